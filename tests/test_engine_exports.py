"""Real exports of tiny models, through every stage from tracing to engines: what is written and what it computes.

A model's graphs are traced once and shared by all tests, which is most of the time these take.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cases
import onnx
import onnx_ir as ir
import pytest
import torch

from engines import ort, trt_rtx
from engines.tensorrt_sidecar import Ranges, read_sidecar
from exporters import check, export, program, weights
from exporters.passes import table
from mscompile import codec
from mscompile.contracts import Plan, Profile, Schedule, StreamSpec
from mscompile.models.family import ReferenceModel

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = cases.TOLERANCE[torch.float32]
PROFILE = Profile(min_batch=1, max_batch=3, max_chunk=24)
CONTEXT = 40

# Wide enough that matrices are stored in weights.bin, which small tensors are not.
WIDE_XL: cases.Settings = {"d_model": 16, "d_head": 8, "d_inner": 32}
WIDE_HOURGLASS: cases.Settings = {"d_model": 16, "d_ff": 32, "context": CONTEXT}

MODELS: dict[str, cases.Settings] = {
    "rolling": {**WIDE_XL, "pre_norm": True, "same_length": True},
    "segments": {**WIDE_XL, "clamp_len": 3, "tgt_len": 6},
    **{name: {**WIDE_HOURGLASS, **settings} for name, settings in cases.KINDS.items()},
    "nested": {**WIDE_HOURGLASS, **cases.NESTED["two-valleys"]},
}
UNITS = {"rolling": 5, "segments": 6, "nested": 4}  # tokens of a memory, a segment or a period; 3 elsewhere
SLOW = ("attention+attention", "nested")
NAMES = ["rolling", "segments", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@dataclass(frozen=True)
class Export:
    """A model and its graphs, as a bundle has them."""

    name: str
    model: ReferenceModel
    stream: program.StreamProgram
    spec: StreamSpec  # after the passes
    graphs: Path

    def path(self, graph: str) -> Path:
        return self.graphs / f"{graph}.onnx"


@cache
def model(name: str) -> ReferenceModel:
    make = cases.transformer_xl if name in ("rolling", "segments") else cases.hourglass
    return make(torch.float32, **MODELS[name])


def traced(stream: program.StreamProgram, graph: str) -> ir.Model:
    """One graph, held against its spec."""
    made = export.export_graph(stream, graph)
    check.check_interface(made, stream.spec.graph(graph), "export")
    return made


@cache
def exported(name: str, directory: Path) -> Export:
    """All graphs of a model, traced once in a run of the tests."""
    stream = program.build(model(name), PROFILE)
    folder = directory / name
    folder.mkdir()
    graphs = {spec.name: traced(stream, spec.name) for spec in stream.spec.graphs}
    passed = table.run(graphs, stream.spec)
    weights.save(graphs, folder)
    return Export(name, model(name), stream, passed.spec, folder)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module", params=NAMES)
def export_of(request: pytest.FixtureRequest, directory: Path) -> Export:
    return exported(request.param, directory)


# ---- What is written --------------------------------------------------------------------------------------


def test_every_graph_passes_the_onnx_checker(export_of: Export) -> None:
    names = {spec.name for spec in export_of.spec.graphs}
    assert {path.stem for path in export_of.graphs.glob("*.onnx")} == names
    for name in names:
        check.check_file(export_of.path(name))


def stored(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and length of each tensor that a graph keeps in weights.bin."""
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == weights.FILE
            yield int(place["offset"]), int(place["length"])


def test_weights_are_stored_once(export_of: Export) -> None:
    places = {spec.name: list(stored(export_of.path(spec.name))) for spec in export_of.spec.graphs}
    content = (export_of.graphs / weights.FILE).read_bytes()
    each = {place for graph in places.values() for place in graph}
    assert len(content) < sum(length for graph in places.values() for _, length in graph)
    assert len({content[offset : offset + length] for offset, length in each}) == len(each)
    kept = sum(length for _, length in each)
    assert kept <= len(content) < kept + len(each) * weights.PAGE
    large = [parameter for parameter in export_of.model.parameters() if parameter.nbytes >= weights.INLINE_BYTES]
    assert len(large) >= 8
    assert kept < 1.5 * sum(parameter.nbytes for parameter in large)  # the rest is folded position keys


