"""fp16, bf16: weights and arithmetic in 16 bits, with islands of FP32.

Given                        Becomes
  y = Op(x, W)   FP32          y = Op(Cast(x), W)       in half; casts appear only where the type changes
  y = Softmax(x)               y = Softmax(Cast(x))     an island: FP32 in, FP32 out

Islands are: operators that sum over many numbers and then divide (SUMS), operators that do not take the type, hard
decisions (DECISIONS) with all that they are made from, back to the nearest product and with it, since what is close
there must not change places, and every node one of whose tensors came within SAFETY of the largest finite number in
calibration rollouts. Inputs and outputs of a graph keep their types, so logits and states stay FP32; positions and
indices are integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from exporters.passes.base import Graphs
from exporters.precision.base import Request
from exporters.precision.products import initializer, products
from mscompile.contracts import Hit, StreamSpec

SUMS = ("Softmax", "LogSoftmax", "LayerNormalization", "ReduceMean", "ReduceSum", "CumSum", "AveragePool")
DECISIONS = (
    *("TopK", "ArgMax", "ArgMin", "Round", "Floor", "Ceil", "Sign"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
)
DECIDES = "a hard decision is made from it"  # the reason of such an island, which a failed gate repeats
PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum")
SAFETY = 8.0
FLOAT = ir.DataType.FLOAT


def apply(graphs: Graphs, request: Request, name: str, kind: ir.DataType) -> tuple[StreamSpec, tuple[Hit, ...]]:
    """All graphs in `kind`. `request.ranges` tells the largest magnitude of each value in each graph."""
    hits: list[Hit] = []
    for graph, model in graphs.items():
        hits += _Halved(model, kind, request.ranges[graph]).hits(name)
    return request.spec, tuple(hits)


class _Halved:
    """One graph on its way to half precision, node by node in order."""

    def __init__(self, model: ir.Model, kind: ir.DataType, ranges: Mapping[str, float]) -> None:
        self.model, self.kind, self.ranges = model, kind, ranges
        self.limit = float(kind.max) / SAFETY
        self.cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.islands: dict[str, list[str]] = {}  # reason -> operators
        self.decisive = frozenset(_decisive(model))
        outputs = list(model.graph.outputs)
        for node in list(model.graph):
            self._convert(node)
        for index, value in enumerate(outputs):
            if value.dtype == kind:
                self._restore(index, value)
        common.RemoveUnusedNodesPass()(model)

    def hits(self, name: str) -> Iterator[Hit]:
        where = self.model.graph.name or ""
        count = sum(product.value.dtype == self.kind for product in products(self.model))
        yield Hit(name, where, count > 0, f"{count} products with weights in {self.kind.name.lower()}")
        for reason, operators in self.islands.items():
            told = ", ".join(f"{number} {operator}" for operator, number in Counter(operators).items())
            yield Hit(name, where, False, f"{told} in FP32: {reason}")

    def _convert(self, node: ir.Node) -> None:
        floats = [index for index, value in enumerate(node.inputs) if value is not None and self._is_float(value)]
        results = [value for value in node.outputs if value.dtype == FLOAT]
        if not floats and not (node.op_type == "Cast" and results):
            return  # whole numbers, or floats made from them, which their readers convert
        reason = self._island(node)
        if reason and results:
            self.islands.setdefault(reason, []).append(node.op_type)
        target = FLOAT if reason else self.kind
        for index in floats:
            value = node.inputs[index]
            assert value is not None
            node.replace_input_with(index, self._as(value, target, node))
        if node.op_type == "Cast" and results:
            node.attributes["to"] = ir.AttrInt64("to", int(target))
        for value in results:
            value.type = ir.TensorType(target)

    def _is_float(self, value: ir.Value) -> bool:
        return value.dtype in (FLOAT, self.kind)

    def _island(self, node: ir.Node) -> str | None:
        """Why a node computes in FP32; None if it does not."""
        if node in self.decisive:
            return DECIDES
        if node.op_type in SUMS:
            return "it divides by sums over many numbers"
        if not _takes(node, self.kind, self.model.opset_imports[""]):
            return f"the operator does not take {self.kind.name.lower()}"
        largest = max((self._largest(value) for value in (*node.inputs, *node.outputs) if value is not None), default=0)
        return f"numbers came near the largest of {self.kind.name.lower()}" if largest > self.limit else None

    def _largest(self, value: ir.Value) -> float:
        if value.const_value is not None and self._is_float(value):
            numbers = np.abs(value.const_value.numpy().astype(np.float32))
            return float(np.max(numbers, initial=0.0, where=np.isfinite(numbers)))
        return self.ranges.get(value.name or "", 0.0)

    def _as(self, value: ir.Value, target: ir.DataType, reader: ir.Node) -> ir.Value:
        """`value` in another type: constants at once, the rest by one Cast for all readers."""
        if value.dtype == target:
            return value
        key = (value, target)
        if key not in self.cast:
            self.cast[key] = self._converted(value, target, reader)
        return self.cast[key]

    def _converted(self, value: ir.Value, target: ir.DataType, reader: ir.Node) -> ir.Value:
        name = f"{value.name}.{target.name.lower()}"
        if value.const_value is not None:
            numbers = value.const_value.numpy().astype(target.numpy())
            return initializer(self.model.graph, name, ir.Tensor(numbers, dtype=target))
        node = ir.node("Cast", [value], {"to": target}, metadata_props=dict(reader.metadata_props))
        node.outputs[0].name, node.outputs[0].shape = name, value.shape
        node.outputs[0].type = ir.TensorType(target)
        self.model.graph.insert_before(reader, [node])
        return node.outputs[0]

    def _restore(self, index: int, value: ir.Value) -> None:
        """Graph output `index` in FP32 again, under its name."""
        node = ir.node("Cast", [value], {"to": FLOAT})
        name, value.name = value.name, f"{value.name}.{self.kind.name.lower()}"
        node.outputs[0].name, node.outputs[0].shape = name, value.shape
        node.outputs[0].type = ir.TensorType(FLOAT)
        self.model.graph.append(node)
        self.model.graph.outputs[index] = node.outputs[0]


def _decisive(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes that decide something by floats, and all that make these floats, back to the nearest products."""
    decisions = [node for node in model.graph if node.op_type in DECISIONS]
    todo = [node for node in decisions if any(value is not None and value.dtype == FLOAT for value in node.inputs)]
    seen = set(todo)
    yield from todo
    while todo:
        node = todo.pop()
        if node.op_type in PRODUCTS:
            continue
        makers = [value.producer() for value in node.inputs if value is not None and value.dtype == FLOAT]
        new = {maker for maker in makers if maker is not None} - seen
        seen |= new
        todo += new
        yield from new


def _takes(node: ir.Node, kind: ir.DataType, opset: int) -> bool:
    """Does the operator's definition allow the type wherever it allows float?"""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    wanted, usual = f"tensor({kind.name.lower()})", "tensor(float)"
    return all(wanted in row.allowed_type_strs for row in schema.type_constraints if usual in row.allowed_type_strs)
