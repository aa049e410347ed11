"""Work in forked processes: results, failures, and what is left when the parent is interrupted or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from cases import model

import mscompile
from exporters import export, forked, program
from mscompile.contracts import Profile
from mscompile.errors import ExportError

ROOT = Path(mscompile.__file__).parents[1]
FORKS = pytest.mark.skipif(sys.platform != "linux", reason="work is forked on Linux only")

# Two workers that would go on for a minute; each says its process number when it begins.
WORKING = """
import os, sys, time
from exporters import forked

def work(name):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once: an unbuffered print writes the end of the line apart
    time.sleep(60)
    return b""

forked.processors = lambda: 2
forked.run(["a", "b"], work, lambda name: None)
"""


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "processors", lambda: 2)


@FORKS
@pytest.mark.usefixtures("two_processors")
def test_every_name_is_worked_on_in_a_process_of_its_own() -> None:
    begun: list[str] = []
    results = forked.run(["a", "b", "c"], lambda name: f"{name} {os.getpid()}".encode(), begun.append)
    assert begun == ["a", "b", "c"]
    words = {name: result.decode().split() for name, result in results.items()}
    assert {name: word for name, (word, _) in words.items()} == {"a": "a", "b": "b", "c": "c"}
    assert len({pid for _, pid in words.values()} | {str(os.getpid())}) == 4


@FORKS
@pytest.mark.usefixtures("two_processors")
def test_work_that_fails_is_left_to_the_caller() -> None:
    def work(name: str) -> bytes:
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"good": b"done"}[name]

    assert forked.run(["good", "raises", "killed"], work, lambda _: None) == {"good": b"done"}


def test_one_processor_does_everything_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "processors", lambda: 1)
    assert forked.run(["a", "b"], lambda _: b"", lambda _: None) == {}


@FORKS
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_parent(end: signal.Signals) -> None:
    command = [sys.executable, "-c", WORKING]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(end)
        assert parent.wait(timeout=60) != 0
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if _works(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _works(pid: int) -> bool:
    """Is there such a process, other than one that nobody has waited for yet?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- Tracing ----------------------------------------------------------------------------------------------


def _bytes(graph: ir.Model) -> bytes:
    return ir.to_proto(graph).SerializeToString(deterministic=True)


@FORKS
@pytest.mark.usefixtures("two_processors")
def test_graphs_traced_apart_are_those_traced_here_and_share_the_weights() -> None:
    stream = program.build(model("post-norm-same-length", torch.float32), Profile(1, 3, 8))
    apart = export.export_graphs(stream)
    assert list(apart) == [graph.name for graph in stream.spec.graphs]
    for name, graph in apart.items():
        weights = export._tensors(stream.graphs[name])
        shared = [value.const_value for key, value in graph.graph.initializers.items() if key in weights]
        assert len(shared) > 10
        assert all(tensor.raw is weights[tensor.name] for tensor in shared if isinstance(tensor, ir.Tensor))
        here = onnx.load_from_string(_bytes(export.export_graph(stream, name)))
        assert onnx.load_from_string(_bytes(graph)) == here


@FORKS
@pytest.mark.usefixtures("two_processors")
def test_a_graph_that_cannot_be_traced_apart_raises_here(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = program.build(model("post-norm-same-length", torch.float32), Profile(1, 3, 8))

    def broken(*_: object) -> None:
        raise torch.onnx.errors.OnnxExporterError("an operator is missing")

    monkeypatch.setattr(export, "_trace", broken)
    with pytest.raises(ExportError, match="graph decode cannot be exported: an operator is missing"):
        export.export_graphs(stream)
