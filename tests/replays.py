"""The same things done to a Python session and, as a script, to a session of another host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mscompile.contracts import Array, Sources
from mscompile.runtime import Bundle, open_bundle

LENGTHS = (1, 1, 1, 2, 3, 7, 16, 64)


@dataclass
class Replay:
    """What was done, for another host to do again, and the logits that Python's session gave."""

    opened: Bundle
    batch: int
    sources: Sources | None = None
    script: list[tuple[Any, ...]] = field(default_factory=list)  # a verb, and what it takes
    logits: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session = self.opened.session("ort", self.batch, self.sources)

    def step(self, tokens: Array) -> None:
        self.script.append(("step", tokens))
        self.logits.append(self.session.step(tokens).ravel())

    def reset(self, rows: Sequence[int] | None = None) -> None:
        self.script.append(("reset", rows))
        self.session.reset(rows)

    def save(self) -> None:
        self.script.append(("save",))
        self.saved = self.session.state()

    def restore(self) -> None:
        self.script.append(("restore",))
        self.session.restore(self.saved)

    @property
    def verbs(self) -> set[str]:
        return {verb for verb, *_ in self.script}

    def largest_difference(self, logits: Array) -> float:
        """Between the logits of the other host, one after another, and Python's."""
        wanted = np.concatenate(self.logits)
        assert logits.shape == wanted.shape
        return float(np.abs(logits - wanted).max())


def mixed(
    path: Path, batch: int, count: int, lengths: Sequence[int] = LENGTHS, sources: Sources | None = None
) -> Replay:
    """Random tokens in mixed chunks, rows reset out of phase, snapshots on the way."""
    replay, draw = Replay(open_bundle(path), batch, sources), np.random.default_rng(0)
    vocab, limit = replay.opened.spec.vocab_size, replay.opened.spec.max_context or 2**62
    done = 0
    while done < count:
        length = min(int(draw.choice(lengths)), limit)
        if (replay.session.position + length > limit).any():
            replay.reset()
        replay.step(draw.integers(0, vocab, (batch, length)))
        done += length
        if draw.random() < 0.15:
            replay.reset([int(draw.integers(batch))])
        if draw.random() < 0.15:
            replay.save()
        if "save" in replay.verbs and draw.random() < 0.1:
            replay.restore()
    return replay
