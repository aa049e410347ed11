"""In which types a network computes, read from its definition before the build.

Networks are strongly typed: the builder keeps these types. A product with weights is a MATRIX_MULTIPLY whose second
input comes from a constant matrix, perhaps through layers that carry it; behind DEQUANTIZE its type is the constant's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from engines.tensorrt_library import Native

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT4": "int4",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
CARRIERS = ("SHUFFLE", "CAST", "DEQUANTIZE", "IDENTITY")


def inspected(network: Native) -> dict[str, Any]:
    """`products`: how many have which type; `float32`: the layers that are FP32; `casts`: conversions in all."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made_by = {layer.get_output(out).name: layer for layer in layers for out in range(layer.num_outputs)}
    kinds: Counter[str] = Counter()
    plain: list[str] = []
    for layer in layers:
        kind = _kind(layer, made_by)
        if kind is not None:
            kinds[kind] += 1
        if kind == "float32":
            plain.append(layer.name)
    casts = sum(layer.type.name == "CAST" for layer in layers)
    return {"products": dict(kinds), "float32": plain, "nodes": len(layers), "casts": casts}


def _kind(layer: Native, made_by: dict[str, Native]) -> str | None:
    if layer.type.name != "MATRIX_MULTIPLY":
        return None
    source, quantized = made_by.get(layer.get_input(1).name), False
    while source is not None and source.type.name in CARRIERS:
        quantized = quantized or source.type.name == "DEQUANTIZE"
        source = made_by.get(source.get_input(0).name)
    if source is None or source.type.name != "CONSTANT" or len(source.get_output(0).shape) != 2:
        return None
    tensor = source.get_output(0) if quantized else layer.get_output(0)
    kind: str = tensor.dtype.name
    return DTYPES.get(kind, kind)
