"""Workloads, samples and what they say; no test here depends on how fast the machine is."""

from __future__ import annotations

from typing import Any

import cases
import pytest

from mscompile.contracts import Schedule, Tick
from mscompile.errors import UsageError
from validation.latency import Meter, Workload, parse, schedule_gain, summarize

EVERY_THIRD = Schedule((Tick(("decode_3",)), Tick(("decode_1",), repeat=2)))
ONE_GRAPH = Schedule((Tick(("decode",)),))


@pytest.mark.parametrize(
    ("text", "workload"),
    [
        ("decode", Workload("decode", 1, 256)),
        ("decode@7", Workload("decode", 1, 7)),
        ("prefill:128", Workload("prefill", 128, 0)),
    ],
)
def test_workloads(text: str, workload: Workload) -> None:
    assert parse(text) == workload
    assert parse(workload.name) == workload


@pytest.mark.parametrize("text", ["", "decode@", "decode@-1", "prefill", "prefill:0", "prefill:x", "encode"])
def test_unknown_workloads_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write decode, decode@POSITION or prefill:TOKENS"):
        parse(text)


def test_a_multi_rate_decode_is_averaged_over_its_period() -> None:
    samples = [(0, 9.0), (1, 1.0), (2, 3.0), (3, 9.0), (4, 3.0), (5, 1.0)]
    found = summarize("ort", parse("decode@0"), samples, EVERY_THIRD)
    assert found.ms_by_graph == {"decode_1": 2.0, "decode_3": 9.0}
    assert found.ms_per_step == pytest.approx((9 + 2 * 2) / 3)
    assert found.tokens_per_second == pytest.approx(1000 / found.ms_per_step)
    assert (found.min_ms, found.samples) == (1.0, 6)


def test_a_prefill_counts_all_its_tokens() -> None:
    found = summarize("ort", parse("prefill:100"), [(0, 20.0), (0, 10.0), (0, 30.0)], EVERY_THIRD)
    assert (found.ms_per_step, found.tokens_per_second, found.ms_by_graph) == (20.0, 5000.0, {})


def test_what_a_schedule_saves_is_predicted_and_measured() -> None:
    latency = summarize("ort", parse("decode@0"), [(0, 8.0), (1, 2.0), (2, 2.0)], EVERY_THIRD)
    gain = schedule_gain(latency, {"decode_1": 100, "decode_3": 700}, EVERY_THIRD)
    assert gain is not None
    assert gain.measured == pytest.approx(8 / 4)
    assert gain.predicted == pytest.approx(700 / 300)


def test_one_graph_for_every_token_saves_nothing_by_its_schedule() -> None:
    latency = summarize("ort", parse("decode@0"), [(0, 1.0), (1, 1.0)], ONE_GRAPH)
    assert schedule_gain(latency, {"decode": 5}, ONE_GRAPH) is None


class Counted:
    """A session that only counts."""

    def __init__(self, batch: int) -> None:
        self.batch, self.steps, self.at = batch, [], 0

    @property
    def position(self) -> list[int]:
        return [self.at]

    def step(self, tokens: Any) -> None:
        self.steps.append(tokens.shape)
        self.at += tokens.shape[1]

    def reset(self, rows: Any = None) -> None:
        assert rows is None
        self.at = 0


def meter(workload: str, limit: int | None, batch: int = 1) -> tuple[Meter, Counted]:
    made: list[Counted] = []

    def new(batch: int) -> Any:
        made.append(Counted(batch))
        return made[0]

    return Meter(new, parse(workload), cases.VOCAB, limit, batch), made[0]


def test_decode_starts_behind_its_prefix_and_never_passes_the_context() -> None:
    measured, session = meter("decode@10", limit=16, batch=2)
    assert session.steps[0] == (2, 10)
    positions = [position for position, _ in measured.sample(9)]
    assert positions == [12, 13, 14, 15, 12, 13, 14, 15, 12]
    assert all(shape in ((2, 10), (2, 1)) for shape in session.steps)


def test_prefill_starts_fresh_each_time() -> None:
    measured, session = meter("prefill:5", limit=8)
    assert [position for position, _ in measured.sample(3)] == [0, 0, 0]
    assert set(session.steps) == {(1, 5)}


def test_a_workload_beyond_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match=r"prefill:9 needs 9 tokens of context; this bundle holds 8"):
        meter("prefill:9", limit=8)
