"""What a precision is: a rewrite of the FP32 graphs, after all passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import onnxscript.version_converter

from exporters.passes.base import Graphs
from mscompile.contracts import Hit, StreamSpec

OPSET = 21  # the first whose DequantizeLinear takes blocks and 4-bit integers

Ranges = Mapping[str, Mapping[str, float]]  # graph -> value -> largest magnitude seen in rollouts


@dataclass(frozen=True)
class Request:
    """What a precision is given beside the graphs."""

    spec: StreamSpec
    ranges: Ranges = field(default_factory=dict)  # only where the precision asks for them


@dataclass(frozen=True)
class Precision:
    """A row of the table. `apply` rewrites the graphs in place; it returns the spec that they keep then."""

    name: str
    why: str
    apply: Callable[[Graphs, Request], tuple[StreamSpec, tuple[Hit, ...]]]
    needs_ranges: bool = False
    refused_by: Mapping[str, str] = field(default_factory=dict)  # engine -> why it cannot be built in this precision


def raised_to(model: ir.Model, version: int) -> None:
    """Raise the opset of a graph, for operators that are to be added."""
    if (model.opset_imports.get("") or 0) < version:
        onnxscript.version_converter.convert_version(model, version)
