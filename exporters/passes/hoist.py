"""hoist: remembered rows are projected once, when they are new, instead of at every step.

Given                                              Becomes
  C = Concat(mems.in, h)       (B, M + T, d)         k_new = f(h)                 only the T new rows
  K = f(C)     row by row      (B, H, M + T, d_h)    K = Concat(mems.key.in, k_new)
  mems.out = C[-M:]                                  mems.key.out = K[-M:]        state mems is gone

Several memories that are joined are hoisted together:

  C = Concat(mems.in, segment.in, h)                 K = Concat(mems.key.in, segment.key.in, f(h))
  segment.out = h              (appended)            segment.key.out = f(h)
  mems.out = Concat(mems.in, segment.in)[-M:]        mems.key.out = Concat(mems.key.in, segment.key.in)[-M:]

This is loop-invariant code motion across time: f(row) never changes once its row is remembered, so the memory
holds f(row). Exact where all of this holds, and refused with the reason otherwise:

1. in every graph that reads the state, it enters only through one Concat along time with other states and new
   rows (and may be asked for the batch size);
2. the result is read only through row-wise functions, as its newest rows, or as the new value of a state;
3. all graphs apply the same functions, or none and only move rows.

A state never has time as its last axis: rows that lie together are written together. The initial value of a new
state is f of the old one's. The outcome keeps each f as a graph of its own, so
that a parity check can tell what the new state must be from the old one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from exporters.derived import ROWS, evaluate
from exporters.passes import sizes
from exporters.passes.base import Derived, Graphs, Outcome
from exporters.passes.nodes import constant, normal
from exporters.passes.row_wise import LAYOUT, PRODUCTS, Axes, copy_onto, digest, mapped, takes_last
from mscompile.contracts import BATCH, Dim, GraphSpec, Hit, StateSpec, StreamSpec, TensorSpec

NAME = "hoist"
WHY = "row-wise functions of remembered rows are computed once, when the rows are new"


class _Refused(Exception):
    """Why a state stays as it is."""


@dataclass(frozen=True)
class Joined:
    """The rows of one Concat in one graph: those of states and, in other parts, new ones."""

    model: ir.Model
    parts: tuple[ir.Value, ...]
    states: Mapping[ir.Value, StateSpec]  # of the parts that are inputs
    value: ir.Value
    axes: Axes
    sized: tuple[ir.Node, ...]  # Shape nodes that ask a state for the batch size only
    stand_in: ir.Value | None  # another input with that batch size

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    @property
    def written(self) -> dict[str, ir.Value]:
        """The outputs that are states here, by the name of the state."""
        outputs = {output.name: output for output in self.graph.outputs}
        return {s.name: outputs[s.output_name] for s in self.states.values() if s.output_name in outputs}

    @property
    def new(self) -> list[ir.Value]:
        return [part for part in self.parts if part not in self.states]

    def count(self, parts: Sequence[ir.Value]) -> sizes.Size | None:
        """How many rows these parts have."""
        return sizes.total(None if part.shape is None else part.shape[self.axes.time] for part in parts)


@dataclass(frozen=True)
class Row:
    """A value with a row for every joined row, each a function of it alone."""

    value: ir.Value
    axes: Axes
    digest: bytes  # of the function
    computes: bool  # does the function do more than arrange?


@dataclass(frozen=True)
class Place:
    """What one graph does with the joined rows."""

    joined: Joined
    rows: Mapping[ir.Value, Row]
    boundaries: Mapping[bytes, Row]  # rows that something else reads: they become states; by their functions
    newest: Mapping[ir.Node, ir.Value]  # Slices that take the rows of the last part, and what they take them of


@dataclass(frozen=True)
class Function:
    """What the memories hold from now on: a function of their rows."""

    key: bytes  # its digest
    name: str
    joined: Joined  # where it was found
    row: Row
    rows: Mapping[ir.Value, Row]


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    """Every state that allows it is hoisted, in all graphs at once, together with those it is joined with."""
    hits: list[Hit] = []
    derived: dict[str, Derived] = {}
    for states in _groups(graphs, spec):
        try:
            places = _places(graphs, spec, states)
        except _Refused as refusal:
            hits += [Hit(NAME, state.name, False, str(refusal)) for state in states]
            continue
        functions = _functions(places)
        new = {state.name: [_derive(state, function) for function in functions] for state in states}
        for place in places:
            _rewrite(place, functions, {name: [made for made, _ in pairs] for name, pairs in new.items()})
        for state in states:
            derived |= {made.name: Derived(state.name, model) for made, model in new[state.name]}
            spec = _respecified(spec, state, [made for made, _ in new[state.name]])
            names = ", ".join(sorted(function.name for function in functions))
            hits.append(Hit(NAME, state.name, True, f"the memory holds {names} instead of its rows"))
    for graph in spec.graphs:
        _order(graphs[graph.name].graph, graph)
    return Outcome(spec, tuple(hits), derived)


# ---- Finding ----------------------------------------------------------------------------------------------


def _groups(graphs: Graphs, spec: StreamSpec) -> list[tuple[StateSpec, ...]]:
    """The states, each with those that it is joined with."""
    names = {state.input_name: state.name for state in spec.states}
    groups = {state.name: {state.name} for state in spec.states}
    for graph in spec.graphs:
        for node in graphs[graph.name].graph:
            joined = {names[v.name] for v in node.inputs if v is not None and v.is_graph_input() and v.name in names}
            if node.op_type == "Concat" and joined:
                together = set().union(*(groups[name] for name in joined))
                groups |= dict.fromkeys(together, together)
    distinct = {min(group): group for group in groups.values()}
    return [tuple(state for state in spec.states if state.name in group) for _, group in sorted(distinct.items())]


def _places(graphs: Graphs, spec: StreamSpec, states: Sequence[StateSpec]) -> list[Place]:
    """Every graph with one of these states; _Refused unless all of them allow to hoist it."""
    names = {state.name for state in states}
    touching = [graph for graph in spec.graphs if names & {*graph.reads, *graph.writes}]
    if not touching:
        raise _Refused("no graph here has it")
    places = [_explore(_find(graphs[graph.name], graph, states)) for graph in touching]
    first = next((place for place in places if place.boundaries), None)
    if first is None:
        raise _Refused("nothing reads its rows through a row-wise function")
    if not any(row.computes for row in first.boundaries.values()):
        raise _Refused("its rows are only arranged on the way to what reads them")
    for place in places:
        only_moves = not place.boundaries and not place.joined.new
        if place.boundaries.keys() != first.boundaries.keys() and not only_moves:
            raise _Refused(f"graph {place.joined.graph.name} applies other functions to its rows")
    return places


def _find(model: ir.Model, graph: GraphSpec, states: Sequence[StateSpec]) -> Joined:
    name = graph.name
    inputs = {value.name: value for value in model.graph.inputs}
    present = [state for state in states if state.name in (*graph.reads, *graph.writes)]
    if any(state.input_name not in inputs for state in present):
        raise _Refused(f"graph {name} writes it without reading it")
    given = {inputs[state.input_name]: state for state in present}
    stand_in = next((v for v in inputs.values() if v not in given and v.shape and BATCH in list(v.shape)), None)
    asking = [usage.node for value, state in given.items() for usage in value.uses() if _asks_batch(usage.node, state)]
    sized = asking if stand_in is not None else []
    readers = {usage.node: None for value in given for usage in value.uses() if usage.node not in sized}
    concat = next(iter(readers), None)
    if concat is None or len(readers) > 1 or concat.op_type != "Concat" or concat.graph is not model.graph:
        types = ", ".join(sorted(reader.op_type for reader in readers)) or "nothing"
        raise _Refused(f"graph {name} reads it by {types}, not by one Concat with new rows")
    axes = Axes(normal(concat.attributes["axis"].as_int(), len(present[0].shape)), present[0].batch_axis)
    for state in present:
        if not isinstance(state.shape[axes.time], int) or state.time_axis not in (None, axes.time):
            raise _Refused(f"graph {name} joins it along its {state.shape[axes.time]} axis, which is not time")
    parts = tuple(part for part in concat.inputs if part is not None)
    return Joined(model, parts, given, concat.outputs[0], axes, tuple(sized), stand_in)


def _asks_batch(node: ir.Node, state: StateSpec) -> bool:
    """Is this the size of the batch, and nothing else?"""
    bounds = [node.attributes[name].as_int() for name in ("start", "end") if name in node.attributes]
    return node.op_type == "Shape" and bounds == [state.batch_axis, state.batch_axis + 1]


def _explore(joined: Joined) -> Place:
    """Follow the joined rows through the graph."""
    rows = {joined.value: Row(joined.value, joined.axes, b"", False)}
    boundaries: dict[bytes, Row] = {}
    newest: dict[ir.Node, ir.Value] = {}
    states: set[str] = set()
    for node in joined.graph:
        given = {index: rows[value] for index, value in _row_inputs(node, rows).items()}
        if not given:
            continue
        axes = mapped(node, {index: row.axes for index, row in given.items()})
        if axes is not None:
            rows |= {out: _row(node, n, axes, given) for n, out in enumerate(node.outputs)}
        elif (state := _new_state(joined, node)) is not None:
            states.add(state)
        elif _takes_newest(joined, node, given):
            newest[node] = given[0].value
        elif joined.value in node.inputs:
            raise _Refused(f"{node.op_type} reads its rows, and is not row-wise")
        else:
            boundaries |= {row.digest: row for row in given.values()}
    _check_outputs(joined, rows, states)
    for row in boundaries.values():
        if not _is_fixed(row):
            raise _Refused(f"the size of {row.value.name}, which would be remembered, is not fixed")
    return Place(joined, rows, boundaries, newest)


def _is_fixed(row: Row) -> bool:
    """Are all sizes known but those of time and batch?"""
    dims = list(row.value.shape or ())
    own = (row.axes.time, row.axes.batch)
    return bool(dims) and all(isinstance(dim, int) or axis in own for axis, dim in enumerate(dims))


def _row_inputs(node: ir.Node, rows: Mapping[ir.Value, Row]) -> dict[int, ir.Value]:
    return {index: value for index, value in enumerate(node.inputs) if value is not None and value in rows}


def _row(node: ir.Node, output: int, axes: Axes, given: Mapping[int, Row]) -> Row:
    inputs = [given[index].digest if index in given else None for index in range(len(node.inputs))]
    computes = node.op_type not in LAYOUT or any(row.computes for row in given.values())
    return Row(node.outputs[output], axes, digest(node, output, axes, inputs), computes)


def _new_state(joined: Joined, node: ir.Node) -> str | None:
    """The replaced state whose new value this node is: the newest joined rows, as many as it remembers."""
    for state in joined.states.values():
        rows = state.shape[joined.axes.time]
        before = sizes.combined(operator.sub, joined.count(joined.parts), rows)  # type: ignore[arg-type]
        if (
            state.update == "replace"
            and node.outputs[0].name == state.output_name
            and node.inputs[0] is joined.value
            and not node.outputs[0].uses()
            and takes_last(node, 0, joined.axes.time, before, rows)  # type: ignore[arg-type]
        ):
            return state.name
    return None


def _takes_newest(joined: Joined, node: ir.Node, given: Mapping[int, Row]) -> bool:
    """Does this node take the rows of the last part, which are new?"""
    *before, last = joined.parts
    if last in joined.states or 0 not in given or node.outputs[0].is_graph_output():
        return False
    return takes_last(node, 0, given[0].axes.time, joined.count(before), joined.count([last]))


def _check_outputs(joined: Joined, rows: Mapping[ir.Value, Row], found: set[str]) -> None:
    """Rows leave the graph as states only, and every state is written as it must be."""
    name = joined.graph.name
    for value in rows:
        if value.is_graph_output():
            raise _Refused(f"its rows leave the graph as output {value.name}")
        if any(usage.node.graph is not joined.graph for usage in value.uses()):
            raise _Refused(f"a branch or loop of graph {name} reads its rows")
    updates = {state.name: state.update for state in joined.states.values()}
    for state, output in joined.written.items():
        if updates[state] == "append" and _without_identity(output) not in joined.new:
            raise _Refused(f"graph {name} appends other rows to {state} than it joins")
        if updates[state] == "replace" and state not in found:
            raise _Refused(f"graph {name} writes {state}, but not as the newest of the joined rows")


def _without_identity(value: ir.Value) -> ir.Value:
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _functions(places: Sequence[Place]) -> list[Function]:
    """The functions of a group, named as the model names their projections, or numbered."""
    first = next(place for place in places if place.boundaries)
    labels = [_label(first, row) for row in first.boundaries.values()]
    if len(set(labels)) < len(labels) or not all(labels):
        labels = [f"{number:02}" for number in range(len(labels))]
    return [
        Function(key, label, first.joined, row, first.rows)
        for (key, row), label in zip(first.boundaries.items(), labels, strict=True)
    ]


def _label(place: Place, row: Row) -> str:
    """What the model calls the last projection on the way, `key` for example."""
    for node in reversed(_cone(place.rows, row.value)):
        if node.op_type in PRODUCTS:
            return node.metadata_props.get("module", "").rpartition(".")[2]
    return ""


def _cone(rows: Mapping[ir.Value, Row], value: ir.Value) -> list[ir.Node]:
    """The nodes that compute rows from the joined ones, in order."""
    found: dict[ir.Node, None] = {}

    def visit(value: ir.Value) -> None:
        node = value.producer()
        if value not in rows or node is None or not rows[value].digest or node in found:
            return
        for given in node.inputs:
            if given is not None:
                visit(given)
        found[node] = None

    visit(value)
    return list(found)


# ---- Rewriting --------------------------------------------------------------------------------------------


class _Replay:
    """The functions of the joined rows, on other rows. What several of them share is built once."""

    def __init__(self, graph: ir.Graph, joined: Joined, rows: Mapping[ir.Value, Row], part: ir.Value) -> None:
        self.graph, self.rows = graph, rows
        self.count = joined.count([part])
        self.done = {joined.value: part}

    def of(self, value: ir.Value) -> ir.Value:
        for node in _cone(self.rows, value):
            if node.outputs[0] not in self.done:
                given = _row_inputs(node, self.rows)
                before, after = (self.rows[v].axes for v in (next(iter(given.values())), node.outputs[0]))
                new = {index: self.done[v] for index, v in given.items()}
                made = copy_onto(self.graph, node, new, before, after, self.count)
                self.done |= dict(zip(node.outputs, made, strict=True))
        return self.done[value]


New = Mapping[str, Sequence[StateSpec]]  # by the name of the old state: one for each function


def _rewrite(place: Place, functions: Sequence[Function], new: New) -> None:
    """Carry the functions' results; take the old states out, with what only they needed."""
    joined, graph = place.joined, place.joined.graph
    replays = {part: _Replay(graph, joined, place.rows, part) for part in joined.new}
    written = joined.written
    others = [value for value in graph.outputs if value not in written.values()]
    graph.outputs.clear()
    graph.outputs.extend(others)
    for node, value in place.newest.items():
        node.outputs[0].replace_all_uses_with(replays[joined.parts[-1]].of(value))
    for number, function in enumerate(functions):
        states = {name: made[number] for name, made in new.items()}
        values = [row.value for row in place.rows.values() if row.digest == function.key]
        on_new = {part: replay.of(values[0]) for part, replay in replays.items()}
        if _comes_last(function.row):
            on_new = {part: _turned(graph, value) for part, value in on_new.items()}
        whole = _carry(place, function, on_new, states)
        read = _turned(graph, whole) if _comes_last(function.row) else whole
        for value in values:
            _read_instead(place, value, read)
        for name, output in written.items():
            rows = on_new[_without_identity(output)] if states[name].update == "append" else whole
            _write(graph, states[name], rows)
    for node in joined.sized:
        _ask(graph, node, joined.stand_in)
    common.RemoveUnusedNodesPass()(joined.model)
    for value in joined.states:
        graph.inputs.remove(value)
    graph.sort()


