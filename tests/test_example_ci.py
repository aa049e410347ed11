"""The sample repository of examples/ci: its recipe passes, and fails when its checkpoint is tampered with."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from test_docs import PRELUDE, ROOT

from validation import thresholds

SAMPLE = ROOT / "examples" / "ci"
NEEDS_THE_NETWORK = ("pip ", "gh ")
Step = tuple[str, str]  # name, commands


@dataclass(frozen=True)
class Done:
    """A step that was run."""

    name: str
    code: int
    output: str


def steps() -> list[Step]:
    """The steps of the recipe that run a command, without those that need the network."""
    recipe = yaml.safe_load((SAMPLE / ".github" / "workflows" / "parity.yml").read_text(encoding="utf-8"))
    named = [(step["name"], step["run"]) for step in recipe["jobs"]["parity"]["steps"] if "run" in step]
    return [(name, run) for name, run in named if not any(word in run for word in NEEDS_THE_NETWORK)]


def run(repository: Path, step: Step) -> Done:
    name, commands = step
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    summary = str(repository / "summary.md")
    environment = {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable, "GITHUB_STEP_SUMMARY": summary}
    done = subprocess.run(
        ["bash", "-c", PRELUDE + commands], cwd=repository, env=environment, text=True, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Done(name, done.returncode, done.stdout)


def copied(path: Path) -> Path:
    shutil.copytree(SAMPLE, path, ignore=shutil.ignore_patterns("__pycache__", "*.msc"))
    return path


def tamper(repository: Path) -> None:
    """Weights that are off by a tenth: a valid checkpoint of the same size, and another model."""
    path = repository / "model.pt"
    content = torch.load(path, weights_only=True)
    for tensor in content["state_dict"].values():
        tensor.mul_(1.1)
    torch.save(content, path)


def test_the_recipe_has_the_steps_that_the_docs_speak_of() -> None:
    commands = [run.split()[:2] for _, run in steps()]
    assert commands == [
        ["mscompile", "export"], ["mscompile", "validate"], ["pytest", "--mscompile-bundle"], ["mscompile", "validate"],
    ]  # fmt: skip


@pytest.mark.slow
def test_the_recipe_passes_and_fails_for_a_tampered_checkpoint(tmp_path: Path) -> None:
    repository = copied(tmp_path / "sample")
    export, parity, own, baseline = steps()
    assert run(repository, export).code == 0
    shutil.copytree(repository / "model.msc", repository / "last" / "model.msc")
    for step in (parity, own, baseline):
        done = run(repository, step)
        assert done.code == 0, f"{done.name}\n{done.output}"
    assert (repository / "summary.md").read_text(encoding="utf-8").startswith("### \u2705 model (fp32) passed")
    assert (repository / "parity.xml").exists()
    assert (repository / "parity.html").exists()

    tamper(repository)
    done = run(repository, parity)  # the bundle is the old one
    assert done.code == 2
    assert "model.pt is not the checkpoint that model.msc was made from: its sha256 differs" in done.output

    shutil.rmtree(repository / "model.msc")
    assert run(repository, export).code == 0  # a checkpoint like any other, so far
    done = run(repository, parity)
    assert done.code == 1
    assert "and parity.toml pins 9824422ea605...; restore that checkpoint, or review the new one" in done.output
    assert (repository / "summary.md").read_text(encoding="utf-8").startswith("### \u274c model (fp32) failed: 1 limit")
    done = run(repository, own)
    assert done.code == 1
    assert "FAILED model.msc::checkpoint" in done.output


def test_the_docs_show_the_recipe_as_it_is() -> None:
    shown = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    for name, commands in steps():
        assert name in shown
        assert " ".join(commands.split()) in " ".join(shown.split())


def test_the_docs_show_every_limit_and_the_pin() -> None:
    shown = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in shown for name in (*thresholds.LIMITS, *thresholds.STATE_LIMITS))
    own = thresholds.load(SAMPLE / "parity.toml")
    assert own.checkpoint_sha256 == hashlib.sha256((SAMPLE / "model.pt").read_bytes()).hexdigest()
    assert own.checkpoint_sha256 in shown
