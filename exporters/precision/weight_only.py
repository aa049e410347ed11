"""int8, int4: weights as integers, dequantized where they are used; all else stays FP32.

Given                       Becomes
  MatMul(x, W)  (K, N)        MatMul(x, DequantizeLinear(Q, scale))    Q int8 or int4 (K, N), blocks along K
  Gemm(x, W, b)               the same, and Add(b)

This is standard ONNX. ONNX Runtime fuses both nodes into one kernel that reads the integers; TensorRT reads it as
weight-only quantization. An embedding stays FP32: a lookup reads one row a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.passes.base import Graphs
from exporters.precision.base import OPSET, Request, raised_to
from exporters.precision.products import Product, as_matmul, constant, initializer, is_floating, products
from exporters.precision.rounding import Rounded, Scheme, rounded
from mscompile.contracts import Hit, StreamSpec

INT8 = Scheme(bits=8, block=128, clip=False)  # clipping gains nothing at 8 bits
INT4 = Scheme(bits=4, block=32)


def apply(graphs: Graphs, request: Request, name: str, scheme: Scheme) -> tuple[StreamSpec, tuple[Hit, ...]]:
    """Every product with weights, in all graphs; a matrix that several graphs use is rounded once."""
    weights = Weights(scheme)
    hits = [hit for model in graphs.values() for hit in _rewrite(model, weights, name)]
    return request.spec, tuple(hits)


class Weights:
    """Rounded matrices by their content."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.kind = ir.DataType.INT8 if scheme.bits > 4 else ir.DataType.INT4
        self._known: dict[str, tuple[Rounded, ir.TensorProtocol, ir.TensorProtocol]] = {}

    def of(self, product: Product) -> tuple[str, Rounded, ir.TensorProtocol, ir.TensorProtocol]:
        """A name for the matrix, its numbers, and both as tensors."""
        matrix = product.matrix()
        key = hashlib.sha256(repr(matrix.shape).encode() + matrix.tobytes()).hexdigest()[:16]
        if key not in self._known:
            made = rounded(matrix, self.scheme)
            integers = ir.Tensor(made.integers.astype(self.kind.numpy()), dtype=self.kind)
            self._known[key] = (made, integers, ir.tensor(made.scale))
        return (key, *self._known[key])


def _rewrite(model: ir.Model, weights: Weights, name: str) -> Iterator[Hit]:
    graph, before, after = model.graph, 0, 0
    raised_to(model, OPSET)
    kept = []
    for product in products(model):
        key, made, integers, scale = weights.of(product)
        given = [initializer(graph, f"weight_{key}", integers), initializer(graph, f"weight_{key}_scale", scale)]
        attributes = {"axis": 0, "block_size": made.block} if made.block else {"axis": 1}
        node = ir.node("DequantizeLinear", given, attributes, metadata_props=dict(product.node.metadata_props))
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(made.integers.shape)
        place = product.place
        if (target := as_matmul(graph, product, node.outputs[0])) is None:
            kept.append(place)
            continue
        graph.insert_before(target, [node])
        before, after = before + 4 * made.integers.size, after + integers.nbytes + scale.nbytes
    common.RemoveUnusedNodesPass()(model)
    where = graph.name or ""
    ratio = f"{before / 1e6:.1f} MB of weights in products become {after / 1e6:.1f} MB"
    yield Hit(name, where, after > 0, ratio if after else "it has no product with weights")
    yield from (Hit(name, f"{where} {place}", False, "a Gemm that scales or transposes its input") for place in kept)
    yield from (
        Hit(name, f"{where} {node.name}", False, "a lookup reads one row a token, so its table stays FP32")
        for node in graph
        if node.op_type == "Gather" and _is_table(node.inputs[0])
    )


def _is_table(value: ir.Value | None) -> bool:
    found = None if value is None else constant(value)
    return value is not None and found is not None and found.ndim == 2 and is_floating(value)
