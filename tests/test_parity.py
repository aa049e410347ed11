"""The parity gate: passes what is right, and names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import cases
import numpy as np
import pytest
import torch
from faulty_sessions import Altered, BadRestore, KeepsOldRows

from engines.torch_eager import original
from mscompile.contracts import Array, Session, Snapshot
from mscompile.errors import BundleError, GateFailed
from mscompile.golden import Rollout as Stored
from validation import parity, rollouts
from validation.parity import ParityReport
from validation.rollouts import Rollout

MODELS = {
    "rolling": lambda: cases.model("post-norm-same-length", torch.float32),
    "segments": lambda: cases.model("pre-norm", torch.float32),
    "hourglass": lambda: cases.model("attention+attention", torch.float32),
}


class ScaledLogits(Altered):
    def step(self, tokens: Array) -> Array:
        return self.inner.step(tokens) * np.float32(1.01)


class OneWrongLogit(Altered):
    def step(self, tokens: Array) -> Array:
        position, logits = int(self.inner.position[0]), self.inner.step(tokens)
        if position <= 20 < position + tokens.shape[1]:
            logits[0, 20 - position, 4] += 0.25
        return logits


class NotANumber(Altered):
    def step(self, tokens: Array) -> Array:
        logits = self.inner.step(tokens)
        logits[-1, -1, 2] = np.nan
        return logits


class StaleState(Altered):
    """Reports the first state with an error that no logit shows."""

    def state(self) -> Snapshot:
        snapshot = self.inner.state()
        name = min(snapshot.states)
        return replace(snapshot, states={**snapshot.states, name: snapshot.states[name] + np.float32(0.01)})


class RenamedState(Altered):
    def state(self) -> Snapshot:
        snapshot = self.inner.state()
        first = min(snapshot.states)
        return replace(snapshot, states={("other" if k == first else k): v for k, v in snapshot.states.items()})


class RollsTooFar(Altered):
    """An off-by-one memory: after each call of one token the first state is shifted by one row."""

    def step(self, tokens: Array) -> Array:
        logits = self.inner.step(tokens)
        snapshot = self.inner.state()
        name = min(snapshot.states)
        self.inner.restore(
            replace(snapshot, states={**snapshot.states, name: np.roll(snapshot.states[name], 1, axis=1)})
        )
        return logits


def report(name: str, altered: Callable[[Session], Any] = lambda session: session, steps: int = 48) -> ParityReport:
    model = MODELS[name]()
    spec = cases.build(model).spec

    def new_session(batch: int) -> Any:
        return altered(cases.eager_session(model, batch))

    chosen = rollouts.standard(spec, None, steps)
    return parity.check(
        "program", "fp32", spec, new_session, original(model), lambda batch: cases.eager_session(model, batch), chosen
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_program_passes(name: str) -> None:
    found = report(name)
    assert found.failures == ()
    assert found.logit_max_abs < 1e-4
    assert found.argmax_agreement == 1.0
    assert found.first_divergence is None
    found.raise_if_failed()
    spec = cases.build(MODELS[name]()).spec
    named = {tensor.tensor for tensor in found.tensors}
    assert named == {"logits", *(state.name for state in spec.states)}


@pytest.mark.parametrize(
    ("altered", "sentence"),
    [
        (ScaledLogits, "norm ratio error 0.01 exceeds 0.0001"),
        (OneWrongLogit, "logits: max abs error 0.25 exceeds 0.001; largest error 0.25 at graph"),
        (OneWrongLogit, "step 20 of row 0, logit 4"),
        (NotANumber, "logits is not finite at graph"),
        (KeepsOldRows, "rows reset in mid-stream: logits: max abs error"),
        (StaleState, "max abs error 0.01 exceeds 0.001"),
        (RenamedState, "extra ['other']"),
        (BadRestore, "snapshot: a restored session does not repeat itself"),
        (RollsTooFar, "token by token: logits: max abs error"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_faults_are_found_and_named(name: str, altered: type[Altered], sentence: str) -> None:
    found = report(name, altered)
    assert not found.passed
    assert any(sentence in failure for failure in found.failures), found.failures
    with pytest.raises(GateFailed, match="program is not the original model") as caught:
        found.raise_if_failed()
    assert caught.value.exit_code == 1


def test_a_greedy_continuation_that_leaves_the_original_is_found() -> None:
    class Swapped(Altered):
        def step(self, tokens: Array) -> Array:
            logits = self.inner.step(tokens)
            return np.roll(logits, 1, axis=-1) if self.inner.position[0] > 30 else logits

    found = report("rolling", Swapped)
    assert found.first_divergence is not None
    assert f"greedy continuation: token {found.first_divergence} differs" in " ".join(found.failures)


def diverging(margin: float) -> tuple[parity.Generation, list[str]]:
    """Greedy continuations where, at token 5 of row 1, the engine swaps the best two logits, `margin` apart."""
    spec = cases.build(MODELS["rolling"]()).spec
    tokens = cases.tokens(2, 16)

    def reference(seen: Array) -> Array:
        logits = np.zeros((*seen.shape, spec.vocab_size), np.float32)
        logits[:, :, 3], logits[:, :, 4] = 1.0, 1.0 - margin
        return logits

    class Swaps:
        consumed = 0

        def step(self, seen: Array) -> Array:
            self.consumed += seen.shape[1]
            logits = reference(seen)
            if self.consumed == 16 + 5:
                logits[1, :, [3, 4]] = logits[1, :, [4, 3]]
            return logits

    swaps: Any = Swaps()
    return parity.generate(spec, lambda _: swaps, reference, tokens, parity.TOLERANCES["fp32"])


def test_the_first_diverging_token_is_named_with_its_margin() -> None:
    found, failures = diverging(0.5)
    assert (found.first_divergence, found.row, found.chosen, found.expected) == (5, 1, 4, 3)
    assert found.margin == pytest.approx(0.5)
    (failure,) = failures
    assert failure.startswith("greedy continuation: token 5 differs from the original's in row 1, 4 for 3, whose best")
    assert failure.endswith("two logits are 0.5 apart there; errors within the limits make up for 0.002")


def test_a_tie_within_the_limits_is_told_and_is_no_fault() -> None:
    found, failures = diverging(0.0015)
    assert found.first_divergence == 5
    assert found.margin == pytest.approx(0.0015, rel=1e-3)
    assert failures == []


def test_expected_logits_start_every_row_anew_at_its_resets() -> None:
    model = MODELS["rolling"]()
    tokens = cases.tokens(3, 12)
    rollout = Rollout("r", tokens, (3, 4, 5), resets=((1, (1,)), (2, (0, 1))))
    expected = parity.expected_logits(rollout, original(model))
    for row, cuts in enumerate(((0, 7, 12), (0, 3, 7, 12), (0, 12))):
        for start, end in pairwise(cuts):
            alone = cases.full(model, tokens[row : row + 1, start:end])[0]
            assert cases.worst(expected[row, start:end], alone) < 1e-5


def test_the_graph_that_consumed_a_token_is_named() -> None:
    spec = cases.build(MODELS["hourglass"]()).spec  # period 3, chunks up to 6
    assert [parity.graph_of(spec, 0, 8, offset) for offset in range(8)] == [*["prefill"] * 6, "decode_3", "decode_1"]
    assert [parity.graph_of(spec, 2, 3, offset) for offset in range(3)] == ["decode_1", "decode_3", "decode_1"]


def _golden(name: str) -> tuple[Stored, Any]:
    model = MODELS[name]()
    spec = cases.build(model).spec
    rollout = rollouts.golden(spec, None, 20)[1]
    session = cases.eager_session(model, rollout.tokens.shape[0])
    session.step(rollout.tokens)
    states = dict(session.state().states)
    chunks = np.array(rollout.chunks)
    return Stored(rollout.name, rollout.tokens, chunks, cases.full(model, rollout.tokens), states), model


@pytest.mark.parametrize("name", MODELS)
def test_golden_rollouts_pass_and_fail(name: str) -> None:
    stored, model = _golden(name)
    spec = cases.build(model).spec

    def check(golden: Stored) -> ParityReport:
        return parity.check_golden("program", "fp32", spec, lambda batch: cases.eager_session(model, batch), [golden])

    assert check(stored).failures == ()
    wrong = stored.logits.copy()
    wrong[1, 3, 0] += 0.1
    assert "step 3 of row 1, logit 0" in check(replace(stored, logits=wrong)).failures[0]
    state = min(stored.states)
    bad = {**stored.states, state: stored.states[state] + 0.1}
    assert f"{state}: max abs error 0.1" in check(replace(stored, states=bad)).failures[0]
    fewer = {key: value for key, value in stored.states.items() if key != state}
    assert f"extra ['{state}']" in check(replace(stored, states=fewer)).failures[0]


def test_golden_states_may_end_where_writing_did() -> None:
    stored, model = _golden("hourglass")
    spec = cases.build(model).spec
    short = {
        state.name: stored.states[state.name]
        if state.time_axis is None
        else stored.states[state.name].take(range(7), axis=state.time_axis)
        for state in spec.states
    }
    found = parity.check_golden(
        "program", "fp32", spec, lambda batch: cases.eager_session(model, batch), [replace(stored, states=short)]
    )
    assert found.failures == ()


def test_log_softmax_sums_to_one_far_from_zero() -> None:
    logits = np.array([[1e4, 1e4 + 1, -1e4]], dtype=np.float32)
    assert np.exp(parity.log_softmax(logits)).sum() == pytest.approx(1.0)


def test_bits_are_told_of_real_text_only() -> None:
    model = MODELS["rolling"]()
    spec = cases.build(model).spec
    text = np.random.default_rng(5).integers(0, cases.VOCAB, 400)
    chosen = rollouts.standard(spec, text, 48)[:1]
    found = parity.check(
        "program", "fp32", spec, lambda b: cases.eager_session(model, b), original(model),
        lambda b: cases.eager_session(model, b), chosen,
    )  # fmt: skip
    (logits,) = [tensor for tensor in found.tensors if tensor.tensor == "logits"]
    wanted = cases.full(model, chosen[0].tokens)
    score = -parity.log_softmax(wanted)[0, np.arange(47), chosen[0].tokens[0, 1:]].mean() / np.log(2)
    assert logits.reference_bits == pytest.approx(score)
    assert logits.engine_bits == pytest.approx(logits.reference_bits, abs=1e-5)


def test_a_precision_that_has_no_limits_is_refused() -> None:
    with pytest.raises(BundleError, match=r"the manifest says precision 'fp13'; known: fp32, fp16, bf16, int8"):
        parity.check_golden("ort", "fp13", cases.build(cases.transformer_xl()).spec, cases.eager_session, ())
