"""Where states are joined with new rows, and what each graph does with the joined rows: what `hoist` looks for."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from exporters.passes import sizes
from exporters.passes.base import Graphs
from exporters.passes.nodes import normal
from exporters.passes.row_wise import LAYOUT, PRODUCTS, Axes, digest, mapped, takes_last
from mscompile.contracts import BATCH, GraphSpec, StateSpec, StreamSpec


class Refused(Exception):
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


def groups_of(graphs: Graphs, spec: StreamSpec) -> list[tuple[StateSpec, ...]]:
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


def places_of(graphs: Graphs, spec: StreamSpec, states: Sequence[StateSpec]) -> list[Place]:
    """Every graph with one of these states; Refused unless all of them allow to hoist it."""
    names = {state.name for state in states}
    touching = [graph for graph in spec.graphs if names & {*graph.reads, *graph.writes}]
    if not touching:
        raise Refused("no graph here has it")
    places = [_explore(_find(graphs[graph.name], graph, states)) for graph in touching]
    first = next((place for place in places if place.boundaries), None)
    if first is None:
        raise Refused("nothing reads its rows through a row-wise function")
    if not any(row.computes for row in first.boundaries.values()):
        raise Refused("its rows are only arranged on the way to what reads them")
    for place in places:
        only_moves = not place.boundaries and not place.joined.new
        if place.boundaries.keys() != first.boundaries.keys() and not only_moves:
            raise Refused(f"graph {place.joined.graph.name} applies other functions to its rows")
    return places


def _find(model: ir.Model, graph: GraphSpec, states: Sequence[StateSpec]) -> Joined:
    name = graph.name
    inputs = {value.name: value for value in model.graph.inputs}
    present = [state for state in states if state.name in (*graph.reads, *graph.writes)]
    if any(state.input_name not in inputs for state in present):
        raise Refused(f"graph {name} writes it without reading it")
    given = {inputs[state.input_name]: state for state in present}
    stand_in = next((v for v in inputs.values() if v not in given and v.shape and BATCH in list(v.shape)), None)
    asking = [usage.node for value, state in given.items() for usage in value.uses() if _asks_batch(usage.node, state)]
    sized = asking if stand_in is not None else []
    readers = {usage.node: None for value in given for usage in value.uses() if usage.node not in sized}
    concat = next(iter(readers), None)
    if concat is None or len(readers) > 1 or concat.op_type != "Concat" or concat.graph is not model.graph:
        types = ", ".join(sorted(reader.op_type for reader in readers)) or "nothing"
        raise Refused(f"graph {name} reads it by {types}, not by one Concat with new rows")
    axes = Axes(normal(concat.attributes["axis"].as_int(), len(present[0].shape)), present[0].batch_axis)
    for state in present:
        if not isinstance(state.shape[axes.time], int) or state.time_axis not in (None, axes.time):
            raise Refused(f"graph {name} joins it along its {state.shape[axes.time]} axis, which is not time")
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
        given = {index: rows[value] for index, value in row_inputs(node, rows).items()}
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
            raise Refused(f"{node.op_type} reads its rows, and is not row-wise")
        else:
            boundaries |= {row.digest: row for row in given.values()}
    _check_outputs(joined, rows, states)
    for row in boundaries.values():
        if not _is_fixed(row):
            raise Refused(f"the size of {row.value.name}, which would be remembered, is not fixed")
    return Place(joined, rows, boundaries, newest)


def _is_fixed(row: Row) -> bool:
    """Are all sizes known but those of time and batch?"""
    dims = list(row.value.shape or ())
    own = (row.axes.time, row.axes.batch)
    return bool(dims) and all(isinstance(dim, int) or axis in own for axis, dim in enumerate(dims))


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
            raise Refused(f"its rows leave the graph as output {value.name}")
        if any(usage.node.graph is not joined.graph for usage in value.uses()):
            raise Refused(f"a branch or loop of graph {name} reads its rows")
    updates = {state.name: state.update for state in joined.states.values()}
    for state, output in joined.written.items():
        if updates[state] == "append" and without_identity(output) not in joined.new:
            raise Refused(f"graph {name} appends other rows to {state} than it joins")
        if updates[state] == "replace" and state not in found:
            raise Refused(f"graph {name} writes {state}, but not as the newest of the joined rows")


def without_identity(value: ir.Value) -> ir.Value:
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def functions_of(places: Sequence[Place]) -> list[Function]:
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
    for node in reversed(cone(place.rows, row.value)):
        if node.op_type in PRODUCTS:
            return node.metadata_props.get("module", "").rpartition(".")[2]
    return ""


def cone(rows: Mapping[ir.Value, Row], value: ir.Value) -> list[ir.Node]:
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


def row_inputs(node: ir.Node, rows: Mapping[ir.Value, Row]) -> dict[int, ir.Value]:
    return {index: value for index, value in enumerate(node.inputs) if value is not None and value in rows}
