"""Latency of several engines and peers side by side: one process each, so that their thread pools do not fight, with
rounds interleaved A B C A B C, so that a noisy machine is noisy for all. The machine's ceilings are measured in the
same rounds.

As a script this module is one such process: it answers each question {"workload", "samples", "batch"} with the
(position, milliseconds) of its steps, and {"check"} with the last logits of a short stream, the same for all.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mscompile import footprint, peers, worker
from mscompile.contracts import Schedule
from mscompile.errors import EngineError, EngineUnavailable, MsCompileError, UsageError
from mscompile.runtime import Bundle, open_bundle
from validation import sources
from validation.ceilings import ProductRate, ReadBandwidth
from validation.latency import (
    Latency,
    Meter,
    Ratio,
    ScheduleGain,
    Workload,
    parse,
    schedule_gain,
    summarize,
)

ORIGINAL = "torch"
CEILING = "ceiling"
CEILING_ROWS = 128  # of the matrix products whose rate is the arithmetic ceiling
CHECK_CHUNK, CHECK_STEPS = 632, 8  # tokens of the stream on which logits are compared; the context may shorten it
LEAST_READ_BYTES = 128 * 2**20  # far more than a cache holds
RUNTIMES = ("mscompile", "numpy", "torch", "onnxruntime", "openvino")

Progress = Callable[[str, int, int], None]
Samples = list[tuple[int, float]]  # (position, milliseconds) of each step


@dataclass(frozen=True)
class Contestant:
    """One process: an engine of a bundle, a peer of its reference, or the machine's ceilings at its sizes."""

    name: str
    engine: str
    bundle: Path
    reference: Path | None = None
    adapter: str | None = None  # of the reference


@dataclass(frozen=True)
class Lane:
    """What one contestant does in each round of a heat."""

    contestant: str
    workload: Workload
    samples: int
    batch: int = 1


@dataclass(frozen=True)
class Rates:
    """What the machine did in one round."""

    bytes_per_second: float
    flops_per_second: float

    def least_ms(self, cost: footprint.Footprint, tokens: int = 1, batch: int = 1) -> float:
        """The time that reading a step's bytes or doing its operations takes, whichever is longer.

        `tokens` of one call share what they read; each does the operations of one decode step.
        """
        reading = cost.bytes(batch) / self.bytes_per_second
        return 1e3 * max(reading, batch * tokens * cost.flops / self.flops_per_second)


@dataclass(frozen=True)
class Heat:
    """Lanes that were run in turn, round by round."""

    samples: Mapping[Lane, Sequence[Samples]]  # one list a round
    rates: Sequence[Rates]  # one a round; empty where ceilings were not measured

    def by_round(self, lane: Lane, schedule: Schedule) -> list[float]:
        """Milliseconds a step in each round."""
        return [summarize("", lane.workload, taken, schedule).ms_per_step for taken in self.samples[lane]]

    def latency(self, lane: Lane, schedule: Schedule) -> Latency:
        every = [sample for taken in self.samples[lane] for sample in taken]
        return summarize(lane.contestant, lane.workload, every, schedule)

    def ratio(self, lane: Lane, other: Lane, schedule: Schedule) -> Ratio:
        """How many times as long as `other` a step of `lane` takes."""
        return Ratio.of(self.by_round(lane, schedule), self.by_round(other, schedule))

    def of_ceiling(self, lane: Lane, cost: footprint.Footprint, schedule: Schedule) -> Ratio:
        """How many times as long as the machine's ceiling allows a step of `lane` takes."""
        least = [rates.least_ms(cost, lane.workload.tokens, lane.batch) for rates in self.rates]
        return Ratio.of(self.by_round(lane, schedule), least)


