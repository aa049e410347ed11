"""Which nodes treat every remembered row by itself, and how to apply one of them to other rows.

A row-wise node maps rows along a time axis to rows along a time axis, perhaps another one:

    product with a constant matrix, LayerNorm, bias, elementwise function     same axis
    head split (..., H * d_h) -> (..., H, d_h)                                same axis
    transposition                                                             where the axis goes
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

ELEMENTWISE = ("Relu", "Gelu", "Tanh", "Sigmoid", "Identity", "Cast", "Neg")
BROADCAST = ("Add", "Sub", "Mul", "Div")
TO_THE_END = 2**31 - 1  # a Slice that ends here or later takes all that follows


def normal(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def mapped_axis(node: ir.Node, index: int, axis: int) -> int | None:
    """The time axis of the output of a node that reads rows as input `index`; None unless it is row-wise."""
    value, out = node.inputs[index], node.outputs[0]
    if value is None or value.shape is None:
        return None
    rank = len(value.shape)
    if node.op_type == "Reshape":
        splits = index == 0 and out.shape is not None and axis < rank - 1 and _splits_last(value.shape, out.shape)
        return axis if splits else None
    others = [other for i, other in enumerate(node.inputs) if i != index and other is not None]
    if any(other.const_value is None for other in others):
        return None
    if node.op_type in ELEMENTWISE:
        return axis
    if node.op_type == "MatMul":
        return axis if index == 0 and axis < rank - 1 and len(others[0].shape or ()) == 2 else None
    if node.op_type == "LayerNormalization":
        start = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        return axis if index == 0 and axis < normal(start, rank) else None
    if node.op_type in BROADCAST:
        return axis if all(rank - len(other.shape or ()) > axis for other in others) else None
    if node.op_type == "Transpose":
        return list(node.attributes["perm"].as_ints()).index(axis)
    return None


def _splits_last(before: ir.Shape | Any, after: ir.Shape | Any) -> bool:
    """(..., a * b) -> (..., a, b)."""
    if len(after) != len(before) + 1 or list(before[:-1]) != list(after[:-2]):
        return False
    whole, parts = before[-1], after[-2:]
    sizes = [dim for dim in (whole, *parts) if isinstance(dim, int)]
    return len(sizes) == 3 and sizes[0] == sizes[1] * sizes[2]


def slice_start(node: ir.Node, index: int, axis: int) -> int | None:
    """Where a Slice of rows with step 1 along `axis`, and no other, begins, if it takes all that follows."""
    if node.op_type != "Slice" or index != 0 or node.inputs[0] is None:
        return None
    constants = [value.const_value.numpy().tolist() for value in node.inputs[1:] if value and value.const_value]
    if len(constants) != len(node.inputs) - 1 or len(constants) < 3:
        return None
    starts, ends, axes, steps = (*constants, [1])[:4]
    whole = len(starts) == 1 and steps == [1] and ends[0] >= TO_THE_END
    return int(starts[0]) if whole and normal(axes[0], len(node.inputs[0].shape or ())) == axis else None


def signature(node: ir.Node, axis: int) -> bytes:
    """Equal for nodes that compute the same on any rows."""
    digest = hashlib.sha256(f"{node.op_type} {axis}".encode())
    if node.op_type == "Reshape":
        digest.update(str(heads(node)).encode())
        return digest.digest()
    for name in sorted(node.attributes):
        digest.update(f"{name}={node.attributes[name].value}".encode())
    for value in node.inputs:
        if value is not None and value.const_value is not None:
            digest.update(value.const_value.tobytes())
    return digest.digest()


def heads(node: ir.Node) -> list[int]:
    """The two sizes that a Reshape splits the last axis into."""
    return [dim for dim in list(node.outputs[0].shape or ())[-2:] if isinstance(dim, int)]


def copy_onto(graph: ir.Graph, node: ir.Node, value: ir.Value, axis: int, rows: Any) -> ir.Value:
    """The output of the same function of other rows, `value`: as many as `rows` says, along `axis` of the output."""
    inputs = [old if old is not None and old.const_value is not None else value for old in node.inputs]
    attributes = dict(node.attributes.items())
    if node.op_type == "Reshape":
        kept = len(node.outputs[0].shape or ()) - 2
        inputs, attributes = [value, constant(graph, [0] * kept + heads(node))], {}
    made = ir.node(node.op_type, inputs, metadata_props=dict(node.metadata_props))
    made.attributes.update(attributes)
    shape = list(node.outputs[0].shape or ())
    made.outputs[0].type = node.outputs[0].type
    made.outputs[0].shape = ir.Shape([*shape[:axis], rows, *shape[axis + 1 :]])
    graph.append(made)
    return made.outputs[0]


def constant(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    """An int64 initializer, one for all uses of the same numbers."""
    name = "numbers_" + "_".join(str(number).replace("-", "m") for number in numbers)
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(numbers)]))
        )
    return graph.initializers[name]
