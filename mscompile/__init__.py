"""mscompile: trained PyTorch memory and multi-scale language models to verified streaming engines."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mscompile.contracts import Profile as Profile
    from mscompile.contracts import StateSpec as StateSpec
    from mscompile.contracts import Tick as Tick
    from mscompile.errors import MsCompileError as MsCompileError
    from mscompile.models.own import Adapter as Adapter
    from mscompile.models.own import state as state
    from mscompile.pipeline import compile_checkpoint as compile_checkpoint
    from mscompile.runtime import Bundle as Bundle
    from mscompile.runtime import generate as generate
    from mscompile.runtime import open_bundle as open_bundle

__version__ = "0.1.0"

# From 1.29 on, ONNX Runtime tells Microsoft about models and the machine, unless it is imported with this set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_PUBLIC = {
    "Adapter": "mscompile.models.own",
    "Bundle": "mscompile.runtime",
    "MsCompileError": "mscompile.errors",
    "Profile": "mscompile.contracts",
    "StateSpec": "mscompile.contracts",
    "Tick": "mscompile.contracts",
    "compile_checkpoint": "mscompile.pipeline",
    "generate": "mscompile.runtime",
    "open_bundle": "mscompile.runtime",
    "state": "mscompile.models.own",
}
__all__ = [*sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), so that nothing heavy is imported before."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mscompile' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
