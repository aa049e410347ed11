"""Sweeps: plans that are refused, cells that are killed, runs that go on where they were stopped, and what is reported.

The long ones run the real thing: cells in their processes, on this machine and on a Ray cluster that they start.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import cases
import pytest
import torch
from bundles import VOCAB

import mscompile
from mscompile import checkpoint, cli
from mscompile.errors import EngineUnavailable, GateFailed, UsageError
from mscompile.sweep import local, plan, ray_cluster, report, sweeping
from mscompile.sweep.plan import Resources, Shape, Trained
from mscompile.sweep.progress import COLOURS
from mscompile.sweep.result import Figures, Result, Status, Store
from mscompile.sweep.sweeping import Outcome

ROOT = Path(mscompile.__file__).parents[1]
COMMAND = [sys.executable, "-m", "mscompile.cli", "sweep"]
GROWN_S = 900  # a busy machine may take this long for one step of a test
SMALL = """
steps = 32
[bench]
workloads = ["decode@4"]
rounds = 1
samples = 1
original = false
"""
TWELVE = f"""
checkpoints = ["one.pt", "two.pt"]
precisions = ["fp32", "fp16"]
shape = [{{ batch = "1", max_chunk = 1 }}, {{ batch = "1:2", max_chunk = 1 }},
         {{ batch = "1:2", max_chunk = 1, memory = "replace" }}]
{SMALL}"""


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with two files that are there, which is all that reading a plan asks of them."""
    for name in ("one.pt", "two.pt"):
        written(tmp_path / name, name)
    return tmp_path


@pytest.fixture
def trained_pair(tmp_path: Path) -> Path:
    """A directory with two tiny Transformer-XL checkpoints."""
    for name, mem_len in (("one", 3), ("two", 4)):
        model = cases.transformer_xl(torch.float32, vocab_size=len(VOCAB), n_layer=1, mem_len=mem_len, same_length=True)
        checkpoint.save(tmp_path / f"{name}.pt", "transformer-xl", model, VOCAB)
    return tmp_path


def cells_of(folder: Path, text: str) -> tuple[plan.Cell, ...]:
    return plan.load(written(folder / "plan.toml", text)).cells


# ---- Plans ------------------------------------------------------------------------------------------------


def test_a_plan_spans_its_cells(folder: Path) -> None:
    cells = cells_of(
        folder,
        """
        checkpoints = ["one.pt", { path = "two.pt", name = "second", family = "hourglass", tokens = "one.pt" }]
        targets = ["ort", "trt-rtx"]
        precisions = ["fp32", "int8"]
        timeout_s = 60
        [[shape]]
        batch = 4
        [[shape]]
        name = "wide"
        batch = "2:3"
        max_chunk = 16
        context = 128
        memory = "replace"
        [bench]
        batch = 3
        [target.trt-rtx]
        resources = { num_gpus = 1, accelerator_type = "RTX", custom = { fast = 0.5 } }
        """,
    )
    assert len(cells) == 2 * 2 * 2 * 2
    assert cells[0].label == "one ort fp32 1:4/512"
    assert cells[-1].label == "second trt-rtx int8 wide"
    assert cells[-1].checkpoint == Trained("second", str(folder / "two.pt"), "hourglass", None, str(folder / "one.pt"))
    assert cells[-1].shape == Shape("wide", 2, 3, 16, 128, "replace")
    assert cells[-1].resources == Resources(1.0, 1.0, "RTX", (("fast", 0.5),))
    assert cells[0].resources == Resources()
    assert len({cell.id for cell in cells}) == 16


def test_what_a_plan_leaves_out_is_as_in_export(folder: Path) -> None:
    (cell,) = cells_of(folder, 'checkpoints = ["one.pt"]')
    assert (cell.target, cell.precision, cell.steps) == ("ort", "fp32", 2048)
    assert cell.shape == Shape("1:8/512", 1, 8, 512, None, "append")


