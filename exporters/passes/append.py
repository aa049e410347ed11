"""append: a memory that rolls becomes a ring that the host writes, and is no longer copied at every step.

Given                                              Becomes
  K = Concat(k.in, k_new)      (.., M + T, ..)       the same columns, those of k.in in the order of ring slots
  k.out = K[-M:]                                     k.out = k_new                    state k is `append`
  softmax(q K + p) V                                 p permuted to that order; softmax and sum do not care
  one token: q K                                     Concat(q k.in, q k_new): k.in is read where it lies
             w V                                     w[:M] v.in + w[M:] v_new

A rolled memory is ordered by age, a ring by slot: slot s holds what was row (s - position) mod M of the rolled
one, rows not written yet included. Exact where all of this holds, and refused with the reason otherwise:

1. in every graph that has the state, it enters as Concat(state.in, one row a token), is read nowhere else, and
   its new value is the newest M rows of that;
2. what is computed from the rows keeps them apart (elementwise, products with other tensors, softmax) until they
   are summed up, together with other remembered rows in the same order.

Everything that meets the rows in their old order (a position term, a mask) is permuted. A permutation is moved
towards the inputs as far as it passes one operand only, so that it costs little: shifted position keys permute
their index, once for all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.passes.base import Graphs, Outcome
from exporters.passes.columns import ELEMENTWISE, Columns, Order, constant, normal
from exporters.passes.row_wise import slice_start
from mscompile.contracts import CHUNK, GraphSpec, Hit, StateSpec, StreamSpec

NAME = "append"
WHY = "a memory that rolls is a ring: the graph returns the new rows, the host writes them"

APART = (*ELEMENTWISE, "Where", "Clip", "Softmax")  # keep columns apart


class _Refused(Exception):
    """Why these states stay as they are."""

    def __init__(self, states: Iterable[str], reason: str) -> None:
        super().__init__(reason)
        self.states = frozenset(states)


@dataclass(frozen=True)
class Rolling:
    """One rolling memory in one graph: joined = [given ; new] along `axis`, out = joined[-rows:]."""

    state: StateSpec
    given: ir.Value
    joined: ir.Value
    new: ir.Value
    out: ir.Value
    axis: int

    @property
    def rows(self) -> int:
        rows = self.state.shape[self.axis]
        assert isinstance(rows, int)
        return rows


@dataclass(frozen=True)
class Found:
    """The rolling memories of one graph, and every value that has their rows as columns."""

    graph: ir.Graph
    spec: GraphSpec
    rolling: Mapping[str, Rolling]
    columns: Mapping[ir.Value, Columns]


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    """All rolling memories that allow it become rings, in all graphs at once."""
    wanted = {state.name for state in spec.states if state.update == "replace"}
    refused: dict[str, str] = {}
    while True:
        try:
            found = [_find(graphs[graph.name].graph, graph, spec, wanted - refused.keys()) for graph in spec.graphs]
            break
        except _Refused as refusal:
            refused |= dict.fromkeys(refusal.states, str(refusal))
    for each in found:
        if each.rolling:
            _rewrite(graphs[each.spec.name], each)
    appended = {name: rolling for each in found for name, rolling in each.rolling.items()}
    reason = "the graph returns the new rows, the host keeps a ring of {}"
    hits = [
        Hit(NAME, name, name in appended, refused.get(name) or reason.format(appended[name].rows))
        for name in sorted(wanted)
    ]
    return Outcome(_respecified(spec, appended), tuple(hits))


# ---- Finding ----------------------------------------------------------------------------------------------


def _find(graph: ir.Graph, spec: GraphSpec, stream: StreamSpec, wanted: Iterable[str]) -> Found:
    names = [name for name in sorted(wanted) if name in (*spec.reads, *spec.writes)]
    rolling = {name: _rolling(graph, spec, stream.state(name)) for name in names}
    columns: dict[ir.Value, Columns] = {
        row.joined: Columns(row.axis, row.state.batch_axis, row.rows, frozenset([name]))
        for name, row in rolling.items()
    }
    outs = {row.out for row in rolling.values()}
    for node in graph:
        read = [index for index, value in enumerate(node.inputs) if value in columns]
        if read and node.outputs[0] not in outs:
            made = _through(node, read, columns)
            if made is not None:
                columns[node.outputs[0]] = made
    for value, column in columns.items():
        if value.is_graph_output():
            raise _Refused(column.states, f"graph {spec.name} returns its rows as output {value.name}")
    return Found(graph, spec, rolling, columns)


def _rolling(graph: ir.Graph, spec: GraphSpec, state: StateSpec) -> Rolling:
    def refuse(reason: str) -> _Refused:
        return _Refused([state.name], f"graph {spec.name} {reason}")

    given = next((value for value in graph.inputs if value.name == state.input_name), None)
    out = next((value for value in graph.outputs if value.name == state.output_name), None)
    if given is None or out is None:
        raise refuse("reads it without writing it" if out is None else "writes it without reading it")
    uses = list(given.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Concat" or uses[0].idx != 0 or len(uses[0].node.inputs) != 2:
        readers = ", ".join(sorted({usage.node.op_type for usage in uses})) or "nothing"
        raise refuse(f"reads it by {readers}, not by one Concat with new rows behind it")
    concat = uses[0].node
    joined, new = concat.outputs[0], concat.inputs[1]
    axis = normal(concat.attributes["axis"].as_int(), len(state.shape))
    rows = state.shape[axis]
    if new is None or new.shape is None or not isinstance(rows, int) or _dim(new, axis) != spec.tokens:
        raise refuse("does not join it with one new row a token")
    last = out.producer()
    total = _dim(joined, axis)
    newest = [-rows, *([total - rows] if isinstance(total, int) else [])]
    if last is None or last.inputs[0] is not joined or out.uses() or slice_start(last, 0, axis) not in newest:
        raise refuse(f"does not keep the newest {rows} rows")
    return Rolling(state, given, joined, new, out, axis)


def _dim(value: ir.Value, axis: int) -> int | str | None:
    dim = None if value.shape is None else value.shape[axis]
    return dim if isinstance(dim, int) or dim is None else dim.value


def _through(node: ir.Node, read: list[int], columns: Mapping[ir.Value, Columns]) -> Columns | None:
    """The columns of a node's output; None where it sums them up. _Refused if it depends on their order."""
    given: list[tuple[int, ir.Value, Columns]] = []
    for index in read:
        value = node.inputs[index]
        assert value is not None
        given.append((index, value, columns[value]))
    states = frozenset().union(*(column.states for *_, column in given))
    _, first, column = given[0]
    rank = len(first.shape or ())
    if any(other.rows != column.rows for *_, other in given):
        raise _Refused(states, f"{node.op_type} joins memories of different lengths")
    if node.op_type == "MatMul":
        ends = {(index, len(value.shape or ()) - other.axis) for index, value, other in given}
        if ends == {(0, 1), (1, 2)}:
            return None
        if len(given) == 1 and ends <= {(1, 1), (0, 2)}:
            return column.moved(len(node.outputs[0].shape or ()) - rank, states)
    elif node.op_type == "Transpose":
        order = list(node.attributes["perm"].as_ints())
        return replace(column, axis=order.index(column.axis), batch=order.index(column.batch))
    elif node.op_type in APART:
        out_rank = len(node.outputs[0].shape or ())
        moved = {other.moved(out_rank - len(value.shape or ()), states) for _, value, other in given}
        if len(moved) == 1:
            return moved.pop()
    raise _Refused(states, f"{node.op_type} depends on the order of its rows")


