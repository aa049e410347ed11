"""Does an engine compute what the original computes? Chained rollouts, logits and states, with a gate.

The reference is the original model's own forward in FP32; the states, which the original does not name, come
from the stream program run in PyTorch. Everything is paired by name: a missing or extra tensor is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Protocol

import numpy as np

from mscompile.contracts import Array, Session, StateSpec, StreamSpec
from mscompile.errors import GateFailed, MsCompileError
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
    max_perplexity_loss: float = inf  # share; over all text rollouts, where they have PERPLEXITY_TOKENS

    def limits(self) -> dict[str, float]:
        """Those that apply, by name."""
        return {name: limit for name, limit in asdict(self).items() if limit != inf}


CURVE_POINTS = 64
PERPLEXITY_TOKENS = 2048  # with fewer, the noise of the loss is as large as the limits

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
class Perplexity:
    """What the engine loses on real text, paired token by token with the original."""

    tokens: int
    loss: float  # perplexity of the engine over that of the original, minus 1
    standard_error: float  # of the loss


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and whether it stays within `tolerance`."""

    engine: str
    precision: str
    tolerance: Tolerance
    tensors: tuple[TensorParity, ...]
    failures: tuple[str, ...]
    first_divergence: int | None = None  # token at which a greedy continuation leaves the reference
    perplexity: Perplexity | None = None  # None: too little text was given

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def logit_max_abs(self) -> float:
        return max((t.max_abs for t in self.tensors if t.tensor == "logits"), default=0.0)

    @property
    def argmax_agreement(self) -> float:
        return min((t.argmax_agreement for t in self.tensors if t.argmax_agreement is not None), default=1.0)

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
        self.tokens = self.agreeing = self.outliers = self.values = self.scored = 0
        self.kl = self.reference_nats = self.engine_nats = self.lost_square = 0.0

    def add(self, found: Array, wanted: Array, following: Array) -> None:
        """`following` are the tokens that come next, for as many positions as are known."""
        log_found, log_wanted = log_softmax(found), log_softmax(wanted)
        self.tokens += found.shape[0] * found.shape[1]
        self.agreeing += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        self.outliers += int((np.abs(found - wanted) > self.outlier_above).sum())
        self.values += found.size
        self.kl += float((np.exp(log_wanted) * (log_wanted - log_found)).sum())
        rows, columns = np.indices(following.shape)
        self.scored += following.size
        of_reference, of_engine = log_wanted[rows, columns, following], log_found[rows, columns, following]
        self.reference_nats -= float(of_reference.sum())
        self.engine_nats -= float(of_engine.sum())
        self.lost_square += float(np.square(of_reference - of_engine).sum())

    def extra(self, is_text: bool) -> dict[str, float | None]:
        per_bit = self.scored * np.log(2)
        return {
            "argmax_agreement": self.agreeing / max(self.tokens, 1),
            "kl": self.kl / max(self.tokens, 1),
            "outlier_share": self.outliers / max(self.values, 1),
            "reference_bits": self.reference_nats / per_bit if is_text and per_bit else None,
            "engine_bits": self.engine_nats / per_bit if is_text and per_bit else None,
        }


def perplexity(texts: Sequence[_LogitStatistics]) -> Perplexity | None:
    """The loss over all text; None where there is too little of it to tell."""
    tokens = sum(text.scored for text in texts)
    if tokens < PERPLEXITY_TOKENS:
        return None
    lost = sum(text.engine_nats - text.reference_nats for text in texts) / tokens
    variance = max(sum(text.lost_square for text in texts) / tokens - lost**2, 0.0)
    return Perplexity(tokens, float(np.expm1(lost)), float(np.exp(lost) * np.sqrt(variance / tokens)))


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
    tolerance = TOLERANCES[precision]
    tensors: list[TensorParity] = []
    failures: list[str] = []
    texts: list[_LogitStatistics] = []
    for rollout in rollouts:
        batch = rollout.tokens.shape[0]
        program = states(batch)
        compared, broken, statistics = _run(
            rollout, spec, new_session(batch), expected_logits(rollout, reference), program, None, tolerance, progress
        )
        tensors += compared
        failures += broken
        texts += [statistics] if rollout.is_text else []
    lost = perplexity(texts)
    failures += perplexity_faults(lost, tolerance)
    failures += _snapshot_faults(new_session, rollouts[0])
    divergence = _greedy_divergence(spec, new_session, reference, rollouts[0])
    if divergence is not None and precision == "fp32":
        failures.append(f"greedy continuation: token {divergence} differs from the original's")
    return ParityReport(engine, precision, tolerance, tuple(tensors), tuple(failures), divergence, lost)


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
        before = engine.position
        found = engine.step(rollout.tokens[:, part])
        if program is not None:
            program.step(rollout.tokens[:, part])
        error = logits.add(found, expected[:, part], batch * chunk, _logit_place(spec, before, chunk))
        logits.curve += zip(range(done, done + chunk), error.max(axis=(0, 2)).tolist(), strict=True)
        statistics.add(found, expected[:, part], rollout.tokens[:, done + 1 : done + chunk + 1])
        done += chunk
        progress(batch * chunk)
        if done == length or (rollout.every_state and program is not None):
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
        f"perplexity on text is {lost.loss:.2%} (+- {lost.standard_error:.2%}) above the original's, over "
        f"{lost.tokens} tokens; {tolerance.max_perplexity_loss:.2%} is allowed"
    )
    return [sentence]


def _snapshot_faults(new_session: NewSession, rollout: Rollout) -> list[str]:
    """A restored session must go on bit by bit as it did before."""
    session = new_session(1)
    tokens = rollout.tokens[:1, :24]
    session.step(tokens[:, :11])
    saved = session.state()
    first = session.step(tokens[:, 11:])
    try:
        session.restore(saved)
    except MsCompileError as error:
        return [f"snapshot: a session does not take its own back: {error}"]
    again = session.step(tokens[:, 11:])
    return [] if np.array_equal(first, again) else ["snapshot: a restored session does not repeat itself"]


def _greedy_divergence(
    spec: StreamSpec, new_session: NewSession, reference: Reference, rollout: Rollout, length: int = 48
) -> int | None:
    """The first token at which free-running greedy continuations differ, None if none does."""
    if spec.max_context is not None:
        length = min(length, spec.max_context // 2)
    seen = rollout.tokens[:1, : max(1, min(16, length))]
    session = new_session(1)
    found = session.step(seen)
    for token in range(length):
        chosen, expected = found[:, -1:].argmax(-1), reference(seen)[:, -1:].argmax(-1)
        if (chosen != expected).any():
            return token
        seen = np.concatenate([seen, expected], axis=1)
        found = session.step(chosen)
    return None


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
    """Replay stored rollouts. Needs neither the reference model nor torch."""
    tolerance = TOLERANCES[precision]
    tensors: list[TensorParity] = []
    failures: list[str] = []
    for stored in golden:
        rollout = Rollout(stored.name, stored.tokens, tuple(int(chunk) for chunk in stored.chunks))
        session = new_session(stored.tokens.shape[0])
        compared, broken, _ = _run(
            rollout, spec, session, stored.logits, None, stored.states, tolerance, lambda _: None
        )
        tensors += compared
        failures += broken
    return ParityReport(engine, precision, tolerance, tuple(tensors), tuple(failures))
