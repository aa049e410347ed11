"""What ONNX Runtime really runs: the products with weights of a graph as the runtime has optimised it.

    MatMulNBits                                      weights as integers of so many bits, read by the kernel
    DynamicQuantizeMatMul, MatMulInteger, ...        products of 8-bit integers
    MatMul, Gemm and their fused forms               in the type of their weights; float32 where the weights are
                                                     dequantized or cast first, in each step

Read from the graph that a session writes when it is created.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

INTEGER = ("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat")
FLOAT = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "TransposeMatMul")
CARRIERS = ("DequantizeLinear", "Cast", "Transpose", "Identity")  # what may stand between weights and a product


def inspected(path: Path) -> dict[str, Any]:
    """`products`: how many run in which type; `float32`: the nodes that run in FP32; `casts`: of half tensors."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    kinds: Counter[str] = Counter()
    plain: list[str] = []
    for node in graph.node:
        kind = _kind(node, weights, made_by)
        if kind is not None:
            kinds[kind] += 1
        if kind == "float32":
            plain.append(node.name)
    casts = sum(node.op_type == "Cast" for node in graph.node)
    return {"products": dict(kinds), "float32": plain, "nodes": len(graph.node), "casts": casts}


def _kind(node: Any, weights: Any, made_by: Any) -> str | None:
    """The type in which a node multiplies by weights; None if it does not."""
    if node.op_type == "MatMulNBits":
        bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
        return f"int{bits}"
    if node.op_type in INTEGER:
        return "int8-dynamic"
    if node.op_type not in FLOAT:
        return None
    name = node.input[1]
    while name not in weights and name in made_by and made_by[name].op_type in CARRIERS:
        name = made_by[name].input[0]
    if name not in weights or len(weights[name].dims) != 2:
        return None
    import onnx

    stored = onnx.helper.tensor_dtype_to_np_dtype(weights[name].data_type).name
    return stored if name == node.input[1] and stored.startswith(("float", "bfloat")) else "float32"
