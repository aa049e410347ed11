"""The engines that can be built into a bundle, in the order tools list them. Importing this imports no runtime."""

from __future__ import annotations

import difflib
import importlib

from mscompile.contracts import Engine
from mscompile.errors import UsageError

MODULES = {
    "ort": "engines.ort",
    "trt-rtx": "engines.trt_rtx",
    "trt": "engines.trt",
}


def find(name: str) -> Engine:
    """The engine of that name; UsageError names the nearest one otherwise."""
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known engines: {', '.join(MODULES)}"
        raise UsageError(f"unknown engine {name!r}; {hint}")
    engine: Engine = importlib.import_module(MODULES[name]).ENGINE
    return engine


def engines() -> tuple[Engine, ...]:
    return tuple(find(name) for name in MODULES)
