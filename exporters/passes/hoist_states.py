"""What memories hold once they are hoisted: functions of their rows, as states and as graphs of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from exporters.derived import ROWS, evaluate
from exporters.passes import sizes
from exporters.passes.joined_rows import Function, Joined, Row, cone, row_inputs
from exporters.passes.row_wise import Axes, copy_onto
from mscompile.contracts import BATCH, Dim, GraphSpec, StateSpec, StreamSpec, TensorSpec


class Replay:
    """The functions of the joined rows, on other rows. What several of them share is built once."""

    def __init__(self, graph: ir.Graph, joined: Joined, rows: Mapping[ir.Value, Row], part: ir.Value) -> None:
        self.graph, self.rows = graph, rows
        self.count = joined.count([part])
        self.done = {joined.value: part}

    def of(self, value: ir.Value) -> ir.Value:
        for node in cone(self.rows, value):
            if node.outputs[0] not in self.done:
                given = row_inputs(node, self.rows)
                before, after = (self.rows[v].axes for v in (next(iter(given.values())), node.outputs[0]))
                new = {index: self.done[v] for index, v in given.items()}
                made = copy_onto(self.graph, node, new, before, after, self.count)
                self.done |= dict(zip(node.outputs, made, strict=True))
        return self.done[value]


def derive(old: StateSpec, function: Function) -> tuple[StateSpec, ir.Model]:
    """The new state, and f as a graph of its own."""
    model = _model(old, function)
    axes, time = held_axes(function.row), function.joined.axes.time
    dims = [dim if isinstance(dim, int) else BATCH for dim in held_shape(function.row, None)]
    start = old.initial_value(1).take([0], axis=time)
    initial = evaluate(model, start).ravel()
    state = replace(
        old,
        name=f"{old.name}.{function.name}",
        dtype=initial.dtype.name,
        shape=(*dims[: axes.time], old.shape[time], *dims[axes.time + 1 :]),
        time_axis=axes.time,
        batch_axis=axes.batch,
        initial=float(initial[0]) if np.ptp(initial) == 0 else tuple(float(number) for number in initial),
    )
    return state, model


def _model(state: StateSpec, function: Function) -> ir.Model:
    """f as a graph of its own: `rows` (batch, n, ...) of the old state to the same rows of the new one."""
    joined = function.joined
    shape = [f"n{axis}" if axis == joined.axes.time else dim for axis, dim in enumerate(state.shape)]
    rows = ir.Value(name=ROWS, type=joined.value.type, shape=ir.Shape(shape))
    graph = ir.Graph([rows], [], nodes=[], opset_imports={"": 20}, name="derived")
    out = Replay(graph, joined, function.rows, rows).of(function.row.value)
    if comes_last(function.row):
        out = turned(graph, out)
    copies: dict[ir.Value, ir.Value] = {}
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.graph is graph:
                continue
            if value not in copies:
                name = f"weight_{len(copies)}"  # unlike the names that nodes here were given
                copies[value] = ir.Value(name=name, const_value=value.const_value, type=value.type, shape=value.shape)
                graph.register_initializer(copies[value])
            node.replace_input_with(index, copies[value])
    out.name = "derived"
    graph.outputs.append(out)
    model = ir.Model(graph, ir_version=10)
    common.RemoveUnusedNodesPass()(model)
    return model


def held_shape(row: Row, count: sizes.Size | None) -> ir.Shape:
    """The shape of so many of these rows, as a state holds them."""
    before = list(row.value.shape or ())
    dims = [*before[: row.axes.time], count, *before[row.axes.time + 1 :]]
    if comes_last(row):
        dims[-2:] = reversed(dims[-2:])
    return ir.Shape(dims)


def comes_last(row: Row) -> bool:
    """Is time the last axis, so that the numbers of one row would lie apart? Then a state exchanges the last two."""
    rank = len(row.value.shape or ())
    return rank > 2 and row.axes.time == rank - 1 and row.axes.batch < rank - 2


def held_axes(row: Row) -> Axes:
    """The axes as a state holds the rows."""
    return replace(row.axes, time=row.axes.time - 1) if comes_last(row) else row.axes


def turned(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The last two axes exchanged, together with a transposition that came before."""
    source, order, before = value, list(range(len(value.shape or ()))), value.producer()
    if before is not None and before.op_type == "Transpose" and before.inputs[0] is not None:
        source, order = before.inputs[0], list(before.attributes["perm"].as_ints())
    order[-2:] = reversed(order[-2:])
    dims = list(value.shape or ())
    dims[-2:] = reversed(dims[-2:])
    node = ir.node("Transpose", [source], {"perm": order})
    node.metadata_props.update({} if before is None else dict(before.metadata_props))
    node.outputs[0].type, node.outputs[0].shape = value.type, ir.Shape(dims)
    graph.append(node)
    return node.outputs[0]


def respecified(spec: StreamSpec, old: StateSpec, new: Sequence[StateSpec]) -> StreamSpec:
    states = sorted([*(state for state in spec.states if state.name != old.name), *new], key=lambda state: state.name)
    graphs = tuple(_respecified_graph(graph, old, new) for graph in spec.graphs)
    return replace(spec, states=tuple(states), graphs=graphs)


def _respecified_graph(graph: GraphSpec, old: StateSpec, new: Sequence[StateSpec]) -> GraphSpec:
    """The old state's tensors replaced by the new ones', which stand in the order of their names."""
    reads, writes = (_replaced(names, old, new) for names in (graph.reads, graph.writes))
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    given, written = inputs.pop(old.input_name, None), outputs.pop(old.output_name, None)
    if given is not None:
        inputs |= {state.input_name: state.as_input(_appended_rows(old, given)) for state in new}
    if written is not None:
        outputs |= {state.output_name: state.as_output(_appended_rows(old, written)) for state in new}
    heads = [name for name in inputs if name.removesuffix(".in") not in reads]
    logits = [name for name in outputs if name.removesuffix(".out") not in writes]
    return replace(
        graph,
        inputs=tuple(inputs[name] for name in (*heads, *(f"{name}.in" for name in reads))),
        outputs=tuple(outputs[name] for name in (*logits, *(f"{name}.out" for name in writes))),
        reads=reads,
        writes=writes,
    )


def _replaced(names: Sequence[str], old: StateSpec, new: Sequence[StateSpec]) -> tuple[str, ...]:
    if old.name not in names:
        return tuple(names)
    return tuple(sorted([*(name for name in names if name != old.name), *(state.name for state in new)]))


def _appended_rows(state: StateSpec, tensor: TensorSpec) -> Dim | None:
    """How many rows of an appended state this tensor has."""
    return tensor.shape[state.time_axis] if state.update == "append" and state.time_axis is not None else None
