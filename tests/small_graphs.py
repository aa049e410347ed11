"""Graphs in ONNX text for the tests of passes: names with dots, shapes inferred, weights from a seed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from mscompile.contracts import Array


def parsed(name: str, text: str, weights: Mapping[str, Array] = {}) -> ir.Model:
    """A graph from its text, in which a name such as `m.in` is written `m__in`."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]>\n{name} {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(w), key) for key, w in weights.items())
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.replace("__", ".")
    for node in proto.graph.node:
        node.input[:] = [value.replace("__", ".") for value in node.input]
        node.output[:] = [value.replace("__", ".") for value in node.output]
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = value.name.replace("__", ".")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **inputs: Array) -> dict[str, Array]:
    """The outputs on ONNX Runtime, by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feeds = {name.replace("__", "."): value for name, value in inputs.items()}
    return dict(zip(names, session.run(names, feeds), strict=True))
