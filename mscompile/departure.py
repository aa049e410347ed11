"""The first call of a stream after which an engine has left its reference. Part of `bisect`; needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engines.torch_eager import original
from mscompile.contracts import Array, Plan, Session, Snapshot, StreamSpec
from mscompile.locate import Exported, Values
from validation import parity
from validation.parity import Tolerance
from validation.rollouts import Rollout
from validation.suspects import error


@dataclass(frozen=True)
class Step:
    """The call after which the engine has left its reference, and the first token that shows it."""

    rollout: str
    call: int  # its number in the rollout
    tokens: int  # that each row consumed in it
    batch: int
    row: int
    position: int  # of the token, since the reset of its row
    phase: int  # of the schedule
    segment: int | None  # None where the model has no segments
    shows_in: str  # "logits", or the state that left first


@dataclass(frozen=True)
class Call:
    """One call of the schedule, by the engine and by its reference."""

    rollout: Rollout
    number: int
    before: Snapshot  # of the engine
    tokens: Array  # (B, T)
    found: Values  # logits (B, T, vocab) and states of the engine, after it
    wanted: Values  # logits of the original, states of the stream program
    program: Array  # logits (B, T, vocab) of the stream program


@dataclass(frozen=True)
class Departure(Call):
    """A call that left the reference."""

    shows_in: str
    ceiling: float  # of the errors of logits that it passed

    def step(self, spec: StreamSpec) -> Step:
        batch, count = self.tokens.shape
        row, offset = self._place(spec)
        schedule, position = spec.schedule, int(self.before.position[row]) + offset
        segment = position // schedule.period if any(tick.closing for tick in schedule.ticks) else None
        phase, name = position % schedule.period, self.rollout.name
        return Step(name, self.number, count, batch, row, position, phase, segment, self.shows_in)

    def _place(self, spec: StreamSpec) -> tuple[int, int]:
        """Row and token of the call; a state shows the row, and that it is wrong after the last token."""
        found, wanted = self.found.get(self.shows_in), self.wanted[self.shows_in]
        batch, count = self.tokens.shape
        if found is None or found.shape != wanted.shape:
            return 0, count - 1
        gap = error(found, wanted)
        if self.shows_in == "logits":
            row, offset = np.argwhere(gap.max(-1) > self.ceiling)[0]
            return int(row), int(offset)
        rows = np.moveaxis(gap, spec.state(self.shows_in).batch_axis, 0).reshape(batch, -1)
        return int(rows.max(-1).argmax()), count - 1


def first(plan: Plan, exported: Exported, rolled: Sequence[Rollout], tolerance: Tolerance) -> Departure | None:
    """The first call past a ceiling of the tolerance, or the first part of what is too much over its whole rollout."""
    for rollout in rolled:
        if (departure := _of_rollout(plan, exported, rollout, tolerance)) is not None:
            return departure
    return None


def _of_rollout(plan: Plan, exported: Exported, rollout: Rollout, tolerance: Tolerance) -> Departure | None:
    drifts = _Drifts(tolerance)
    for call in _calls(plan, exported, rollout):
        for name, wanted in call.wanted.items():
            if past_ceiling(tolerance, name, call.found.get(name), wanted):
                return Departure(**vars(call), shows_in=name, ceiling=tolerance.logit_max_abs)
            drifts.add(call, name)
    return drifts.first()


class _Drifts:
    """What one step may show and a whole rollout may not: outliers among the logits, and the drift of states."""

    def __init__(self, tolerance: Tolerance) -> None:
        self.tolerance = tolerance
        self.departures: dict[str, Departure] = {}  # by tensor, the first call that is over the share
        self.sums: dict[str, tuple[float, float]] = {}  # by tensor, what is wrong and out of how much

    def add(self, call: Call, name: str) -> None:
        wrong, total = self._parts(name, error(call.found[name], call.wanted[name]), call.wanted[name])
        if wrong > self._share(name) * total and name not in self.departures:
            self.departures[name] = Departure(**vars(call), shows_in=name, ceiling=self.tolerance.logit_outlier_above)
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (before[0] + wrong, before[1] + total)

    def first(self) -> Departure | None:
        """The first call of a tensor that is over its share in the rollout as a whole."""
        over = [
            departure
            for name, departure in self.departures.items()
            if self.sums[name][0] > self._share(name) * self.sums[name][1]
        ]
        return min(over, key=lambda departure: departure.number, default=None)

    def _parts(self, name: str, gap: Array, wanted: Array) -> tuple[float, float]:
        if name == "logits":
            return float((gap > self.tolerance.logit_outlier_above).sum()), float(gap.size)
        return float(np.square(gap).sum()), float(np.square(wanted.astype(np.float64)).sum())

    def _share(self, name: str) -> float:
        return self.tolerance.logit_outlier_share if name == "logits" else self.tolerance.state_relative**2


def _calls(plan: Plan, exported: Exported, rollout: Rollout) -> Iterator[Call]:
    """The rollout by the engine and the stream program, side by side, call by call of the engine's schedule."""
    batch = rollout.tokens.shape[0]
    engine, reference = plan.session(batch, exported.sources), exported.session(batch)
    expected = parity.expected_logits(rollout, original(exported.model))
    resets, done, number = dict(rollout.resets), 0, 0
    for chunk, count in enumerate(rollout.chunks):
        for session in (engine, reference):
            if chunk in resets:
                session.reset(resets[chunk])
        for part in _parts(plan.spec, engine, done, done + count):
            before, tokens = engine.state(), rollout.tokens[:, part]
            found = {"logits": engine.step(tokens), **engine.state().states}
            program = reference.step(tokens)
            wanted = {"logits": expected[:, part], **reference.state().states}
            yield Call(rollout, number, before, tokens, found, wanted, program)
            number += 1
        done += count


def _parts(spec: StreamSpec, session: Session, start: int, end: int) -> Iterator[slice]:
    """The tokens from `start` to `end` in parts that the session runs in one call of the schedule."""
    while start < end:
        phases = session.position % spec.schedule.period
        together = bool((phases == phases[0]).all())
        count = spec.schedule.next_call(int(phases[0]), end - start).tokens if together else 1
        yield slice(start, start + count)
        start += count


def past_ceiling(tolerance: Tolerance, name: str, found: Array | None, wanted: Array) -> bool:
    """Is a tensor outside what holds for every single step?"""
    if found is None or found.shape != wanted.shape or not np.isfinite(found).all():
        return True
    ceiling = tolerance.logit_max_abs if name == "logits" else tolerance.state_max_abs
    return bool((error(found, wanted) > ceiling).any())
