"""TensorRT for RTX builds for real here, without a GPU; what needs one runs on stand-ins for CUDA and the engines."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import cuda, tensorrt_load, tensorrt_sidecar, trt, trt_rtx
from engines.tensorrt_device import DeviceExecutor
from engines.tensorrt_library import Library, messages
from engines.tensorrt_sidecar import Ranges
from mscompile.contracts import (
    Array,
    GraphSpec,
    Profile,
    Schedule,
    StateSpec,
    StreamSpec,
    TensorSpec,
    Tick,
)
from mscompile.errors import EngineError, EngineUnavailable, InputError

WIDTH, SLOTS, VOCAB = 4, 6, 8
MEMORY = StateSpec("memory", "float32", ("batch", SLOTS, WIDTH))
ROWS = StateSpec("rows", "float32", ("batch", 8, WIDTH), update="append", time_axis=1)
PROFILE = Profile(min_batch=1, max_batch=4, max_chunk=13)


def graph_spec(name: str, tokens: int | str) -> GraphSpec:
    inputs = (TensorSpec("tokens", "int64", ("batch", tokens)), TensorSpec("position", "int64", ("batch",)))
    logits = TensorSpec("logits", "float32", ("batch", tokens, VOCAB))
    written = ROWS.as_output("chunk/3") if tokens == "chunk" else MEMORY.as_output()
    return GraphSpec(
        name, (*inputs, MEMORY.as_input()), (logits, written), ("memory",), (written.name.removesuffix(".out"),), tokens
    )


SPEC = StreamSpec(
    states=(MEMORY, ROWS),
    graphs=(graph_spec("decode", 1), graph_spec("prefill", "chunk")),
    schedule=Schedule((Tick(("decode",), repeat=3),), prefill="prefill", chunk_multiple=3, max_chunk=13),
    vocab_size=VOCAB,
    max_batch=4,
)


def write_graph(folder: Path, graph: GraphSpec, *extra: onnx.NodeProto) -> None:
    """An ONNX file with the graph's interface, its weights in weights.bin."""
    random = np.random.default_rng(0)
    weights = {
        "embedding": random.standard_normal((VOCAB, WIDTH)).astype(np.float32),
        "head": random.standard_normal((WIDTH, VOCAB)).astype(np.float32),
        "axes": np.array([1, 2]),
        "axis": np.array([2]),
        "starts": np.array([1]),
        "ends": np.array([SLOTS]),
        "time": np.array([1]),
        "groups": np.array([0, -1, 3, WIDTH]),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "tokens"], ["x"]),
        helper.make_node("ReduceMean", ["memory.in", "time"], ["mean"], keepdims=1),
        helper.make_node("Add", ["x", "mean"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "head"], ["scores"]),
        helper.make_node("Cast", ["position"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["count", "axes"], ["counts"]),
        helper.make_node("Add", ["scores", "counts"], ["logits"], name="/head/Add"),
        *extra,
    ]
    if graph.tokens == "chunk":
        nodes.append(helper.make_node("Reshape", ["x", "groups"], ["grouped"]))
        nodes.append(helper.make_node("ReduceMean", ["grouped", "axis"], ["rows.out"], keepdims=0))
    else:
        nodes.append(helper.make_node("Slice", ["memory.in", "starts", "ends", "time"], ["kept"]))
        nodes.append(helper.make_node("Concat", ["kept", "x"], ["memory.out"], axis=1))
    made = helper.make_graph(
        nodes,
        graph.name,
        [_info(tensor) for tensor in graph.inputs],
        [_info(tensor) for tensor in graph.outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / f"{graph.name}.onnx", save_as_external_data=True, location="weights.bin")


def _info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        tensor.name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.shape
    )


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    folder = tmp_path / "graphs"
    folder.mkdir()
    for graph in SPEC.graphs:
        write_graph(folder, graph)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "engines"
    folder.mkdir()
    return folder


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)


