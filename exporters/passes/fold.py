"""fold: what depends on weights and the profile only becomes an initializer.

Given                                              Becomes
  Range -> Sin, Cos -> Concat -> MatMul(W_r)         one initializer: the position keys
  Transpose(weight)                                  the weight, stored transposed

The position keys of a memory of M rows are M x d_model numbers. A result above BUDGET elements stays a
computation: a table that large costs more to read than its product costs to compute.

A transposed weight is a view of the weight, one for all graphs, until it is written: models may be larger than
half the memory.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

from exporters.passes.base import Graphs, Outcome
from mscompile.contracts import Array, Hit, StreamSpec

NAME = "fold"
WHY = "what depends on weights and the profile only is computed once, at export"
BUDGET = 1 << 24  # elements

Views = dict[tuple[int, tuple[int, ...]], tuple[Any, Array]]  # (data, view) by id of the data and permutation


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    views: Views = {}
    return Outcome(spec, tuple(_fold(model, views) for model in graphs.values()))


def _fold(model: ir.Model, views: Views) -> Hit:
    before = model.graph.num_nodes()
    common.InlinePass()(model)
    _turn_weights(model.graph, views)
    onnxscript.optimizer.optimize_ir(model, input_size_limit=BUDGET, output_size_limit=BUDGET)
    common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)
    folded = before - model.graph.num_nodes()
    return Hit(NAME, model.graph.name or "", folded > 0, f"{before} nodes, {folded} of them folded")


def _turn_weights(graph: ir.Graph, views: Views) -> None:
    """Transpose(weight) becomes an initializer whose data is a view of the weight's."""
    for node in list(graph):
        weight, out = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Transpose" or weight is None or out.is_graph_output():
            continue
        if weight.is_initializer() and isinstance(weight.const_value, ir.Tensor):
            data = _view(weight.const_value, node, views)
            tensor = ir.Tensor(data, dtype=weight.const_value.dtype, name=out.name)
            turned = ir.Value(name=out.name, type=weight.type, shape=ir.Shape(data.shape), const_value=tensor)
            out.replace_all_uses_with(turned)
            graph.remove(node, safe=True)
            graph.register_initializer(turned)


def _view(tensor: ir.Tensor[Any], node: ir.Node, views: Views) -> Array:
    """The tensor's data with the axes of a Transpose, the same array for the same data."""
    axes = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(tensor.shape))[::-1]
    key = (id(tensor.raw), tuple(axes))
    if key not in views:
        views[key] = (tensor.raw, tensor.numpy().transpose(axes))
    return views[key][1]
