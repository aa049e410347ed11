"""Graphs that tell how large their numbers get: for each float value, one more output with its largest magnitude.

Masked scores are infinite by design and do not count.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.precision.products import initializer

SUFFIX = ".largest"


def probed(model: ir.Model) -> ir.Model:
    """A copy of the graph with outputs `<value>.largest`, float32 scalars, behind its own."""
    copy = model.clone()
    graph = copy.graph
    zero = initializer(graph, "probe.zero", ir.tensor(np.zeros(1, np.float32)))
    row = initializer(graph, "probe.row", ir.tensor(np.array([-1], np.int64)))
    computed = [value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    for value in [*computed, *(given for given in graph.inputs if given.dtype == ir.DataType.FLOAT)]:
        size = ir.node("Abs", [value])
        masked = ir.node("IsInf", [size.outputs[0]])
        finite = ir.node("Where", [masked.outputs[0], zero, size.outputs[0]])
        flat = ir.node("Reshape", [finite.outputs[0], row])
        never_empty = ir.node("Concat", [flat.outputs[0], zero], {"axis": 0})
        largest = ir.node("ReduceMax", [never_empty.outputs[0]], {"keepdims": 0})
        result = largest.outputs[0]
        result.name, result.type, result.shape = f"{value.name}{SUFFIX}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.extend([size, masked, finite, flat, never_empty, largest])
        graph.outputs.append(result)
    return copy