class Field:
    """The running processes of all contestants; `skipped` says which cannot run here, and why."""

    def __init__(self, contestants: Sequence[Contestant]) -> None:
        self.skipped: dict[str, str] = {}
        self.peak_bytes: dict[str, int] = {}  # resident memory of each process
        self._ask: dict[str, worker.Ask] = {}
        self._contestants = contestants

    def __enter__(self) -> Field:
        with ExitStack() as stack:
            workspace = stack.enter_context(tempfile.TemporaryDirectory())
            for one in self._contestants:
                # Peers of one checkpoint share what they export.
                shared = Path(workspace, one.reference.stem if one.reference else one.bundle.stem)
                shared.mkdir(exist_ok=True)
                arguments = (one.bundle, one.engine, one.reference or "", shared, one.adapter or "")
                try:
                    ask = stack.enter_context(worker.process(one.name, "mscompile.bench", *arguments))
                except (EngineUnavailable, EngineError) as error:
                    self._skip(one.name, error)
                else:
                    self._ask[one.name] = ask
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _skip(self, name: str, error: MsCompileError) -> None:
        """Go on without a peer that fails; a failure of an engine of ours ends the run."""
        engines = {one.name: one.engine for one in self._contestants}
        unavailable = isinstance(error, EngineUnavailable)
        if not unavailable and isinstance(error, EngineError) and engines[name] not in peers.PEERS:
            raise error
        self.skipped[name] = str(error)
        self._ask.pop(name, None)

    @property
    def running(self) -> list[str]:
        return [name for name in self._ask if name != CEILING]

    def errors(self) -> dict[str, float]:
        """Largest difference of the last logits of a short stream to those of the original, where that runs too."""
        logits = {
            one.name: np.array(self._ask[one.name](check=True)["logits"])
            for one in self._contestants
            if one.name in self.running and (one.engine not in peers.PEERS or peers.find(one.engine).exact)
        }
        originals = {one.reference: one.name for one in self._contestants if one.engine == ORIGINAL}
        return {
            one.name: float(np.abs(logits[one.name] - logits[originals[one.reference]]).max())
            for one in self._contestants
            if one.name in logits and originals.get(one.reference) in logits and one.engine != ORIGINAL
        }

    def run(self, lanes: Sequence[Lane], rounds: int, progress: Progress = lambda *_: None) -> Heat:
        """`rounds` rounds over the lanes whose contestants run here, and over the ceilings."""
        taken: dict[Lane, list[Samples]] = {lane: [] for lane in lanes}
        rates: list[Rates] = []
        for number in range(rounds):
            for place, lane in enumerate(lanes):
                progress(f"{lane.contestant} {lane.workload.name}", number * len(lanes) + place, rounds * len(lanes))
                if lane.contestant in self._ask:
                    taken[lane] += self._samples(lane)
            if CEILING in self._ask:
                rates.append(Rates(**self._ask[CEILING]()))
        return Heat({lane: found for lane, found in taken.items() if len(found) == rounds}, rates)

    def _samples(self, lane: Lane) -> list[Samples]:
        """The samples of one round; none where a peer has failed."""
        question = {"workload": lane.workload.name, "samples": lane.samples, "batch": lane.batch}
        try:
            answer = self._ask[lane.contestant](**question)
        except EngineError as error:
            self._skip(lane.contestant, error)
            return []
        self.peak_bytes[lane.contestant] = answer["peak_bytes"]
        return [[(position, ms) for position, ms in answer["samples"]]]


@dataclass(frozen=True)
class BenchReport:
    """Latencies of every engine on every workload, measured in one run."""

    bundle: str
    machine: dict[str, Any]
    batch: int
    rounds: int
    latencies: tuple[Latency, ...]
    schedule_gains: dict[str, ScheduleGain]  # by "engine workload"
    skipped: dict[str, str]  # engines that could not run, and why
    speedups: dict[str, Ratio]  # by "engine workload peer": how many times as long the peer takes
    ceilings: dict[str, Ratio]  # by "engine workload": how many times as long as the machine's ceiling
    rates: Rates | None  # of the machine, the median of all rounds
    peak_bytes: dict[str, int]  # resident memory of each engine's process
    errors: dict[str, float]  # of each engine: largest difference of logits to the original on a short stream


