"""The order of remembered rows where they are columns of scores, and how to change it.

Columns are [M remembered rows ; T new rows]. The old order of the remembered ones is by age, the new one by
ring slot: slot s shows row (s - position) mod M of the old order. Positions differ between batch rows, so a
permutation does, too: it is an index (batch, M + T).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mscompile.contracts import BATCH, TOKENS, Dim

ELEMENTWISE = ("Relu", "Gelu", "Tanh", "Sigmoid", "Identity", "Cast", "Neg", "Add", "Sub", "Mul", "Div")
ALIGNED = (  # operators that a permutation of their operands passes
    *ELEMENTWISE, "And", "Or", "Not", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual",
    "Mod", "Min", "Max", "Abs", "Where", "Clip",
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Which axis of a value is the columns, which the batch; counted from the left."""

    axis: int
    batch: int
    rows: int  # M
    states: frozenset[str]  # that the columns come from

    def moved(self, by: int, states: frozenset[str]) -> Columns:
        return replace(self, axis=self.axis + by, batch=self.batch + by, states=states)


class Order:
    """Permutes values of one graph from the old order to the new one."""

    def __init__(self, graph: ir.Graph, position: ir.Value, tokens: Dim) -> None:
        self.graph, self.position, self.tokens = graph, position, tokens
        self._indexes: dict[int, ir.Value] = {}  # by M: (batch, M + T)
        self._expanded: dict[tuple[object, ...], ir.Value] = {}
        self._done: dict[tuple[ir.Value, int, int], ir.Value] = {}

    def permuted(self, value: ir.Value, columns: Columns) -> ir.Value:
        """`value` with its columns in the new order."""
        key = (value, columns.axis, columns.batch)
        if key not in self._done:
            moved = self._moved_up(value, columns) if columns.batch >= 0 else None
            self._done[key] = moved if moved is not None else self._gathered(value, columns)
        return self._done[key]

    def _moved_up(self, value: ir.Value, columns: Columns) -> ir.Value | None:
        """The permutation applied to what `value` is computed from; None if it must be applied to `value`."""
        node = value.producer()
        if node is None or value.shape is None:
            return None
        inputs = dict(enumerate(node.inputs))
        if node.op_type == "GatherElements":
            if normal(node.attributes["axis"].as_int(), len(value.shape)) != columns.axis:
                return None
            passed = {1: columns}
        elif node.op_type == "Expand":
            passed = {0: columns.moved(len(_shape(inputs[0])) - len(value.shape), columns.states)}
        elif node.op_type == "Unsqueeze":
            moved = _before_unsqueeze(node, columns)
            passed = {} if moved is None else {0: moved}
        elif node.op_type in ALIGNED:
            passed = {
                index: here
                for index, operand in inputs.items()
                if operand is not None
                and (here := columns.moved(len(_shape(operand)) - len(value.shape), columns.states)).axis >= 0
                and _shape(operand)[here.axis] != 1
            }
        else:
            return None
        if len(passed) != 1:
            return None
        ((index, here),) = passed.items()
        operand = inputs[index]
        if operand is None or here.axis < 0 or here.batch < 0 or _shape(operand)[here.axis] == 1:
            return None
        inputs[index] = self.permuted(operand, here)
        made = ir.node(node.op_type, list(inputs.values()), metadata_props=dict(node.metadata_props))
        made.attributes.update(dict(node.attributes.items()))
        return self._add(made, value, [BATCH if axis == columns.batch else dim for axis, dim in enumerate(value.shape)])

    def _gathered(self, value: ir.Value, columns: Columns) -> ir.Value:
        """GatherElements along the columns, with the index expanded to the other axes."""
        if columns.batch < 0:
            added = -columns.batch
            axes = constant(self.graph, list(range(added)))
            shape = [*[1] * added, *_shape(value)]
            value = self._add(ir.node("Unsqueeze", [value, axes]), value, shape)
            columns = columns.moved(added, columns.states)
        shape = [BATCH if axis == columns.batch else dim for axis, dim in enumerate(_shape(value))]
        index = self._expanded_index(value, columns, shape)
        if _shape(value)[columns.batch] == 1:
            sizes = self._add(ir.node("Shape", [index]), index, [len(shape)])
            value = self._add(ir.node("Expand", [value, sizes]), value, shape)
        return self._add(ir.node("GatherElements", [value, index], {"axis": columns.axis}), value, shape)

    def _expanded_index(self, value: ir.Value, columns: Columns, shape: list[Dim]) -> ir.Value:
        """The index (batch, M + T) as one of the shape of `value` with a batch; shared by values of one shape."""
        key = (columns.axis, columns.batch, columns.rows, *map(str, shape))
        if key not in self._expanded:
            index = self._index(columns.rows)
            total = shape[columns.axis]
            if columns.batch > columns.axis:
                index = self._add(ir.node("Transpose", [index], {"perm": [1, 0]}), index, [total, BATCH])
            others = [axis for axis in range(len(shape)) if axis not in (columns.axis, columns.batch)]
            if others:
                thin = [dim if axis not in others else 1 for axis, dim in enumerate(shape)]
                index = self._add(ir.node("Unsqueeze", [index, constant(self.graph, others)]), index, thin)
                if any(shape[axis] != 1 for axis in others):
                    sizes = self._add(ir.node("Shape", [value]), index, [len(shape)])
                    index = self._add(ir.node("Expand", [index, sizes]), index, shape)
            self._expanded[key] = index
        return self._expanded[key]

    def _index(self, rows: int) -> ir.Value:
        """(batch, M + T): where each column of the new order is in the old one."""
        if rows in self._indexes:
            return self._indexes[rows]
        like = self.position

        def add(node: ir.Node, *shape: Dim) -> ir.Value:
            return self._add(node, like, list(shape))

        def number(value: int) -> ir.Value:
            return constant(self.graph, [value])

        position = add(ir.node("Unsqueeze", [self.position, number(1)]), BATCH, 1)
        turned = add(ir.node("Mod", [position, number(rows)]), BATCH, 1)
        slots = self._vector(f"slots_{rows}", np.arange(rows, 2 * rows))
        ahead = add(ir.node("Sub", [slots, turned]), BATCH, rows)  # in 1 .. 2 M - 1
        ring = add(ir.node("Mod", [ahead, number(rows)]), BATCH, rows)
        if isinstance(self.tokens, int):
            new, new_rows, total = (
                self._vector(f"new_{rows}", np.arange(rows, rows + self.tokens)),
                self.tokens,
                rows + self.tokens,
            )
        else:
            tokens = next(value for value in self.graph.inputs if value.name == TOKENS)
            count = add(ir.node("Shape", [tokens], {"start": 1, "end": 2}), 1)
            zero, one, first = (self._scalar(value) for value in (0, 1, rows))
            scalar = add(ir.node("Squeeze", [count]))
            end = add(ir.node("Add", [scalar, first]))
            new, new_rows, total = (
                add(ir.node("Range", [first, end, one]), self.tokens),
                self.tokens,
                f"{self.tokens} + {rows}",
            )
            del zero
        everywhere = add(ir.node("Mul", [position, number(0)]), BATCH, 1)
        behind = add(ir.node("Add", [everywhere, new]), BATCH, new_rows)
        self._indexes[rows] = add(ir.node("Concat", [ring, behind], {"axis": 1}), BATCH, total)
        return self._indexes[rows]

    def _vector(self, name: str, numbers: np.ndarray) -> ir.Value:
        if name not in self.graph.initializers:
            tensor = ir.tensor(numbers.astype(np.int64), name=name)
            shape = ir.Shape(list(tensor.shape))
            self.graph.register_initializer(
                ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
            )
        return self.graph.initializers[name]

    def _scalar(self, number: int) -> ir.Value:
        return self._vector(f"scalar_{number}", np.array(number))

    def _add(self, node: ir.Node, like: ir.Value, shape: list[Dim] | list[object]) -> ir.Value:
        out = node.outputs[0]
        out.type = like.type
        out.shape = ir.Shape(shape)  # type: ignore[arg-type]
        self.graph.append(node)
        return out


def _shape(value: ir.Value | None) -> list[Dim]:
    assert value is not None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]  # type: ignore[misc]


def _before_unsqueeze(node: ir.Node, columns: Columns) -> Columns | None:
    axes_value = node.inputs[1]
    if axes_value is None or axes_value.const_value is None:
        return None
    rank = len(_shape(node.outputs[0]))
    axes = [normal(int(axis), rank) for axis in axes_value.const_value.numpy().tolist()]
    if columns.axis in axes or columns.batch in axes:
        return None
    return replace(
        columns,
        axis=columns.axis - sum(axis < columns.axis for axis in axes),
        batch=columns.batch - sum(axis < columns.batch for axis in axes),
    )


def normal(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def constant(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    """An int64 initializer, one for all uses of the same numbers."""
    name = "numbers_" + "_".join(str(number).replace("-", "m") for number in numbers)
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(numbers)]))
        )
    return graph.initializers[name]
