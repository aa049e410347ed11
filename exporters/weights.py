"""One weights file for all graphs of a bundle.

Tensors of equal dtype, shape and bytes are stored once, however many graphs use them. Offsets are multiples
of the page size for large tensors, so that runtimes can map them, and of 64 bytes for small ones. Tensors
below INLINE_BYTES stay inside the graph.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

FILE = "weights.bin"
INLINE_BYTES = 1024
PAGE, LINE = 4096, 64


def save(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write `<name>.onnx` for each model, and their weights, into an existing directory.

    One tensor at a time: no more than one is ever copied.
    """
    with (directory / FILE).open("wb") as file:
        stored = _Stored(file, directory)
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and tensor.nbytes >= INLINE_BYTES:
                    value.const_value = stored.reference(tensor, value.name or "")
    for name, model in models.items():
        ir.save(model, directory / f"{name}.onnx")


class _Stored:
    """What the file holds so far: where each content begins, and which data was found to be which."""

    def __init__(self, file: BinaryIO, directory: Path) -> None:
        self._file, self._directory = file, directory
        self._offsets: dict[tuple[str, tuple[int, ...], str], int] = {}  # by dtype, shape, sha256
        self._known: dict[int, tuple[Any, int]] = {}  # (data, its offset) by id of the data

    def reference(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        """The same tensor in the file; what several graphs share is read once."""
        data = tensor.raw if isinstance(tensor, ir.Tensor) else tensor
        if id(data) not in self._known:
            self._known[id(data)] = (data, self._write(tensor))
        offset = self._known[id(data)][1]
        shape = ir.Shape(_sizes(tensor))
        return ir.ExternalTensor(
            FILE, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=self._directory
        )

    def _write(self, tensor: ir.TensorProtocol) -> int:
        """The offset of the tensor's content, which is written unless it is there."""
        content = _content(tensor)
        key = (tensor.dtype.name, _sizes(tensor), hashlib.sha256(content).hexdigest())
        if key not in self._offsets:
            alignment = PAGE if tensor.nbytes >= PAGE else LINE
            self._file.write(b"\0" * (-self._file.tell() % alignment))
            self._offsets[key] = self._file.tell()
            self._file.write(content)
        return self._offsets[key]


def _sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]


def _content(tensor: ir.TensorProtocol) -> memoryview | bytes:
    """The bytes of a tensor as ONNX stores them, copied only where they do not lie so in memory."""
    if not isinstance(tensor, ir.Tensor) or tensor.dtype.bitwidth < 8 or sys.byteorder != "little":
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
