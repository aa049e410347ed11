"""Where the files of other languages are that packages are made of."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from mscompile.errors import UsageError


def sources(folder: str, marker: str) -> Path:
    """A folder of sources: beside this package in a checkout, in the data folder of an installation."""
    places = (Path(__file__).parents[2] / folder, Path(sysconfig.get_path("data"), "share", "mscompile", folder))
    for place in places:
        if (place / marker).is_file():
            return place
    raise UsageError(f"{marker} is not in {places[-1]}; install mscompile again, or run this in a checkout")