def with_graphs(*graphs: GraphSpec) -> StreamSpec:
    return StreamSpec(SPEC.states, graphs, SPEC.schedule, SPEC.vocab_size, SPEC.max_batch)


# ---- Builds, for real -------------------------------------------------------------------------------------


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def test_build_writes_engines_and_a_sidecar(rtx: Any, graphs: Path, out: Path) -> None:
    facts = trt_rtx.ENGINE.build(graphs, out, SPEC, PROFILE)
    assert sorted(path.name for path in out.iterdir()) == ["decode.engine", "engine.json", "prefill.engine"]
    assert all((out / f"{name}.engine").read_bytes()[:4] == b"vtrt" for name in ("decode", "prefill"))
    sizes = {name: (out / f"{name}.engine").stat().st_size for name in ("decode", "prefill")}
    targets = ["SM80", "SM86", "SM89", "SM120", "SM121"]
    made = {"runtime": "tensorrt-rtx", "version": rtx.__version__, "compute_capabilities": targets}
    numerics = facts.pop("numerics")
    assert facts == {**made, "size_bytes": sizes, "warnings": {}}
    assert {name: row["products"] for name, row in numerics.items()} == {
        "decode": {"float32": 1},
        "prefill": {"float32": 1},
    }
    assert json.loads(json.dumps(facts)) == facts

    sidecar = json.loads((out / "engine.json").read_text())
    prefill = sidecar["graphs"].pop("prefill")
    assert sidecar["graphs"]["decode"]["file"] == "decode.engine"
    del sidecar["graphs"]
    assert sidecar == {"schema": 1, **made, "ranges": {"batch": [1, 1, 4], "chunk": [3, 12, 12], "context": [1, 1, 1]}}
    assert prefill.pop("layers") > 5
    memory = {"min": [1, 6, 4], "opt": [1, 6, 4], "max": [4, 6, 4]}
    assert prefill == {
        "file": "prefill.engine",
        "size_bytes": sizes["prefill"],
        "warnings": [],
        "inputs": [
            {
                "name": "tokens",
                "dtype": "int64",
                "shape": ["batch", "chunk"],
                "profile": {"min": [1, 3], "opt": [1, 12], "max": [4, 12]},
            },
            {"name": "position", "dtype": "int64", "shape": ["batch"], "profile": {"min": [1], "opt": [1], "max": [4]}},
            {"name": "memory.in", "dtype": "float32", "shape": ["batch", 6, 4], "profile": memory},
        ],
        "outputs": [
            {"name": "logits", "dtype": "float32", "shape": ["batch", "chunk", 8]},
            {"name": "rows.out", "dtype": "float32", "shape": ["batch", "chunk/3", 4]},
        ],
    }
    read = tensorrt_sidecar.read_sidecar(trt_rtx.LIBRARY, out, SPEC)
    assert read == tensorrt_sidecar.Sidecar(rtx.__version__, tuple(targets), Ranges((1, 1, 4), (3, 12, 12)))


def changed(graph: GraphSpec, **fields: Any) -> GraphSpec:
    return GraphSpec(**{**{name: getattr(graph, name) for name in GraphSpec.__dataclass_fields__}, **fields})


DECODE = SPEC.graphs[0]
MISFITS = {
    "missing": (
        changed(DECODE, inputs=(*DECODE.inputs, TensorSpec("due", "bool", ("batch",)))),
        "input due is missing",
    ),
    "extra": (changed(DECODE, outputs=DECODE.outputs[:1]), "output memory.out is not in the spec"),
    "dtype": (
        changed(DECODE, inputs=(TensorSpec("tokens", "int32", ("batch", 1)), *DECODE.inputs[1:])),
        "input tokens is int64, not int32",
    ),
    "static size": (
        changed(DECODE, outputs=(DECODE.outputs[0], TensorSpec("memory.out", "float32", ("batch", 7, 4)))),
        r"output memory.out has shape \(-1, 6, 4\), not \(batch, 7, 4\)",
    ),
    "static where dynamic": (
        changed(DECODE, inputs=(TensorSpec("tokens", "int64", ("batch", "chunk")), *DECODE.inputs[1:])),
        r"input tokens has shape \(-1, 1\), not \(batch, chunk\)",
    ),
    "rank": (
        changed(DECODE, inputs=(DECODE.inputs[0], TensorSpec("position", "int64", ("batch", 1)), DECODE.inputs[2])),
        r"input position has shape \(-1\), not \(batch, 1\)",
    ),
}


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("case", MISFITS)
def test_a_graph_that_is_not_its_spec_is_refused(case: str, graphs: Path, out: Path) -> None:
    graph, reason = MISFITS[case]
    with pytest.raises(EngineError, match=f"decode.onnx is not the graph that its spec describes: {reason}$"):
        trt_rtx.ENGINE.build(graphs, out, with_graphs(graph), PROFILE)
    assert not list(out.iterdir())


