"""int8-dynamic: products of 8-bit integers; activations are quantized when they are known, weights at export.

Given                       Becomes
  MatMul(x, W)                q, s, z = DynamicQuantizeLinear(x)       uint8, a scale for the whole of x
                              Cast(MatMulInteger(q, Q, z)) * (s * scale)      Q int8 (K, N), a scale a column

Row results are no longer independent: rows of one call share the scale of x. TensorRT has no such operators.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.passes.base import Graphs
from exporters.precision.base import Request
from exporters.precision.products import Product, as_matmul, initializer, products, replace
from exporters.precision.rounding import Scheme
from exporters.precision.weight_only import Weights
from mscompile.contracts import Hit, StreamSpec

COLUMNS = Scheme(bits=8, block=None, clip=False)


def apply(graphs: Graphs, request: Request, name: str) -> tuple[StreamSpec, tuple[Hit, ...]]:
    weights = Weights(COLUMNS)
    hits = []
    for model in graphs.values():
        quantized: dict[ir.Value, ir.Node] = {}  # one DynamicQuantizeLinear for all products of the same x
        found = list(products(model))
        for product in found:
            _rewrite(model.graph, product, weights, quantized)
        common.RemoveUnusedNodesPass()(model)
        reason = f"{len(found)} products of 8-bit integers" if found else "it has no product with weights"
        hits.append(Hit(name, model.graph.name or "", bool(found), reason))
    return request.spec, tuple(hits)


def _rewrite(graph: ir.Graph, product: Product, weights: Weights, quantized: dict[ir.Value, ir.Node]) -> None:
    key, _, integers, scale = weights.of(product)
    weight = initializer(graph, f"weight_{key}", integers)
    column_scale = initializer(graph, f"weight_{key}_scale", scale)
    target = as_matmul(graph, product, weight)
    if target is None or target.inputs[0] is None:
        return
    x, props = target.inputs[0], dict(target.metadata_props)
    if x not in quantized:
        quantized[x] = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, metadata_props=props)
        kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
        shapes = (x.shape, ir.Shape([]), ir.Shape([]))
        for out, kind, shape in zip(quantized[x].outputs, kinds, shapes, strict=True):
            out.type, out.shape = ir.TensorType(kind), shape
        graph.insert_before(target, [quantized[x]])
    values, x_scale, zero = quantized[x].outputs
    product_of = ir.node("MatMulInteger", [values, weight, zero], metadata_props=props)
    exact = ir.node("Cast", [product_of.outputs[0]], {"to": ir.DataType.FLOAT})
    both = ir.node("Mul", [x_scale, column_scale])
    result = ir.node("Mul", [exact.outputs[0], both.outputs[0]])
    shape = target.outputs[0].shape
    for node, kind, dims in (
        (product_of, ir.DataType.INT32, shape),
        (exact, ir.DataType.FLOAT, shape),
        (both, ir.DataType.FLOAT, column_scale.shape),
    ):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(kind), dims
    replace(graph, target, [product_of, exact, both, result])
