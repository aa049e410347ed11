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
from exporters.passes.columns import ELEMENTWISE, Columns, Order
from exporters.passes.nodes import constant, dims, normal, take_place
from exporters.passes.row_wise import slice_start
from mscompile.contracts import CHUNK, POSITION, GraphSpec, Hit, StateSpec, StreamSpec

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
    found, refused = _find_all(graphs, spec, wanted)
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


def _find_all(graphs: Graphs, spec: StreamSpec, wanted: set[str]) -> tuple[list[Found], dict[str, str]]:
    """What can be a ring in every graph, and why the others cannot; one refusal may lead to another."""
    refused: dict[str, str] = {}
    while True:
        try:
            return [
                _find(graphs[graph.name].graph, graph, spec, wanted - refused.keys()) for graph in spec.graphs
            ], refused
        except _Refused as refusal:
            refused |= dict.fromkeys(refusal.states, str(refusal))


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
    if new is None or not isinstance(rows, int) or dims(new)[axis : axis + 1] != [spec.tokens]:
        raise refuse("does not join it with one new row a token")
    last = out.producer()
    total = dims(joined)[axis]
    newest = [-rows, *([total - rows] if isinstance(total, int) else [])]
    if last is None or last.inputs[0] is not joined or out.uses() or slice_start(last, 0, axis) not in newest:
        raise refuse(f"does not keep the newest {rows} rows")
    return Rolling(state, given, joined, new, out, axis)


def _through(node: ir.Node, read: list[int], columns: Mapping[ir.Value, Columns]) -> Columns | None:
    """The columns of a node's output; None where it sums them up. _Refused if it depends on their order."""
    values = {index: value for index in read if (value := node.inputs[index]) is not None}
    given = {index: columns[value] for index, value in values.items()}
    states = frozenset().union(*(column.states for column in given.values()))
    first = replace(next(iter(given.values())), states=states)
    if len({column.rows for column in given.values()}) > 1:
        raise _Refused(states, f"{node.op_type} joins memories of different lengths")
    rank = len(dims(node.outputs[0]))
    shifts = {index: rank - len(dims(value)) for index, value in values.items()}
    if node.op_type == "MatMul":
        ends = {(index, len(dims(value)) - given[index].axis) for index, value in values.items()}
        if ends == {(0, 1), (1, 2)}:
            return None
        if ends in ({(1, 1)}, {(0, 2)}):
            return first.moved(next(iter(shifts.values())))
    elif node.op_type == "Transpose":
        order = list(node.attributes["perm"].as_ints())
        return replace(first, axis=order.index(first.axis), batch=order.index(first.batch))
    elif node.op_type in APART:
        moved = {replace(given[index].moved(shift), states=states) for index, shift in shifts.items()}
        if len(moved) == 1:
            return moved.pop()
    raise _Refused(states, f"{node.op_type} depends on the order of its rows")


# ---- Rewriting --------------------------------------------------------------------------------------------


def _rewrite(model: ir.Model, found: Found) -> None:
    graph = model.graph
    position = next(value for value in graph.inputs if value.name == POSITION)
    order = Order(graph, position, found.spec.tokens)
    for node in list(graph):
        column = found.columns.get(node.outputs[0])
        if column is not None and node.op_type in APART:
            _align(node, column, found.columns, order)
    for row in found.rolling.values():
        if found.spec.tokens == 1:
            _split_products(graph, row)
        _return_new(graph, row, found.spec)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    graph.sort()


def _split_products(graph: ir.Graph, row: Rolling) -> None:
    """Every product with the joined rows, which may have been transposed first."""
    for usage in list(row.joined.uses()):
        node = usage.node
        if node.op_type == "MatMul" and usage.idx == 1:
            _split(graph, node, row, row.given, row.new, row.axis)
        elif node.op_type == "Transpose":
            perm = list(node.attributes["perm"].as_ints())
            products = [use.node for use in node.outputs[0].uses() if use.node.op_type == "MatMul" and use.idx == 1]
            if products:
                given, new = (_transposed(graph, node, value, perm) for value in (row.given, row.new))
                for each in products:
                    _split(graph, each, row, given, new, perm.index(row.axis))


def _transposed(graph: ir.Graph, node: ir.Node, value: ir.Value, perm: list[int]) -> ir.Value:
    made = ir.node("Transpose", [value], {"perm": perm}, metadata_props=dict(node.metadata_props))
    made.outputs[0].type = value.type
    made.outputs[0].shape = ir.Shape([dims(value)[axis] for axis in perm])
    graph.insert_before(node, made)
    return made.outputs[0]


def _align(node: ir.Node, column: Columns, known: Mapping[ir.Value, Columns], order: Order) -> None:
    """Bring the operands that have the columns in their old order into the new one."""
    rank = len(dims(node.outputs[0]))
    for index, value in enumerate(node.inputs):
        if value is None or value in known or not dims(value):
            continue
        here = column.moved(len(dims(value)) - rank)
        if here.axis >= 0 and dims(value)[here.axis] != 1:
            node.replace_input_with(index, order.permuted(value, here))


def _split(graph: ir.Graph, node: ir.Node, row: Rolling, given: ir.Value, new: ir.Value, axis: int) -> None:
    """A product with joined rows, as products with the remembered and with the new ones."""
    left, out = node.inputs[0], node.outputs[0]
    module = dict(node.metadata_props)

    def product(weights: ir.Value | None, rows: ir.Value, last: int | str | None) -> ir.Value:
        made = ir.node("MatMul", [weights, rows], metadata_props=module)
        made.outputs[0].type, made.outputs[0].shape = out.type, ir.Shape([*dims(out)[:-1], last])
        graph.insert_before(node, made)
        return made.outputs[0]

    if axis == len(dims(given)) - 1:  # they are columns of the result
        parts = [product(left, rows, dims(rows)[axis]) for rows in (given, new)]
        made = ir.node("Concat", parts, {"axis": len(dims(out)) - 1}, metadata_props=module)
    else:  # they are summed up
        cut = ir.node("Split", [left, constant(graph, [row.rows, 1])], {"axis": -1}, num_outputs=2)
        cut.metadata_props.update(module)
        for part, size in zip(cut.outputs, (row.rows, 1), strict=True):
            part.type, part.shape = out.type, ir.Shape([*dims(left)[:-1], size])
        graph.insert_before(node, cut)
        parts = [product(*pair, dims(out)[-1]) for pair in zip(cut.outputs, (given, new), strict=True)]
        made = ir.node("Add", parts, metadata_props=module)
    take_place(graph, node, made)


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