@pytest.mark.usefixtures("rtx")
def test_an_unsupported_operator_is_named_with_its_node(graphs: Path, out: Path) -> None:
    write_graph(graphs, DECODE, helper.make_node("NonZero", ["x"], ["where"], name="/memory/NonZero"))
    with pytest.raises(EngineError, match=r"refuses decode.onnx: node '/memory/NonZero' \(NonZero\): "):
        trt_rtx.ENGINE.build(graphs, out, SPEC, PROFILE)


@pytest.mark.usefixtures("rtx")
def test_a_graph_that_parses_but_does_not_build_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, graphs: Path, out: Path
) -> None:
    monkeypatch.setattr(trt_rtx, "targets", lambda _: ("SM75",))
    with pytest.raises(EngineError, match=r"cannot build decode.onnx: .*FP32 GEMM is not supported"):
        trt_rtx.ENGINE.build(graphs, out, SPEC, PROFILE)


@pytest.mark.usefixtures("rtx")
def test_a_damaged_or_missing_graph_file_is_refused(graphs: Path, out: Path) -> None:
    (graphs / "decode.onnx").write_bytes(b"not protobuf")
    with pytest.raises(EngineError, match=r"the parser refuses decode\.onnx: "):
        trt_rtx.ENGINE.build(graphs, out, SPEC, PROFILE)
    (graphs / "decode.onnx").unlink()
    with pytest.raises(EngineError, match=r"decode\.onnx is missing in "):
        trt_rtx.ENGINE.build(graphs, out, SPEC, PROFILE)


def test_a_capability_that_the_library_does_not_know_is_refused(rtx: Any) -> None:
    strange = SimpleNamespace(
        __version__=rtx.__version__, ComputeCapability=SimpleNamespace(__members__={"SM90": rtx.ComputeCapability(90)})
    )
    config = rtx.Builder(messages(rtx)).create_builder_config()
    with pytest.raises(EngineError, match="does not build for SM90"):
        trt_rtx._aim(strange, config)


PROFILES = {
    "batch": (Profile(min_batch=5, max_batch=4), SPEC, "its batch sizes are 5, 5, 4"),
    "zero": (Profile(min_batch=0, max_batch=4), SPEC, "its batch sizes are 0, 0, 4"),
    "chunk": (
        PROFILE,
        StreamSpec((), (), Schedule(SPEC.schedule.ticks, "prefill", chunk_multiple=8, max_chunk=4), 8, 4),
        "its chunk sizes are 8, 0, 0",
    ),
    "spec": (Profile(max_batch=2), SPEC, "batches up to 4, its engine profile ends at 2"),
}


@pytest.mark.parametrize("case", PROFILES)
def test_an_impossible_profile_is_refused(case: str) -> None:
    profile, spec, reason = PROFILES[case]
    with pytest.raises(EngineError, match=reason):
        Ranges.of(spec, profile)


@pytest.mark.usefixtures("rtx")
def test_a_profile_that_the_builder_refuses_is_an_engine_error(
    monkeypatch: pytest.MonkeyPatch, graphs: Path, out: Path
) -> None:
    wrong = {"min": [3, 1], "opt": [1, 1], "max": [4, 1]}
    monkeypatch.setattr(Ranges, "shapes", lambda *_: wrong)
    with pytest.raises(EngineError, match=r"decode\.onnx.*MIN<=OPT<=MAX"):
        trt_rtx.ENGINE.build(graphs, out, SPEC, PROFILE)


