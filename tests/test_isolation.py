"""Engines in processes of their own: answers, progress and errors come through, and a crash takes nothing with it."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest

from mscompile import gate, isolation
from mscompile.errors import UsageError
from mscompile.runtime import open_bundle


def test_answers_and_progress_come_through(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, int, int]] = []
    assert isolation.call(processes.answers, 3, progress=lambda *what: told.append(what)) == 3
    assert told == [("half", 1, 2)]
    assert capfd.readouterr().out == ""


def test_errors_come_through_and_crashes_are_named() -> None:
    with pytest.raises(UsageError, match="not like this"):
        isolation.call(processes.refuses)
    with pytest.raises(isolation.ProcessEnded, match=r"ended with signal 11 \(SIGSEGV\), without an answer"):
        isolation.call(processes.crashes)
    with pytest.raises(isolation.ProcessEnded, match="ended with code 7, without an answer"):
        isolation.call(processes.ends)


def test_a_bundle_is_validated_in_a_process_of_its_own(compiled: Path) -> None:
    opened = open_bundle(compiled)
    found = gate.validate(opened, isolated=True)
    assert found.passed
    assert opened._plans == {}  # nothing was loaded here
    alone = found.reports[0]
    assert alone.tensors == opened.verify("ort").tensors


def test_an_engine_that_crashes_fails_and_leaves_a_report(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_reopened_and_rolled_out", processes.crashes)
    found = gate.validate(open_bundle(compiled), isolated=True)
    assert not found.passed
    assert found.failures == ["ort: the process that ran it ended with signal 11 (SIGSEGV), without an answer"]
