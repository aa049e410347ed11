"""Does an engine compute what the original computes? Chained rollouts, logits and states, with a gate.

The reference is the original model's own forward in FP32; the states, which the original does not name, come
from the stream program run in PyTorch. Everything is paired by name: a missing or extra tensor is a failure.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Protocol

import numpy as np

from mscompile.contracts import Array, Session, StateSpec, StreamSpec
from mscompile.errors import BundleError, GateFailed
from validation import invariants
from validation.invariants import Check
from validation.perplexity import Perplexity, perplexity
from validation.rollouts import Rollout

NewSession = Callable[[int], Session]  # batch -> session at position 0
Reference = Callable[[Array], Array]  # tokens (B, N) of whole streams -> logits (B, N, V) of the original
Progress = Callable[[int], None]  # tokens consumed since the last call


@dataclass(frozen=True)
class Tolerance:
    """What a precision may cost. `max_abs` bounds are hard ceilings, the others hold over a whole rollout.

    A limit of infinity does not apply.
    """

    logit_max_abs: float
    logit_outlier_above: float  # an error above this is an outlier ...
    logit_outlier_share: float  # ... and this share of all logits may be one
    min_argmax_agreement: float
    max_kl: float  # nats per token, mean
    state_max_abs: float
    max_norm_ratio_error: float  # | |engine| / |reference| - 1 | of logits
    state_relative: float = inf  # |engine - reference| / |reference|, of a whole state: it drifts with the weights
    max_perplexity_loss: float = inf  # share; over all text rollouts, where they are long enough

    def limits(self) -> dict[str, float]:
        """Those that apply, by name."""
        return {name: limit for name, limit in asdict(self).items() if limit != inf}


CURVE_POINTS = 64
COUPLED = ("int8-dynamic",)  # precisions in which all rows of a call share a scale
TIMES, LEAST_TIMES = 41, 12  # quantiles of the times of steps, and steps that are enough to tell

TOLERANCES: Mapping[str, Tolerance] = {
    # FP32 on both sides: only the order of sums differs, 1e-5 as measured; the ceiling leaves two decades.
    # States are within 5e-6 of their norm in every family; rounded to float16 once, they are 3e-4 away.
    "fp32": Tolerance(1e-3, 1e-4, 1e-3, 0.999, 1e-6, 1e-3, 1e-4, 1e-4),
    # Ceilings of the other rows lie four to five times above the worst of both shipped models, over text, random tokens
    # and resets: enough for other weights, and far below what a wrong scale, a missing island or a lost bit costs.
    # On text, mean KL divergence is close to the loss of log perplexity, so it stands in where no text is given.
    # 11 bits of mantissa: a logit of 20 is rounded by 1e-2.
    "fp16": Tolerance(0.5, 0.1, 1e-3, 0.985, 1e-4, inf, 1e-3, 0.01, 0.001),
    # 8 bits of mantissa.
    "bf16": Tolerance(3.0, 0.5, 1e-3, 0.92, 3e-3, inf, 5e-3, 0.06, 0.005),
    # Weights within 1/254 of the largest of their block, activations within 1/254 of theirs.
    "int8": Tolerance(3.0, 0.5, 1e-3, 0.92, 3e-3, inf, 0.01, 0.06, 0.005),
    # Weights within 1/14 of the largest of their block; the limit on perplexity is what counts.
    "int4": Tolerance(12.0, 2.5, 1e-2, 0.75, 0.15, inf, 0.05, 0.5, 0.02),
    # One scale for all activations of a call, whose largest decides how fine the others are.
    "int8-dynamic": Tolerance(4.0, 1.0, 1e-3, 0.9, 0.01, inf, 0.01, 0.12, 0.01),
}


def tolerance_of(precision: str) -> Tolerance:
    """What a bundle of this precision is held to; BundleError for one that is not known."""
    if precision not in TOLERANCES:
        raise BundleError(f"the manifest says precision {precision!r}; known: {', '.join(TOLERANCES)}")
    return TOLERANCES[precision]


@dataclass(frozen=True)
class TensorParity:
    """Logits, or one state, over one rollout."""

    rollout: str
    tensor: str
    tokens: int  # tokens whose values were compared, over all batch rows
    max_abs: float
    mean_abs: float
    cosine: float
    norm_ratio: float
    worst: str  # where the largest error is
    argmax_agreement: float | None = None
    kl: float | None = None
    outlier_share: float | None = None
    reference_bits: float | None = None  # bits per token on real text
    engine_bits: float | None = None
    relative: float | None = None  # norm of the error over the norm of the reference
    error_by_step: tuple[tuple[int, float], ...] = ()  # (step, largest error), at most CURVE_POINTS; not in manifests


@dataclass(frozen=True)
class Generation:
    """Greedy continuations that run free: each side is fed what it chose itself."""

    rows: int
    tokens: int  # a row, until the first that differs
    first_divergence: int | None = None  # number of the token at which a continuation leaves the original's
    row: int | None = None
    chosen: int | None = None  # by the engine there ...
    expected: int | None = None  # ... and by the original
    margin: float | None = None  # between the original's best two logits there


@dataclass(frozen=True)
class StepTimes:
    """How long steps of one token took while they were checked: a hint, not a benchmark."""

    graph: str
    batch: int
    steps: int
    quantiles_ms: tuple[float, ...]  # at 0, 1/40, .. 1

    def at(self, share: float) -> float:
        """Milliseconds that this share of steps takes at most."""
        return self.quantiles_ms[round(share * (len(self.quantiles_ms) - 1))]


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and whether it stays within `tolerance`."""

    engine: str
    precision: str
    tolerance: Tolerance
    tensors: tuple[TensorParity, ...]
    failures: tuple[str, ...]
    generation: Generation | None = None  # None: there was no original to run beside it
    perplexity: Perplexity | None = None  # None: too little text was given
    checks: tuple[Check, ...] = ()
    step_times: tuple[StepTimes, ...] = ()  # not in manifests

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def logit_max_abs(self) -> float:
        return max((t.max_abs for t in self.tensors if t.tensor == "logits"), default=0.0)

    @property
    def argmax_agreement(self) -> float:
        return min((t.argmax_agreement for t in self.tensors if t.argmax_agreement is not None), default=1.0)

    @property
    def first_divergence(self) -> int | None:
        return self.generation.first_divergence if self.generation else None

    def raise_if_failed(self) -> None:
        if self.failures:
            more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
            raise GateFailed(f"{self.engine} is not the original model: {self.failures[0]}{more}")