def _carry(
    place: Place, function: Function, on_new: Mapping[ir.Value, ir.Value], states: Mapping[str, StateSpec]
) -> ir.Value:
    """f of all joined rows, as the states hold it: those, which are inputs now, with f of the parts that are new."""
    joined, row = place.joined, function.row
    time = _held(row).time
    parts = []
    for part in joined.parts:
        if part in joined.states:
            state = states[joined.states[part].name]
            given = ir.Value(name=state.input_name, type=row.value.type, shape=_shape(row, joined.count([part])))
            joined.graph.inputs.append(given)
            parts.append(given)
        else:
            parts.append(on_new[part])
    node = ir.node("Concat", parts, {"axis": time})
    node.outputs[0].type, node.outputs[0].shape = row.value.type, _shape(row, joined.count(joined.parts))
    joined.graph.append(node)
    return node.outputs[0]


def _shape(row: Row, count: sizes.Size | None) -> ir.Shape:
    """The shape of so many of these rows, as a state holds them."""
    before = list(row.value.shape or ())
    dims = [*before[: row.axes.time], count, *before[row.axes.time + 1 :]]
    if _comes_last(row):
        dims[-2:] = reversed(dims[-2:])
    return ir.Shape(dims)


def _comes_last(row: Row) -> bool:
    """Is time the last axis, so that the numbers of one row would lie apart? Then a state exchanges the last two."""
    rank = len(row.value.shape or ())
    return rank > 2 and row.axes.time == rank - 1 and row.axes.batch < rank - 2