def test_expected_warnings_are_dropped_and_others_passed_on(rtx: Any, caplog: pytest.LogCaptureFixture) -> None:
    log = messages(rtx)
    assert messages(rtx) is log
    log.take()
    with caplog.at_level(logging.WARNING):
        log.log(rtx.ILogger.Severity.WARNING, "ModelImporter.cpp:1071: Make sure input tokens has Int64 binding.")
        log.log(rtx.ILogger.Severity.WARNING, "weights are clipped\n")
        log.log(rtx.ILogger.Severity.INFO, "chatter")
        log.log(rtx.ILogger.Severity.ERROR, "broken")
    assert [record.getMessage() for record in caplog.records] == ["tensorrt_rtx: weights are clipped\n"]
    assert log.take() == (["broken"], ["weights are clipped"])
    assert log.take() == ([], [])


# ---- The sidecar ------------------------------------------------------------------------------------------


@pytest.fixture
def built(out: Path) -> Path:
    """A directory as `build` leaves it, with engines that no machine can read."""
    ranges = Ranges.of(SPEC, PROFILE)
    rows = {}
    for graph in SPEC.graphs:
        (out / f"{graph.name}.engine").write_bytes(b"vtrt....")
        rows[graph.name] = tensorrt_sidecar.described(graph, ranges) | {"size_bytes": 8, "layers": 9, "warnings": []}
    content = {
        "schema": 1,
        "runtime": "tensorrt-rtx",
        "version": "1.7",
        "compute_capabilities": ["SM86", "SM89"],
        "ranges": {word: list(sizes) for word, sizes in asdict(ranges).items()},
        "graphs": rows,
    }
    (out / "engine.json").write_text(json.dumps(content))
    return out


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        *parents, last = path.split("/")
        for name in parents:
            content = content[name]
        content[last] = value

    return change


CORRUPTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "schema": (_set("schema", 2), "schema: wanted 1, found 2"),
    "runtime": (_set("runtime", "tensorrt"), "runtime: wanted tensorrt-rtx, found tensorrt"),
    "field": (lambda content: content.pop("version"), "fields: wanted "),
    "no schema": (lambda content: content.pop("schema"), "'schema' is missing"),
    "ranges": (_set("ranges/chunk", [3, 12, 15]), "ranges: wanted "),
    "ranges type": (_set("ranges/batch", ["1", 1, 4]), "engine.json is damaged"),
    "ranges order": (_set("ranges/batch", [8, 8, 4]), "1 <= min <= opt <= max"),
    "graph": (lambda content: content["graphs"].pop("decode"), "graphs: wanted "),
    "row": (_set("graphs/decode/extra", 1), "fields of graph decode: wanted "),
    "dtype": (lambda content: content["graphs"]["decode"]["inputs"][0].update(dtype="int32"), "inputs of graph decode"),
    "profile": (
        lambda content: content["graphs"]["decode"]["inputs"][0]["profile"].update(max=[9, 1]),
        "inputs of graph decode",
    ),
    "outputs": (lambda content: content["graphs"]["prefill"]["outputs"].pop(), "outputs of graph prefill"),
    "escape": (_set("graphs/decode/file", "../decode.engine"), "file of graph decode: wanted decode.engine"),
    "size": (_set("graphs/decode/size_bytes", 9), "size of decode.engine: wanted 9, found 8"),
    "not an object": (_set("graphs", []), "engine.json is damaged"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_a_corrupted_sidecar_is_refused(case: str, built: Path) -> None:
    change, reason = CORRUPTIONS[case]
    content = json.loads((built / "engine.json").read_text())
    change(content)
    (built / "engine.json").write_text(json.dumps(content))
    with pytest.raises(EngineError, match=reason):
        trt_rtx.ENGINE.load(built, built, SPEC)


def test_missing_or_broken_files_are_refused(built: Path) -> None:
    (built / "prefill.engine").unlink()
    with pytest.raises(EngineError, match=r"cannot be read: .*prefill\.engine"):
        trt_rtx.ENGINE.load(built, built, SPEC)
    (built / "engine.json").write_text("{")
    with pytest.raises(EngineError, match=r"engine\.json is damaged or of another version"):
        trt_rtx.ENGINE.load(built, built, SPEC)
    (built / "engine.json").unlink()
    with pytest.raises(EngineError, match=r"engine\.json cannot be read"):
        trt_rtx.ENGINE.load(built, built, SPEC)


# ---- What is missing here ---------------------------------------------------------------------------------


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert trt_rtx.ENGINE.cannot_build() == "TensorRT for RTX is not installed: pip install 'mscompile[trt-rtx]'"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert trt.ENGINE.cannot_build() == (
        "TensorRT is not installed: pip install 'mscompile[trt]'; or use --target trt-rtx, which builds without a GPU, "
        "or --target ort, which needs none at all"
    )
    with pytest.raises(EngineUnavailable, match="TensorRT is not installed"):
        trt.ENGINE.build(Path(), Path(), SPEC, PROFILE)


def test_a_library_that_fails_to_import_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("import tensorrt_libraries_that_are_missing")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    reason = trt.LIBRARY.missing()
    assert reason == (
        "TensorRT is installed but does not import: No module named 'tensorrt_libraries_that_are_missing'"
    )


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_trt_points_to_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4"))
    assert trt.ENGINE.cannot_build() == (
        "TensorRT builds on the GPU that will run the engine, and no NVIDIA driver is installed (libcuda.so.1 was not "
        "found); use --target trt-rtx, which builds without a GPU, or --target ort, which needs none at all"
    )


@pytest.mark.usefixtures("no_gpu", "rtx")
def test_without_a_gpu_rtx_builds_but_does_not_run(built: Path) -> None:
    sentence = (
        "TensorRT for RTX engines run on an NVIDIA GPU only: no NVIDIA driver is installed (libcuda.so.1 was not "
        "found); the engine 'ort' runs on this machine"
    )
    assert trt_rtx.ENGINE.cannot_build() is None
    assert trt_rtx.ENGINE.cannot_run() == sentence
    with pytest.raises(EngineUnavailable) as caught:
        trt_rtx.ENGINE.load(built, built, SPEC)
    assert str(caught.value) == sentence


class FakeDriver:
    """libcuda with GPUs of these compute capabilities."""

    def __init__(self, *capabilities: tuple[int, int], status: int = 0) -> None:
        self.capabilities, self.status = capabilities, status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status + flags

    def cuDeviceGetCount(self, answer: Any) -> int:  # noqa: N802
        answer._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, answer: Any, ordinal: int) -> int:  # noqa: N802
        answer._obj.value = ordinal
        return 0

    def cuDeviceGetAttribute(self, answer: Any, attribute: int, device: int) -> int:  # noqa: N802
        answer._obj.value = self.capabilities[device][attribute - 75]
        return 0


def test_the_driver_tells_compute_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver((8, 9), (12, 0)))
    assert cuda.devices() == ("SM89", "SM120")
    assert cuda.device_count() == 2
    for driver in (FakeDriver(), FakeDriver(status=100)):
        monkeypatch.setattr(ctypes, "CDLL", lambda _, driver=driver: driver)
        with pytest.raises(EngineUnavailable, match="the NVIDIA driver sees no GPU"):
            cuda.devices()
        assert cuda.device_count() == 0
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver(status=999))
    with pytest.raises(EngineUnavailable, match=r"does not start \(error 999\)"):
        cuda.devices()


