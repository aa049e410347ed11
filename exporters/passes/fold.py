"""fold: what depends on weights and the profile only becomes an initializer.

Given                                              Becomes
  Range -> Sin, Cos -> Concat -> MatMul(W_r)         one initializer: the position keys
  Transpose(weight)                                  the weight, stored transposed

The position keys of a memory of M rows are M x d_model numbers. A result above BUDGET elements stays a
computation: a table that large costs more to read than its product costs to compute.
"""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

from exporters.passes.base import Graphs, Outcome
from mscompile.contracts import Hit, StreamSpec

NAME = "fold"
WHY = "what depends on weights and the profile only is computed once, at export"
BUDGET = 1 << 24  # elements


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    return Outcome(spec, tuple(_fold(model) for model in graphs.values()))


def _fold(model: ir.Model) -> Hit:
    before = model.graph.num_nodes()
    onnxscript.optimizer.optimize_ir(model, input_size_limit=BUDGET, output_size_limit=BUDGET)
    common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)
    folded = before - model.graph.num_nodes()
    return Hit(NAME, model.graph.name or "", folded > 0, f"{before} nodes, {folded} of them folded")
