"""The family table, in the order the documentation lists it."""

from __future__ import annotations

import difflib

from mscompile.errors import CheckpointError
from mscompile.models import hourglass, transformer_xl
from mscompile.models.family import Family

FAMILIES: tuple[Family, ...] = (transformer_xl.FAMILY, hourglass.FAMILY)


def find(name: str) -> Family:
    """The family of that name; CheckpointError names the nearest one otherwise."""
    known = {family.name: family for family in FAMILIES}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known families: {', '.join(known)}"
    raise CheckpointError(f"unknown family {name!r}; {hint}")
