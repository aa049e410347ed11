"""What a graph pass is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from mscompile.contracts import Hit

Apply = Callable[[ir.Model], tuple[ir.Model, tuple[Hit, ...]]]


@dataclass(frozen=True)
class Pass:
    """A rewrite of one graph that keeps what the stream computes; it tells what it did as Hits."""

    name: str
    why: str
    apply: Apply
