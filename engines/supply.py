"""Host inputs: what a source says of the chunks that a step completes, and which of it each call takes.

A step knows all its tokens, so a source is asked once for all chunks of all rows, before anything is consumed: one
large question instead of many small ones, and a source that fails leaves the session as it was.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mscompile.contracts import Array, HostInput, Sources
from mscompile.errors import InputError


class Supply:
    """One host input of one session."""

    def __init__(self, given: HostInput, sources: Sources) -> None:
        given.source(sources)  # missing ones are refused before the first token
        self.given, self._sources = given, sources
        self._rows: list[Array] = []  # of each row, the entries (chunks, *shape) of this step
        self._first: list[int] = []  # of each row, the number of the chunk that these begin with

    def ask(self, recent: Array, position: Array, tokens: Array) -> None:
        """Get what is needed to consume `tokens` (batch, T); `recent` (batch, every) is the ring of those before."""
        every = self.given.every
        self._first = (position // every).tolist()
        held = (position % every).tolist()  # tokens of a chunk that an earlier step began, in the first slots
        lines = [np.concatenate([ring[:count], new]) for ring, count, new in zip(recent, held, tokens, strict=True)]
        chunks = [line[: len(line) // every * every].reshape(-1, every) for line in lines]
        entries = self.given.ask(self._sources, np.concatenate(chunks))
        self._rows = np.split(entries, np.cumsum([len(row) for row in chunks])[:-1])

    def fill(self, entries: Array, position: Array, tokens: int) -> None:
        """Write what a call of so many tokens takes, (batch, chunks, *shape).

        Rows that complete no chunk get zeros, and so may rows that the call is not for: their results are dropped.
        """
        starts, ends = (position // self.given.every).tolist(), ((position + tokens) // self.given.every).tolist()
        entries[...] = 0
        for target, known, first, start, end in zip(entries, self._rows, self._first, starts, ends, strict=True):
            completed = known[start - first : end - first]
            target[: len(completed)] = completed


def supplies(inputs: Iterable[HostInput], sources: Sources) -> tuple[Supply, ...]:
    """InputError for a source that is missing, or that nothing takes."""
    names = [given.name for given in inputs]
    if strangers := sorted(sources.keys() - set(names)):
        raise InputError(
            f"this model takes no {', '.join(strangers)} from its host; it takes {', '.join(names) or 'nothing'}"
        )
    return tuple(Supply(given, sources) for given in inputs)
