"""What must hold of every session, whatever the model: checks against the engine itself, without a reference.

Rollouts compare an engine with the original; these compare it with itself where nothing may change: after a snapshot,
with its rows in another order, and with poison wherever a value must not be read. Each is a few dozen tokens.

Rows are poisoned with NaN, which spreads through whatever reads it. Slots of a ring that were not written yet are read
by design, and masked: their probability is zero, and zero times NaN is NaN. So they get a large finite number, which a
mask removes and its absence does not hide. Chunks are never padded: a prefill call has as many tokens as it consumes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mscompile.contracts import Array, Session, Snapshot, StreamSpec
from mscompile.errors import MsCompileError

TOKENS = 32  # a row
HEAD = 11  # of them before what is checked, so that no period ends there
OUT_OF_PHASE = 3  # and that many after a reset of row 0
LARGE = 1e4  # within float16, and far from any activation

NewSession = Callable[[int], Session]


@dataclass(frozen=True)
class Check:
    """One property of a session: what was done, and what came of it."""

    name: str
    what: str
    fault: str | None = None
    skipped: str | None = None  # why it was not done

    @property
    def failures(self) -> tuple[str, ...]:
        return () if self.fault is None else (f"{self.name}: {self.fault}",)


def check(spec: StreamSpec, new_session: NewSession, tokens: Array, allowed: float, coupled: bool) -> tuple[Check, ...]:
    """All checks on `tokens` (batch, time).

    Logits may differ by `allowed` where the order of sums may. `coupled`: all rows of a call share a scale, as with
    dynamic quantization, so that they are not independent by design.
    """
    trial = _Trial(spec, new_session, tokens[:, : min(TOKENS, spec.max_context or TOKENS)], allowed)
    one_row = "one row only" if len(tokens) == 1 else None
    shared = "this precision has one scale for all rows" if coupled else None
    rings = None if trial.rings else "no state is appended to whose first slots are masked"
    out = None if trial.tokens.shape[1] > HEAD + OUT_OF_PHASE else "the context is too short"
    if set(new_session(1).state().states) != {state.name for state in spec.states}:
        out = "the states of sessions have other names than the spec's"
    rows: tuple[tuple[str, str, Callable[[], str | None], str | None], ...] = (
        ("snapshot", "restored in its session and in a new one, with rows out of phase", trial.snapshot, None),
        ("row permutation", "rows exchanged in mid-stream", trial.permuted, one_row),
        ("poisoned rows", "NaN in the states of all rows but one", trial.poisoned_rows, one_row or shared),
        ("poisoned slots", f"{LARGE:g} in memory that was not written yet", trial.poisoned_slots, rings),
    )
    return tuple(_check(name, what, run, out or skipped) for name, what, run, skipped in rows)


def _check(name: str, what: str, run: Callable[[], str | None], skipped: str | None) -> Check:
    if skipped:
        return Check(name, what, skipped=skipped)
    try:
        return Check(name, what, run())
    except MsCompileError as error:
        return Check(name, what, str(error))


class _Trial:
    """Sessions on the same tokens; each check gives the sentence of its fault."""

    def __init__(self, spec: StreamSpec, new_session: NewSession, tokens: Array, allowed: float) -> None:
        self.spec, self.new_session, self.tokens, self.allowed = spec, new_session, tokens, allowed
        self.tail = tokens[:, HEAD + OUT_OF_PHASE :]
        self.rings = [name for name in rings(spec) if not spec.state(name).reads_initial]

    def begun(self) -> Session:
        """A session in mid-stream. Row 0 is out of phase, unless a reset would ask a host for what it does not know."""
        session = self.new_session(len(self.tokens))
        session.step(self.tokens[:, :HEAD])
        if not self.spec.inputs:
            session.reset([0])
        session.step(self.tokens[:, HEAD : HEAD + OUT_OF_PHASE])
        return session

    def snapshot(self) -> str | None:
        session = self.begun()
        saved = session.state()
        kept = {name: value.copy() for name, value in saved.states.items()}
        first = stepped(session, self.tail)
        if any(not np.array_equal(saved.states[name], value) for name, value in kept.items()):
            return "it changes while its session goes on"
        try:
            session.restore(saved)
        except MsCompileError as error:
            return f"a session does not take its own back: {error}"
        if not np.array_equal(first, stepped(session, self.tail)):
            return "a restored session does not repeat itself"
        other = self.new_session(len(self.tokens))
        other.restore(saved)
        return self.differs(stepped(other, self.tail), first, "a new session goes on otherwise than the one it is of")

    def permuted(self) -> str | None:
        session = self.begun()
        saved, order = session.state(), np.roll(np.arange(len(self.tokens)), 1)
        first = stepped(session, self.tail)
        session.restore(self.rows(saved, order))
        again = stepped(session, self.tail[order])
        return self.differs(again, first[order], "logits depend on which row a stream is in")

    def poisoned_rows(self) -> str | None:
        session = self.begun()
        saved = session.state()
        first = stepped(session, self.tail)
        for row in (0, len(self.tokens) - 1):
            session.restore(self.poisoned(saved, keep=row))
            again = stepped(session, self.tail)
            if fault := self.differs(again[row], first[row], f"row {row} reads the states of other rows"):
                return fault
        return None

    def poisoned_slots(self) -> str | None:
        session = self.new_session(len(self.tokens))
        first, again = with_other_starts(session, self.tokens, self.rings)
        return self.differs(again, first, "memory is read before it was written")

    def rows(self, saved: Snapshot, order: Array) -> Snapshot:
        """The same streams in other rows."""
        states = {
            name: np.ascontiguousarray(value.take(order, axis=self.spec.state(name).batch_axis))
            for name, value in saved.states.items()
        }
        return Snapshot(saved.position[order], states, {name: rows[order] for name, rows in saved.cursors.items()})

    def poisoned(self, saved: Snapshot, keep: int) -> Snapshot:
        """NaN in every floating-point state of every row but one."""
        states = {}
        for name, value in saved.states.items():
            states[name] = value.copy()
            if value.dtype.kind == "f":
                others = np.delete(np.arange(len(self.tokens)), keep)
                np.moveaxis(states[name], self.spec.state(name).batch_axis, 0)[others] = np.nan
        return replace(saved, states=states)

    def differs(self, found: Array, wanted: Array, sentence: str) -> str | None:
        error = float(np.abs(found.astype(np.float64) - wanted).max())
        if error <= self.allowed:
            return None
        how = "are not finite" if np.isnan(error) else f"differ by up to {error:.3g}, {self.allowed:.3g} is allowed"
        return f"{sentence}: logits {how}"


def rings(spec: StreamSpec) -> list[str]:
    """The names of the appended states that can be poisoned."""
    return [state.name for state in spec.states if state.update == "append" and np.dtype(state.dtype).kind == "f"]


def starts_read(spec: StreamSpec, new_session: NewSession, names: Collection[str], allowed: float) -> set[str]:
    """Which of the states `names` change logits by more than `allowed` with what they hold in a new session."""
    length = min(TOKENS, spec.max_context or TOKENS)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (1, length), dtype=np.int64)

    def read(some: Collection[str]) -> bool:
        first, again = with_other_starts(new_session(1), tokens, some)
        return not (np.abs(again - first) <= allowed).all()

    return {name for name in names if read([name])} if read(names) else set()


def with_other_starts(session: Session, tokens: Array, names: Collection[str]) -> tuple[Array, Array]:
    """Logits of a new session, and of one whose states `names` begin with large numbers."""
    fresh = session.state()
    first = stepped(session, tokens)
    session.restore(replace(fresh, states={**fresh.states, **{name: _large(fresh.states[name]) for name in names}}))
    return first, stepped(session, tokens)


def _large(like: Array) -> Array:
    """Two numbers by turns: neither a mean nor what a LayerNorm makes of them is zero."""
    return np.where(np.arange(like.size) % 2, LARGE, LARGE / 2).reshape(like.shape).astype(like.dtype)


def stepped(session: Session, tokens: Array) -> Array:
    """Logits of `tokens`: three one by one, the rest at once."""
    parts: Sequence[Array] = np.split(tokens, [1, 2, 3], axis=1)
    return np.concatenate([session.step(part) for part in parts if part.shape[1]], axis=1)
