"""hoist: remembered rows are projected once, when they are new, instead of at every step.

Given                                              Becomes
  C = Concat(mems.in, h)       (B, M + T, d)         k_new = f(h)                 only the T new rows
  K = f(C)     row by row      (B, H, M + T, d_h)    K = Concat(mems.key.in, k_new)
  mems.out = C[-M:]                                  mems.key.out = K[-M:]        state mems is gone

This is loop-invariant code motion across time: f(row) never changes once its row is remembered, so the memory
holds f(row). Exact where all of this holds, and refused with the reason otherwise:

1. in every graph that reads the state, it enters only as the first part of one Concat(state.in, new rows)
   (and may be asked for the batch size);
2. the result is read only through row-wise functions, as its newest rows, or as the new state;
3. all graphs apply the same functions.

The initial value of a new state is f of the old one's. The outcome keeps each f as a graph of its own, so
that a parity check can tell what the new state must be from the old one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from exporters.derived import ROWS, evaluate
from exporters.passes.base import Derived, Graphs, Outcome
from exporters.passes.row_wise import constant, copy_onto, mapped_axis, normal, signature, slice_start
from mscompile.contracts import BATCH, GraphSpec, Hit, StateSpec, StreamSpec

NAME = "hoist"
WHY = "row-wise functions of remembered rows are computed once, when the rows are new"


class _Refused(Exception):
    """Why a state stays as it is."""


@dataclass(frozen=True)
class Step:
    """One row-wise node on the way from the remembered rows to a boundary."""

    node: ir.Node
    axis: int  # of time in its output


@dataclass(frozen=True)
class Boundary:
    """A row-wise value that something else reads: it becomes a state."""

    value: ir.Value
    axis: int
    path: tuple[Step, ...]


@dataclass(frozen=True)
class Remembered:
    """One state in one graph: joined = [given ; new] along `axis`."""

    state: StateSpec
    given: ir.Value
    joined: ir.Value
    new: ir.Value
    axis: int
    rows: int
    sized: tuple[ir.Node, ...]  # Shape nodes that ask it for the batch size only
    stand_in: ir.Value | None  # another input with that batch size


@dataclass(frozen=True)
class Place:
    """A graph that reads the state, and the boundary of every function there, by the function's name."""

    model: ir.Model
    remembered: Remembered
    boundaries: Mapping[str, Boundary]


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    """Every replaced state that allows it is hoisted, in all graphs at once."""
    hits: list[Hit] = []
    derived: dict[str, Derived] = {}
    for state in spec.states:
        if state.update == "append":
            continue  # it holds what it needs already
        try:
            places = _places(graphs, spec, state)
        except _Refused as refusal:
            hits.append(Hit(NAME, state.name, False, str(refusal)))
            continue
        first = places[0]
        functions = {name: _function(first.remembered, boundary) for name, boundary in first.boundaries.items()}
        states = {name: _state(first, name, function) for name, function in functions.items()}
        for place in places:
            _rewrite(place, states)
        derived |= {states[name].name: Derived(state.name, function) for name, function in functions.items()}
        spec = _respecified(spec, state, tuple(states.values()))
        hits.append(Hit(NAME, state.name, True, f"the memory holds {', '.join(sorted(states))} instead of its rows"))
    for graph in spec.graphs:
        _order(graphs[graph.name].graph, graph)
    return Outcome(spec, tuple(hits), derived)


# ---- Finding ----------------------------------------------------------------------------------------------


def _places(graphs: Graphs, spec: StreamSpec, state: StateSpec) -> list[Place]:
    """Every graph with this state; _Refused unless all allow to hoist it."""
    touching = [graphs[g.name] for g in spec.graphs if state.name in (*g.reads, *g.writes)]
    if not touching:
        raise _Refused("no graph here has it")
    found = [(model, remembered := _find(model, state), _boundaries(remembered)) for model in touching]
    (_, _, first), *_ = found
    if not first:
        raise _Refused("nothing reads its rows through a row-wise function")
    for model, _, boundaries in found:
        if boundaries.keys() != first.keys():
            raise _Refused(f"graph {model.graph.name} applies other functions to its rows")
    labels = {function: _label(boundary) for function, boundary in first.items()}
    if len(set(labels.values())) < len(labels) or not all(labels.values()):
        labels = {function: f"{number:02}" for number, function in enumerate(first)}
    return [Place(model, rows, {labels[f]: boundary for f, boundary in b.items()}) for model, rows, b in found]


