"""What a validation of a bundle found, in one value: parity of its engines, and how it stands to an older bundle.

Every report is written from it: JSON, JUnit, Markdown and HTML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb, inf, isnan
from statistics import median
from typing import Any

from mscompile.contracts import StreamSpec
from mscompile.errors import GateFailed
from validation.latency import Ratio
from validation.parity import ParityReport, TensorParity, measures
from validation.thresholds import Limits

LEAST_ROUNDS = 6  # with fewer, no round's ratio bounds the median with that confidence


def least_median(values: Sequence[float], confidence: float = 0.975) -> float:
    """A lower bound of the median that the values were drawn around, whatever their distribution.

    It is an order statistic: at most k of n values lie below the median with the binomial probability of k or fewer
    heads in n tosses. -inf where there are too few values.
    """
    ordered, tail = [-inf, *sorted(values)], 0.0
    for below in range(len(values)):
        tail += comb(len(values), below) / 2 ** len(values)
        if tail > 1 - confidence:
            return ordered[below]
    return -inf


@dataclass(frozen=True)
class LogitChange:
    """The logits of one engine of two bundles on the same tokens."""

    engine: str
    rollout: str
    tokens: int  # over all batch rows
    max_abs: float
    argmax_agreement: float
    limit: float | None  # on max_abs; None where the bundles hold different checkpoints, which differ on purpose

    def fault(self) -> str | None:
        if self.limit is None or self.max_abs <= self.limit:
            return None
        return (
            f"{self.engine}, {self.rollout}: logits differ from the baseline's by up to {self.max_abs:.3g}, and both "
            f"bundles hold the same checkpoint; {self.limit:.3g} is allowed"
        )


@dataclass(frozen=True)
class Slowdown:
    """A step of one engine of two bundles, measured in the same interleaved rounds."""

    engine: str
    workload: str
    baseline_ms: float
    ms: float
    ratio: Ratio  # of the times in a round: more than 1 is slower than the baseline
    surely: float  # what the median ratio is at least, with 97.5 % confidence
    limit: float

    @classmethod
    def of(
        cls, engine: str, workload: str, times: Sequence[float], baseline: Sequence[float], limit: float
    ) -> Slowdown:
        """From the milliseconds a step in each round."""
        ratios = [time / other for time, other in zip(times, baseline, strict=True)]
        spread = Ratio.of(times, baseline)
        return cls(engine, workload, median(baseline), median(times), spread, least_median(ratios), limit)

    def fault(self) -> str | None:
        """A sentence where the ratio is surely above the limit: noise alone does not fail a gate."""
        if self.surely <= self.limit:
            return None
        return (
            f"{self.engine} {self.workload} takes {self.ratio.median:.2f}x as long as in the baseline, surely "
            f"{self.surely:.2f}x; {self.limit:.2f}x is allowed"
        )


@dataclass(frozen=True)
class Baseline:
    """A bundle against an older one."""

    bundle: str  # its path
    same_checkpoint: bool
    changes: tuple[str, ...]  # of states, graphs, schedule and what else a host sees
    logits: tuple[LogitChange, ...]
    latencies: tuple[Slowdown, ...]
    skipped: Mapping[str, str]  # what was not compared, and why

    def failures(self) -> list[str]:
        faults = [*(change.fault() for change in self.logits), *(slow.fault() for slow in self.latencies)]
        return [fault for fault in faults if fault is not None]


@dataclass(frozen=True)
class Subject:
    """The bundle that is validated: what it holds, and where it is from."""

    family: str
    parameters: int | None  # of the checkpoint; None: the manifest does not say
    versions: Mapping[str, str]  # of what exported it
    graph_bytes: int  # graphs and weights
    engine_bytes: Mapping[str, int]
    total_bytes: int
    spec: StreamSpec
    nodes: tuple[Mapping[str, Any], ...]  # of each graph after each stage of its export; empty in older bundles
    operations: Mapping[str, int]  # floating-point, of one call for one stream, of graphs of one token
    verified_at_export: tuple[str, ...]  # engines
    command: str


@dataclass(frozen=True)
class Validation:
    """What was checked of a bundle, by which limits, and what came of it."""

    bundle: str
    title: str
    precision: str
    checkpoint_sha256: str
    against: str  # "its golden rollouts" or the name of the original checkpoint
    machine: Mapping[str, Any]
    reports: tuple[ParityReport, ...]  # one an engine
    skipped: Mapping[str, str]  # engines that cannot run here, and why
    limits: Limits
    thresholds: str | None  # the file that set the limits
    faults: tuple[str, ...]  # of the bundle as a whole
    baseline: Baseline | None = None
    subject: Subject | None = None

    @property
    def failures(self) -> list[str]:
        """All that failed, the most general first."""
        engines = [f"{report.engine}: {failure}" for report in self.reports for failure in report.failures]
        return [*self.faults, *engines, *(self.baseline.failures() if self.baseline else [])]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def verdict(self) -> str:
        """One sentence."""
        count = len(self.failures)
        found = "passed" if self.passed else f"failed: {count} limit{'s' if count > 1 else ''} broken"
        return f"{self.bundle} ({self.precision}) {found}, against {self.against}"

    @property
    def unchecked(self) -> dict[str, str]:
        """What was not checked, and why."""
        left = dict(self.skipped)
        built = self.subject.engine_bytes if self.subject else {}
        ran = {report.engine for report in self.reports}
        left |= {engine: "built, and not asked for" for engine in built if engine not in ran and engine not in left}
        for report in self.reports:
            if report.generation is None:
                left[f"{report.engine}: generation"] = "it takes the original beside it: --reference"
            if report.perplexity is None:
                left[f"{report.engine}: perplexity"] = "it takes --reference and 2,048 tokens of text: --tokens"
            left |= {f"{report.engine}: {each.name}": each.skipped for each in report.checks if each.skipped}
        return left

    def raise_if_failed(self) -> None:
        """GateFailed with the first failure and how many more there are."""
        if self.faults:
            raise GateFailed(self.faults[0] + _more(self.failures))
        for report in self.reports:
            report.raise_if_failed()
        if self.baseline and (found := self.baseline.failures()):
            raise GateFailed(found[0] + _more(found))

    def limit(self, tensor: TensorParity) -> tuple[str, float, float]:
        """The limit that a tensor comes closest to: what is measured, its value and its limit."""
        return max(measures(tensor, self.limits.of(tensor.tensor)), key=lambda found: _share(*found[1:]))

    def share(self, tensor: TensorParity) -> float:
        """How much of that limit it uses; 1 is all of it."""
        return _share(*self.limit(tensor)[1:])

    def worst(self, report: ParityReport) -> TensorParity | None:
        """The tensor that uses most of its limit; None where nothing was compared."""
        return max(report.tensors, key=self.share, default=None)


def faults_of(report: ParityReport, tensor: TensorParity) -> list[str]:
    """The failures of a report that are about this tensor."""
    start = f"{tensor.rollout}: {tensor.tensor}"
    return [fault for fault in report.failures if fault.startswith((f"{start}: ", f"{start} "))]


def other_faults(report: ParityReport) -> Iterator[tuple[str, str]]:
    """The failures that are about no one tensor, each with the check that it begins with, as `snapshot`."""
    known = {fault for tensor in report.tensors for fault in faults_of(report, tensor)}
    for fault in report.failures:
        if fault not in known:
            yield fault.partition(": ")[0] if ": " in fault else " ".join(fault.split()[:3]), fault


def _share(value: float, limit: float) -> float:
    if limit in (0, inf) or isnan(value):
        return 0.0 if value <= limit else inf
    return value / limit


def _more(failures: list[str]) -> str:
    return f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
