"""Where a graph's time goes, by kind of work and by operator:

    python benchmarks/profile_graph.py BUNDLE [--graph prefill]

Runs ONNX Runtime's own profiler on one graph of a bundle, with its states and tokens, and adds up the operators'
times. Bytes are those of the constants that a kind of operator reads, operations those of its products. Times are of a
profiled run, which is slower than a bare one: read them as shares.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import typer
from rich.console import Console
from rich.table import Table

from mscompile import bench
from mscompile.contracts import POSITION, TOKENS, TensorSpec
from mscompile.runtime import Bundle, open_bundle

PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulBnb4")
COPIES = (
    "Concat", "Slice", "Split", "Transpose", "Gather", "GatherElements", "GatherND", "Expand", "Pad", "Tile",
    "ScatterElements", "ScatterND", "ReorderInput", "ReorderOutput", "MemcpyToHost", "MemcpyFromHost",
)  # fmt: skip
RUNS = 30


@dataclass
class Work:
    """One operator, or one kind of work, in one run of the graph."""

    calls: float = 0.0
    ms: float = 0.0
    constant_bytes: int = 0
    flops: int = 0
    operators: dict[str, float] = field(default_factory=dict)


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle with an ONNX Runtime engine.")],
    graph: Annotated[str, typer.Option(help="The graph to run.")] = "decode",
    position: Annotated[int, typer.Option(help="Tokens before the call.")] = 1024,
    chunk: Annotated[int, typer.Option(help="Tokens of the call, where the graph takes many.")] = 128,
    batch: Annotated[int, typer.Option(help="Streams.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    opened = open_bundle(bundle, hash_files=False)
    found = profile(opened, graph, position, chunk, batch)
    result = {
        "bundle": opened.manifest.name,
        "graph": graph,
        "tokens": chunk if isinstance(opened.spec.graph(graph).tokens, str) else 1,
        "kinds": {name: asdict(work) for name, work in found.items()},
        "machine": bench.machine(),
    }
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    Console(width=120).print(shown(found, f"{opened.manifest.name}, {graph}"))


def profile(opened: Bundle, graph: str, position: int, chunk: int, batch: int) -> dict[str, Work]:
    """Work by kind, the most time first, as averages over RUNS runs after as many to warm up."""
    spec = opened.spec.graph(graph)
    path = opened.path / "graphs" / f"{graph}.onnx"
    sizes = {"batch": batch, "chunk": chunk, "context": position}
    inputs = {tensor.name: _value(tensor, opened, sizes) for tensor in spec.inputs}
    with tempfile.TemporaryDirectory() as directory:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = bench.threads()
        options.optimized_model_filepath = str(Path(directory, "optimized.onnx"))
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(directory, "profile"))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(2 * RUNS):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        model = onnx.load(directory + "/optimized.onnx", load_external_data=False)
    return by_kind(events, model)


def _value(tensor: TensorSpec, opened: Bundle, sizes: Mapping[str, int]) -> np.ndarray:
    shape = tensor.concrete(**sizes)
    random = np.random.default_rng(0)
    if tensor.name == TOKENS:
        return random.integers(0, opened.spec.vocab_size, shape)
    if tensor.name == POSITION:
        return np.full(shape, sizes["context"], np.int64)
    return random.standard_normal(shape).astype(tensor.dtype)


def by_kind(events: list[dict[str, Any]], model: onnx.ModelProto) -> dict[str, Work]:
    """Sums of the profiler's node events, second half of the runs only."""
    constants = {tensor.name: _nbytes(tensor) for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    kernels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kernels[event["name"].removesuffix("_kernel_time")].append(event)
    found: dict[str, Work] = defaultdict(Work)
    for name, runs in kernels.items():
        node, last = nodes.get(name), runs[len(runs) // 2 :]
        operator = last[0]["args"]["op_name"]
        read = sum(constants.get(given, 0) for given in node.input) if node else 0
        ms = sum(event["dur"] for event in last) / len(last) / 1e3
        work = found[kind(operator, read)]
        work.calls += 1
        work.ms += ms
        work.operators[operator] = work.operators.get(operator, 0.0) + ms
        work.constant_bytes += read
        work.flops += _flops(operator, last[0]["args"])
    return dict(sorted(found.items(), key=lambda pair: -pair[1].ms))


def kind(operator: str, constant_bytes: int) -> str:
    """The kind of work an operator does."""
    if operator in PRODUCTS:
        return "products with weights" if constant_bytes else "attention products"
    if operator in COPIES:
        return "copies"
    if "LayerNorm" in operator:
        return "layer norms"
    if operator == "Softmax":
        return "softmax"
    return "small operators"


def _flops(operator: str, arguments: Mapping[str, Any]) -> int:
    """Two for each multiply-add of a product, from the shapes that ran."""
    if operator not in PRODUCTS:
        return 0
    first = _shape(arguments["input_type_shape"][0])
    output = _shape(arguments["output_type_shape"][0])
    return 2 * prod(output) * first[-1]


def _shape(typed: Mapping[str, list[int]]) -> list[int]:
    return next(iter(typed.values()))


def _nbytes(tensor: onnx.TensorProto) -> int:
    halves = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    bits = 4 if tensor.data_type in halves else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return prod(tensor.dims) * bits // 8


def shown(found: Mapping[str, Work], title: str) -> Table:
    """One line a kind."""
    table = Table(title=title, title_justify="left")
    for column in ("kind", "calls", "ms", "share", "MB of constants", "GB/s", "MFLOP", "GFLOP/s", "operators, ms"):
        table.add_column(column, justify="left" if column in ("kind", "operators, ms") else "right")
    total = sum(work.ms for work in found.values())
    for name, work in found.items():
        most = sorted(work.operators.items(), key=lambda pair: -pair[1])[:5]
        table.add_row(
            name,
            f"{work.calls:.0f}",
            f"{work.ms:.3f}",
            f"{100 * work.ms / total:.0f} %",
            f"{work.constant_bytes / 1e6:.1f}",
            f"{work.constant_bytes / work.ms / 1e6:.1f}" if work.constant_bytes and work.ms else "",
            f"{work.flops / 1e6:.1f}",
            f"{work.flops / work.ms / 1e6:.1f}" if work.flops and work.ms else "",
            ", ".join(f"{operator} {ms:.2f}" for operator, ms in most),
        )
    table.add_row("all", f"{sum(work.calls for work in found.values()):.0f}", f"{total:.3f}")
    return table


if __name__ == "__main__":
    typer.run(main)
