"""Products with weights, found by structure: what a precision applies to.

    MatMul(x, W), Gemm(x, W[, bias])    W a constant matrix, perhaps through Transpose or Identity

Products of two computed tensors (attention) are not among them, nor are constants of three axes (folded position
keys) or tables that are gathered from (embeddings).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.contracts import Array


@dataclass(frozen=True)
class Product:
    """One node that multiplies rows by a weight matrix, which it holds as input 1."""

    node: ir.Node
    value: ir.Value  # input 1
    transposed: bool  # Gemm: the matrix is (N, K)

    def matrix(self) -> Array:
        """The weights as (K, N) float32."""
        found = constant(self.value)
        assert found is not None
        return np.ascontiguousarray(found.T if self.transposed else found, dtype=np.float32)

    @property
    def place(self) -> str:
        """The module the node came from, or its name."""
        return self.node.metadata_props.get("module") or self.node.name or str(self.value.name)


def products(model: ir.Model) -> Iterator[Product]:
    """Every product with a constant float matrix of this graph."""
    for node in list(model.graph):
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
            continue
        value = node.inputs[1]
        matrix = None if value is None else constant(value)
        if value is None or matrix is None or matrix.ndim != 2 or not is_floating(value):
            continue
        yield Product(node, value, node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0)))


def is_floating(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def constant(value: ir.Value) -> Array | None:
    """The numbers of a constant, through Transpose and Identity; None for what is computed at run time."""
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type not in ("Transpose", "Identity") or node.inputs[0] is None:
        return None
    inner = constant(node.inputs[0])
    if inner is None or node.op_type == "Identity":
        return inner
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    return inner.transpose(perm)


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """`tensor` as an initializer called `name`; one of that name is taken to be the same."""
    if name not in graph.initializers:
        shape = ir.Shape(tensor.numpy().shape)
        made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
        graph.register_initializer(made)
    return graph.initializers[name]


def as_matmul(graph: ir.Graph, product: Product, weight: ir.Value) -> ir.Node | None:
    """The node as MatMul(x, weight) and Add(bias), in its place; None for a Gemm that scales or transposes x."""
    node, bias = product.node, product.node.inputs[2] if len(product.node.inputs) > 2 else None
    if node.op_type == "MatMul":
        node.replace_input_with(1, weight)
        return node
    scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    turned = node.attributes.get_int("transA", 0)
    if scaled or turned:
        return None
    out = node.outputs[0]
    made = ir.node("MatMul", [node.inputs[0], weight], metadata_props=dict(node.metadata_props))
    made.outputs[0].type, made.outputs[0].shape = out.type, out.shape
    added = [made] if bias is None else [made, ir.node("Add", [made.outputs[0], bias])]
    replace(graph, node, added)
    return made


def replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put `nodes` in the place of `node`; the output of the last takes over its output."""
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    name = old.name
    graph.remove(node, safe=True)
    new.name = name
