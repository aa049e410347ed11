"""scale: a constant factor of a projection becomes part of its weights.

Given                                              Becomes
  q = x W_q            split into heads              q = x (c W_q)
  a = (q + u) c                                      a = q + (c u)
  b = (q + v) c                                      b = q + (c v)

A product with a factor of its own leaves the fast path of runtimes that is made for one row. Exact up to the
rounding of c W, and for a factor that is a power of two, as 1/sqrt(64), exactly. Refused, quietly, where some
use of the product is not scaled by the same factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from exporters.passes.base import Graphs, Outcome
from mscompile.contracts import Hit, StreamSpec

NAME = "scale"
WHY = "a constant factor of a projection is multiplied into its weights once, at export"

THROUGH = ("Reshape", "Transpose", "Identity")


class _Unscaled(Exception):
    """A use that is not scaled by the same factor."""


@dataclass
class _Reach:
    """What follows a product up to its scaling: the Mul nodes, and the constants added on the way."""

    factor: float | None = None
    scaled: list[ir.Node] = field(default_factory=list)
    added: list[tuple[ir.Node, int]] = field(default_factory=list)


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    return Outcome(spec, tuple(hit for model in graphs.values() for hit in _apply(model.graph)))


def _apply(graph: ir.Graph) -> Iterator[Hit]:
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None:
            continue
        reach = _Reach()
        try:
            _follow(node.outputs[0], reach)
        except _Unscaled:
            continue
        if reach.factor is None or not reach.scaled:
            continue
        factor = reach.factor
        node.replace_input_with(1, _scaled(graph, weight, factor))
        for added, index in reach.added:
            constant = added.inputs[index]
            assert constant is not None
            added.replace_input_with(index, _scaled(graph, constant, factor))
        for multiplied in reach.scaled:
            source = next(value for value in multiplied.inputs if value is not None and value.const_value is None)
            multiplied.outputs[0].replace_all_uses_with(source)
            graph.remove(multiplied, safe=True)
        place = node.metadata_props.get("module") or node.name or "?"
        yield Hit(NAME, f"{graph.name}: {place}", True, f"the factor {factor:g} is part of the weights")


def _follow(value: ir.Value, reach: _Reach) -> None:
    """Every use of `value`, up to the Mul by one and the same scalar."""
    if value.is_graph_output() or not value.uses():
        raise _Unscaled
    for usage in value.uses():
        node, other = usage.node, usage.node.inputs[1 - usage.idx] if len(usage.node.inputs) == 2 else None
        if node.op_type == "Mul" and (factor := _scalar(other)) is not None:
            if reach.factor not in (None, factor) or node.outputs[0].is_graph_output():
                raise _Unscaled
            reach.factor = factor
            reach.scaled.append(node)
        elif node.op_type == "Add" and other is not None and other.const_value is not None:
            reach.added.append((node, 1 - usage.idx))
            _follow(node.outputs[0], reach)
        elif node.op_type in THROUGH and usage.idx == 0:
            _follow(node.outputs[0], reach)
        else:
            raise _Unscaled


def _scalar(value: ir.Value | None) -> float | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().item())


def _scaled(graph: ir.Graph, value: ir.Value, factor: float) -> ir.Value:
    """A new initializer, `factor` times the old one; computed when it is written."""
    old = value.const_value
    assert old is not None
    name = f"{value.name}.scaled_{factor:g}"
    if name not in graph.initializers:

        def product() -> ir.TensorProtocol:
            numbers = old.numpy()
            return ir.tensor(numbers * np.asarray(factor, numbers.dtype), name=name)

        tensor = ir.LazyTensor(product, dtype=old.dtype, shape=old.shape, name=name)
        made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(old.dtype), shape=old.shape)
        graph.register_initializer(made)
    return graph.initializers[name]
