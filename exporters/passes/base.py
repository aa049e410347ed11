"""What a graph pass is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from mscompile.contracts import Hit, StreamSpec

Graphs = Mapping[str, ir.Model]  # by the name of the graph; passes rewrite them in place


@dataclass(frozen=True)
class Derived:
    """How a new state follows from an old one: a graph from `rows` (batch, n, ...) to the same rows of the new."""

    source: str  # the old state
    function: ir.Model


@dataclass(frozen=True)
class Outcome:
    """What a pass did: the spec its graphs keep now, and which states it replaced by functions of them."""

    spec: StreamSpec
    hits: tuple[Hit, ...]
    derived: Mapping[str, Derived] = field(default_factory=dict)  # by the name of the new state


@dataclass(frozen=True)
class Pass:
    """A rewrite of all graphs of a program that keeps what the stream computes."""

    name: str
    why: str
    apply: Callable[[Graphs, StreamSpec], Outcome]
