"""The order of remembered rows where they are columns of scores, and how to change it.

Columns are [M remembered rows ; T new rows]. The old order of the remembered ones is by age, the new one by
ring slot: slot s shows row (s - position) mod M of the old order. Positions differ between batch rows, so a
permutation does, too: it is an index (batch, M + T).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from exporters.passes.nodes import Dims, constant, dims, initializer, normal
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

    def moved(self, by: int) -> Columns:
        return replace(self, axis=self.axis + by, batch=self.batch + by)


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
        """The permutation applied to the one operand with columns; None if it must be applied to `value`."""
        node = value.producer()
        passed = {} if node is None else _operands(node, columns)
        if node is None or len(passed) != 1:
            return None
        (index, here), *_ = passed.items()
        operand = node.inputs[index]
        if operand is None or here.axis < 0 or here.batch < 0 or dims(operand)[here.axis] == 1:
            return None
        inputs = list(node.inputs)
        inputs[index] = self.permuted(operand, here)
        made = ir.node(node.op_type, inputs, metadata_props=dict(node.metadata_props))
        made.attributes.update(dict(node.attributes.items()))
        return self._add(made, value, _with_batch(value, columns))

    def _gathered(self, value: ir.Value, columns: Columns) -> ir.Value:
        """GatherElements along the columns, with the index expanded to the other axes."""
        if columns.batch < 0:
            added = -columns.batch
            axes = constant(self.graph, range(added))
            value = self._add(ir.node("Unsqueeze", [value, axes]), value, [*[1] * added, *dims(value)])
            columns = columns.moved(added)
        shape = _with_batch(value, columns)
        index = self._expanded_index(value, columns, shape)
        if dims(value)[columns.batch] == 1:
            sizes = self._add(ir.node("Shape", [index]), self.position, [len(shape)])
            value = self._add(ir.node("Expand", [value, sizes]), value, shape)
        return self._add(ir.node("GatherElements", [value, index], {"axis": columns.axis}), value, shape)

    def _expanded_index(self, value: ir.Value, columns: Columns, shape: Dims) -> ir.Value:
        """The index (batch, M + T) as one of the shape of `value`; shared by values of one shape."""
        key = (columns.axis, columns.batch, columns.rows, *map(str, shape))
        if key not in self._expanded:
            index = self._index(columns.rows)
            if columns.batch > columns.axis:
                turned = [shape[columns.axis], BATCH]
                index = self._add(ir.node("Transpose", [index], {"perm": [1, 0]}), index, turned)
            others = [axis for axis in range(len(shape)) if axis not in (columns.axis, columns.batch)]
            if others:
                thin = [1 if axis in others else dim for axis, dim in enumerate(shape)]
                index = self._add(ir.node("Unsqueeze", [index, constant(self.graph, others)]), index, thin)
            if any(shape[axis] != 1 for axis in others):
                sizes = self._add(ir.node("Shape", [value]), index, [len(shape)])
                index = self._add(ir.node("Expand", [index, sizes]), index, shape)
            self._expanded[key] = index
        return self._expanded[key]

    def _index(self, rows: int) -> ir.Value:
        """(batch, M + T): where each column of the new order is in the old one."""
        if rows not in self._indexes:
            position = self._number("Unsqueeze", self.position, constant(self.graph, [1]), shape=[BATCH, 1])
            turned = self._number("Mod", position, constant(self.graph, [rows]), shape=[BATCH, 1])
            slots = initializer(self.graph, f"slots_{rows}", np.arange(rows, 2 * rows))
            ahead = self._number("Sub", slots, turned, shape=[BATCH, rows])  # in 1 .. 2 M - 1
            ring = self._number("Mod", ahead, constant(self.graph, [rows]), shape=[BATCH, rows])
            new = self._new_columns(rows)
            zeros = self._number("Mul", position, constant(self.graph, [0]), shape=[BATCH, 1])
            behind = self._number("Add", zeros, new, shape=[BATCH, self.tokens])
            total = rows + self.tokens if isinstance(self.tokens, int) else f"{self.tokens} + {rows}"
            joined = ir.node("Concat", [ring, behind], {"axis": 1})
            self._indexes[rows] = self._add(joined, self.position, [BATCH, total])
        return self._indexes[rows]

    def _new_columns(self, rows: int) -> ir.Value:
        """M .. M + T - 1: new rows stay behind the remembered ones."""
        if isinstance(self.tokens, int):
            return initializer(self.graph, f"new_{rows}", np.arange(rows, rows + self.tokens))
        tokens = next(value for value in self.graph.inputs if value.name == TOKENS)
        first, one = (initializer(self.graph, f"number_{each}", np.array(each)) for each in (rows, 1))
        count = self._add(ir.node("Shape", [tokens], {"start": 1, "end": 2}), self.position, [1])
        end = self._number("Add", self._number("Squeeze", count, shape=[]), first, shape=[])
        return self._number("Range", first, end, one, shape=[self.tokens])

    def _number(self, operator: str, *inputs: ir.Value, shape: Dims) -> ir.Value:
        return self._add(ir.node(operator, inputs), self.position, shape)

    def _add(self, node: ir.Node, like: ir.Value, shape: Dims) -> ir.Value:
        self.graph.append(node)
        node.outputs[0].type, node.outputs[0].shape = like.type, ir.Shape(shape)
        return node.outputs[0]


def _operands(node: ir.Node, columns: Columns) -> dict[int, Columns]:
    """The operands that a permutation of the output passes to, by index; none if it does not pass."""
    rank = len(dims(node.outputs[0]))
    if node.op_type == "GatherElements":
        along = normal(node.attributes["axis"].as_int(), rank) == columns.axis
        return {1: columns} if along else {}
    if node.op_type == "Expand":
        return {0: columns.moved(len(dims(node.inputs[0])) - rank)}
    if node.op_type == "Unsqueeze":
        before = _before_unsqueeze(node, columns)
        return {} if before is None else {0: before}
    if node.op_type not in ALIGNED:
        return {}
    here = {index: columns.moved(len(dims(value)) - rank) for index, value in enumerate(node.inputs) if dims(value)}
    return {index: each for index, each in here.items() if each.axis >= 0 and dims(node.inputs[index])[each.axis] != 1}


def _before_unsqueeze(node: ir.Node, columns: Columns) -> Columns | None:
    axes = node.inputs[1]
    if axes is None or axes.const_value is None:
        return None
    rank = len(dims(node.outputs[0]))
    added = [normal(int(axis), rank) for axis in axes.const_value.numpy().tolist()]
    if columns.axis in added or columns.batch in added:
        return None
    axis, batch = (each - sum(new < each for new in added) for each in (columns.axis, columns.batch))
    return replace(columns, axis=axis, batch=batch)


def _with_batch(value: ir.Value, columns: Columns) -> Dims:
    return [BATCH if axis == columns.batch else dim for axis, dim in enumerate(dims(value))]