class _Comparison:
    """Running sums over the values of one tensor."""

    def __init__(self) -> None:
        self.max_abs, self.worst = 0.0, ""
        self.sum_abs, self.count, self.tokens = 0.0, 0, 0
        self.dot, self.wanted_square, self.found_square, self.error_square = 0.0, 0.0, 0.0, 0.0
        self.not_finite = ""
        self.curve: list[tuple[int, float]] = []  # (step, largest error)

    def add(self, found: Array, wanted: Array, tokens: int, place: Callable[[tuple[int, ...]], str]) -> Array:
        """Take values in; returns their errors, infinite where a value is not finite."""
        error = np.abs(found.astype(np.float64) - wanted)
        if not np.isfinite(found).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(found))[0])
            self.not_finite = self.not_finite or place(index)
            error = np.where(np.isfinite(error), error, np.inf)
        if error.size and (largest := float(error.max())) >= self.max_abs:
            self.max_abs = largest
            self.worst = place(tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape)))
        self.sum_abs, self.count, self.tokens = (
            self.sum_abs + float(error.sum()),
            self.count + error.size,
            self.tokens + tokens,
        )
        self.error_square += float(np.vdot(error, error))
        self.dot += float(np.vdot(found.astype(np.float64), wanted))
        self.found_square += float(np.vdot(found.astype(np.float64), found))
        self.wanted_square += float(np.vdot(wanted.astype(np.float64), wanted))
        return error

    def summary(self, rollout: str, tensor: str, **extra: Any) -> TensorParity:
        norms = np.sqrt(self.found_square * self.wanted_square)
        same = self.found_square == self.wanted_square  # both zero, for example
        return TensorParity(
            rollout,
            tensor,
            self.tokens,
            self.max_abs,
            self.sum_abs / max(self.count, 1),
            float(self.dot / norms) if norms else float(same),
            float(np.sqrt(self.found_square / self.wanted_square)) if self.wanted_square else float(same),
            self.worst,
            relative=float(np.sqrt(self.error_square / self.wanted_square))
            if self.wanted_square
            else (inf if self.error_square else 0.0),
            error_by_step=thinned(self.curve),
            **extra,
        )


