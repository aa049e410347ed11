"""Sessions of an engine whose host does one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from mscompile.contracts import Array, Session, Snapshot


class Altered:
    """A session with one fault."""

    def __init__(self, session: Session) -> None:
        self.inner = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, tokens: Any) -> Array:
        return self.inner.step(tokens)

    def edit(self, change: Callable[[dict[str, Array]], None]) -> None:
        """Change the states of the session."""
        snapshot = self.inner.state()
        states = dict(snapshot.states)
        change(states)
        self.inner.restore(replace(snapshot, states=states))


class RollsTooFar(Altered):
    """After every step the first ring is turned by one slot."""

    def step(self, tokens: Any) -> Array:
        logits = self.inner.step(tokens)
        self.edit(lambda states: states.update({(name := min(states)): np.roll(states[name], 1, axis=2)}))
        return logits


class WrongRingOrder(Altered):
    """Chunks are written to the ring from their newest row to their oldest."""

    def step(self, tokens: Any) -> Array:
        logits = self.inner.step(tokens)
        count = np.asarray(tokens).shape[1]

        def turn(states: dict[str, Array]) -> None:
            name = min(states)
            rows = min(count, states[name].shape[2])
            states[name] = states[name].copy()
            states[name][:, :, :rows] = states[name][:, :, :rows][:, :, ::-1]

        if count > 1:
            self.edit(turn)
        return logits


class StaleBuffer(Altered):
    """Every fifth step the last state is not written."""

    steps = 0

    def step(self, tokens: Any) -> Array:
        before, logits = self.inner.state(), self.inner.step(tokens)
        self.steps += 1
        if self.steps % 5 == 0:
            self.edit(lambda states: states.update({max(states): before.states[max(states)]}))
        return logits


class KeepsOldRows(Altered):
    """A reset of single rows does nothing."""

    def reset(self, rows: Any = None) -> None:
        if rows is None or len(rows) == self.inner.batch:
            self.inner.reset(rows)


class PositionNotReset(Altered):
    """A reset leaves the states of the first row as they are."""

    def reset(self, rows: Any = None) -> None:
        before = self.inner.state()
        self.inner.reset(rows)
        if rows is not None and 0 in rows:
            kept = {name: value.copy() for name, value in self.inner.state().states.items()}
            name = min(kept)
            kept[name][0] = before.states[name][0]
            self.inner.restore(replace(self.inner.state(), states=kept))


class BadRestore(Altered):
    def restore(self, snapshot: Snapshot) -> None:
        name = min(snapshot.states)
        self.inner.restore(replace(snapshot, states={**snapshot.states, name: snapshot.states[name] * 0.5}))


class SharedSnapshot(Altered):
    """A snapshot whose position is not kept: it goes on with the session."""

    def restore(self, snapshot: Snapshot) -> None:
        self.inner.restore(replace(snapshot, position=self.inner.position))


class RowsMixed(Altered):
    """The rows of a batch get each other's logits."""

    def step(self, tokens: Any) -> Array:
        return self.inner.step(tokens)[::-1]


class LateLogits(Altered):
    """In a long call the first token's logits are those of the second."""

    def step(self, tokens: Any) -> Array:
        logits = self.inner.step(tokens)
        if logits.shape[1] > 12:
            logits[:, 0] = logits[:, 1]
        return logits


class NotANumber(Altered):
    """Once, in one row, one logit."""

    def step(self, tokens: Any) -> Array:
        logits = self.inner.step(tokens)
        if self.inner.batch > 1 and self.inner.position[-1] > 30:
            logits[-1, -1, 1] = np.nan
        return logits
