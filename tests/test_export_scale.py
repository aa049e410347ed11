"""Large models: nothing holds a second copy of the weights, and files beyond 2 GB are written and read right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from cases import model, transformer_xl

import mscompile
from exporters import check, export, program, weights
from exporters.passes import fold
from mscompile import checkpoint
from mscompile.contracts import BATCH, Profile

ROOT = Path(mscompile.__file__).parents[1]
BILLION = 2**30


# ---- Weights stay where they are --------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="maps are read from /proc")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_is_mapped_not_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    small = transformer_xl(torch.float32)
    checkpoint.save(path, "transformer-xl", small, tuple(chr(0x100 + i) for i in range(small.config.vocab_size)))
    loaded = checkpoint.load(path).model
    ranges = [
        tuple(int(bound, 16) for bound in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for parameter in loaded.parameters():
        assert any(begin <= parameter.data_ptr() < end for begin, end in ranges)


def test_transposed_weights_are_views_shared_by_all_graphs() -> None:
    stream = program.build(model("post-norm-same-length", torch.float32), Profile(1, 3, 8))
    graphs = {graph.name: export.export_graph(stream, graph.name) for graph in stream.spec.graphs}
    fold.apply(graphs, stream.spec)
    parameters = [parameter.detach().numpy() for parameter in stream.root.parameters() if parameter.dim() == 2]
    views: dict[str, set[int]] = {}
    for name, graph in graphs.items():
        arrays = [value.const_value.numpy() for value in graph.graph.initializers.values() if value.const_value]
        views[name] = {id(array) for array in arrays if any(np.shares_memory(array, w) for w in parameters)}
        assert not [node for node in graph.graph if node.op_type == "Transpose" and node.inputs[0].is_initializer()]
    assert len(views["decode"] & views["prefill"]) >= 8  # of two layers: products of attention and feed-forward


MEASURED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import export_scale
from exporters import export, program, weights
from exporters.passes import table
from mscompile import checkpoint
from mscompile.contracts import Profile

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def stages(path, out):
    out.mkdir()
    stream = program.build(checkpoint.load(path).model, Profile(1, 1, 8), None)
    graphs = export.export_graphs(stream)
    table.run(graphs, stream.spec)
    weights.save(graphs, out)

directory = Path(sys.argv[1])
export_scale.write_checkpoint(directory / "small.safetensors", export_scale.shape(2e4))
stages(directory / "small.safetensors", directory / "small")  # imports everything
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
size = export_scale.write_checkpoint(directory / "large.safetensors", export_scale.shape(6e7))
stages(directory / "large.safetensors", directory / "large")
print((peak() - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_an_export_holds_the_weights_once(tmp_path: Path) -> None:
    """Peak memory from the checkpoint to the written graphs, of a model whose weights outweigh what tracing needs."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(ROOT / "benchmarks")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout.split()[-1]) < 1.7  # pages of the mapped checkpoint, and no second copy


# ---- One file ---------------------------------------------------------------------------------------------


def _lookup(name: str, table: np.ndarray, product: np.ndarray) -> ir.Model:
    """row (batch,) int64 -> table[row] @ product."""
    row = ir.Value(name="row", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((BATCH,)))
    constants = [
        ir.Value(name=key, const_value=ir.tensor(array, name=key), type=ir.TensorType(ir.DataType.FLOAT))
        for key, array in (("table", table), ("product", product))
    ]
    found = ir.node("Gather", [constants[0], row])
    out = ir.node("MatMul", [found.outputs[0], constants[1]])
    out.outputs[0].name, out.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    out.outputs[0].shape = ir.Shape((BATCH, product.shape[1]))
    graph = ir.Graph([row], out.outputs, nodes=[found, out], initializers=constants, opset_imports={"": 20}, name=name)
    return ir.Model(graph, ir_version=10)


@pytest.mark.slow
def test_weights_beyond_two_gigabytes(tmp_path: Path) -> None:
    """A table of 2 GiB is stored once for two graphs, and what lies behind it is found."""
    table = np.zeros((BILLION // 32, 16), np.float32)  # pages that nobody writes take no memory
    table[-1] = np.arange(16)
    random = np.random.default_rng(0)
    products = {name: random.standard_normal((16, 64), np.float32) for name in ("one", "two")}
    weights.save({name: _lookup(name, table, product) for name, product in products.items()}, tmp_path)
    assert 2 * BILLION < (tmp_path / weights.FILE).stat().st_size < 2 * BILLION + 4 * weights.PAGE
    for name, product in products.items():
        check.check_file(tmp_path / f"{name}.onnx")
        proto = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False)
        offsets = [
            int(entry.value) for tensor in proto.graph.initializer for entry in tensor.external_data
            if entry.key == "offset"
        ]  # fmt: skip
        assert max(offsets) >= 2 * BILLION
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {"row": np.array([len(table) - 1, 0])})
        assert np.allclose(out[0], np.arange(16) @ product, rtol=1e-5, atol=1e-4)
        assert (out[1] == 0).all()
    (tmp_path / weights.FILE).unlink()  # pytest keeps temporary directories
