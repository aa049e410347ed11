"""layout: with one token, nothing has to be moved, and products with constants read rows as they lie.

Given                                              Becomes
1. (B, 1, H d) -> Reshape (B, 1, H, d)             (B, 1, H d) -> Reshape (B, H, 1, d)
               -> Transpose (B, H, 1, d)
2. a (B, H, 1, d) times constant W (H, d, D)       W' (H, D, d) times a' (B, H, d, 1) -> Reshape (B, H, 1, D)

The time axis of one token has one row, so a transposition past it is a reshape, and reshapes in a row are one.
A product of one row takes as long as reading its constant: W' = W^T is read in order, W in d strides (1.1 to 1.3
times slower for the position keys of 512 rows and 64 columns, ONNX Runtime on an AVX-512 CPU).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from exporters.passes.base import Graphs, Outcome
from exporters.passes.nodes import Dims, changed, constant, dims, take_place
from mscompile.contracts import Hit, StreamSpec

NAME = "layout"
WHY = "with one token, heads are not moved, and position keys are read row by row"


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    single = [graphs[graph.name] for graph in spec.graphs if graph.tokens == 1]
    return Outcome(spec, tuple(hit for model in single for hit in _apply(model)))


def _apply(model: ir.Model) -> Iterator[Hit]:
    graph = model.graph
    moved = [node for node in graph if node.op_type == "Transpose" and _moves_nothing(node)]
    for node in moved:
        _reshape_instead(graph, node, node.inputs[0])
    turned = [node for node in graph if node.op_type == "MatMul" and _is_row_times_constant(node)]
    for node in turned:
        _turn(graph, node)
    while sum(_pass_addition(graph, node) or _merge(graph, node) for node in list(graph)):
        pass
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    if moved:
        yield Hit(NAME, graph.name or "", True, f"{len(moved)} transpositions are reshapes")
    if turned:
        yield Hit(NAME, graph.name or "", True, f"{len(turned)} constants are read row by row")


def _behind_batch(shape: Dims) -> list[int] | None:
    """Sizes of all axes but the first, which may be the batch; None if another one is unknown."""
    sizes = [dim for dim in shape[1:] if isinstance(dim, int)]
    return sizes if shape and len(sizes) == len(shape) - 1 else None


def _moves_nothing(node: ir.Node) -> bool:
    """Are only axes of one row moved, and is the batch still first?"""
    shape = dims(node.inputs[0])
    order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []
    if not order or _behind_batch(shape) is None:
        return False
    long = [axis for axis in order if shape[axis] != 1]
    return order[0] == 0 and long == sorted(long)


def _is_row_times_constant(node: ir.Node) -> bool:
    row, matrix = node.inputs
    shape = dims(row)
    is_constant = matrix is not None and matrix.const_value is not None and len(dims(matrix)) == 3
    return is_constant and len(shape) == 4 and shape[2] == 1 and _behind_batch(shape) is not None


def _turn(graph: ir.Graph, node: ir.Node) -> None:
    """a W -> (W^T a^T)^T, where both transpositions of the one row are reshapes."""
    row, matrix, out = node.inputs[0], node.inputs[1], node.outputs[0]
    assert matrix is not None
    assert matrix.shape is not None
    batch, head, _, depth = dims(row)
    heads, inner, width = (int(dim) for dim in matrix.shape)  # type: ignore[arg-type]
    column = _reshaped(graph, node, row, [batch, head, depth, 1])
    rows = changed(graph, matrix, "rows", lambda numbers: np.swapaxes(numbers, 1, 2), [heads, width, inner])
    made = ir.node("MatMul", [rows, column], metadata_props=dict(node.metadata_props))
    made.outputs[0].type, made.outputs[0].shape = out.type, ir.Shape([batch, head, width, 1])
    graph.insert_before(node, made)
    _reshape_instead(graph, node, made.outputs[0])


def _pass_addition(graph: ir.Graph, node: ir.Node) -> bool:
    """Reshape(x + c) -> Reshape(x) + Reshape(c) for a constant c, so that reshapes meet."""
    added = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
    if added is None or added.op_type != "Add" or len(added.outputs[0].uses()) != 1:
        return False
    bias = next((value for value in added.inputs if value is not None and value.const_value is not None), None)
    given = next((value for value in added.inputs if value is not None and value.const_value is None), None)
    sizes = _behind_batch(dims(node.outputs[0]))
    if bias is None or given is None or sizes is None or dims(bias) != [1, *(_behind_batch(dims(given)) or [])]:
        return False
    shape = [1, *sizes]
    turned = changed(graph, bias, f"as_{'_'.join(map(str, shape))}", lambda numbers: numbers.reshape(shape), shape)
    moved = _reshaped(graph, node, given, dims(node.outputs[0]))
    take_place(graph, node, ir.node("Add", [moved, turned], metadata_props=dict(added.metadata_props)))
    return True


def _merge(graph: ir.Graph, node: ir.Node) -> bool:
    """Reshape(Reshape(x)) -> Reshape(x)."""
    before = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
    if before is None or before.op_type != "Reshape":
        return False
    given, wanted = dims(before.inputs[0]), dims(node.outputs[0])
    if given[:1] != wanted[:1] or _behind_batch(given) is None or _behind_batch(wanted) is None:
        return False
    _reshape_instead(graph, node, before.inputs[0])
    return True


def _reshape_instead(graph: ir.Graph, node: ir.Node, value: ir.Value | None) -> None:
    """`node` gives way to a Reshape of `value` to its output's shape."""
    sizes = _behind_batch(dims(node.outputs[0])) or []
    made = ir.node("Reshape", [value, constant(graph, [0, *sizes])], metadata_props=dict(node.metadata_props))
    take_place(graph, node, made)


def _reshaped(graph: ir.Graph, node: ir.Node, value: ir.Value | None, shape: Dims) -> ir.Value:
    """`value` in another shape, made before `node`."""
    sizes = _behind_batch(shape) or []
    made = ir.node("Reshape", [value, constant(graph, [0, *sizes])], metadata_props=dict(node.metadata_props))
    made.outputs[0].type = None if value is None else value.type
    made.outputs[0].shape = ir.Shape(shape)
    graph.insert_before(node, made)
    return made.outputs[0]
