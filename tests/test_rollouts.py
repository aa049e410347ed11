"""The token streams of the parity check: complete, within the context, the same for the same seed."""

from __future__ import annotations

import cases
import numpy as np
import pytest

from validation import rollouts

SPECS = {
    "rolling": lambda: cases.build(cases.model("post-norm-same-length")).spec,
    "segments": lambda: cases.build(cases.model("post-norm")).spec,
    "hourglass": lambda: cases.build(cases.model("attention+attention")).spec,
    "nested": lambda: cases.build(cases.model("two-valleys")).spec,
    "single stream": lambda: cases.build(cases.model("post-norm"), max_batch=1).spec,
}


@pytest.mark.parametrize("name", SPECS)
def test_standard_rollouts_are_consistent(name: str) -> None:
    spec = SPECS[name]()
    chosen = rollouts.standard(spec, None, 100)
    assert len({rollout.name for rollout in chosen}) == len(chosen)
    for rollout in chosen:
        batch, length = rollout.tokens.shape
        assert sum(rollout.chunks) == length
        assert min(rollout.chunks) >= 1
        assert batch <= spec.max_batch
        assert rollout.tokens.dtype == np.int64
        assert rollout.tokens.min() >= 0
        assert rollout.tokens.max() < spec.vocab_size
        assert _longest(rollout) <= (spec.max_context or length)
    assert chosen[0].tokens.shape[1] == chosen[1].tokens.shape[1] == 100
    assert chosen[1].tokens.shape[0] == min(3, spec.max_batch)


def _longest(rollout: rollouts.Rollout) -> int:
    position, longest = np.zeros(rollout.tokens.shape[0], dtype=int), 0
    resets = dict(rollout.resets)
    for number, chunk in enumerate(rollout.chunks):
        position[list(resets.get(number, ()))] = 0
        position += chunk
        longest = max(longest, int(position.max()))
    return longest


def test_they_cover_several_periods_odd_lengths_and_rows_out_of_phase() -> None:
    spec = SPECS["nested"]()
    period, longest = spec.schedule.period, spec.schedule.max_chunk
    chosen = {rollout.name: rollout for rollout in rollouts.standard(spec, None, 100)}
    assert set(chosen["token by token"].chunks) == {1}
    assert chosen["token by token"].tokens.shape[1] >= 4 * period
    edges = set(chosen["around multiples"].chunks)
    assert {1, period - 1, period, period + 1, longest, longest - 1} <= edges
    resets = chosen["rows reset in mid-stream"].resets
    assert len(resets) >= 2
    assert all(len(rows) == 1 for _, rows in resets)


def test_lengths_lie_around_every_ring_and_rows_of_text_are_apart() -> None:
    spec = SPECS["segments"]()
    rings = {state.shape[state.time_axis] for state in spec.states if state.time_axis is not None}
    assert spec.max_context is None
    text = np.arange(1000) % spec.vocab_size
    chosen = {rollout.name: rollout for rollout in rollouts.standard(spec, text, 100)}
    edges = set(chosen["around multiples"].chunks)
    shorter = {ring for ring in rings if ring < spec.schedule.max_chunk}
    assert {ring + more for ring in shorter for more in (-1, 0, 1)} <= edges
    starts = [start for rollout in chosen.values() for start in rollout.starts]
    assert len(starts) == 4
    assert min(np.diff(sorted(starts))) >= 100  # so that no token is read twice


def test_states_are_compared_all_along_and_at_the_end() -> None:
    long, *_ = rollouts.standard(SPECS["rolling"](), None, 400)
    compared = [number for number in range(len(long.chunks)) if long.compares_states(number)]
    assert compared[-1] == len(long.chunks) - 1
    assert min(rollouts.MOMENTS, len(long.chunks)) <= len(compared) <= rollouts.MOMENTS + 1


def test_real_text_is_taken_where_it_is_long_enough() -> None:
    spec = SPECS["rolling"]()
    text = np.arange(300) % spec.vocab_size
    chosen = rollouts.standard(spec, text, 100)
    assert [rollout.is_text for rollout in chosen] == [True, True, False, False, False]
    assert chosen[0].tokens[0].tolist() == text[:100].tolist()
    assert not rollouts.standard(spec, text[:50], 100)[0].is_text


def test_the_same_seed_gives_the_same_rollouts() -> None:
    spec = SPECS["hourglass"]()
    once, again, other = (rollouts.standard(spec, None, 60, seed) for seed in (3, 3, 4))
    assert all((a.tokens == b.tokens).all() and a.chunks == b.chunks for a, b in zip(once, again, strict=True))
    assert (once[0].tokens != other[0].tokens).any()


def test_golden_rollouts_fit_the_context() -> None:
    for name in SPECS:
        spec = SPECS[name]()
        for rollout in rollouts.golden(spec, None, 200):
            assert rollout.tokens.shape[1] <= (spec.max_context or 200)
            assert rollout.resets == ()