def _held(row: Row) -> Axes:
    """The axes as a state holds the rows."""
    return replace(row.axes, time=row.axes.time - 1) if _comes_last(row) else row.axes


def _turned(graph: ir.Graph, value: ir.Value) -> ir.Value:
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


def _read_instead(place: Place, value: ir.Value, whole: ir.Value) -> None:
    """Whatever is not row-wise reads `whole` in place of `value`."""
    for usage in list(value.uses()):
        if usage.node.outputs[0] not in place.rows:
            usage.node.replace_input_with(usage.idx, whole)


def _write(graph: ir.Graph, state: StateSpec, rows: ir.Value) -> None:
    """Return the appended rows, or as many of the newest as the state has."""
    if state.update == "append":
        node = ir.node("Identity", [rows])
        shape = rows.shape
    else:
        axis = state.time_axis or 0
        bounds = [constant(graph, [number]) for number in (-int(state.shape[axis]), 2**63 - 1, axis)]
        node = ir.node("Slice", [rows, *bounds])
        shape = ir.Shape(state.shape)
    graph.append(node)
    out = node.outputs[0]
    out.name, out.type, out.shape = state.output_name, rows.type, shape
    graph.outputs.append(out)


def _ask(graph: ir.Graph, node: ir.Node, other: ir.Value | None) -> None:
    """Take the batch size from another input."""
    assert other is not None, "without one the node counts as a reader"
    axis = [str(dim) for dim in other.shape or ()].index(BATCH)
    made = ir.node("Shape", [other], {"start": axis, "end": axis + 1})
    made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.append(made)
    node.outputs[0].replace_all_uses_with(made.outputs[0])