def _find(model: ir.Model, state: StateSpec) -> Remembered:
    name = model.graph.name
    given = next((value for value in model.graph.inputs if value.name == state.input_name), None)
    if given is None:
        raise _Refused(f"graph {name} writes it without reading it")
    sized = tuple(usage.node for usage in given.uses() if _asks_batch(usage.node, state))
    stand_in = next((v for v in model.graph.inputs if v is not given and v.shape and v.shape[0] == BATCH), None)
    uses = [usage for usage in given.uses() if usage.node not in sized or stand_in is None]
    if len(uses) != 1 or uses[0].node.op_type != "Concat" or uses[0].idx != 0:
        readers = ", ".join(sorted({usage.node.op_type for usage in uses})) or "nothing"
        raise _Refused(f"graph {name} reads it by {readers}, not by one Concat with new rows behind it")
    concat = uses[0].node
    new = concat.inputs[1]
    if len(concat.inputs) != 2 or new is None:
        raise _Refused(f"graph {name} joins it with {len(concat.inputs) - 1} other tensors, not with one")
    axis = normal(concat.attributes["axis"].as_int(), len(state.shape))
    rows = state.shape[axis]
    if not isinstance(rows, int):
        raise _Refused(f"graph {name} joins it along its {rows} axis, which is not time")
    return Remembered(state, given, concat.outputs[0], new, axis, rows, sized, stand_in)


def _asks_batch(node: ir.Node, state: StateSpec) -> bool:
    """Is this the size of the batch, which comes first, and nothing else?"""
    bounds = [node.attributes[name].as_int() for name in ("start", "end") if name in node.attributes]
    return node.op_type == "Shape" and state.batch_axis == 0 and bounds == [0, 1]


def _boundaries(remembered: Remembered) -> dict[bytes, Boundary]:
    """The boundaries in a graph by what is computed on the way to them."""
    found = _explore(remembered, remembered.joined, remembered.axis, ())
    return {_signature(boundary): boundary for boundary in found}


def _explore(remembered: Remembered, value: ir.Value, axis: int, path: tuple[Step, ...]) -> Iterator[Boundary]:
    if value.is_graph_output():
        raise _Refused(f"its rows leave the graph as output {value.name}")
    is_boundary = False
    for usage in value.uses():
        node = usage.node
        mapped = mapped_axis(node, usage.idx, axis)
        if mapped is not None:
            yield from _explore(remembered, node.outputs[0], mapped, (*path, Step(node, mapped)))
        elif slice_start(node, usage.idx, axis) != remembered.rows and not _is_new_state(node, value, remembered):
            if not path:
                raise _Refused(f"{node.op_type} reads its rows, and is not row-wise")
            is_boundary = True
    if is_boundary:
        yield Boundary(value, axis, path)


def _is_new_state(node: ir.Node, value: ir.Value, remembered: Remembered) -> bool:
    """Does this node take the newest rows, as many as are remembered, as the state's new value?"""
    start = slice_start(node, 0, remembered.axis)
    out, total = node.outputs[0], value.shape[remembered.axis] if value.shape is not None else None
    if start is None or value is not remembered.joined or out.name != remembered.state.output_name or out.uses():
        return False
    return start == -remembered.rows or (isinstance(total, int) and start == total - remembered.rows)


def _signature(boundary: Boundary) -> bytes:
    return hashlib.sha256(b"".join(signature(step.node, step.axis) for step in boundary.path)).digest()


def _label(boundary: Boundary) -> str:
    """What the model calls the last projection on the way, `key` for example."""
    modules = [s.node.metadata_props.get("module", "") for s in boundary.path if s.node.op_type == "MatMul"]
    return modules[-1].rpartition(".")[2] if modules else ""


# ---- Rewriting --------------------------------------------------------------------------------------------


def _rewrite(place: Place, states: Mapping[str, StateSpec]) -> None:
    """Carry the functions' results; take the old state out, with what only it needed."""
    graph, remembered = place.model.graph, place.remembered
    on_new = {remembered.joined: remembered.new}
    axes = {remembered.joined: remembered.axis}
    for name, boundary in place.boundaries.items():
        new = _replay(graph, remembered, boundary.path, on_new)
        axes |= {step.node.outputs[0]: step.axis for step in boundary.path}
        _carry(graph, remembered, boundary, new, states[name])
    for old, new in on_new.items():
        for usage in list(old.uses()):
            if slice_start(usage.node, usage.idx, axes[old]) == remembered.rows:
                usage.node.outputs[0].replace_all_uses_with(new)
    for value in list(graph.outputs):
        if value.name == remembered.state.output_name:
            graph.outputs.remove(value)
    for node in remembered.sized:
        node.replace_input_with(0, remembered.stand_in)
    common.RemoveUnusedNodesPass()(place.model)
    graph.inputs.remove(remembered.given)
    graph.sort()