def test_graphs_do_not_tell_where_they_were_made(export_of: Export) -> None:
    private = (str(ROOT), "site-packages", "stack_trace", 'File "', '.py"')
    for path in export_of.graphs.glob("*.onnx"):
        content = path.read_bytes()
        assert not [text for text in private if text.encode() in content], path.name


def test_a_second_export_gives_the_same_bytes(export_of: Export, tmp_path: Path) -> None:
    assert contents(exported(export_of.name, tmp_path).graphs) == contents(export_of.graphs)


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib, test_engine_exports as t; t.exported('rolling', pathlib.Path(sys.argv[1]))"
    places = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": places, "PYTHONHASHSEED": "7"}  # sets have another order
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    assert contents(tmp_path / "rolling") == contents(exported("rolling", directory).graphs)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- What it computes -------------------------------------------------------------------------------------


@cache
def ort_plan(made: Export) -> Plan:
    built = made.graphs / "ort"
    built.mkdir()
    facts = ort.ENGINE.build(made.graphs, built, made.spec, PROFILE)
    assert facts["runtime"] == "onnxruntime"
    return ort.ENGINE.load(made.graphs, built, made.spec)


def chunkings(unit: int) -> list[tuple[int, ...]]:
    """Ways to feed a stream: at once, for lengths around multiples of `unit`, and in chunks of such lengths."""
    lengths = [1, *(length for k in (1, 2, 5, 7) for length in (k * unit - 1, k * unit, k * unit + 1))]
    mixed = (unit + 1, 2 * unit - 1, unit, 1, unit - 1)
    return [*((length,) for length in lengths if length <= CONTEXT), (1,) * (2 * unit + 1), mixed, mixed[::-1]]


def calls(schedule: Schedule, chunks: tuple[int, ...]) -> Iterator[int]:
    """How many tokens each call of a stream consumes."""
    position = 0
    for chunk in chunks:
        end = position + chunk
        while position < end:
            tokens = schedule.next_call(position, end - position).tokens
            yield tokens
            position += tokens


def check_streams(made: Export, batch: int) -> None:
    """Streams of all chunkings, each from a reset, against the model's own forward."""
    session = ort_plan(made).session(batch)
    schedule = made.spec.schedule
    sizes: set[int] = set()
    for seed, chunks in enumerate(chunkings(UNITS.get(made.name, 3))):
        sizes.update(calls(schedule, chunks))
        tokens = cases.tokens(batch, sum(chunks), seed)
        session.reset()
        error = cases.worst(cases.stream(session, tokens, chunks), cases.full(made.model, tokens))
        assert error <= TOLERANCE, f"chunks {chunks} are {error:.2g} away from the full forward"
    multiple = schedule.chunk_multiple
    assert len(sizes - {1, 2 * multiple, 4 * multiple}) >= 2  # prefill calls of sizes that no trace has seen


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_streams_on_onnx_runtime_equal_the_full_forward(export_of: Export, batch: int) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    check_streams(export_of, batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["average+repeat", "linear+linear", "attention-linear+attention"])
def test_every_way_to_shorten_and_upsample_runs_on_onnx_runtime(kind: str, directory: Path) -> None:
    """With attention+attention above, every kind once; all pairs are tested before the export."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    check_streams(exported(kind, directory), batch=2)


def test_tensorrt_for_rtx_builds_every_graph(export_of: Export, tmp_path: Path) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    spec = export_of.spec
    facts = trt_rtx.ENGINE.build(export_of.graphs, tmp_path, spec, PROFILE)
    assert (facts["runtime"], facts["version"]) == ("tensorrt-rtx", rtx.__version__)
    assert facts["warnings"] == {}
    assert codec.encode(facts) == facts
    sidecar = read_sidecar(trt_rtx.LIBRARY, tmp_path, spec)
    assert (sidecar.version, sidecar.ranges) == (facts["version"], Ranges.of(spec, PROFILE))
    assert list(sidecar.compute_capabilities) == facts["compute_capabilities"]
    engines = {path.stem: path.stat().st_size for path in tmp_path.glob("*.engine")}
    assert engines == facts["size_bytes"]
