"""Our own ONNX lowerings, where the stock one is larger, slower or tied to a length.

Every integer that a streaming module divides is a position, a row number or a slot: never negative. For those
ONNX's truncating Div is the floor division, and Div-Mul-Sub or Mod needs no sign correction; the stock lowering
adds six nodes of it at every use. `gather` has indices of the rank of its input, so it is one GatherElements; its
tables have far less than 2^31 entries, and indices of 4 bytes are read faster than those of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnxscript import opset20 as op


def _floor_divide(value: Any, divisor: Any) -> Any:
    return op.Div(value, op.CastLike(divisor, value))


def _remainder(value: Any, divisor: Any) -> Any:
    return op.Mod(value, op.CastLike(divisor, value))


def _gather(value: Any, dim: int, index: Any, sparse_grad: bool = False) -> Any:
    narrow: Any = op.Cast(index, to=onnx.TensorProto.INT32)
    return op.GatherElements(value, narrow, axis=dim)


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.floor_divide.default: _floor_divide,
    torch.ops.aten.remainder.Scalar: _remainder,
    torch.ops.aten.gather.default: _gather,
}
