"""What a graph costs to run once: multiply-adds of its matrix products, as a graph, or before there is one."""

from __future__ import annotations

import re
from math import prod

import onnx_ir as ir
import torch
from torch.utils.flop_counter import FlopCounterMode

from exporters.program import Streaming
from mscompile.contracts import BATCH, Schedule

PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")


def flops(model: ir.Model) -> int:
    """Floating-point operations of one call on one stream: two for each multiply-add.

    For graphs whose only symbolic dimension is the batch.
    """
    return sum(2 * prod(_sizes(node.outputs[0])) * _depth(node) for node in _products(model))


def eager_flops(stream: Streaming) -> dict[str, int]:
    """Floating-point operations of each graph that consumes one token or none, for one stream, before any pass.

    Run in PyTorch once and counted there. Passes leave work out: these are an upper bound of what an engine does.
    """
    counted = {}
    for spec in stream.spec.graphs:
        if spec.tokens in (0, 1):
            given = [
                torch.zeros(tensor.concrete(batch=1), dtype=getattr(torch, tensor.dtype)) for tensor in spec.inputs
            ]
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                stream.graphs[spec.name](*given)
            counted[spec.name] = counter.get_total_flops()
    return counted


def per_token(costs: dict[str, int], schedule: Schedule) -> float:
    """The operations of a token, averaged over the period."""
    ticks = [(tick.repeat, (*tick.graphs, *tick.closing)) for tick in schedule.ticks]
    return sum(repeat * sum(costs[name] for name in names) for repeat, names in ticks) / schedule.period


def _products(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type in PRODUCTS]


def _depth(node: ir.Node) -> int:
    """The length of the axis that is summed over."""
    first = node.inputs[0]
    assert first is not None
    transposed = node.op_type == "Gemm" and (attribute := node.attributes.get("transA")) and attribute.as_int()
    return _sizes(first)[0 if transposed else -1]


def _sizes(value: ir.Value) -> list[int]:
    if value.shape is None:
        raise ValueError(f"{value.name} has no shape, so its cost is unknown")
    return [dim if isinstance(dim, int) else _of_one_stream(str(dim.value), value.name) for dim in value.shape]


def _of_one_stream(dim: str, name: str | None) -> int:
    """A symbolic size for a batch of one; rows that were folded into the batch make it "2*batch", for example."""
    match = re.fullmatch(rf"(?:(\d+)\*)?{BATCH}", dim)
    if match is None:
        raise ValueError(f"{name} has the symbolic size {dim}, so its cost is unknown")
    return int(match[1] or 1)