# ---- Rewriting --------------------------------------------------------------------------------------------


def _rewrite(model: ir.Model, found: Found) -> None:
    graph = model.graph
    order = Order(graph, next(value for value in graph.inputs if value.name == "position"), found.spec.tokens)
    for node in list(graph):
        column = found.columns.get(node.outputs[0])
        if column is not None and node.op_type in APART:
            _align(node, column, found.columns, order)
    for row in found.rolling.values():
        if found.spec.tokens == 1:
            for usage in list(row.joined.uses()):
                if usage.node.op_type == "MatMul":
                    _split(graph, usage.node, usage.idx, row)
        _return_new(graph, row, found.spec)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    graph.sort()


def _align(node: ir.Node, column: Columns, known: Mapping[ir.Value, Columns], order: Order) -> None:
    """Bring the operands that have the columns in their old order into the new one."""
    rank = len(node.outputs[0].shape or ())
    for index, value in enumerate(node.inputs):
        if value is None or value in known or value.shape is None:
            continue
        here = column.moved(len(value.shape) - rank, column.states)
        if here.axis >= 0 and value.shape[here.axis] != 1:
            node.replace_input_with(index, order.permuted(value, here))


def _split(graph: ir.Graph, node: ir.Node, index: int, row: Rolling) -> None:
    """A product with joined rows, as products with the remembered and with the new ones."""
    out = node.outputs[0]
    module = dict(node.metadata_props)
    if index == 1 and row.axis == len(row.state.shape) - 1:  # columns of the result
        left = node.inputs[0]
        parts = [ir.node("MatMul", [left, rows], metadata_props=module) for rows in (row.given, row.new)]
        for part, rows in zip(parts, (row.given, row.new), strict=True):
            _typed(part.outputs[0], out, rows.shape[row.axis] if rows.shape else None)
        made = ir.node("Concat", [part.outputs[0] for part in parts], {"axis": -1}, metadata_props=module)
        nodes = [*parts, made]
    elif index == 1:  # summed up
        weights = node.inputs[0]
        assert weights is not None
        sizes = constant(graph, [row.rows, 1])
        cut = ir.node("Split", [weights, sizes], {"axis": -1}, num_outputs=2, metadata_props=module)
        for part, size in zip(cut.outputs, (row.rows, 1), strict=True):
            _typed(part, weights, size)
        parts = [
            ir.node("MatMul", [weight, rows], metadata_props=module)
            for weight, rows in zip(cut.outputs, (row.given, row.new), strict=True)
        ]
        for part in parts:
            _typed(part.outputs[0], out)
        made = ir.node("Add", [part.outputs[0] for part in parts], metadata_props=module)
        nodes = [cut, *parts, made]
    else:
        return
    _typed(made.outputs[0], out)
    graph.insert_after(node, nodes)
    out.replace_all_uses_with(made.outputs[0])


