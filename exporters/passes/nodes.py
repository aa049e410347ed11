"""Small things that passes do with onnx-ir graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from mscompile.contracts import Array

Dims = list[int | str | None]


def dims(value: ir.Value | None) -> Dims:
    """The shape of a value: sizes, or names of symbolic dimensions; empty where it is unknown."""
    if value is None or value.shape is None:
        return []
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def normal(axis: int, rank: int) -> int:
    """An axis counted from the left."""
    return axis + rank if axis < 0 else axis


def number(value: ir.Value | None) -> float | None:
    """The value of a constant of one element."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().item())


def initializer(graph: ir.Graph, name: str, numbers: Array) -> ir.Value:
    """A constant, one for all uses of the same name."""
    if name not in graph.initializers:
        tensor = ir.tensor(numbers, name=name)
        made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(numbers.shape))
        graph.register_initializer(made)
    return graph.initializers[name]


def constant(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """An int64 vector, one for all uses of the same numbers."""
    name = "numbers_" + "_".join(str(each).replace("-", "m") for each in numbers)
    return initializer(graph, name, np.array(numbers, np.int64))


def changed(
    graph: ir.Graph, value: ir.Value, what: str, change: Callable[[Array], Array], shape: Sequence[int] | None = None
) -> ir.Value:
    """A function of a constant, evaluated when it is written; `what` tells it from other functions of it."""
    old = value.const_value
    assert old is not None
    size = list(old.numpy().shape) if shape is None else shape
    return _lazy(graph, f"{value.name}.{what}", lambda: change(old.numpy()), old.dtype, size)


def joined(graph: ir.Graph, values: Sequence[ir.Value], axis: int) -> ir.Value:
    """Constants side by side, evaluated when they are written."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    shape = list(shapes[0])
    shape[axis] = sum(each[axis] for each in shapes)
    name = "+".join(value.name or "" for value in values)

    def join() -> Array:
        return np.concatenate([tensor.numpy() for tensor in tensors], axis)

    return _lazy(graph, name, join, tensors[0].dtype, shape)


def _lazy(
    graph: ir.Graph, name: str, evaluate: Callable[[], Array], dtype: ir.DataType, shape: Sequence[int]
) -> ir.Value:
    if name not in graph.initializers:
        size = ir.Shape(shape)
        tensor = ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(evaluate()), name=name), dtype, size, name=name)
        made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=size)
        graph.register_initializer(made)
    return graph.initializers[name]


def take_place(graph: ir.Graph, node: ir.Node, made: ir.Node) -> None:
    """Put `made` where `node` was; its output keeps the old one's name where that leaves the graph."""
    out, new = node.outputs[0], made.outputs[0]
    new.type, new.shape = out.type, out.shape
    graph.insert_before(node, made)
    if out.is_graph_output():
        new.name, out.name = out.name, f"{out.name}.before"
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
