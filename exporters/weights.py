"""One weights file for all graphs of a bundle.

Tensors of equal dtype, shape and bytes are stored once, however many graphs use them. Offsets are multiples
of the page size for large tensors, so that runtimes can map them, and of 64 bytes for small ones. Tensors
below INLINE_BYTES stay inside the graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

FILE = "weights.bin"
INLINE_BYTES = 1024
PAGE, LINE = 4096, 64


def save(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write `<name>.onnx` for each model, and their weights, into an existing directory."""
    stored: dict[tuple[str, tuple[int, ...], str], int] = {}
    with (directory / FILE).open("wb") as file:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and tensor.nbytes >= INLINE_BYTES:
                    value.const_value = _externalize(tensor, file, stored, directory)
    for name, model in models.items():
        ir.save(model, directory / f"{name}.onnx")


def _externalize(
    tensor: ir.TensorProtocol,
    file: BinaryIO,
    stored: dict[tuple[str, tuple[int, ...], str], int],
    directory: Path,
) -> ir.ExternalTensor:
    content = tensor.tobytes()
    shape = tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]
    key = (tensor.dtype.name, shape, hashlib.sha256(content).hexdigest())
    if key not in stored:
        alignment = PAGE if len(content) >= PAGE else LINE
        file.write(b"\0" * (-file.tell() % alignment))
        stored[key] = file.tell()
        file.write(content)
    return ir.ExternalTensor(
        FILE, stored[key], len(content), tensor.dtype, shape=ir.Shape(shape), name=tensor.name or "", base_dir=directory
    )
