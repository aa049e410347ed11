"""Real exports of tiny models, through every stage from tracing to engines: what is written and what it computes.

A model's graphs are traced once and shared by all tests, which is most of the time these take.
"""

from __future__ import annotations

import os
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

from exporters import check, export, program, weights
from exporters.passes.table import PASSES
from mscompile.contracts import Profile
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
    "segments": {**WIDE_XL, "clamp_len": 3},
    **{name: {**WIDE_HOURGLASS, **settings} for name, settings in cases.KINDS.items()},
    "nested": {**WIDE_HOURGLASS, **cases.NESTED["two-valleys"]},
}
UNITS = {"rolling": 5, "segments": 4, "nested": 4}  # memory, segment or period in tokens, at which something happens
SLOW = ("attention+attention", "nested")
NAMES = ["rolling", "segments", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@dataclass(frozen=True)
class Export:
    """A model and its graphs, as a bundle has them."""

    model: ReferenceModel
    stream: program.StreamProgram
    graphs: Path

    def path(self, graph: str) -> Path:
        return self.graphs / f"{graph}.onnx"


@cache
def model(name: str) -> ReferenceModel:
    make = cases.transformer_xl if name in ("rolling", "segments") else cases.hourglass
    return make(torch.float32, **MODELS[name])


def traced(stream: program.StreamProgram, graph: str) -> ir.Model:
    """One graph after all passes, held against its spec at every stage."""
    spec = stream.spec.graph(graph)
    made = export.export_graph(stream, graph)
    check.check_interface(made, spec, "export")
    for rewrite in PASSES:
        made, _ = rewrite.apply(made)
        check.check_interface(made, spec, rewrite.name)
    return made


@cache
def exported(name: str, directory: Path) -> Export:
    """All graphs of a model, traced once in a run of the tests."""
    stream = program.build(model(name), PROFILE)
    folder = directory / name
    folder.mkdir()
    weights.save({spec.name: traced(stream, spec.name) for spec in stream.spec.graphs}, folder)
    return Export(model(name), stream, folder)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module", params=NAMES)
def export_of(request: pytest.FixtureRequest, directory: Path) -> Export:
    return exported(request.param, directory)


# ---- What is written --------------------------------------------------------------------------------------


def test_every_graph_passes_the_onnx_checker(export_of: Export) -> None:
    names = {spec.name for spec in export_of.stream.spec.graphs}
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
    places = {spec.name: list(stored(export_of.path(spec.name))) for spec in export_of.stream.spec.graphs}
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
    private = [str(ROOT), str(Path.home()), sys.prefix, os.path.dirname(torch.__file__), "stack_trace", 'File "', ".py"]
    for path in export_of.graphs.glob("*.onnx"):
        content = path.read_bytes()
        assert not [text for text in private if text.encode() in content], path.name
