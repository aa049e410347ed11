"""An export that is killed, or that runs out of disk, leaves the old bundle whole and no half of a new one."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mscompile
from mscompile.errors import BundleError, MsCompileError

ROOT = Path(mscompile.__file__).parents[1]
KILLS = 10


def command(checkpoint: Path, out: Path, max_chunk: int = 16) -> list[str]:
    options = ["--target", "ort", "--batch", "1:3", "--max-chunk", str(max_chunk), "--steps", "64", "--force"]
    return [sys.executable, "-m", "mscompile.cli", "export", "--model", str(checkpoint), "--out", str(out), *options]


def bundles_in(directory: Path) -> Iterator[Path]:
    """Whatever opens as a bundle, hidden directories included."""
    for path in directory.iterdir():
        try:
            mscompile.open_bundle(path)
        except MsCompileError:
            continue
        yield path


@pytest.mark.slow
def test_kills_at_random_points_leave_no_bundle_that_opens(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.msc"
    quick = command(trained, out, max_chunk=1)  # one graph to trace, every other stage as always
    begun = time.monotonic()
    subprocess.run(quick, check=True, cwd=ROOT, capture_output=True)
    whole = time.monotonic() - begun
    old = mscompile.open_bundle(out).manifest
    aside, stopped = tmp_path / "kept", 0
    random = np.random.default_rng(0)
    for moment in random.uniform(0.1, 1.0, KILLS):
        fresh = bool(random.integers(2))
        if fresh and out.exists():
            shutil.rmtree(aside, ignore_errors=True)
            out.rename(aside)
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(quick, cwd=ROOT, start_new_session=True, **silent)
        time.sleep(whole * moment)
        os.killpg(process.pid, signal.SIGKILL)
        stopped += process.wait() != 0
        for path in bundles_in(tmp_path):  # only whole ones: exports give the same bytes
            assert path in (out, aside)
            assert mscompile.open_bundle(path).manifest.files == old.files
        assert fresh or out in bundles_in(tmp_path)
        if aside.exists() and not out.exists():
            aside.rename(out)
    assert stopped >= KILLS // 2
    assert mscompile.open_bundle(out).verify("ort").passed


def test_a_full_disk_leaves_the_old_bundle(trained: Path, compiled: Path, tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    out = tmp_path / "model.msc"
    compiled_files = mscompile.open_bundle(compiled).manifest.files
    subprocess.run(["cp", "-r", str(compiled), str(out)], check=True)
    ended = subprocess.run(
        command(trained, out), cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=small_files_only
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (sentence,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert str(out) in sentence
    assert "File too large" in sentence or "no space" in sentence.lower()
    assert mscompile.open_bundle(out).manifest.files == compiled_files
    assert [path.name for path in tmp_path.iterdir()] == ["model.msc"]


def test_a_gate_that_fails_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifying process reports a failure: the export ends with code 1 and no bundle."""
    from bundles import options

    from mscompile import pipeline
    from mscompile.errors import GateFailed

    report = '{"reports": [{"failures": ["text: logits: max abs error 0.5 exceeds 0.001"]}]}'
    script = f"import sys; print({report!r}); sys.exit(1)"
    start = subprocess.Popen

    def failing(command: list[str], **options: object) -> subprocess.Popen[str]:
        assert command[1:4] == ["-m", "mscompile.cli", "validate"]
        return start([sys.executable, "-c", script], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(pipeline.subprocess, "Popen", failing)
    with pytest.raises(GateFailed, match=r"max abs error 0\.5 exceeds 0\.001; no bundle was written") as caught:
        pipeline.compile_checkpoint(trained, ["ort"], tmp_path / "model.msc", options())
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_exports_give_the_same_bytes(trained: Path, compiled: Path, tmp_path: Path) -> None:
    subprocess.run(command(trained, tmp_path / "transformer-xl.msc"), check=True, cwd=ROOT, capture_output=True)
    for path in sorted(compiled.rglob("*")):
        if path.is_file():
            other = tmp_path / "transformer-xl.msc" / path.relative_to(compiled)
            assert other.read_bytes() == path.read_bytes(), path.name


def test_an_unfinished_bundle_is_not_opened(compiled: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".model.msc.0123abcd.partial"
    subprocess.run(["cp", "-r", str(compiled), str(partial)], check=True)
    with pytest.raises(BundleError, match="is an export that is under way or was stopped"):
        mscompile.open_bundle(partial)
