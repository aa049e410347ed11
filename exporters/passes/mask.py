"""mask: hidden columns get one large negative number added to their scores, once for all layers and heads.

Given                                              Becomes
  softmax(Where(hidden, lowest, scores))             bias = Where(hidden, lowest, 0)       once
  hidden (B, 1, T, S), scores (B, H, T, S)           softmax(scores + bias)

An addition that broadcasts over heads is several times faster than a selection that does (ONNX Runtime: 11 of 103
ms of a prefill of 128 tokens went into the selections). Equal as long as each row of scores has a visible column,
since the number dwarfs any score; attention where a token sees itself has one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from exporters.passes.base import Graphs, Outcome
from exporters.passes.nodes import dims, initializer, number, take_place
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
        assert hidden is not None
        key = (hidden, number(lowest) or 0.0)
        if key not in biases:
            biases[key] = _bias(graph, node)
        added = ir.node("Add", [scores, biases[key]], metadata_props=dict(node.metadata_props))
        take_place(graph, node, added)
    if found:
        yield Hit(NAME, graph.name or "", True, f"{len(found)} selections are additions of {len(biases)} masks")


def _hides(node: ir.Node) -> bool:
    """Does this Where hide columns from a softmax, with a mask that is smaller than the scores?"""
    hidden, lowest, scores = node.inputs
    largest = number(lowest)
    if largest is None or largest > DWARFS or not dims(hidden):
        return False
    smaller = len(dims(scores)) == len(dims(hidden)) and dims(hidden) != dims(scores)
    return smaller and _feeds_softmax(node.outputs[0])


def _feeds_softmax(value: ir.Value) -> bool:
    """Do all uses end in a softmax, perhaps after other columns were joined to these?"""
    nodes = [usage.node for usage in value.uses()]
    return bool(nodes) and not value.is_graph_output() and all(map(_is_softmax, nodes))


def _is_softmax(node: ir.Node) -> bool:
    return node.op_type == "Softmax" or (node.op_type == "Concat" and _feeds_softmax(node.outputs[0]))


def _bias(graph: ir.Graph, node: ir.Node) -> ir.Value:
    hidden, lowest, _ = node.inputs
    assert hidden is not None
    assert lowest is not None
    assert lowest.const_value is not None
    dtype = lowest.const_value.dtype.numpy()
    zero = initializer(graph, f"zero_{dtype.name}", np.zeros((), dtype))
    made = ir.node("Where", [hidden, lowest, zero], metadata_props=dict(node.metadata_props))
    made.outputs[0].type, made.outputs[0].shape = lowest.type, hidden.shape
    graph.insert_before(node, made)
    return made.outputs[0]
