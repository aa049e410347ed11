"""A bundle against that of the last release: what a host sees differently, the logits on the golden rollouts, and the
latency of both, measured in the same interleaved rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mscompile import bench
from mscompile.bundle import Manifest
from mscompile.contracts import Array, StreamSpec
from mscompile.errors import EngineUnavailable, UsageError
from mscompile.golden import Rollout
from mscompile.runtime import Bundle
from validation import contract
from validation.evidence import LEAST_ROUNDS, Baseline, LogitChange, Slowdown
from validation.latency import Workload
from validation.parity import tolerance_of

OLDER = "the baseline"
SAMPLES = 12  # decode steps a round
DECODE_AT, PREFILL = 256, 128  # positions and tokens, where the context holds them

Progress = Callable[[str, int, int], None]


def compare(
    new: Bundle,
    old: Bundle,
    engines: Sequence[str],
    max_slowdown: float,
    rounds: int,
    progress: Progress = lambda *_: None,
) -> Baseline:
    """`new` against `old`, on those of `engines` that both have; UsageError where they share none.

    Logits are gated where both hold the same checkpoint: each may be its tolerance away from the original, so the two
    may be both tolerances apart. Another checkpoint differs on purpose, and then they are reported only.
    """
    if max_slowdown < 1:
        raise UsageError(f"--max-slowdown is a ratio of at least 1, for example 1.10, not {max_slowdown:g}")
    if rounds < LEAST_ROUNDS:
        raise UsageError(f"--rounds must be at least {LEAST_ROUNDS} to tell slow from noisy, not {rounds}")
    shared = [engine for engine in engines if engine in old.engines]
    if not shared:
        raise UsageError(
            f"{old.path} was built for {', '.join(old.engines) or 'no engine'} and {new.path} runs here on "
            f"{', '.join(engines)}; a baseline needs an engine that both have"
        )
    skipped = {engine: f"{old.path} was not built for it" for engine in engines if engine not in shared}
    same = new.manifest.source["sha256"] == old.manifest.source["sha256"]
    limit = sum(tolerance_of(one.manifest.precision).logit_max_abs for one in (new, old)) if same else None
    replayed = []
    for rollout in old.golden.rollouts:
        if reason := _cannot_replay(new.spec, old.spec, rollout):
            skipped[rollout.name] = reason
        else:
            replayed += [_logits(new, old, engine, rollout, limit) for engine in shared]
    return Baseline(
        str(old.path),
        same,
        differences(old.manifest, new.manifest),
        tuple(replayed),
        tuple(_latencies(new, old, shared, max_slowdown, rounds, progress)),
        skipped,
    )


def differences(old: Manifest, new: Manifest) -> tuple[str, ...]:
    """A line for each difference of what was compiled, the states, the graphs and the schedule."""
    facts = {
        "checkpoint": (old.source["sha256"][:12], new.source["sha256"][:12]),
        "family": (old.family, new.family),
        "precision": (old.precision, new.precision),
        "max_chunk": (old.profile.max_chunk, new.profile.max_chunk),
    }
    changed = (f"{what} is {now}, {OLDER} says {before}" for what, (before, now) in facts.items() if now != before)
    return (*changed, *contract.differences(new.spec, old.spec, OLDER))


# Logits


def _cannot_replay(new: StreamSpec, old: StreamSpec, rollout: Rollout) -> str | None:
    """Why the newer bundle cannot take a rollout of the older one."""
    batch, length = rollout.tokens.shape
    if new.vocab_size != old.vocab_size:
        return f"it has {new.vocab_size} token ids, {OLDER} {old.vocab_size}"
    if new.inputs != old.inputs:
        return f"it takes other host inputs than {OLDER}"
    if batch > new.max_batch:
        return f"it takes {new.max_batch} rows, the rollout has {batch}"
    if length > (new.max_context or length):
        return f"it takes {new.max_context} tokens, the rollout has {length}"
    return None


def _logits(new: Bundle, old: Bundle, engine: str, rollout: Rollout, limit: float | None) -> LogitChange:
    found, before = (_replay(one, old, engine, rollout) for one in (new, old))
    error = np.abs(found.astype(np.float64) - before)
    largest = float(error.max()) if np.isfinite(error).all() else np.inf
    agree = float((found.argmax(-1) == before.argmax(-1)).mean())
    return LogitChange(engine, rollout.name, rollout.tokens.size, largest, agree, limit)


def _replay(bundle: Bundle, recorded: Bundle, engine: str, rollout: Rollout) -> Array:
    """Logits (batch, time, vocab); host inputs are answered with what `recorded` holds."""
    sources = recorded.golden.sources(recorded.spec.inputs)
    session = bundle.session(engine, rollout.tokens.shape[0], sources)
    parts = np.split(rollout.tokens, np.cumsum(rollout.chunks)[:-1], axis=1)
    return np.concatenate([session.step(part) for part in parts], axis=1)


# Latency


def workloads(new: StreamSpec, old: StreamSpec) -> tuple[Workload, Workload]:
    """Decode and prefill, at sizes that both contexts hold."""
    context = min(new.max_context or 2**31, old.max_context or 2**31)
    return Workload("decode", 1, min(DECODE_AT, context // 2)), Workload("prefill", min(PREFILL, context // 2), 0)


def _latencies(
    new: Bundle, old: Bundle, engines: Sequence[str], max_slowdown: float, rounds: int, progress: Progress
) -> Iterator[Slowdown]:
    """Every engine of both bundles, one process each, round by round."""
    runs = [(f"{place} {engine}", engine, one) for engine in engines for place, one in (("old", old), ("new", new))]
    schedules = {name: one.spec.schedule for name, _, one in runs}
    period = max(new.spec.schedule.period, old.spec.schedule.period)
    with bench.Field([bench.Contestant(name, engine, one.path) for name, engine, one in runs]) as field:
        if field.skipped:
            raise EngineUnavailable("; ".join(f"{name}: {reason}" for name, reason in field.skipped.items()))
        for workload in workloads(new.spec, old.spec):
            count = max(SAMPLES, period) if workload.kind == "decode" else max(SAMPLES // 4, 2)
            lanes = {name: bench.Lane(name, workload, count) for name, _, _ in runs}
            heat = field.run(list(lanes.values()), rounds, progress)
            ms = {name: heat.by_round(lane, schedules[name]) for name, lane in lanes.items()}
            for engine in engines:
                yield Slowdown.of(engine, workload.name, ms[f"new {engine}"], ms[f"old {engine}"], max_slowdown)
