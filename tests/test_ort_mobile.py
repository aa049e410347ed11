"""Bundles in ORT format: the same logits, the operators and the sizes that a phone needs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mscompile.errors import GateFailed
from mscompile.packaging import ort_mobile
from mscompile.packaging.formats import package
from mscompile.runtime import Bundle, open_bundle


@pytest.fixture
def mobile(bundle_of: Path, tmp_path: Path) -> Path:
    return package(bundle_of, "ort-mobile", tmp_path / "mobile")


def files(mobile: Path) -> dict[str, Path]:
    return {path.stem: path for path in (mobile / "graphs").iterdir()}


def test_the_golden_rollouts_are_replayed(bundle_of: Path, mobile: Path) -> None:
    opened = open_bundle(bundle_of)
    assert set(files(mobile)) == {graph.name for graph in opened.spec.graphs}
    report = ort_mobile.verify(opened, files(mobile))
    assert report.passed, report.failures
    assert report.logit_max_abs <= 1e-4
    assert {tensor.tensor for tensor in report.tensors} >= {"logits"}


def test_the_contract_is_the_bundles(bundle_of: Path, mobile: Path) -> None:
    for name in ("manifest.json", "golden.npz", "tokenizer.json"):
        assert (mobile / name).read_bytes() == (bundle_of / name).read_bytes()


def test_sizes_are_those_of_the_files(bundle_of: Path, mobile: Path) -> None:
    facts = json.loads((mobile / "sizes.json").read_text(encoding="utf-8"))
    for graph in facts["graphs"].values():
        content = (mobile / graph["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (graph["size_bytes"], graph["sha256"])
        assert 0 < graph["weights_bytes"] < graph["size_bytes"]
    assert facts["graphs_bytes"] == sum(path.stat().st_size for path in files(mobile).values())
    assert facts["distinct_weights_bytes"] < facts["weights_bytes"]  # graphs share weights, files do not
    assert facts["state_bytes_per_stream"] == open_bundle(bundle_of).spec.bytes_per_stream()


def test_operators_are_listed_with_their_types(mobile: Path) -> None:
    lines = (mobile / ort_mobile.OPERATORS).read_text(encoding="utf-8").splitlines()
    assert [line.split(";")[0] for line in lines] == sorted(line.split(";")[0] for line in lines)
    listed = {line.split(";")[0] for line in lines}
    assert "ai.onnx" in listed <= {"ai.onnx", "com.microsoft"}
    assert any('MatMul{"inputs": {"0": ["float"]}}' in line for line in lines)


def test_a_disk_without_room_for_a_graph_is_said_so(bundle_of: Path, tmp_path: Path) -> None:
    """The room is that of a file: a process may not write more to one than a limit of its own."""
    cli = "import resource, signal; from mscompile.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    cli += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); main()"
    out = tmp_path / "mobile"
    line = [sys.executable, "-c", cli, "package", str(bundle_of), "--format", "ort-mobile", "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [f"error: cannot write {out}: Input/output error; choose another place"]
    assert list(tmp_path.iterdir()) == []


def test_graphs_of_another_model_are_not_let_through(
    bundle_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that gives other logits than the bundle's own graph."""
    untouched = ort_mobile._write_graphs

    def with_a_fault(bundle: Bundle, folder: Path) -> dict[str, Path]:
        written = untouched(bundle, folder)
        file = written["prefill"]
        content = bytearray(file.read_bytes())
        largest = max(_weights(bytes(content)), key=len)
        place = content.index(largest)
        content[place : place + len(largest)] = bytes(len(largest))
        file.write_bytes(content)
        return written

    monkeypatch.setattr(ort_mobile, "_write_graphs", with_a_fault)
    with pytest.raises(GateFailed, match="the graphs in ORT format are not those of"):
        package(bundle_of, "ort-mobile", tmp_path / "mobile")
    assert not (tmp_path / "mobile").exists()


def _weights(content: bytes) -> list[bytes]:
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    graph = InferenceSession.GetRootAs(content, 0).Model().Graph()
    return [graph.Initializers(index).RawDataAsNumpy().tobytes() for index in range(graph.InitializersLength())]