def _typed(value: ir.Value, like: ir.Value, last: int | ir.SymbolicDim | None = None) -> None:
    value.type = like.type
    dims = list(like.shape or ())
    value.shape = ir.Shape(dims if last is None else [*dims[:-1], last])


def _return_new(graph: ir.Graph, row: Rolling, spec: GraphSpec) -> None:
    """Return the new rows as the state's output."""
    new = row.new
    if new.producer() is None or new.is_graph_output():
        copy = ir.node("Identity", [new])
        copy.outputs[0].type = new.type
        graph.append(copy)
        new = copy.outputs[0]
    row.out.name = f"{row.state.name}.rolled"
    new.name = row.state.output_name
    shape = list(row.state.shape)
    shape[row.axis] = spec.tokens
    new.shape = ir.Shape(shape)
    graph.outputs[graph.outputs.index(row.out)] = new


# ---- What the states are ----------------------------------------------------------------------------------


def _respecified(spec: StreamSpec, appended: Mapping[str, Rolling]) -> StreamSpec:
    def state(old: StateSpec) -> StateSpec:
        return replace(old, update="append", time_axis=appended[old.name].axis) if old.name in appended else old

    states = {old.name: state(old) for old in spec.states}

    def graph(old: GraphSpec) -> GraphSpec:
        rows = CHUNK if old.tokens == CHUNK else 1
        outputs = {states[name].output_name: states[name].as_output(rows) for name in old.writes if name in appended}
        return replace(old, outputs=tuple(outputs.get(tensor.name, tensor) for tensor in old.outputs))

    return replace(spec, states=tuple(states.values()), graphs=tuple(graph(old) for old in spec.graphs))
