"""Bundles as projects for other hosts: one directory that a program is built from, served or run in.

A format is a function that fills an empty directory from an opened bundle, and the file that every such directory
has. `FORMATS` lists them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mscompile.atomic import writing
from mscompile.errors import UsageError
from mscompile.packaging import cpp, ort_mobile, triton, web
from mscompile.runtime import Bundle, open_bundle


@dataclass(frozen=True)
class Format:
    """One kind of project: how to fill its directory, and a file that each of them has."""

    fill: Callable[[Bundle, Path], None]
    marker: str
    title: str


FORMATS = {
    "cpp": Format(cpp.fill, "CMakeLists.txt", "a CMake project with a main.cpp that generates text"),
    "ort-mobile": Format(ort_mobile.fill, ort_mobile.MARKER, "the graphs in ORT format, for phones, with a report"),
    "triton": Format(triton.fill, triton.CLIENT, "a model repository for Triton Inference Server, with a client"),
    "web": Format(web.fill, web.MARKER, "a static page that generates text in the browser"),
}


def package(bundle: Path, form: str, out: Path, force: bool = False) -> Path:
    """Write the project of format `form` around the bundle to `out`, whole or not at all.

    Raises UsageError for an unknown format or where `out` exists (unless `force`), BundleError for a bad bundle.
    """
    if form not in FORMATS:
        near = difflib.get_close_matches(form, FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known formats: {', '.join(FORMATS)}"
        raise UsageError(f"unknown format {form!r}; {hint}")
    opened = open_bundle(bundle)
    with writing(out, force, FORMATS[form].marker) as directory:
        FORMATS[form].fill(opened, directory)
    return out
