"""Scales tick: which graph runs for which token, and what it may write."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    NESTED,
    build,
    check_rollout,
    eager_session,
    full,
    hourglass,
    model,
    permuted,
    plans,
    stream,
    tokens,
    transformer_xl,
    worst,
)
from hypothesis import given
from hypothesis import strategies as st

from exporters import program
from exporters.root import Root
from exporters.stream import Ticks
from mscompile.contracts import Schedule, ScheduledCall, Tick
from mscompile.errors import Refusal

Plan = tuple[int, int, list[tuple[Any, ...]]]

TICKS = {
    "1@1": (["decode"], (Tick(("decode",)),), 1),
    "1@1 1@3 1@1": (["decode_1", "decode_3"], (Tick(("decode_3",)), Tick(("decode_1",), repeat=2)), 3),
    "1@1 1@2 1@4 1@2 1@1": (
        ["decode_1", "decode_2", "decode_4"],
        (Tick(("decode_4",)), Tick(("decode_1",)), Tick(("decode_2",)), Tick(("decode_1",))),
        4,
    ),
    "1@1 1@3 1@6 1@3 1@1": (
        ["decode_1", "decode_3", "decode_6"],
        (Tick(("decode_6",)), Tick(("decode_1",), repeat=2), Tick(("decode_3",)), Tick(("decode_1",), repeat=2)),
        6,
    ),
    "1@1 0@2 1@4 0@8 1@4 0@2 1@1": (
        ["decode_1", "decode_2", "decode_4", "decode_8"],
        tuple(Tick((f"decode_{coarsest}",)) for coarsest in (8, 1, 2, 1, 4, 1, 2, 1)),
        8,
    ),
}


@pytest.mark.parametrize("hierarchy", TICKS)
def test_one_graph_a_pattern_of_due_scales_and_this_exact_tick_table(hierarchy: str) -> None:
    names, ticks, period = TICKS[hierarchy]
    spec = build(hourglass(hierarchy=hierarchy), max_chunk=19).spec
    assert [graph.name for graph in spec.graphs] == [*names, "prefill"]
    assert spec.schedule == Schedule(ticks, "prefill", chunk_multiple=period, max_chunk=19 - 19 % period)
    assert spec.schedule.period == period


def test_a_chunk_shorter_than_the_period_leaves_no_prefill() -> None:
    spec = build(hourglass(hierarchy="1@1 1@4 1@1"), max_chunk=3).spec
    assert (spec.schedule.prefill, spec.schedule.max_chunk) == (None, 1)
    assert [graph.name for graph in spec.graphs] == ["decode_1", "decode_4"]


class Rows(Root):
    def __init__(self, segment: int | None, ticks: Ticks) -> None:
        super().__init__()
        self.segment, self.ticks = segment, ticks


def test_rows_that_end_with_a_token_are_due_at_its_phase() -> None:
    schedule = program._schedule(Rows(None, "end"), (2, 4), 9)
    ticks = (Tick(("decode_1",)), Tick(("decode_2",)), Tick(("decode_1",)), Tick(("decode_4",)))
    assert schedule == Schedule(ticks, "prefill", chunk_multiple=4, max_chunk=8)


def test_a_segment_of_whole_rows_closes_after_its_last_one() -> None:
    schedule = program._schedule(Rows(6, "end"), (3,), 9)
    row = (Tick(("decode_1",), repeat=2), Tick(("decode_3",)))
    assert schedule.ticks == (*row, row[0], Tick(("decode_3",), closing=("close",)))
    assert (schedule.chunk_multiple, schedule.max_chunk) == (3, 6)
    assert schedule.next_call(3, 9) == ScheduledCall(("prefill", "close"), 3)


def test_a_segment_that_cuts_rows_is_refused() -> None:
    with pytest.raises(Refusal, match=r"^rows and segments of 2, 5 tokens: each length must divide the next"):
        program._schedule(Rows(5, "begin"), (2,), 8)


def test_the_states_of_a_nested_model_have_these_names() -> None:
    blocks = [
        f"{scale}.{part}.block00.attention.{what}"
        for scale, parts in (
            ("scale1", ("pre", "post")),
            ("scale1.valley.scale2", ("pre", "post")),
            ("scale1.valley.scale2.valley.scale4", ("pre",)),
        )
        for part in parts
        for what in ("key", "value")
    ]
    resampling = [
        f"{valley}.{what}"
        for valley in ("scale1.valley", "scale1.valley.scale2.valley")
        for what in (
            "shortening.rows", "shortening.key", "shortening.value",
            "upsampling.expansion", "upsampling.key", "upsampling.value",
        )
    ]  # fmt: skip
    spec = build(model("two-valleys")).spec
    assert [state.name for state in spec.states] == sorted(blocks + resampling)
    for graph in spec.graphs:
        assert list(graph.reads) == sorted(graph.reads)
        assert list(graph.writes) == sorted(graph.writes)


def test_coarse_states_are_written_only_by_graphs_in_which_their_scale_is_due() -> None:
    spec = build(model("two-valleys")).spec
    fine = {f"scale1.{part}.block00.attention.{what}" for part in ("pre", "post") for what in ("key", "value")}
    fine |= {"scale1.valley.shortening.rows"}
    two = {state.name for state in spec.states if state.name.startswith("scale1.valley.")} - fine
    four = {name for name in two if name.startswith("scale1.valley.scale2.valley.")}
    four -= {"scale1.valley.scale2.valley.shortening.rows"}
    assert set(spec.graph("decode_1").writes) == fine
    assert set(spec.graph("decode_2").writes) == fine | (two - four)
    assert set(spec.graph("decode_4").writes) == fine | two
    assert set(spec.graph("prefill").writes) == fine | two
    unread = {name for name in four if ".upsampling." not in name}
    for graph in ("decode_1", "decode_2"):
        assert unread & set(spec.graph(graph).reads) == set(), "what is not due is not read either"


@pytest.mark.parametrize("name", [*NESTED, "attention+attention"])
def test_a_step_leaves_the_states_of_scales_that_are_not_due_as_they_are(name: str) -> None:
    session = eager_session(model(name), batch=2)
    spec, before = session.spec, session.state()
    for position in range(2 * spec.schedule.period):
        session.step(tokens(2, 1, seed=position))
        after = session.state()
        (graph,) = spec.schedule.tick(position).graphs
        changed = {state for state, value in after.states.items() if not np.array_equal(value, before.states[state])}
        assert changed == set(spec.graph(graph).writes)
        before = after


def test_a_coarse_memory_gains_a_row_every_factor_tokens() -> None:
    session = eager_session(model("two-valleys"), max_chunk=8)
    for position in range(1, 13):
        session.step(tokens(1, 1, seed=position))
        for name, cursor in session.state().cursors.items():
            if ".attention." in name:
                factor = int(re.findall(r"scale(\d+)", name)[-1])
                assert cursor[0] == -(-position // factor), f"{name} after {position} tokens"


def test_every_part_of_the_model_is_streamed_by_a_rule_that_says_so() -> None:
    hits = {(hit.place, hit.name) for hit in build(model("two-valleys")).hits if hit.applied and hit.reason}
    assert {
        ("model", "hourglass"),
        ("scale1", "level"),
        ("scale1.pre", "stack"),
        ("scale1.pre.block00", "block"),
        ("scale1.pre.block00.attention", "cached-attention"),
        ("scale1.valley", "valley"),
        ("scale1.valley.shortening", "shortening"),
        ("scale1.valley.upsampling", "upsampling"),
        ("scale1.valley.scale2.valley.scale4", "level"),
    } <= hits


@pytest.mark.parametrize("name", NESTED)
@given(plan=plans())
def test_any_stream_equals_the_full_forward(name: str, plan: Plan) -> None:
    check_rollout(model(name), plan)


@given(name=st.sampled_from([*NESTED]), plan=plans())
def test_any_stream_equals_the_full_forward_in_single_precision(name: str, plan: Plan) -> None:
    check_rollout(model(name, torch.float32), plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", NESTED)
@given(plan=plans(max_actions=25))
def test_any_long_stream_equals_the_full_forward(name: str, plan: Plan) -> None:
    check_rollout(model(name), plan)


@pytest.mark.parametrize("skipped", range(1, 9))
def test_rows_out_of_phase_tick_each_in_their_own_time(skipped: int) -> None:
    """Three rows at three phases of a nested model, after resets at different positions."""
    reference = model("two-valleys")
    session, ids = eager_session(reference, batch=3), tokens(3, 20)
    first = stream(session, ids[:, :skipped], [skipped])
    session.reset([1])
    second = stream(session, ids[:, skipped : skipped + 3], [1, 2])
    session.reset([2])
    third = stream(session, ids[:, skipped + 3 : skipped + 9], [5, 1])
    logits = np.concatenate([first, second, third], axis=1)
    for row, begin in enumerate((0, skipped, skipped + 3)):
        wanted = full(reference, ids[row : row + 1, begin : skipped + 9])[0]
        assert worst(logits[row, begin:], wanted) <= 1e-10
    assert session.position.tolist() == [skipped + 9, 9, 6]


@pytest.mark.parametrize("reference", [model("two-valleys"), transformer_xl()], ids=["hourglass", "transformer-xl"])
def test_swapped_rows_continue_each_its_own_stream(reference: Any) -> None:
    session, ids = eager_session(reference, batch=3), tokens(3, 17)
    session.step(ids[:, :5])
    session.reset([1])
    session.step(ids[:, 5:7])
    order = [2, 0, 1]
    straight = session.state()
    wanted = session.step(ids[:, 7:])
    session.restore(permuted(straight, order))
    assert worst(session.step(ids[order, 7:]), wanted[order]) <= 1e-10


def test_a_snapshot_is_independent_of_what_follows() -> None:
    reference = model("two-valleys")
    session, ids = eager_session(reference, batch=2), tokens(2, 15)
    before = session.step(ids[:, :7])
    saved = session.state()
    copy = {name: value.copy() for name, value in saved.states.items()}
    after = session.step(ids[:, 7:])
    assert all(np.array_equal(saved.states[name], value) for name, value in copy.items())
    for other in (session, eager_session(reference, batch=2)):
        other.restore(saved)
        assert worst(stream(other, ids[:, 7:], [1, 4, 3]), after) <= 1e-10
    assert worst(np.concatenate([before, after], axis=1), full(reference, ids)) <= 1e-10
