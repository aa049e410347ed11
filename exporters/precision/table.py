"""The precisions, by the name that `--precision` takes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import onnx_ir as ir

from exporters import check
from exporters.passes.base import Graphs
from exporters.precision import dynamic, half, weight_only
from exporters.precision.base import Precision, Request
from exporters.precision.rounding import Scheme
from mscompile.contracts import Hit, StreamSpec

NO_DYNAMIC = "TensorRT has no DynamicQuantizeLinear and no MatMulInteger; use --precision int8, or --target ort"


def _kept(_: Graphs, request: Request) -> tuple[StreamSpec, tuple[Hit, ...]]:
    return request.spec, ()


def _weight_only(name: str, scheme: Scheme) -> Precision:
    why = f"weights as {scheme.bits}-bit integers, a scale for every {scheme.block} of a column; all else in FP32"
    return Precision(name, why, partial(weight_only.apply, name=name, scheme=scheme))


def _half(name: str, kind: ir.DataType) -> Precision:
    why = f"weights and arithmetic in {kind.name.lower()}, sums and large numbers in FP32"
    return Precision(name, why, partial(half.apply, name=name, kind=kind), needs_ranges=True)


PRECISIONS: Mapping[str, Precision] = {
    row.name: row
    for row in (
        Precision("fp32", "as the checkpoint computes", _kept),
        _half("fp16", ir.DataType.FLOAT16),
        _half("bf16", ir.DataType.BFLOAT16),
        _weight_only("int8", weight_only.INT8),
        _weight_only("int4", weight_only.INT4),
        Precision(
            "int8-dynamic",
            "weights and activations of products as 8-bit integers",
            partial(dynamic.apply, name="int8-dynamic"),
            refused_by=dict.fromkeys(("trt-rtx", "trt"), NO_DYNAMIC),
        ),
    )
}


def run(
    name: str, graphs: Graphs, request: Request, scheme: Scheme | None = None
) -> tuple[StreamSpec, tuple[Hit, ...]]:
    """Rewrite all graphs; each is held against its GraphSpec after that. `scheme` replaces how weights are rounded."""
    row = PRECISIONS[name] if scheme is None else _weight_only(name, scheme)
    spec, hits = row.apply(graphs, request)
    for graph in spec.graphs:
        check.check_interface(graphs[graph.name], graph, name)
    return spec, hits
