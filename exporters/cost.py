"""What a graph costs to run once: multiply-adds of its matrix products, counted from the shapes in the graph."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from mscompile.contracts import BATCH

PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")


def flops(model: ir.Model) -> int:
    """Floating-point operations of one call on one stream: two for each multiply-add.

    For graphs whose only symbolic dimension is the batch.
    """
    return sum(2 * prod(_sizes(node.outputs[0])) * _depth(node) for node in _products(model))


def _products(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type in PRODUCTS]


def _depth(node: ir.Node) -> int:
    """The length of the axis that is summed over."""
    first = node.inputs[0]
    assert first is not None
    transposed = node.op_type == "Gemm" and (attribute := node.attributes.get("transA")) and attribute.as_int()
    return _sizes(first)[0 if transposed else -1]


def _sizes(value: ir.Value) -> list[int]:
    if value.shape is None:
        raise ValueError(f"{value.name} has no shape, so its cost is unknown")
    sizes = [1 if not isinstance(dim, int) and dim.value == BATCH else dim for dim in value.shape]
    if unknown := [dim for dim in sizes if not isinstance(dim, int)]:
        raise ValueError(f"{value.name} has the symbolic size {unknown[0]}, so its cost is unknown")
    return [int(size) for size in sizes]  # type: ignore[arg-type]