# ---- What the new states are ------------------------------------------------------------------------------


def _model(state: StateSpec, function: Function) -> ir.Model:
    """f as a graph of its own: `rows` (batch, n, ...) of the old state to the same rows of the new one."""
    joined = function.joined
    shape = [f"n{axis}" if axis == joined.axes.time else dim for axis, dim in enumerate(state.shape)]
    rows = ir.Value(name=ROWS, type=joined.value.type, shape=ir.Shape(shape))
    graph = ir.Graph([rows], [], nodes=[], opset_imports={"": 20}, name="derived")
    out = _Replay(graph, joined, function.rows, rows).of(function.row.value)
    if _comes_last(function.row):
        out = _turned(graph, out)
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


def _derive(old: StateSpec, function: Function) -> tuple[StateSpec, ir.Model]:
    """The new state, and f as a graph of its own."""
    model = _model(old, function)
    axes, time = _held(function.row), function.joined.axes.time
    dims = [dim if isinstance(dim, int) else BATCH for dim in _shape(function.row, None)]
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


def _respecified(spec: StreamSpec, old: StateSpec, new: Sequence[StateSpec]) -> StreamSpec:
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


def _order(graph: ir.Graph, spec: GraphSpec) -> None:
    """Inputs and outputs in the order of the spec."""
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        by_name = {value.name: value for value in values}
        ordered = [by_name[tensor.name] for tensor in tensors]
        values.clear()
        values.extend(ordered)
