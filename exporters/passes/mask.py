"""mask: hidden columns are added to the scores as one large negative number, once for all layers and heads.

Given                                              Becomes
  softmax(Where(hidden, -inf, scores))               bias = Where(hidden, -inf, 0)         once
  hidden (B, 1, T, S), scores (B, H, T, S)           softmax(scores + bias)

An addition that broadcasts over heads is several times faster than a selection that does. Equal as long as a
row of scores has one visible column, since the number dwarfs any score; attention where a token sees itself has.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from exporters.passes.base import Graphs, Outcome
from mscompile.contracts import Hit, StreamSpec

NAME = "mask"
WHY = "a mask is added to scores, once for all layers and heads, instead of selected"
DWARFS = -1e4  # scores are nowhere near


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    return Outcome(spec, tuple(hit for model in graphs.values() for hit in _apply(model.graph)))


def _apply(graph: ir.Graph) -> Iterator[Hit]:
    biases: dict[tuple[ir.Value, float], ir.Value] = {}
    found = [node for node in graph if node.op_type == "Where" and _hides(node)]
    for node in found:
        hidden, lowest, scores = node.inputs
        assert hidden is not None and lowest is not None and lowest.const_value is not None and scores is not None
        key = (hidden, float(lowest.const_value.numpy().item()))
        if key not in biases:
            zero = _zero(graph, lowest.const_value)
            made = ir.node("Where", [hidden, lowest, zero], metadata_props=dict(node.metadata_props))
            made.outputs[0].type, made.outputs[0].shape = scores.type, hidden.shape
            graph.insert_before(node, made)
            biases[key] = made.outputs[0]
        added = ir.node("Add", [scores, biases[key]], metadata_props=dict(node.metadata_props))
        out = node.outputs[0]
        added.outputs[0].type, added.outputs[0].shape = out.type, out.shape
        graph.insert_before(node, added)
        out.replace_all_uses_with(added.outputs[0])
        graph.remove(node, safe=True)
    if found:
        yield Hit(NAME, graph.name or "", True, f"{len(found)} selections are additions of {len(biases)} masks")


def _hides(node: ir.Node) -> bool:
    """Does this Where hide columns from a softmax, with a mask that is smaller than the scores?"""
    hidden, lowest, scores = node.inputs
    if hidden is None or lowest is None or scores is None or hidden.shape is None or scores.shape is None:
        return False
    number = lowest.const_value
    if number is None or number.size != 1 or float(number.numpy().item()) > DWARFS:
        return False
    wider = len(scores.shape) == len(hidden.shape) and list(hidden.shape) != list(scores.shape)
    return wider and _feeds_softmax(node.outputs[0])


def _feeds_softmax(value: ir.Value) -> bool:
    """Do all uses end in a softmax, perhaps after other columns were joined to these?"""
    nodes = [usage.node for usage in value.uses()]
    return (
        bool(nodes)
        and not value.is_graph_output()
        and all(
            node.op_type == "Softmax" or (node.op_type == "Concat" and _feeds_softmax(node.outputs[0]))
            for node in nodes
        )
    )


def _zero(graph: ir.Graph, like: ir.TensorProtocol) -> ir.Value:
    name = f"zero_{like.dtype.name.lower()}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.zeros((), like.numpy().dtype), name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]))
        )
    return graph.initializers[name]