@pytest.mark.usefixtures("rtx")
def test_a_gpu_that_rtx_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver((9, 0)))
    monkeypatch.setattr(Library, "cuda", lambda _: None)
    assert trt_rtx.ENGINE.cannot_run() == (
        "TensorRT for RTX runs FP32 engines on SM80, SM86, SM89, SM120, SM121 and this GPU is SM90; "
        "use the engine 'trt' or 'ort'"
    )


# ---- Loading and running, on stand-ins --------------------------------------------------------------------


class FakeCuda:
    """cuda.bindings.runtime over host memory; `broken` names a call that fails."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.broken = ""
        self.streams = 0

    def _status(self, call: str) -> int:
        return 2 if call == self.broken else 0

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, f"error {status}".encode()

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        self.streams += 1
        return self._status("cudaStreamCreate"), 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == 7
        self.streams -= 1
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == 7
        return (self._status("cudaStreamSynchronize"),)

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        buffer = ctypes.create_string_buffer(b"\xff" * size, size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return self._status("cudaMalloc"), ctypes.addressof(buffer)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.memory[address]
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        device = target if kind == 1 else source
        assert size <= len(self.memory[device])
        assert stream == 7
        ctypes.memmove(target, source, size)
        return (self._status("cudaMemcpyAsync"),)


class FakeEngine:
    """Engine and context in one: `memory.out = memory.in + 1`, `logits = tokens + position`, on the addresses given."""

    def __init__(self, graph: GraphSpec) -> None:
        self.graph = graph
        self.tensors = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
        self.num_io_tensors = len(self.tensors)
        self.addresses: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.accepts = True

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def create_execution_context(self) -> FakeEngine:
        return FakeEngine(self.graph)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return (index, stream) == (0, 7)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name == "tokens":
            self.sizes = {"batch": shape[0], "chunk": shape[1]}
        return self.accepts and shape == self.tensors[name].concrete(**self.sizes)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].concrete(**self.sizes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def _array(self, name: str) -> Array:
        tensor = self.tensors[name]
        shape, dtype = tensor.concrete(**self.sizes), np.dtype(tensor.dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        memory: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.addresses[name]))
        return memory.view(dtype).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        tokens, position = self._array("tokens"), self._array("position")
        self._array("logits")[...] = (tokens + position[:, None])[:, :, None]
        if "memory.out" in self.tensors:
            self._array("memory.out")[...] = self._array("memory.in") + 1
        else:
            self._array("rows.out")[...] = 5
        return True


class FakeLog:
    def take(self) -> tuple[list[str], list[str]]:
        return ["out of memory"], []


def fake_runtime(version: str = "1.7", readable: bool = True) -> Any:
    """A module whose Runtime reads the graphs of SPEC in order."""

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.graphs = iter(SPEC.graphs)

        def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
            assert data == b"vtrt...."
            return FakeEngine(next(self.graphs)) if readable else None

    return SimpleNamespace(
        __name__=f"fake {version}",
        __version__=version,
        Runtime=Runtime,
        ILogger=type("ILogger", (), {}),
        ComputeCapability=SimpleNamespace(__members__=["SM86", "SM89"]),
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver((8, 9)))
    monkeypatch.setattr(Library, "cuda", lambda _: cuda)
    monkeypatch.setattr(Library, "load", lambda _: fake_runtime())
    return cuda


def test_a_plan_streams_on_a_device(gpu: FakeCuda, built: Path) -> None:
    plan = trt_rtx.ENGINE.load(built, built, SPEC)
    session = plan.session(batch=2)
    tokens = np.arange(14).reshape(2, 7) % VOCAB
    logits = session.step(tokens)  # a prefill call of 6 tokens and a tick
    assert logits.shape == (2, 7, VOCAB)
    np.testing.assert_array_equal(logits[:, :6, 0], tokens[:, :6])
    np.testing.assert_array_equal(logits[:, 6, 0], tokens[:, 6] + 6)
    state = session.state()
    assert (state.states["memory"] == 1).all()
    assert (state.states["rows"][:, :2] == 5).all()
    assert (state.states["rows"][:, 2:] == 0).all()
    session.step(tokens[:, :2])
    assert (session.state().states["memory"] == 3).all()
    other = plan.session(batch=1)
    other.step([[1]])
    assert (other.state().states["memory"] == 1).all()
    del session, other, plan
    gc.collect()
    assert (gpu.memory, gpu.streams) == ({}, 0)


def test_the_batch_must_be_in_the_profile(gpu: FakeCuda, built: Path) -> None:
    plan = trt_rtx.ENGINE.load(built, built, SPEC)
    for batch in (0, 5):
        with pytest.raises(InputError, match=f"batch {batch} is "):
            plan.session(batch)
    assert not gpu.memory


def test_engines_of_another_version_gpu_or_graph_are_refused(
    gpu: FakeCuda, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not gpu.memory
    monkeypatch.setattr(Library, "load", lambda _: fake_runtime("1.8"))
    with pytest.raises(EngineUnavailable, match=r"built by TensorRT for RTX 1\.7 and 1\.8 is installed.*rtx==1\.7"):
        trt_rtx.ENGINE.load(built, built, SPEC)
    monkeypatch.setattr(Library, "load", lambda _: fake_runtime(readable=False))
    with pytest.raises(EngineError, match=r"decode\.engine cannot be read on this GPU: it gives no reason"):
        trt_rtx.ENGINE.load(built, built, SPEC)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver((12, 0)))
    with pytest.raises(EngineUnavailable, match="this GPU is SM120 and these engines were built for SM86, SM89"):
        tensorrt_load.load(trt_rtx.LIBRARY, built, SPEC, None)
    reader = SimpleNamespace(deserialize_cuda_engine=lambda _: FakeEngine(SPEC.graphs[1]))
    with pytest.raises(EngineError, match=r"decode\.engine is of another graph: its tensors are logits, memory\.in"):
        tensorrt_load._deserialize(reader, built / "decode.engine", DECODE, FakeLog())


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_cuda_errors_are_engine_errors(call: str, gpu: FakeCuda, built: Path) -> None:
    session = trt_rtx.ENGINE.load(built, built, SPEC).session()
    gpu.broken = call
    with pytest.raises(EngineError, match=f"{call} failed: error 2"):
        session.step([[1]])


def test_a_call_that_the_engine_refuses_gives_its_reason(gpu: FakeCuda) -> None:
    executor = DeviceExecutor(gpu, FakeLog(), {"decode": FakeEngine(DECODE)})
    executor._contexts["decode"].accepts = False
    inputs = {tensor.name: np.zeros(tensor.concrete(batch=1), tensor.dtype) for tensor in DECODE.inputs}
    outputs = {tensor.name: np.zeros(tensor.concrete(batch=1), tensor.dtype) for tensor in DECODE.outputs}
    with pytest.raises(EngineError, match=r"decode: the engine refuses shape \(1, 1\) of tokens: out of memory"):
        executor.bind("decode", inputs, outputs)()
    executor._contexts["decode"].accepts = True
    short = {**outputs, "logits": np.zeros((1, 1, 3), np.float32)}
    with pytest.raises(EngineError, match=r"logits has shape \(1, 1, 8\) where the spec says \(1, 1, 3\)"):
        executor.bind("decode", inputs, short)()
    strided = {**inputs, "memory.in": np.zeros((1, WIDTH, SLOTS), np.float32).transpose(0, 2, 1)}
    with pytest.raises(EngineError, match=r"memory\.in must be contiguous"):
        executor.bind("decode", strided, outputs)


@pytest.mark.gpu
@pytest.mark.usefixtures("rtx")
def test_a_built_engine_runs_where_a_gpu_is_present(graphs: Path, out: Path) -> None:
    if reason := trt_rtx.ENGINE.cannot_run():
        pytest.skip(reason)
    trt_rtx.ENGINE.build(graphs, out, SPEC, PROFILE)
    session = trt_rtx.ENGINE.load(graphs, out, SPEC).session(batch=2)
    logits = session.step(np.ones((2, 7), np.int64))
    assert np.isfinite(logits).all()
