"""A graph against its GraphSpec: what the exporter or a pass may have dropped, frozen or renamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from mscompile.contracts import Dim, GraphSpec, TensorSpec
from mscompile.errors import ExportError


def check_interface(model: ir.Model, spec: GraphSpec, stage: str) -> None:
    """Names, order, dtypes and shapes of inputs and outputs are those of the spec. Raises ExportError."""
    faults = [
        *_compare("input", model.graph.inputs, spec.inputs),
        *_compare("output", model.graph.outputs, spec.outputs),
    ]
    if faults:
        raise ExportError(f"graph {spec.name} after {stage} does not keep its contract: {'; '.join(faults)}")


def check_file(path: Path) -> None:
    """The written file, external data included, passes the ONNX checker with shape inference."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"{path.name} does not pass the ONNX checker: {reason}") from error


def _compare(kind: str, found: Sequence[ir.Value], wanted: Sequence[TensorSpec]) -> list[str]:
    names, expected = [value.name for value in found], [tensor.name for tensor in wanted]
    if names != expected:
        missing = [name for name in expected if name not in names]
        extra = [name for name in names if name not in expected]
        return [f"{kind}s are {names}, wanted {expected} (missing {missing}, extra {extra})"]
    faults = []
    for value, tensor in zip(found, wanted, strict=True):
        dtype = value.dtype.numpy().name if value.dtype is not None else "unknown"
        if dtype != tensor.dtype:
            faults.append(f"{kind} {tensor.name} is {dtype}, wanted {tensor.dtype}")
        shape = _shape(value)
        if shape != tensor.shape:
            faults.append(f"{kind} {tensor.name} has shape {shape}, wanted {tensor.shape}")
    return faults


def _shape(value: ir.Value) -> tuple[Dim | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
