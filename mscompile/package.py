"""Bundles as projects for other hosts: one directory that a program is built from and runs in.

A format is a function that fills an empty directory from an opened bundle, and the file that every such directory
has. `FORMATS` lists them.
"""

from __future__ import annotations

import difflib
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mscompile.atomic import writing
from mscompile.errors import UsageError
from mscompile.runtime import Bundle, open_bundle

RUNTIME = ("CMakeLists.txt", "cmake", "dependencies.sh", "include", "src")  # of the C++ sources, what a build needs

CPP_CMAKE = """\
cmake_minimum_required(VERSION 3.21)
project(generate LANGUAGES C CXX)

add_subdirectory(mscompile)
add_executable(generate main.cpp)
target_link_libraries(generate PRIVATE mscompile::mscompile)
"""

CPP_README = """\
# {name}

A program in C++17 that continues texts with the model in `{name}.msc`, {title}. `mscompile/` holds the runtime.

It needs CMake 3.21, OpenSSL 3 and nlohmann-json, and ONNX Runtime: headers of 1.17 or newer to build, a library to run.
On Debian, the first line gets what the build needs into a folder of its own; where it is installed, leave it out.

```bash
bash mscompile/dependencies.sh dependencies
cmake -B build -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$PWD/dependencies/usr"
cmake --build build
pip install onnxruntime
build/generate {name}.msc "{prompt}" 200 0.8 1
```

The arguments are the bundle, a prompt, how many tokens, the temperature (0 is greedy) and a seed. The library of ONNX
Runtime is the one that MSCOMPILE_ONNXRUNTIME names, that of the Python package, or the system's.
"""


@dataclass(frozen=True)
class Format:
    """One kind of project: how to fill its directory, and a file that each of them has."""

    fill: Callable[[Bundle, Path], None]
    marker: str
    title: str


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


def _cpp(bundle: Bundle, directory: Path) -> None:
    """A CMake project: the bundle, a main.cpp that generates text, and the runtime that both need."""
    sources, name = _cpp_sources(), bundle.manifest.name
    prompt = next((token for token in bundle.tokenizer.tokens if token.isalnum()), bundle.tokenizer.tokens[0])
    shutil.copytree(bundle.path, directory / f"{name}.msc")
    shutil.copyfile(sources / "example" / "main.cpp", directory / "main.cpp")
    for entry in RUNTIME:
        source, target = sources / entry, directory / "mscompile" / entry
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    (directory / "CMakeLists.txt").write_text(CPP_CMAKE, encoding="utf-8")
    readme = CPP_README.format(name=name, title=bundle.manifest.title, prompt=prompt)
    (directory / "README.md").write_text(readme, encoding="utf-8")


def _cpp_sources() -> Path:
    """The C++ runtime: beside this package in a checkout, in the data folder of an installation."""
    places = (Path(__file__).parents[1] / "cpp", Path(sysconfig.get_path("data"), "share", "mscompile", "cpp"))
    for place in places:
        if (place / "CMakeLists.txt").is_file():
            return place
    raise UsageError(f"the C++ sources are not in {places[-1]}; install mscompile again, or run this in a checkout")


FORMATS = {"cpp": Format(_cpp, "CMakeLists.txt", "a CMake project with a main.cpp that generates text")}