def test_names_that_a_plan_knows_are_those_of_exports() -> None:
    from exporters.precision.table import PRECISIONS
    from mscompile import pipeline

    assert set(plan.MEMORIES) == set(pipeline.MEMORIES)
    assert set(plan.TOLERANCES) == set(PRECISIONS)
    assert set(plan.RUNTIMES) == set(plan.registry.MODULES)
    assert set(pipeline.TOOLS) <= set(plan.TOOLS)


BAD = {
    "no checkpoints": ("targets = ['ort']", r"the plan has no checkpoints; for example"),
    "zero cells": ("checkpoints = []", r"checkpoints of the plan must be a list that is not empty, not \[\]"),
    "no precisions": ("checkpoints = ['one.pt']\nprecisions = []", r"precisions of the plan must be a list of texts"),
    "key": ("checkpoints = ['one.pt']\ntarget_s = ['ort']", r"the plan has an unknown key 'target_s'; did you mean"),
    "missing": ("checkpoints = ['three.pt']", r"path names .*three\.pt, which does not exist"),
    "target": ("checkpoints = ['one.pt']\ntargets = ['trt-rtz']", r"targets .* 'trt-rtz'; did you mean trt-rtx\?"),
    "precision": ("checkpoints = ['one.pt']\nprecisions = ['int9']", r"precisions .* 'int9'; did you mean int8\?"),
    "twice": ("checkpoints = ['one.pt']\ntargets = ['ort', 'ort']", r"targets has 'ort' twice"),
    "type": ("checkpoints = ['one.pt']\nsteps = '64'", r"steps of the plan must be a whole number .*, not '64'"),
    "steps": ("checkpoints = ['one.pt']\nsteps = 31", r"steps of the plan must be .* of 32 or more, not 31"),
    "boolean": ("checkpoints = ['one.pt']\nsteps = true", r"steps of the plan must be a whole number"),
    "not a list": ("checkpoints = 'one.pt'", r"checkpoints of the plan must be a list"),
    "not a table": ("checkpoints = [3]", r"a table of checkpoints must be a table, not 3"),
    "checkpoint key": ("checkpoints = [{ pth = 'one.pt' }]", r"a table of checkpoints needs path"),
    "batch": ("checkpoints = ['one.pt']\n[[shape]]\nbatch = '4:2'", r"batch must read \"LEAST:MOST\" or MOST"),
    "memory": ("checkpoints = ['one.pt']\n[[shape]]\nmemory = 'apend'", r"memory .* 'apend'; did you mean append\?"),
    "shape key": ("checkpoints = ['one.pt']\n[[shape]]\nmaxchunk = 2", r".* 'maxchunk'; did you mean max_chunk"),
    "context": ("checkpoints = ['one.pt']\n[[shape]]\ncontext = 1", r"context of \[\[shape\]\] must be .* of 2"),
    "workload": ("checkpoints = ['one.pt']\n[bench]\nworkloads = ['dcode']", r"\[bench\] unknown workload 'dcode'"),
    "bench batch": ("checkpoints = ['one.pt']\n[bench]\nbatch = 9", r"\[bench\] batch 9 lies outside .* shape 1:8/512"),
    "other target": ("checkpoints = ['one.pt']\n[target.trt]\n", r"\[target.trt\] is not among the targets"),
    "resources": (
        "checkpoints = ['one.pt']\n[target.ort]\nresources = { gpus = 1 }",
        r"\[target.ort\] resources has an unknown key 'gpus'; did you mean num_gpus\?",
    ),
    "amount": ("checkpoints = ['one.pt']\n[target.ort]\nresources = { num_gpus = -1 }", r"num_gpus of .*, not -1"),
    "same names": ("checkpoints = ['one.pt', 'again/one.pt']", r"checkpoints has 'one' twice; remove one, or give it"),
    "same cells": ("checkpoints = ['one.pt', { path = 'one.pt', name = 'x' }]", r"'one .*' and 'x .*' are the same"),
    "thresholds": ("checkpoints = ['one.pt']\nthresholds = 'limits.toml'", r"unknown key 'fp33'; did you mean fp32\?"),
    "TOML": ("checkpoints = [", r"plan.toml is not valid TOML"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_plan_is_refused_before_anything_runs(
    text: str, sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(folder / "limits.toml", "[fp33]\n")
    (folder / "again").mkdir()
    written(folder / "again" / "one.pt", "another")
    path = written(folder / "plan.toml", text)
    monkeypatch.setattr(sys, "argv", ["mscompile", "sweep", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert re.search(sentence, said), said
    assert not (folder / "plan.sweep").exists()


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the plan .*: No such file"):
        plan.load(tmp_path / "plan.toml")


def test_a_key_is_of_contents_options_and_versions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells_of(folder, 'checkpoints = ["one.pt"]')
    moved = written(folder / "moved.pt", "one.pt")
    same = replace(cell, checkpoint=Trained("other name", str(moved)), timeout_s=5)
    same = replace(same, shape=replace(cell.shape, name="other"))
    assert plan.key_of(same) == cell.key == plan.key_of(cell)
    changed = (
        replace(cell, checkpoint=Trained("one", str(folder / "two.pt"))),
        replace(cell, checkpoint=replace(cell.checkpoint, tokens=str(folder / "two.pt"))),
        replace(cell, steps=64),
        replace(cell, target="trt-rtx"),
        replace(cell, shape=replace(cell.shape, max_chunk=4)),
        replace(cell, bench=replace(cell.bench, rounds=1)),
        replace(cell, thresholds=str(moved)),
        replace(cell, resources=Resources(num_gpus=1.0)),
    )
    keys = {cell.key, *(plan.key_of(each) for each in changed)}
    assert len(keys) == 1 + len(changed)
    monkeypatch.setattr(plan, "versions", lambda _: {"onnxruntime": "0.1"})
    assert plan.key_of(cell) not in keys


# ---- Results ----------------------------------------------------------------------------------------------


def passed(cell: plan.Cell, **more: Any) -> Result:
    return Result(cell.key, "passed", "done", final=True, **more)


def test_only_what_is_finished_and_whole_is_kept(folder: Path) -> None:
    one, two = cells_of(folder, 'checkpoints = ["one.pt", "two.pt"]')
    store = Store(folder / "out")
    store.open()
    assert store.finished(one) is None
    store.save(one, passed(one))
    assert store.load(one) == passed(one)
    assert store.finished(one) is None, "its bundle is not there"
    store.bundle(one).mkdir()
    written(store.bundle(one) / "manifest.json", "{}")
    assert store.finished(one) == passed(one)
    store.save(two, Result(two.key, "failed", "process", "killed"))
    assert store.finished(two) is None, "another run may be luckier"
    store.save(two, Result(two.key, "failed", "validate", "a gate", final=True))
    assert store.finished(two) is not None
    (path,) = (folder / "out" / "cells").glob("two-*.json")
    content = path.read_text(encoding="utf-8")
    written(path, content.replace(two.key, one.key))
    assert store.load(two) is None
    written(path, content[:-10])
    assert store.load(two) is None


def outcome_of(folder: Path) -> Outcome:
    cells = cells_of(
        folder, 'checkpoints = ["one.pt", { path = "two.pt", name = "<b>|two" }]\nprecisions = ["fp32", "int4"]'
    )
    latency = {"engine": "ort", "workload": "decode@256", "ms_per_step": 0.5}
    ratio = {"median": 12.5, "low": 12.0, "high": 13.0}
    measured = {"latencies": [latency], "speedups": {"ort decode@256 torch": ratio}}
    machine = {"processor": "A CPU", "cores": 2, "threads": 1, "python": "3.11", "versions": {}}
    figures = Figures(2048, 3e-5, 0.9995, 1e-9, 0.004)
    results = (
        passed(cells[0], parity=figures, bench=measured, machine=machine, size_bytes=5_200_000),
        Result(cells[1].key, "failed", "export", "ort is not the original model: <logits> | 0.5", final=True),
        Result(cells[2].key, "built", "done", "this machine has no GPU", final=True, size_bytes=1),
        Result(cells[3].key, "unavailable", "export", "tensorrt is not installed"),
    )
    return Outcome("plan.toml", str(folder / "out"), tuple(zip(cells, results, strict=True)), 1)


def test_reports_say_what_came_of_each_cell(folder: Path) -> None:
    outcome = outcome_of(folder)
    assert outcome.verdict == "4 cells: 1 passed, 1 built only, 1 failed, 1 unavailable; 1 from before"
    page = report.page(outcome)
    root = ElementTree.fromstring(page.split("\n", 1)[1])  # noqa: S314 (our own text)
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://", page)
    text = " ".join("".join(root.itertext()).split())
    for said in (
        "1 failed, 1 unavailable",
        "3.0e-05",
        "99.95%",
        "+0.40%",
        "0.500 (12.5x)",
        "5.2",
        "A CPU, 2 cores, 1 threads",
        f"torch {version('torch')}",
    ):
        assert said in text
    assert "<b>|two" in text
    assert "failed at export: ort is not the original model: <logits> | 0.5" in text
    assert "built: this machine has no GPU" in text
    assert "one, decode@256" in text


def test_the_markdown_table_has_a_line_a_cell(folder: Path) -> None:
    lines = report.markdown(outcome_of(folder)).splitlines()
    assert lines[0].startswith("### ❌ 4 cells: 1 passed")
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert set(rows[1]) <= set("|-: ")
    unescaped = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert len(set(unescaped)) == 1, "no cell breaks the table"
    assert sum(line.startswith("- ") for line in lines) == 3
    assert r"\<logits\> \| 0.5" in lines[-3]


def test_an_exit_code_says_the_worst(folder: Path) -> None:
    outcome = outcome_of(folder)
    with pytest.raises(GateFailed, match=r"^one ort int4 1:8/512 failed: ort is not the original model"):
        outcome.raise_if_failed()
    replace(outcome, cells=outcome.cells[2:]).raise_if_failed()
    with pytest.raises(EngineUnavailable, match="nothing could run: tensorrt is not installed"):
        replace(outcome, cells=outcome.cells[3:]).raise_if_failed()


def test_every_result_has_a_colour() -> None:
    assert set(COLOURS) == set(get_args(Status))


def test_workers_get_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_cores", lambda: [0, 2, 4, 6, 8])
    assert local._shares(1) == [(0, 2, 4, 6, 8)]
    assert local._shares(2) == [(0, 2), (4, 6)]
    assert local._shares(6) == [(0,), (2,), (4,), (6,), (8,), (0,)]
    assert local.default_workers() == 1


# ---- Real runs --------------------------------------------------------------------------------------------


def processes() -> dict[int, tuple[int, str]]:
    """Process -> its parent and its command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(entry.name)] = parent, (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has just ended
    return found


def cell_processes(out: Path) -> list[int]:
    """The processes of cells that write their logs into `out`, without those that trace graphs for them."""
    found = []
    for pid, (_, command) in processes().items():
        with suppress(OSError):  # it has just ended
            cell = "mscompile.sweep.cell" in command and os.getsid(pid) == pid
            if cell and str(Path(f"/proc/{pid}/fd/2").readlink()).startswith(str(out)):
                found.append(pid)
    return found


def until(condition: Callable[[], Any], running: subprocess.Popen[str] | None = None) -> Any:
    """What the condition gives, as soon as that is something; a sweep that ends meanwhile is a failure."""
    end = time.monotonic() + GROWN_S
    while not (found := condition()):
        assert time.monotonic() < end
        assert running is None or running.poll() is None, running.communicate()
        time.sleep(0.05)
    return found


def results_in(out: Path) -> dict[str, int]:
    """Result files with the times of their last changes, in ns."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}


def exporting(out: Path) -> list[int]:
    """Cells in mid-export: their bundles are begun."""
    return cell_processes(out) if list((out / "bundles").glob(".*.partial")) else []


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def survives(folder: Path, options: list[str], victim: Callable[[int], int], stop: signal.Signals) -> None:
    """Twelve cells; the sweep is stopped, the same command goes on, and one process of it is killed in mid-cell."""
    path, out = written(folder / "plan.toml", TWELVE), folder / "out"
    command = [*COMMAND, str(path), "--out", str(out), "--json", *options]
    with started(command) as sweep:
        until(lambda: len(results_in(out)) >= 3, sweep)
        sweep.send_signal(stop)
        sweep.communicate(timeout=GROWN_S)
        assert sweep.returncode != 0
    until(lambda: not cell_processes(out))
    before = results_in(out)
    assert 3 <= len(before) < 12
    for name in before:
        found = json.loads((out / "cells" / name).read_text(encoding="utf-8"))
        assert found["status"] == "passed", found["reason"]
    with started(command) as sweep:
        os.kill(victim(until(lambda: exporting(out), sweep)[0]), signal.SIGKILL)
        printed, complaints = sweep.communicate()
        assert sweep.returncode == 0, complaints
    said = json.loads(printed)
    assert len(said["cells"]) == 12
    assert {cell["result"]["status"] for cell in said["cells"]} == {"passed"}
    assert said["verdict"] == f"12 cells: 12 passed; {len(before)} from before"
    after = results_in(out)
    assert {name: after[name] for name in before} == before, "finished cells were run again"
    assert max(cell["result"]["attempts"] for cell in said["cells"]) == 2, "no cell was tried again"
    assert sum(cell["result"]["attempts"] for cell in said["cells"]) <= 12 + 2, "others were tried again, too"
    for cell in said["cells"]:
        assert mscompile.open_bundle(out / "bundles" / f"{cell['id']}.msc").manifest.verified
        assert cell["result"]["bench"]["latencies"][0]["workload"] == "decode@4"


@pytest.mark.slow
@pytest.mark.timeout(4 * GROWN_S)
def test_twelve_cells_survive_a_killed_process_and_an_interrupt(trained_pair: Path) -> None:
    survives(trained_pair, ["--workers", "2"], lambda cell: cell, signal.SIGINT)


@contextmanager
def ray_head(folder: Path) -> Iterator[str]:
    """The address of a Ray cluster of one node, started as one starts them."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'mscompile[ray]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node = [
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=2",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
    ]
    node += ["--object-store-memory=100000000", f"--temp-dir={folder}", "--resources", '{"shelf": 1}']
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", "start", *node], cwd=ROOT, **quiet)
    try:
        until(lambda: head.poll() is None and (folder / "session_latest").exists())
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()  # it ends what it started
        head.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(4 * GROWN_S)
def test_twelve_cells_survive_a_killed_ray_worker_and_a_killed_sweep(
    trained_pair: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with ray_head(tmp_path_factory.mktemp("r")) as address:
        survives(trained_pair, ["--ray", address], lambda cell: processes()[cell][0], signal.SIGKILL)
        path = written(
            trained_pair / "asks.toml", 'checkpoints = ["one.pt"]\n[target.ort]\nresources = { num_gpus = 8 }\n'
        )
        ended = subprocess.run(
            [*COMMAND, str(path), "--ray", address], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 3
        assert "nothing could run: no node of the Ray cluster has CPU 1, GPU 8" in ended.stderr


def test_resources_that_no_node_has() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0, "accelerator_type:L4": 1.0, "shelf": 2.0}]
    assert ray_cluster.lacking(Resources(), nodes) is None
    assert ray_cluster.lacking(Resources(2.0, 1.0, "L4", (("shelf", 1.0),)), nodes) is None
    assert ray_cluster.lacking(Resources(4.0, 1.0), nodes) == (
        "no node of the Ray cluster has CPU 4, GPU 1; it has the GPU types accelerator_type:L4"
    )
    assert ray_cluster.lacking(Resources(1.0, 0.0, "H100"), nodes) is not None
    assert ray_cluster.lacking(Resources(custom=(("shelf", 3.0),)), nodes) is not None


def test_without_ray_the_sentence_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    cells = cells_of(folder, 'checkpoints = ["one.pt"]')
    with pytest.raises(EngineUnavailable, match=r"Ray is not installed; pip install 'mscompile\[ray\]'"):
        list(ray_cluster.run(cells, Store(folder), "auto"))


def test_a_cluster_that_is_not_there(folder: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'mscompile[ray]'")
    cells = cells_of(folder, 'checkpoints = ["one.pt"]')
    with pytest.raises(
        EngineUnavailable, match=r"^no Ray cluster at 127\.0\.0\.1:9: .*refused; start one with ray start"
    ):
        list(ray_cluster.run(cells, opened(folder), "127.0.0.1:9"))


ADAPTER = """
import os, signal, time
from pathlib import Path
import torch
from mscompile import Adapter, state

class Model(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.embedding = torch.nn.Embedding(*tensors["embedding.weight"].shape)
        self.cell = torch.nn.GRUCell(8, 8)
        self.load_state_dict(tensors)

    def forward(self, tokens, hidden):
        hidden = self.cell(self.embedding(tokens[:, 0]), hidden)
        return (hidden @ self.embedding.weight.T)[:, None], hidden

    def over(self, tokens):
        hidden, logits = torch.zeros(len(tokens), 8), []
        for token in tokens.unbind(dim=1):
            row, hidden = self(token[:, None], hidden)
            logits.append(row)
        return torch.cat(logits, dim=1)

def build(weights):
    tensors = torch.load(weights, weights_only=True)
    {}
    model = Model(tensors)
    return Adapter(model, states=[state("hidden", 8)], full=model.over)
"""
TAMPER = """seen = weights.with_suffix(".seen")
    if seen.exists():
        tensors["cell.weight_hh"] *= 1.5
    seen.touch()"""
FAULTS = {
    "good": ("pass", r"^$"),
    "killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        r"^its process was ended by SIGKILL.* after 2 attempts; see .*killed-ort",
    ),
    "raising": ("raise ValueError('no such layer')", r"build of .* failed .*: ValueError: no such layer"),
    "tampered": (TAMPER, r"^ort is not the original model: .*max abs error .*; no bundle was written"),
}


def own_module(folder: Path, name: str, fault: str) -> str:
    """A recurrent module whose adapter does something else, too; its entry in a plan."""
    torch.manual_seed(0)
    tensors = {"embedding.weight": torch.randn(28, 8)}
    tensors |= {f"cell.{name}": each.detach() for name, each in torch.nn.GRUCell(8, 8).named_parameters()}
    torch.save(tensors, folder / f"{name}.pt")
    written(folder / f"{name}.py", ADAPTER.replace("{}", fault))
    return f'{{ path = "{name}.pt", adapter = "{name}.py" }}'


@pytest.mark.slow
def test_a_cell_whose_time_is_up_is_ended(tmp_path: Path) -> None:
    entry = own_module(tmp_path, "slow", "time.sleep(3600)")
    read = plan.load(written(tmp_path / "plan.toml", f"checkpoints = [{entry}]\ntimeout_s = 5\n"))
    (_, result), *_ = sweeping.run(read, tmp_path / "out", Silent()).cells
    assert (result.status, result.final, result.attempts) == ("failed", False, 1)
    assert (result.reason or "").startswith("not done after 5 s; raise timeout_s in the plan, or see")
    assert not cell_processes(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(2 * GROWN_S)
def test_one_bad_cell_costs_itself_only(tmp_path: Path) -> None:
    """Killed each time, raising, tampered with between export and its check: each says so, and the rest is run."""
    listed = ", ".join(own_module(tmp_path, name, fault) for name, (fault, _) in FAULTS.items())
    text = f'checkpoints = [{listed}]\nshape = [{{ batch = "1", max_chunk = 1 }}]\n{SMALL}'
    path, markdown = written(tmp_path / "plan.toml", text), tmp_path / "report.md"
    command = [*COMMAND, str(path), "--json", "--markdown", str(markdown)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    cells = {cell["cell"]["checkpoint"]["name"]: cell["result"] for cell in json.loads(ended.stdout)["cells"]}
    for name, (_, reason) in FAULTS.items():
        assert cells[name]["status"] == ("passed" if name == "good" else "failed")
        assert re.search(reason, cells[name]["reason"] or ""), (name, cells[name]["reason"])
    assert [name for name, result in cells.items() if result["final"]] == ["good", "tampered"]
    assert "4 cells: 1 passed, 3 failed" in markdown.read_text(encoding="utf-8")
    assert len(list((tmp_path / "plan.sweep" / "bundles").glob("*.msc"))) == 1


@pytest.mark.slow
def test_limits_of_a_project_fail_a_cell_and_engines_that_cannot_run_are_built(trained_pair: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'mscompile[trt-rtx]'")
    if mscompile_can_run("trt-rtx"):
        pytest.skip("this machine runs trt-rtx")
    written(trained_pair / "limits.toml", "[fp32]\nlogit_max_abs = 1e-12\n")
    text = 'checkpoints = ["one.pt"]\ntargets = ["ort", "trt-rtx"]\nthresholds = "limits.toml"\n'
    shape = 'timeout_s = 500\nshape = [{ batch = "1", max_chunk = 4 }]\n'  # two graphs: they are traced side by side
    read = plan.load(written(trained_pair / "plan.toml", f"{text}{shape}{SMALL}"))
    outcome = sweeping.run(read, trained_pair / "out", Silent(), workers=1)
    (_, limited), (_, built) = outcome.cells
    assert (limited.status, limited.stage, limited.final) == ("failed", "validate", True)
    assert re.search(r"logits: max abs error \S+ exceeds 1e-12", limited.reason or "")
    assert limited.parity is not None
    assert 0 < limited.parity.logit_max_abs < 1e-3
    assert (built.status, built.final) == ("built", True)
    assert built.size_bytes > 0
    assert built.reason is not None


def mscompile_can_run(engine: str) -> bool:
    from engines import registry

    return registry.find(engine).cannot_run() is None


class Silent:
    """Watches without a word."""

    def resumed(self, cell: plan.Cell, result: Result) -> None:
        raise AssertionError(f"{cell.label} was not finished before")

    def show(self, event: local.Event) -> None:
        assert event.cell.label


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"versions": (("torch", "0.1"),)},
            r"other versions than the machine that read the plan: .*torch \S+, not 0\.1",
        ),
        ({"key": "0" * 64}, r"a file of the cell has changed since the plan was read, or is another one on"),
    ],
)
def test_a_machine_that_would_compute_another_cell_refuses(change: dict[str, Any], sentence: str, folder: Path) -> None:
    (cell,) = cells_of(folder, 'checkpoints = ["one.pt"]')
    result = local.attempt(replace(cell, **change), opened(folder), local.Running())
    assert (result.status, result.stage, result.final) == ("failed", "export", False)
    assert re.search(sentence, result.reason or "")


def opened(folder: Path) -> Store:
    store = Store(folder / "out")
    store.open()
    return store