def _replay(graph: ir.Graph, remembered: Remembered, path: Sequence[Step], done: dict[ir.Value, ir.Value]) -> ir.Value:
    """The functions of `path` on the rows that `done` has for the joined ones; shared parts are built once."""
    current = done[remembered.joined]
    rows = (current.shape or ir.Shape([None] * (remembered.axis + 1)))[remembered.axis]
    for step in path:
        out = step.node.outputs[0]
        if out not in done:
            done[out] = copy_onto(graph, step.node, current, step.axis, rows)
        current = done[out]
    return current


def _carry(graph: ir.Graph, remembered: Remembered, boundary: Boundary, new: ir.Value, state: StateSpec) -> None:
    """Read the boundary as [state.in ; f(new rows)], and return its newest rows."""
    kind = boundary.value.type
    given = ir.Value(name=state.input_name, type=kind, shape=ir.Shape(state.shape))
    joined = ir.node("Concat", [given, new], {"axis": boundary.axis})
    joined.outputs[0].type, joined.outputs[0].shape = kind, boundary.value.shape
    bounds = [constant(graph, [number]) for number in (-remembered.rows, 2**63 - 1, boundary.axis)]
    newest = ir.node("Slice", [joined.outputs[0], *bounds])
    newest.outputs[0].name = state.output_name
    newest.outputs[0].type, newest.outputs[0].shape = kind, ir.Shape(state.shape)
    for usage in list(boundary.value.uses()):
        if mapped_axis(usage.node, usage.idx, boundary.axis) is None:
            usage.node.replace_input_with(usage.idx, joined.outputs[0])
    graph.inputs.append(given)
    graph.extend([joined, newest])
    graph.outputs.append(newest.outputs[0])


# ---- What the new states are ------------------------------------------------------------------------------


def _function(remembered: Remembered, boundary: Boundary) -> ir.Model:
    """f as a graph of its own: `rows` (batch, n, ...) of the old state to the same rows of the new one."""
    shape = [f"n{axis}" if axis == remembered.axis else dim for axis, dim in enumerate(remembered.state.shape)]
    rows = ir.Value(name=ROWS, type=remembered.given.type, shape=ir.Shape(shape))
    graph = ir.Graph([rows], [], nodes=[], opset_imports={"": 20}, name="derived")
    out = _replay(graph, remembered, boundary.path, {remembered.joined: rows})
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.name in graph.initializers:
                continue
            copied = ir.Value(name=value.name, const_value=value.const_value, type=value.type, shape=value.shape)
            graph.register_initializer(copied)
            node.replace_input_with(index, copied)
    out.name = "derived"
    graph.outputs.append(out)
    return ir.Model(graph, ir_version=10)


def _state(place: Place, name: str, function: ir.Model) -> StateSpec:
    old, boundary = place.remembered.state, place.boundaries[name]
    shape = list(boundary.value.shape or ())
    shape[boundary.axis] = place.remembered.rows
    dims = tuple(dim if isinstance(dim, int) else BATCH for dim in shape)
    start = old.initial_value(1).take([0], axis=place.remembered.axis)
    initial = evaluate(function, start).ravel()
    return replace(
        old,
        name=f"{old.name}.{name}",
        shape=dims,
        time_axis=boundary.axis,
        batch_axis=dims.index(BATCH),
        initial=float(initial[0]) if np.ptp(initial) == 0 else tuple(float(number) for number in initial),
    )


def _respecified(spec: StreamSpec, old: StateSpec, new: Sequence[StateSpec]) -> StreamSpec:
    states = sorted([*(state for state in spec.states if state.name != old.name), *new], key=lambda state: state.name)
    graphs = tuple(_respecified_graph(graph, old, new) for graph in spec.graphs)
    return replace(spec, states=tuple(states), graphs=graphs)


def _respecified_graph(graph: GraphSpec, old: StateSpec, new: Sequence[StateSpec]) -> GraphSpec:
    if old.name not in graph.reads:
        return graph
    given, written = {t.name: t for t in graph.inputs}, {t.name: t for t in graph.outputs}
    del given[old.input_name], written[old.output_name]
    given |= {state.input_name: state.as_input() for state in new}
    written |= {state.output_name: state.as_output() for state in new}
    names = [state.name for state in new]
    reads = tuple(sorted([*(name for name in graph.reads if name != old.name), *names]))
    writes = tuple(sorted([*(name for name in graph.writes if name != old.name), *names]))
    heads, logits = graph.inputs[: -len(graph.reads)], graph.outputs[: -len(graph.writes)]
    return replace(
        graph,
        inputs=(*heads, *(given[f"{name}.in"] for name in reads)),
        outputs=(*logits, *(written[f"{name}.out"] for name in writes)),
        reads=reads,
        writes=writes,
    )


def _order(graph: ir.Graph, spec: GraphSpec) -> None:
    """Inputs and outputs in the order of the spec."""
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        by_name = {value.name: value for value in values}
        ordered = [by_name[tensor.name] for tensor in tensors]
        values.clear()
        values.extend(ordered)
