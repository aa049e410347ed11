"""What a step must read and compute, from the graphs of a bundle: the basis of every ceiling.

Bytes are those that any program must read for one call: weights and folded tables of the graph, once, whatever the
batch; of a table that is only gathered from, the rows that are gathered; and the rows of state that were written.
Writes and everything that fits caches are left out, so this is a lower bound. Needs onnx, inside functions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mscompile import bundle
from mscompile.contracts import BATCH, GraphSpec, StateSpec, StreamSpec

GATHERS = ("Gather", "GatherElements", "GatherND", "GatherBlockQuantized")
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


@dataclass(frozen=True)
class Footprint:
    """One decode step at a position, averaged over the schedule's period."""

    weight_bytes: float  # read once for all streams
    state_bytes: float  # read for each stream
    flops: float  # for each stream; multiply and add count as two

    def bytes(self, batch: int = 1) -> float:
        return self.weight_bytes + batch * self.state_bytes


def decode(path: Path, manifest: bundle.Manifest, position: int) -> Footprint:
    """The footprint of decoding one token behind `position` tokens."""
    spec, totals = manifest.spec, [0.0, 0.0, 0.0]
    for tick in spec.schedule.ticks:
        for name in (*tick.graphs, *tick.closing):
            graph = spec.graph(name)
            state = sum(state_bytes(spec, spec.state(read), position) for read in graph.reads)
            parts = (weight_bytes(path / bundle.GRAPHS, graph), state, manifest.costs.get(name, 0))
            totals = [total + tick.repeat * part for total, part in zip(totals, parts, strict=True)]
    return Footprint(*(total / spec.schedule.period for total in totals))


def state_bytes(spec: StreamSpec, state: StateSpec, position: int) -> float:
    """Bytes of one stream's state that hold something after `position` tokens."""
    share = 1.0
    if state.update == "append" and spec.max_context is not None:
        share = min(1.0, position / spec.max_context)
    return share * state.bytes_per_stream()


def weight_bytes(graphs: Path, graph: GraphSpec) -> int:
    """Bytes of constants that one call reads."""
    model = _load(graphs / f"{graph.name}.onnx")
    sizes, gathered = _sizes(model), Counter[str]()
    whole = set()
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if node.op_type in GATHERS and place == 0:
                gathered[name] += prod(_shape(model, node.output[0]) or (2**62,)) * 4
            else:
                whole.add(name)
    return sum(
        size if name in whole else min(size, gathered[name])
        for name, size in sizes.items()
        if name in whole or name in gathered
    )


def products(graphs: Path, graph: GraphSpec) -> list[tuple[int, int, int]]:
    """(rows summed over, columns, how often) of the graph's products with weights, the work that counts."""
    model = _load(graphs / f"{graph.name}.onnx")
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 2}
    found = Counter[tuple[int, int]]()
    for node in model.graph.node:
        if node.op_type in PRODUCTS and node.input[1] in shapes:
            rows, columns = shapes[node.input[1]]
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            found[(columns, rows) if transposed else (rows, columns)] += 1
    return [(rows, columns, count) for (rows, columns), count in sorted(found.items())]


def _load(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False)


def _sizes(model: Any) -> dict[str, int]:
    """Bytes of every initializer."""
    import onnx_ir

    graph = onnx_ir.serde.deserialize_model(model).graph
    return {name: int(value.const_value.nbytes) for name, value in graph.initializers.items() if value.const_value}


def _shape(model: Any, name: str) -> tuple[int, ...] | None:
    """The shape of a value for a batch of one; None where it is not known."""
    for value in (*model.graph.value_info, *model.graph.output):
        if value.name == name and value.type.tensor_type.HasField("shape"):
            sizes = [1 if dim.dim_param == BATCH else dim.dim_value for dim in value.type.tensor_type.shape.dim]
            return tuple(sizes) if all(sizes) else None
    return None
