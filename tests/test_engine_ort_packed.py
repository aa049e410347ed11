"""Packed weights: one copy in one file for all graphs, mapped, and the same results."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import mscompile
from engines import ort, ort_packed
from engines.ort import CONFIG, ENGINE
from exporters import weights
from mscompile.contracts import BATCH, GraphSpec, Profile, Schedule, StreamSpec, TensorSpec, Tick
from mscompile.errors import BundleError, EngineError

ROOT = Path(mscompile.__file__).parents[1]
WIDTH, LAYERS = 1024, 8
WEIGHTS_BYTES = LAYERS * WIDTH * WIDTH * 4
NAMES = ("one", "two", "three")


def spec() -> StreamSpec:
    x, y = (TensorSpec(name, "float32", (BATCH, WIDTH)) for name in ("x", "y"))
    graphs = tuple(GraphSpec(name, (x,), (y,), (), (), 1) for name in NAMES)
    return StreamSpec((), graphs, Schedule((Tick(("one",)),)), 2, 1)


def graph(name: str, products: list[np.ndarray]) -> ir.Model:
    """x -> tanh(x W_0) -> tanh(... W_1) -> ..."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((BATCH, WIDTH)))
    constants = [ir.Value(name=f"w{i}", const_value=ir.tensor(w, name=f"w{i}")) for i, w in enumerate(products)]
    nodes, last = [], x
    for weight in constants:
        nodes += [ir.node("MatMul", [last, weight])]
        nodes += [ir.node("Tanh", [nodes[-1].outputs[0]])]
        last = nodes[-1].outputs[0]
    last.name, last.type, last.shape = "y", x.type, x.shape
    made = ir.Graph([x], [last], nodes=nodes, initializers=constants, opset_imports={"": 20}, name=name)
    return ir.Model(made, ir_version=10)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """graphs/ and engines/ort/ of three graphs that multiply by the same weights, in different orders."""
    directory = tmp_path_factory.mktemp("packed")
    random = np.random.default_rng(0)
    products = [random.standard_normal((WIDTH, WIDTH), np.float32) / 30 for _ in range(LAYERS)]
    (directory / "graphs").mkdir()
    (directory / "ort").mkdir()
    orders = (products, products[::-1], products[2:] + products[:2])
    weights.save({name: graph(name, order) for name, order in zip(NAMES, orders, strict=True)}, directory / "graphs")
    ENGINE.build(directory / "graphs", directory / "ort", spec(), Profile())
    return directory


def run(plan: object, name: str, x: np.ndarray) -> np.ndarray:
    (y,) = plan.sessions[name].run(None, {"x": x})  # type: ignore[attr-defined]
    return np.asarray(y)


def test_every_weight_is_packed_once(bundle: Path) -> None:
    made = sorted(path.relative_to(bundle / "ort").as_posix() for path in (bundle / "ort").rglob("*") if path.is_file())
    assert made == [CONFIG, *sorted(f"packed/{name}" for name in ("one.onnx", "three.onnx", "two.onnx", "weights.bin"))]
    size = (bundle / "ort/packed/weights.bin").stat().st_size
    assert 2 * WEIGHTS_BYTES <= size <= 2.05 * WEIGHTS_BYTES  # unpacked and packed


def test_packed_graphs_compute_the_same(bundle: Path) -> None:
    x = np.random.default_rng(1).standard_normal((3, WIDTH), np.float32)
    packed = ENGINE.load(bundle / "graphs", bundle / "ort", spec())
    facts = json.loads((bundle / "ort" / CONFIG).read_text())
    elsewhere = bundle / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / CONFIG).write_text(json.dumps(facts | {"packed_for": "another processor"}))
    plain = ENGINE.load(bundle / "graphs", elsewhere, spec())
    results = {name: run(plain, name, x) for name in NAMES}
    assert np.ptp(results["one"]) > 0.1
    assert not np.allclose(results["one"], results["two"], atol=1e-3)
    for name, wanted in results.items():
        assert (run(packed, name, x) == wanted).all()


def test_building_again_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    ENGINE.build(bundle / "graphs", tmp_path, spec(), Profile())
    for path in (bundle / "ort").rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(bundle / "ort")).read_bytes() == path.read_bytes(), path.name


def test_an_engine_of_another_processor_runs_the_graphs_of_the_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(bundle / "ort" / CONFIG, tmp_path / CONFIG)  # no packed graphs here: opening them would fail
    with pytest.raises(mscompile.MsCompileError):
        ENGINE.load(bundle / "graphs", tmp_path, spec())
    monkeypatch.setattr(ort_packed, "environment", lambda: "onnxruntime 1.99, riscv64, 0123456789abcdef")
    assert ENGINE.load(bundle / "graphs", tmp_path, spec()).sessions.keys() == set(NAMES)


def test_a_damaged_record_is_named(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(BundleError, match=r"engine\.json is damaged"):
        ENGINE.load(bundle / "graphs", tmp_path, spec())


OPENING = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_engine_ort_packed import ENGINE, NAMES, WIDTH, run, spec
import numpy as np

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

ENGINE.cannot_run()
before = anonymous()
plan = ENGINE.load(Path(sys.argv[1]), Path(sys.argv[2]), spec())
for name in NAMES:
    run(plan, name, np.zeros((1, WIDTH), np.float32))
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_open_graphs_hold_no_copy_of_the_weights(bundle: Path) -> None:
    """Memory of the process's own; the packed weights are pages of the file, which all graphs share."""

    def grown(engine: Path) -> int:
        command = [sys.executable, "-c", OPENING, str(bundle / "graphs"), str(engine), str(ROOT / "tests")]
        # Buffers that are freed go back to the system at once, so that what remains is what is held.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    plain = bundle / "plain"
    plain.mkdir()
    (plain / CONFIG).write_text("{}")
    assert grown(bundle / "ort") < 0.5 * WEIGHTS_BYTES
    assert grown(plain) > 2.5 * WEIGHTS_BYTES  # a packed copy each: what the files avoid


def test_a_full_disk_is_told_from_a_graph_that_cannot_be_loaded(bundle: Path, tmp_path: Path) -> None:
    graphs, one = bundle / "graphs", spec().graphs[0]
    (tmp_path / "one.onnx").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not save what it made of one\.onnx") as full:
        ort._open(graphs / "one.onnx", graphs, one, ort.CPU, tmp_path)
    assert full.value.errno == errno.EIO
    (broken := tmp_path / "broken.onnx").write_bytes((graphs / "one.onnx").read_bytes()[:200])
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load broken\.onnx"):
        ort._open(broken, graphs, one, ort.CPU, tmp_path)