def thinned(curve: Sequence[tuple[int, float]], points: int = CURVE_POINTS) -> tuple[tuple[int, float], ...]:
    """At most `points` of a curve: the highest of each run of neighbours."""
    size = -(-len(curve) // points)
    return tuple(max(curve[i : i + size], key=lambda point: point[1]) for i in range(0, len(curve), size or 1))


class _LogitStatistics:
    """What only logits have: argmax, distributions, bits on real text."""

    def __init__(self, outlier_above: float) -> None:
        self.outlier_above = outlier_above
        self.tokens = self.agreeing = self.outliers = self.values = 0
        self.kl = 0.0
        self.nats: list[tuple[Array, Array]] = []  # of the tokens that come next: the original's, the engine's

    def add(self, found: Array, wanted: Array, following: Array) -> None:
        """`following` are the tokens that come next, for as many positions as are known."""
        log_found, log_wanted = log_softmax(found), log_softmax(wanted)
        self.tokens += found.shape[0] * found.shape[1]
        self.agreeing += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        self.outliers += int((np.abs(found - wanted) > self.outlier_above).sum())
        self.values += found.size
        self.kl += float((np.exp(log_wanted) * (log_wanted - log_found)).sum())
        rows, columns = np.indices(following.shape)
        self.nats.append((-log_wanted[rows, columns, following], -log_found[rows, columns, following]))

    def losses(self) -> tuple[Array, Array]:
        """Nats (batch, N) that each token costs the original, and the engine."""
        original, engine = (np.concatenate(parts, axis=1) for parts in zip(*self.nats, strict=True))
        return original, engine

    def extra(self, is_text: bool) -> dict[str, float | None]:
        scored = is_text and any(part.size for part, _ in self.nats)
        original, engine = self.losses() if scored else (None, None)
        return {
            "argmax_agreement": self.agreeing / max(self.tokens, 1),
            "kl": self.kl / max(self.tokens, 1),
            "outlier_share": self.outliers / max(self.values, 1),
            "reference_bits": None if original is None else float(original.mean() / np.log(2)),
            "engine_bits": None if engine is None else float(engine.mean() / np.log(2)),
        }


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def check(
    engine: str,
    precision: str,
    spec: StreamSpec,
    new_session: NewSession,
    reference: Reference,
    states: NewSession,
    rollouts: Sequence[Rollout],
    progress: Progress = lambda _: None,
) -> ParityReport:
    """Run every rollout on the engine and gate its differences to the original.

    `reference` gives the original's logits of whole streams, `states` sessions of the stream program.
    """
    tolerance = tolerance_of(precision)
    tensors: list[TensorParity] = []
    failures: list[str] = []
    texts: list[tuple[tuple[int, ...], Array, Array]] = []
    times = _Times(spec)
    for rollout in rollouts:
        batch = rollout.tokens.shape[0]
        expected = expected_logits(rollout, reference)
        compared, broken, statistics = _run(
            rollout, spec, new_session(batch), expected, states(batch), None, tolerance, progress, times
        )
        tensors += compared
        failures += broken
        texts += [(rollout.starts, *statistics.losses())] if rollout.is_text and compared else []
    lost = perplexity(texts)
    widest = max(rollouts, key=lambda rollout: len(rollout.tokens)).tokens
    checks = _invariants(spec, new_session, widest, precision)
    generation, left = generate(spec, new_session, reference, widest, tolerance)
    failures += [*perplexity_faults(lost, tolerance), *left, *(fault for each in checks for fault in each.failures)]
    return ParityReport(
        engine, precision, tolerance, tuple(tensors), tuple(failures), generation, lost, checks, times.summary()
    )


def _invariants(spec: StreamSpec, new_session: NewSession, tokens: Array, precision: str) -> tuple[Check, ...]:
    allowed = tolerance_of(precision).logit_outlier_above
    return invariants.check(spec, new_session, tokens, allowed, precision in COUPLED)


class _Times:
    """Milliseconds of the steps of one token, by graph and batch."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec, self.taken = spec, defaultdict[tuple[str, int], list[float]](list)

    def add(self, before: Array, count: int, begun: float) -> None:
        """A step of `count` tokens begun at `begun`, with rows at `before`; those that do not share it are left out."""
        if count == 1 and (before == before[0]).all():
            graph = self.spec.schedule.next_call(int(before[0]), 1).graphs[0]
            self.taken[graph, len(before)].append((time.perf_counter() - begun) * 1e3)

    def summary(self) -> tuple[StepTimes, ...]:
        """The first step of each, which binds arrays, is left out."""
        return tuple(
            StepTimes(graph, batch, len(ms) - 1, tuple(np.quantile(ms[1:], np.linspace(0, 1, TIMES)).tolist()))
            for (graph, batch), ms in sorted(self.taken.items())
            if len(ms) > LEAST_TIMES
        )


def expected_logits(rollout: Rollout, reference: Reference) -> Array:
    """The original's logits (batch, N, V) for a rollout: every stream between two resets on its own."""
    batch, length = rollout.tokens.shape
    starts = np.cumsum([0, *rollout.chunks])
    borders = {row: [0] for row in range(batch)}
    for chunk, rows in rollout.resets:
        for row in rows:
            borders[row].append(int(starts[chunk]))
    logits: Array | None = None
    for cuts in dict.fromkeys(tuple(cuts) for cuts in borders.values()):
        sharing = [row for row in borders if tuple(borders[row]) == cuts]
        for start, end in zip(cuts, (*cuts[1:], length), strict=True):
            if start < end:
                stream = reference(rollout.tokens[sharing, start:end])
                if logits is None:
                    logits = np.empty((batch, length, stream.shape[2]), dtype=stream.dtype)
                logits[sharing, start:end] = stream
    assert logits is not None
    return logits


def _run(
    rollout: Rollout,
    spec: StreamSpec,
    engine: Session,
    expected: Array,
    program: Session | None,
    final_states: Mapping[str, Array] | None,
    tolerance: Tolerance,
    progress: Progress,
    times: _Times,
) -> tuple[list[TensorParity], list[str], _LogitStatistics]:
    """One rollout: what was compared, what breaks the gate, and the sums over its logits.

    States are compared with those of `program`, or at the end with `final_states`.
    """
    batch, length = rollout.tokens.shape
    logits, statistics = _Comparison(), _LogitStatistics(tolerance.logit_outlier_above)
    named = {state.name: _Comparison() for state in spec.states}
    resets = dict(rollout.resets)
    done = 0
    for number, chunk in enumerate(rollout.chunks):
        part = slice(done, done + chunk)
        for session in (engine, program):
            if session is not None and number in resets:
                session.reset(resets[number])
        before, begun = engine.position, time.perf_counter()
        found = engine.step(rollout.tokens[:, part])
        times.add(before, chunk, begun)
        if program is not None:
            program.step(rollout.tokens[:, part])
        error = logits.add(found, expected[:, part], batch * chunk, _logit_place(spec, before, chunk))
        logits.curve += zip(range(done, done + chunk), error.max(axis=(0, 2)).tolist(), strict=True)
        statistics.add(found, expected[:, part], rollout.tokens[:, done + 1 : done + chunk + 1])
        done += chunk
        progress(batch * chunk)
        if done == length or (program is not None and rollout.compares_states(number)):
            wanted = program.state().states if program is not None else final_states or {}
            fault = _add_states(engine, spec, wanted, named, batch * chunk, number, done)
            if fault:
                return [], [f"{rollout.name}: {fault}"], statistics
    tensors = [logits.summary(rollout.name, "logits", **statistics.extra(rollout.is_text))]
    tensors += [comparison.summary(rollout.name, name) for name, comparison in named.items()]
    broken = [
        f"{rollout.name}: {name} is not finite at {comparison.not_finite}"
        for name, comparison in {"logits": logits, **named}.items()
        if comparison.not_finite
    ]
    return tensors, broken + [fault for tensor in tensors for fault in faults(tensor, tolerance)], statistics


def _add_states(
    engine: Session,
    spec: StreamSpec,
    wanted: Mapping[str, Array],
    named: dict[str, _Comparison],
    tokens: int,
    chunk: int,
    done: int,
) -> str | None:
    """Compare the states after `chunk`, `done` tokens into the rollout; what is wrong with their names or shapes."""
    found, when = engine.state().states, f"after chunk {chunk}, token {done}"
    if found.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        return f"states differ: missing {missing}, extra {extra}"
    for name, comparison in named.items():
        value = written_rows(spec.state(name), found[name], wanted[name])
        if value.shape != wanted[name].shape:
            return f"{name} has shape {value.shape}, wanted {wanted[name].shape}"
        error = comparison.add(value, wanted[name], tokens, lambda index: f"{when}, element {list(index)}")
        comparison.curve.append((done - 1, float(error.max(initial=0.0))))
    return None


def written_rows(state: StateSpec, value: Array, like: Array) -> Array:
    """As many leading rows of an appended state as `like` has: golden states end where writing did."""
    if state.update != "append" or state.time_axis is None or value.ndim != like.ndim:
        return value
    index = [slice(None)] * value.ndim
    index[state.time_axis] = slice(like.shape[state.time_axis])
    return value[tuple(index)]


def _logit_place(spec: StreamSpec, before: Array, chunk: int) -> Callable[[tuple[int, ...]], str]:
    def place(index: tuple[int, ...]) -> str:
        row, offset, token = index
        graph = graph_of(spec, int(before[row]), chunk, offset)
        return f"graph {graph}, step {int(before[row]) + offset} of row {row}, logit {token}"

    return place


def graph_of(spec: StreamSpec, position: int, count: int, offset: int) -> str:
    """The graph that consumes token `offset` of a step of `count` tokens begun at `position`."""
    done = 0
    while True:
        call = spec.schedule.next_call(position + done, count - done)
        if offset < done + call.tokens:
            return call.graphs[0]
        done += call.tokens


def measures(tensor: TensorParity, tolerance: Tolerance) -> list[tuple[str, float, float]]:
    """What of a tensor is limited: each measure, its value and its limit."""
    if tensor.tensor != "logits":
        found: list[tuple[str, float | None, float]] = [
            ("max abs error", tensor.max_abs, tolerance.state_max_abs),
            ("relative error", tensor.relative, tolerance.state_relative),
        ]
    else:
        found = [
            ("max abs error", tensor.max_abs, tolerance.logit_max_abs),
            ("share of outliers", tensor.outlier_share, tolerance.logit_outlier_share),
            ("mean KL divergence", tensor.kl, tolerance.max_kl),
            ("norm ratio error", abs(tensor.norm_ratio - 1), tolerance.max_norm_ratio_error),
            ("argmax disagreement", 1 - (tensor.argmax_agreement or 0.0), 1 - tolerance.min_argmax_agreement),
        ]
    return [(what, value, limit) for what, value, limit in found if value is not None]


def faults(tensor: TensorParity, tolerance: Tolerance) -> list[str]:
    """What breaks the gate, each with its figures."""
    where = f"largest error {tensor.max_abs:.3g} at {tensor.worst}"
    return [
        f"{tensor.rollout}: {tensor.tensor}: {what} {value:.3g} exceeds {limit:.3g}; {where}"
        for what, value, limit in measures(tensor, tolerance)
        if not value <= limit
    ]


def perplexity_faults(lost: Perplexity | None, tolerance: Tolerance) -> list[str]:
    """The sentence that breaks the gate, where the loss on text is above its limit."""
    if lost is None or lost.loss <= tolerance.max_perplexity_loss:
        return []
    sentence = (
        f"perplexity on text is {lost.loss:.2%} above the original's (95 % interval {lost.low:.2%} to "
        f"{lost.high:.2%}), over {lost.tokens} tokens; {tolerance.max_perplexity_loss:.2%} is allowed"
    )
    return [sentence]


def generate(
    spec: StreamSpec,
    new_session: NewSession,
    reference: Reference,
    tokens: Array,
    tolerance: Tolerance,
    prompt: int = 16,
    length: int = 48,
) -> tuple[Generation, list[str]]:
    """Greedy continuations of the first tokens of each row, and the sentence that breaks the gate.

    Each logit may be `logit_max_abs` away from the original's, so two that are closer than twice that may change
    places: there a continuation may leave the original's.
    """
    if spec.max_context is not None:
        length = min(length, spec.max_context // 2)
    seen = tokens[:, : max(1, min(prompt, length))]
    rows, session = len(seen), new_session(len(seen))
    found = session.step(seen)
    for token in range(length):
        wanted = reference(seen)[:, -1]
        chosen, expected = found[:, -1].argmax(-1), wanted.argmax(-1)
        if (chosen != expected).any():
            row = int(np.flatnonzero(chosen != expected)[0])
            second, best = np.sort(wanted[row].astype(np.float64))[-2:]
            at = Generation(rows, token, token, row, int(chosen[row]), int(expected[row]), float(best - second))
            return at, divergence_faults(at, tolerance)
        seen = np.concatenate([seen, expected[:, None]], axis=1)
        found = session.step(chosen[:, None])
    return Generation(rows, length), []


def divergence_faults(found: Generation | None, tolerance: Tolerance) -> list[str]:
    """The sentence that breaks the gate, where the limits do not explain why a continuation left the original's."""
    if found is None or found.margin is None or found.margin <= 2 * tolerance.logit_max_abs:
        return []
    sentence = (
        f"greedy continuation: token {found.first_divergence} differs from the original's in row {found.row}, "
        f"{found.chosen} for {found.expected}, whose best two logits are {found.margin:.3g} apart there; errors within "
        f"the limits make up for {2 * tolerance.logit_max_abs:.3g}"
    )
    return [sentence]


class StoredRollout(Protocol):
    """A rollout with the reference's logits and final states, as a bundle keeps it."""

    @property
    def name(self) -> str: ...
    @property
    def tokens(self) -> Array: ...
    @property
    def chunks(self) -> Array: ...
    @property
    def logits(self) -> Array: ...
    @property
    def states(self) -> dict[str, Array]: ...


def check_golden(
    engine: str, precision: str, spec: StreamSpec, new_session: NewSession, golden: Sequence[StoredRollout]
) -> ParityReport:
    """Replay stored rollouts, and check sessions on their tokens. Needs neither the reference model nor torch."""
    tolerance, times = tolerance_of(precision), _Times(spec)
    tensors: list[TensorParity] = []
    failures: list[str] = []
    for stored in golden:
        rollout = Rollout(stored.name, stored.tokens, tuple(int(chunk) for chunk in stored.chunks))
        session = new_session(stored.tokens.shape[0])
        compared, broken, _ = _run(
            rollout, spec, session, stored.logits, None, stored.states, tolerance, lambda _: None, times
        )
        tensors += compared
        failures += broken
    checks: tuple[Check, ...] = ()
    if golden:
        widest = max(golden, key=lambda stored: len(stored.tokens)).tokens
        checks = _invariants(spec, new_session, widest, precision)
        failures += [fault for each in checks for fault in each.failures]
    return ParityReport(
        engine,
        precision,
        tolerance,
        tuple(tensors),
        tuple(failures),
        checks=checks,
        step_times=times.summary(),
    )