def run(
    bundle: Path,
    engines: Sequence[str],
    workloads: Sequence[str],
    reference: Path | None = None,
    rounds: int = 8,
    samples: int = 12,
    batch: int = 1,
    progress: Progress = lambda *_: None,
    against: Sequence[str] | None = None,
    ceilings: bool = False,
    adapter: str | None = None,
) -> BenchReport:
    """Measure `engines` of a bundle and, with `reference`, the peers `against`: the original ("torch") by default.

    `adapter` builds the original where it is a module of one's own.
    A decode round takes at least one period of the schedule. What cannot run here is reported as skipped;
    EngineUnavailable if nothing can.
    """
    opened = open_bundle(bundle)
    parsed = [parse(text) for text in workloads]
    schedule = opened.spec.schedule
    if against and reference is None:
        raise UsageError("--against compares with the original model; give its checkpoint with --reference")
    rivals = [peers.find(name).name for name in against] if against is not None else [ORIGINAL] if reference else []
    names = [*rivals, *(engines or opened.engines)]
    contestants = [Contestant(name, name, bundle, reference, adapter) for name in names]
    contestants += [Contestant(CEILING, CEILING, bundle)] if ceilings else []
    measured: list[tuple[Workload, Heat]] = []
    with Field(contestants) as field:
        if not field.running:
            raise EngineUnavailable("; ".join(field.skipped.values()) or "no engine to measure")
        for number, workload in enumerate(parsed):
            count = max(samples, schedule.period) if workload.kind == "decode" else max(samples // 4, 2)
            lanes = [Lane(name, workload, count, batch) for name in field.running]
            measured.append((workload, field.run(lanes, rounds, _part(progress, number, len(parsed)))))
        errors = field.errors()
    report = _Summary(opened, rivals, measured)
    return BenchReport(
        opened.manifest.name, machine(), batch, rounds, report.latencies, report.gains, field.skipped,
        report.speedups, report.ceilings, report.rates, field.peak_bytes, errors,
    )  # fmt: skip


def _part(progress: Progress, number: int, parts: int) -> Progress:
    return lambda what, done, total: progress(what, number * total + done, parts * total)


class _Summary:
    """What the heats of one bundle say."""

    def __init__(self, opened: Bundle, rivals: Sequence[str], heats: Sequence[tuple[Workload, Heat]]) -> None:
        manifest, schedule = opened.manifest, opened.spec.schedule
        self.latencies = tuple(heat.latency(lane, schedule) for _, heat in heats for lane in heat.samples)
        self.gains: dict[str, ScheduleGain] = {}
        self.speedups: dict[str, Ratio] = {}
        self.ceilings: dict[str, Ratio] = {}
        for workload, heat in heats:
            engines = [lane for lane in heat.samples if lane.contestant not in rivals]
            for lane in engines:
                name = f"{lane.contestant} {workload.name}"
                if gain := schedule_gain(heat.latency(lane, schedule), manifest.costs, schedule):
                    self.gains[name] = gain
                for other in heat.samples:
                    if other.contestant in rivals:
                        self.speedups[f"{name} {other.contestant}"] = heat.ratio(other, lane, schedule)
                if heat.rates:
                    cost = footprint.decode(opened.path, manifest, workload.start)
                    self.ceilings[name] = heat.of_ceiling(lane, cost, schedule)
        self.rates = typical([rates for _, heat in heats for rates in heat.rates])


def typical(rates: Sequence[Rates]) -> Rates | None:
    """The medians; None of nothing."""
    if not rates:
        return None
    return Rates(median(r.bytes_per_second for r in rates), median(r.flops_per_second for r in rates))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: found for name in RUNTIMES if (found := _version(name))},
    }


def threads() -> int:
    """Compute threads that everything measured gets: one for each core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _steps(bundle: str, engine: str, reference: str, workspace: str, adapter: str) -> worker.Handler:
    """Answers with the times of an engine's or a peer's steps."""
    opened = open_bundle(bundle, hash_files=False)
    if engine in peers.PEERS:
        source = peers.Source(Path(reference), adapter or None, opened.spec.max_context)
        new_session = peers.sessions(engine, source, Path(workspace), threads())
    else:
        new_session = partial(opened.plan(engine).session, sources=sources.pseudo(opened.spec.inputs))
    spec = opened.spec
    meters: dict[tuple[str, int], Meter] = {}

    def check() -> dict[str, Any]:
        count = min(CHECK_CHUNK + CHECK_STEPS, spec.max_context or CHECK_CHUNK + CHECK_STEPS)
        tokens = np.random.default_rng(1).integers(0, spec.vocab_size, (1, count))
        session = new_session(1)
        session.step(tokens[:, :-CHECK_STEPS])
        for place in range(count - CHECK_STEPS, count - 1):
            session.step(tokens[:, place : place + 1])
        return {"logits": session.step(tokens[:, -1:])[0, -1].tolist()}

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        if "check" in question:
            return check()
        key = question["workload"], question["batch"]
        if key not in meters:
            meters[key] = Meter(new_session, parse(key[0]), spec.vocab_size, spec.max_context, key[1])
        samples = meters[key].sample(question["samples"])
        return {"samples": samples, "peak_bytes": worker.peak_resident_bytes()}

    return answer


def _ceilings(bundle: str) -> worker.Handler:
    """Answers with the machine's rates, at the sizes of a bundle's model."""
    opened = open_bundle(bundle, hash_files=False)
    manifest, spec = opened.manifest, opened.spec
    graph = spec.graph(spec.schedule.prefill or spec.schedule.ticks[0].graphs[0])
    read = footprint.decode(opened.path, manifest, spec.max_context or 0).bytes()
    bandwidth = ReadBandwidth(max(int(read), LEAST_READ_BYTES), threads())
    products = ProductRate(footprint.products(opened.path / "graphs", graph), CEILING_ROWS, threads())
    return lambda _: {
        "bytes_per_second": bandwidth.bytes_per_second(),
        "flops_per_second": products.flops_per_second(),
    }


def _serve(bundle: str, engine: str, *original: str) -> None:
    worker.serve(lambda: _ceilings(bundle) if engine == CEILING else _steps(bundle, engine, *original))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
