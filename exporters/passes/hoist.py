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

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.passes.base import Derived, Graphs, Outcome
from exporters.passes.hoist_states import Replay, comes_last, derive, held_axes, held_shape, respecified, turned
from exporters.passes.joined_rows import Function, Place, Refused, functions_of, groups_of, places_of, without_identity
from exporters.passes.nodes import constant
from mscompile.contracts import BATCH, GraphSpec, Hit, StateSpec, StreamSpec

NAME = "hoist"
WHY = "row-wise functions of remembered rows are computed once, when the rows are new"


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    """Every state that allows it is hoisted, in all graphs at once, together with those it is joined with."""
    hits: list[Hit] = []
    derived: dict[str, Derived] = {}
    for states in groups_of(graphs, spec):
        try:
            places = places_of(graphs, spec, states)
        except Refused as refusal:
            hits += [Hit(NAME, state.name, False, str(refusal)) for state in states]
            continue
        functions = functions_of(places)
        new = {state.name: [derive(state, function) for function in functions] for state in states}
        for place in places:
            _rewrite(place, functions, {name: [made for made, _ in pairs] for name, pairs in new.items()})
        for state in states:
            derived |= {made.name: Derived(state.name, model) for made, model in new[state.name]}
            spec = respecified(spec, state, [made for made, _ in new[state.name]])
            names = ", ".join(sorted(function.name for function in functions))
            hits.append(Hit(NAME, state.name, True, f"the memory holds {names} instead of its rows"))
    for graph in spec.graphs:
        _order(graphs[graph.name].graph, graph)
    return Outcome(spec, tuple(hits), derived)


def _order(graph: ir.Graph, spec: GraphSpec) -> None:
    """Inputs and outputs in the order of the spec."""
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        by_name = {value.name: value for value in values}
        ordered = [by_name[tensor.name] for tensor in tensors]
        values.clear()
        values.extend(ordered)


New = Mapping[str, Sequence[StateSpec]]  # by the name of the old state: one for each function


def _rewrite(place: Place, functions: Sequence[Function], new: New) -> None:
    """Carry the functions' results; take the old states out, with what only they needed."""
    joined, graph = place.joined, place.joined.graph
    replays = {part: Replay(graph, joined, place.rows, part) for part in joined.new}
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
        if comes_last(function.row):
            on_new = {part: turned(graph, value) for part, value in on_new.items()}
        whole = _carry(place, function, on_new, states)
        read = turned(graph, whole) if comes_last(function.row) else whole
        for value in values:
            _read_instead(place, value, read)
        for name, output in written.items():
            rows = on_new[without_identity(output)] if states[name].update == "append" else whole
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
    time = held_axes(row).time
    parts = []
    for part in joined.parts:
        if part in joined.states:
            state = states[joined.states[part].name]
            given = ir.Value(name=state.input_name, type=row.value.type, shape=held_shape(row, joined.count([part])))
            joined.graph.inputs.append(given)
            parts.append(given)
        else:
            parts.append(on_new[part])
    node = ir.node("Concat", parts, {"axis": time})
    node.outputs[0].type, node.outputs[0].shape = row.value.type, held_shape(row, joined.count(joined.parts))
    joined.graph.append(node)
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
