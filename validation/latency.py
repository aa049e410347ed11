"""How long a step takes: workloads, samples, and what they say. Interleaving processes is the caller's affair."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import numpy as np

from mscompile.contracts import Schedule, Session
from mscompile.errors import UsageError

WARM_UPS = 2


@dataclass(frozen=True)
class Workload:
    """decode: single tokens from position `start` on. prefill: `tokens` at once; from position `start` on, or in a
    fresh stream each time where that is 0.
    """

    kind: str
    tokens: int
    start: int

    @property
    def name(self) -> str:
        if self.kind == "decode":
            return f"decode@{self.start}"
        return f"prefill:{self.tokens}@{self.start}" if self.start else f"prefill:{self.tokens}"


def parse(text: str) -> Workload:
    """`decode`, `decode@512` (from that position on), `prefill:128` or `prefill:128@512`. Raises UsageError."""
    if match := re.fullmatch(r"decode(?:@(\d+))?", text):
        return Workload("decode", 1, int(match[1] or 256))
    if (match := re.fullmatch(r"prefill:(\d+)(?:@(\d+))?", text)) and int(match[1]) >= 1:
        return Workload("prefill", int(match[1]), int(match[2] or 0))
    raise UsageError(f"unknown workload {text!r}; write decode, decode@POSITION or prefill:TOKENS")


class Meter:
    """Samples of one workload on one session, taken in as many rounds as wanted."""

    def __init__(
        self,
        new_session: Callable[[int], Session],
        workload: Workload,
        vocab_size: int,
        limit: int | None,
        batch: int = 1,
    ):
        warm = WARM_UPS if workload.start or workload.kind == "decode" else 0  # these steps follow one another
        longest = workload.start + workload.tokens * (2 * warm if workload.kind == "decode" else 1 + warm)
        if limit is not None and longest > limit:
            raise UsageError(f"{workload.name} needs {longest} tokens of context; this bundle holds {limit}")
        self.workload, self.limit = workload, limit
        self.session = new_session(batch)
        self.random = np.random.default_rng(0)
        self.vocab_size = vocab_size
        self._prime()

    @property
    def _continues(self) -> bool:
        return self.workload.kind == "decode" or self.workload.start > 0

    def _tokens(self, count: int) -> np.ndarray:
        return self.random.integers(0, self.vocab_size, (self.session.batch, count), dtype=np.int64)

    def _prime(self) -> None:
        self.session.reset()
        if self.workload.start:
            self.session.step(self._tokens(self.workload.start))
        for _ in range(WARM_UPS):
            self._timed()

    def sample(self, count: int) -> list[tuple[int, float]]:
        """(position, milliseconds) of `count` steps."""
        return [self._timed() for _ in range(count)]

    def _timed(self) -> tuple[int, float]:
        if not self._continues:
            self.session.reset()
        position = int(self.session.position[0])
        if self.limit is not None and position + self.workload.tokens > self.limit:
            self._prime()
            position = int(self.session.position[0])
        tokens = self._tokens(self.workload.tokens)
        begun = time.perf_counter()
        self.session.step(tokens)
        return position, (time.perf_counter() - begun) * 1e3


@dataclass(frozen=True)
class Latency:
    """One engine on one workload."""

    engine: str
    workload: str
    samples: int
    ms_per_step: float  # median; for a multi-rate decode, the medians of its ticks averaged over the period
    p95_ms: float
    min_ms: float
    tokens_per_second: float
    ms_by_graph: Mapping[str, float]  # median of the steps that each tick's graph consumed, decode only


def summarize(engine: str, workload: Workload, samples: Sequence[tuple[int, float]], schedule: Schedule) -> Latency:
    times = [ms for _, ms in samples]
    by_graph: dict[str, list[float]] = defaultdict(list)
    if workload.kind == "decode":
        for position, ms in samples:
            by_graph[schedule.tick(position).graphs[0]].append(ms)
    medians = {name: median(values) for name, values in sorted(by_graph.items())}
    per_step = _over_period(medians, schedule) if medians else median(times)
    p95 = quantiles(times, n=20)[-1] if len(times) > 1 else times[0]
    return Latency(
        engine, workload.name, len(times), per_step, p95, min(times), 1e3 * workload.tokens / per_step, medians
    )


def _over_period(medians: Mapping[str, float], schedule: Schedule) -> float:
    """Mean over one period, of the ticks that were sampled."""
    sampled = [(tick.repeat, medians[tick.graphs[0]]) for tick in schedule.ticks if tick.graphs[0] in medians]
    return sum(repeat * ms for repeat, ms in sampled) / sum(repeat for repeat, _ in sampled)


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times that were measured in the same rounds: the median over rounds, and where the middle 80 %
    of rounds lie. Rounds that were noisy for one are noisy for the other, so this says more than the times do.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float], others: Sequence[float]) -> Ratio:
        """`times[i] / others[i]`, one of each a round."""
        ratios = np.array([time / other for time, other in zip(times, others, strict=True)])
        low, middle, high = np.percentile(ratios, (10, 50, 90))
        return cls(float(middle), float(low), float(high))


@dataclass(frozen=True)
class ScheduleGain:
    """What running each scale only when due saves, against running every scale for every token."""

    predicted: float  # from the floating-point operations of each tick's graph
    measured: float  # from the medians of each tick's steps


def schedule_gain(latency: Latency, costs: Mapping[str, int], schedule: Schedule) -> ScheduleGain | None:
    """None where one graph serves every token, or a tick was not sampled."""
    names = {tick.graphs[0] for tick in schedule.ticks}
    if len(names) == 1 or not names <= latency.ms_by_graph.keys() or not names <= costs.keys():
        return None
    floats = {name: float(costs[name]) for name in names}
    medians = latency.ms_by_graph
    return ScheduleGain(
        max(floats.values()) / _over_period(floats, schedule),
        max(medians[name] for name in names) / _over_period(medians, schedule),
    )
