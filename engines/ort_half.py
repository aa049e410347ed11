"""fp16 and bf16 on a CPU, which has few kernels for them: FP32 arithmetic, every result rounded to half.

Given                          Becomes
  y = Op(x, ..)   half           y' = Op(x', ..)   float32
                                 y = Cast(Cast(y', half), float32)
  weight          half           Cast(weight, float32), which the runtime computes once, when it loads

Left to itself the runtime would put casts around every operator without a kernel and then drop those that meet, and
with them the rounding. What is rounded here, and when, is what half hardware rounds that accumulates in FP32; so
parity measures the precision. It does not run faster than FP32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

HALVES = {10: "float16", 16: "bfloat16"}  # TensorProto.FLOAT16, BFLOAT16
FLOAT = 1  # TensorProto.FLOAT
# Operators that only hand on numbers that they are given, which need no second rounding.
MOVES = (
    "Concat", "Expand", "Gather", "GatherElements", "Identity", "Neg", "Relu", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze", "Where",
)  # fmt: skip


def rewrite(graphs: Path, out: Path, names: Iterable[str]) -> dict[str, str]:
    """Write `out/<name>.onnx` for each graph that computes in half; which half, by the names of those."""
    found = {name: _rewrite(graphs / f"{name}.onnx", out) for name in names}
    return {name: kind for name, kind in found.items() if kind is not None}


def relabelled(numerics: Mapping[str, Mapping[str, Any]], emulated: Mapping[str, str]) -> dict[str, Any]:
    """The facts of rewritten graphs, calling their FP32 products what they emulate."""
    found: dict[str, Any] = {}
    for name, row in numerics.items():
        if name not in emulated:
            found[name] = dict(row)
            continue
        count = row["products"].get("float32", 0)
        found[name] = {**row, "products": {emulated[name]: count}, "float32": [], "emulated": emulated[name]}
    return found


def _rewrite(path: Path, out: Path) -> str | None:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    half = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    half = {name: kind for name, kind in half.items() if kind in HALVES}
    weights = [tensor.name for tensor in graph.initializer if tensor.data_type in HALVES]
    if not half and not weights:
        return None
    kind = next(iter(half.values()), FLOAT)
    nodes = [onnx.helper.make_node("Cast", [name], [f"{name}.float"], to=FLOAT) for name in weights]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in weights:
                node.input[index] = f"{name}.float"
        nodes += _rounding(node, half)
    del graph.node[:]
    graph.node.extend(nodes)
    for value in graph.value_info:
        if value.name in half:
            value.type.tensor_type.elem_type = FLOAT
    onnx.save(model, str(out / path.name))
    return HALVES[kind]


def _rounding(node: Any, half: Mapping[str, int]) -> Iterator[Any]:
    """The node in FP32, and the rounding of its results."""
    import onnx

    results = [(index, name) for index, name in enumerate(node.output) if name in half]
    if not results or node.op_type in MOVES:
        yield node
        return
    sources = [node.input[0]] if node.op_type == "Cast" else [f"{name}.exact" for _, name in results]
    if node.op_type != "Cast":  # a Cast to half is the rounding itself
        for (index, _), source in zip(results, sources, strict=True):
            node.output[index] = source
        yield node
    for (_, name), source in zip(results, sources, strict=True):
        yield onnx.helper.make_node("Cast", [source], [f"{name}.half"], to=half[name])
        yield onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=FLOAT)
