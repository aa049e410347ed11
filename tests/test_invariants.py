"""What must hold of every session: each check passes on good sessions and catches the fault that it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bundles
import cases
import numpy as np
import pytest
import tiny
import torch
from faulty_sessions import Altered

from engines.torch_eager import original
from mscompile.contracts import Array, Snapshot
from mscompile.errors import EngineError, GateFailed
from mscompile.models.transformer_xl import TransformerXLLayer
from validation import invariants, parity, rollouts
from validation.invariants import Check

MODELS = {
    "rolling": lambda: cases.model("post-norm-same-length", torch.float32),
    "segments": lambda: cases.model("pre-norm", torch.float32),
    "hourglass": lambda: cases.model("attention+attention", torch.float32),
}
Alter = Callable[[Any], Any]


class FavoursRowZero(Altered):
    """A row that is told apart by its place, not by its state."""

    def step(self, tokens: Array) -> Array:
        logits = self.inner.step(tokens)
        logits[0] += np.float32(0.01)
        return logits


class MixesRows(Altered):
    """A scale that is taken over all rows."""

    def step(self, tokens: Array) -> Array:
        logits = self.inner.step(tokens)
        return (logits + 1e-9 * logits.mean()).astype(np.float32)


class SnapshotIsAView(Altered):
    def state(self) -> Snapshot:
        states = {name: buffer.value for name, buffer in self.inner._states.items()}
        return replace(self.inner.state(), states=states)


class RemembersBesidesItsState(Altered):
    """Something that goes on from step to step and is in no snapshot."""

    steps = 0

    def step(self, tokens: Array) -> Array:
        self.steps += 1
        return self.inner.step(tokens) + np.float32(0.001 * self.steps)


class ForgetsInNewSessions(Altered):
    """A restore that only the session which was saved can do."""

    saved = False

    def state(self) -> Snapshot:
        self.saved = True
        return self.inner.state()

    def restore(self, snapshot: Snapshot) -> None:
        self.inner.restore(snapshot)
        if not self.saved:
            self.inner.reset()


class ReadsBehindTheCursor(Altered):
    """A mask that lets the last slot of every ring through before it was written."""

    def step(self, tokens: Array) -> Array:
        leak = sum(
            float(np.moveaxis(buffer.value, buffer.spec.time_axis, 0)[-1].mean())
            for buffer in self.inner._states.values()
            if buffer.spec.update == "append"
        )
        return self.inner.step(tokens) + np.float32(leak)


class Breaks(Altered):
    def restore(self, snapshot: Snapshot) -> None:
        if any(np.isnan(value).any() for value in snapshot.states.values() if value.dtype.kind == "f"):
            raise EngineError("index out of range")
        self.inner.restore(snapshot)


def checks(name: str, alter: Alter = lambda session: session, rows: int = 3, coupled: bool = False) -> dict[str, Check]:
    model = MODELS[name]()
    spec = cases.build(model).spec
    tokens = cases.tokens(rows, 60)
    found = invariants.check(spec, lambda batch: alter(cases.eager_session(model, batch)), tokens, 1e-4, coupled)
    return {check.name: check for check in found}


@pytest.mark.parametrize("name", MODELS)
def test_good_sessions_pass(name: str) -> None:
    found = checks(name)
    assert [check.fault for check in found.values()] == [None] * 4
    appends = any(state.update == "append" for state in cases.build(MODELS[name]()).spec.states)
    assert [check.name for check in found.values() if check.skipped] == ([] if appends else ["poisoned slots"])


@pytest.mark.parametrize(
    ("alter", "check", "sentence"),
    [
        (FavoursRowZero, "row permutation", "logits depend on which row a stream is in: logits differ by up to 0.01"),
        (MixesRows, "poisoned rows", "row 0 reads the states of other rows: logits are not finite"),
        (SnapshotIsAView, "snapshot", "it changes while its session goes on"),
        (RemembersBesidesItsState, "snapshot", "a restored session does not repeat itself"),
        (ForgetsInNewSessions, "snapshot", "a new session goes on otherwise than the one it is of"),
        (Breaks, "poisoned rows", "index out of range"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_each_fault_is_caught_by_its_check(name: str, alter: type[Altered], check: str, sentence: str) -> None:
    fault = checks(name, alter)[check].fault
    assert fault is not None
    assert sentence in fault


def test_memory_that_is_read_before_it_was_written_is_caught() -> None:
    fault = checks("hourglass", ReadsBehindTheCursor)["poisoned slots"].fault
    assert fault is not None
    assert fault.startswith("memory is read before it was written: logits differ by up to")


def test_what_is_read_before_it_was_written_is_found_by_its_name() -> None:
    attends = tiny.model("skip-cross-head", "rolling-pre-norm", torch.float32)  # to the zeros it begins with
    for model, wanted in ((attends, {"layer00.mems", "layer01.mems"}), (MODELS["rolling"](), set())):
        names = [state.name for state in cases.build(model).spec.states]
        new = partial(cases.eager_session, model)
        assert invariants.starts_read(cases.build(model).spec, new, names, 1e-4) == wanted


def test_rings_whose_first_slots_are_read_by_design_are_not_poisoned() -> None:
    model = MODELS["hourglass"]()
    spec = cases.build(model).spec
    marked = replace(spec, states=tuple(replace(state, reads_initial=True) for state in spec.states))
    found = invariants.check(marked, partial(cases.eager_session, model), cases.tokens(3, 60), 1e-4, False)
    assert {check.name: check.skipped for check in found}["poisoned slots"] == (
        "no state is appended to whose first slots are masked"
    )


def test_a_mask_forgotten_by_a_rule_fails_the_rollouts_though_its_rings_are_not_poisoned(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream program alone cannot tell its own fault from what the original does; the original's logits can."""
    monkeypatch.setattr(TransformerXLLayer, "attends_empty", True)
    with pytest.raises(GateFailed) as caught:
        bundles.compile_to(tmp_path / "tiny.msc", trained)
    assert "logits: max abs error" in str(caught.value)


def test_what_cannot_be_checked_says_why() -> None:
    one = checks("hourglass", rows=1)
    assert one["row permutation"].skipped == one["poisoned rows"].skipped == "one row only"
    assert one["snapshot"].skipped is None
    coupled = checks("hourglass", MixesRows, coupled=True)["poisoned rows"]
    assert (coupled.fault, coupled.skipped) == (None, "this precision has one scale for all rows")


def test_the_gate_of_an_export_has_them() -> None:
    model = MODELS["rolling"]()
    spec = cases.build(model).spec
    found = parity.check(
        "program", "fp32", spec, lambda batch: FavoursRowZero(cases.eager_session(model, batch)), original(model),
        lambda batch: cases.eager_session(model, batch), rollouts.standard(spec, None, 48),
    )  # fmt: skip
    assert [check.name for check in found.checks if check.fault] == ["row permutation"]
    assert any(failure.startswith("row permutation: logits depend on") for failure in found.failures)
