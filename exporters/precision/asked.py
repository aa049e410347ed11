"""Was an engine built in the precision asked for? The products of its graphs against those of the runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir

from exporters.passes.base import Graphs
from exporters.precision.products import constant


def products(model: ir.Model) -> dict[str, int]:
    """How many products with weights a graph has, by the type in which they are to run."""
    kinds = Counter(kind for node in model.graph if (kind := _kind(node)) is not None)
    return dict(kinds)


def fault(graphs: Graphs, numerics: Mapping[str, Mapping[str, Any]]) -> str | None:
    """In one sentence, where the runtime's products (`engines.*.build` facts) are not those asked for.

    FP32 needs no proof, and a runtime may fuse such products into something else.
    """
    for name, model in graphs.items():
        wanted, found = products(model), numerics[name]["products"]
        wanted.pop("float32", None)
        if missing := {kind: count for kind, count in wanted.items() if found.get(kind, 0) < count}:
            asked = ", ".join(f"{count} {kind}" for kind, count in missing.items())
            ran = ", ".join(f"{count} {kind}" for kind, count in found.items()) or "none"
            nodes = ", ".join(numerics[name]["float32"][:4]) or "none"
            return f"graph {name} asks for {asked} products and the runtime has {ran}; in FP32 run {nodes}"
    return None


LOW = ("float16", "bfloat16", "int8", "int4", "int8-dynamic")
CALLED = {"fp16": "float16", "bf16": "bfloat16"}  # others are called as their products are


def is_of(precision: str, kinds: Collection[str]) -> bool:
    """Are these the types of the products of graphs in this precision? Some may be left in FP32."""
    low = {kind for kind in kinds if kind in LOW}
    return low == (set() if precision == "fp32" else {CALLED.get(precision, precision)})


def _kind(node: ir.Node) -> str | None:
    if node.op_type == "MatMulInteger":
        return "int8-dynamic"
    value = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        return str(producer.inputs[0].dtype.name).lower() if producer.inputs[0].dtype else None
    matrix = constant(value)
    return matrix.dtype.name if matrix is not None and matrix.ndim == 2 else None
