"""Token streams that a parity check runs: seeded, chained over many calls, with resets and odd lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mscompile.contracts import Array, StreamSpec
from mscompile.errors import UsageError

LEAST_STEPS = 32
BATCH = 3  # rows of the batched rollouts, where the engine takes as many
MOMENTS = 8  # at which states are compared in a long rollout


@dataclass(frozen=True)
class Rollout:
    """Tokens (batch, N) fed in `chunks`, which sum to N; `resets` are (before chunk number, rows).

    `starts` says where in the text each row begins, if the tokens are real text, so that bits per token mean something.
    """

    name: str
    tokens: Array
    chunks: tuple[int, ...]
    resets: tuple[tuple[int, tuple[int, ...]], ...] = ()
    starts: tuple[int, ...] = ()
    every_state: bool = False  # compare states after every chunk, not at MOMENTS of them

    @property
    def is_text(self) -> bool:
        return bool(self.starts)

    def compares_states(self, chunk: int) -> bool:
        """Whether states are compared after chunk number `chunk`; always after the last."""
        count = len(self.chunks)
        return self.every_state or chunk == count - 1 or chunk % -(-count // MOMENTS) == 0


def require_steps(steps: int) -> None:
    """Raises UsageError for rollouts too short to show anything."""
    if steps < LEAST_STEPS:
        raise UsageError(f"steps must be at least {LEAST_STEPS} tokens, not {steps}")


def standard(spec: StreamSpec, text: Array | None, steps: int, seed: int = 0) -> tuple[Rollout, ...]:
    """The rollouts every engine is gated by.

    `text` is a run of real token ids, `steps` the tokens a row of the two long rollouts consumes. Streams
    longer than the model's context are reset where it ends.
    """
    rng = np.random.default_rng(seed)
    rows = min(BATCH, spec.max_batch)
    unit, edges = _unit(spec), _edges(spec)
    short = min(max(4 * unit, 96), steps, 4 * spec.schedule.max_chunk + 7)
    kind, starts = "random", tuple[int, ...]()
    if text is not None and len(text) > steps:
        kind, starts = "text", _spread(text, 1 + rows, steps)
    return (
        _long(kind, text, steps, 1, starts[:1], spec, rng),
        _long(f"{kind}, batch {rows}", text, steps, rows, starts[1:], spec, rng),
        _bounded("token by token", _rows(spec, text, 1, short, rng), spec, [1] * short, every_state=True),
        _bounded("around multiples", _random(spec, min(2, rows), sum(edges), rng), spec, edges, every_state=True),
        _row_resets(_random(spec, rows, short, rng), spec, rng),
    )


def golden(spec: StreamSpec, text: Array | None, tokens: int, seed: int = 1) -> tuple[Rollout, ...]:
    """A short pair of rollouts, without resets, to keep in a bundle."""
    rng = np.random.default_rng(seed)
    rollouts = []
    lengths = {1: tokens, 2: max(tokens // 2, 1)}  # by batch size
    for batch, length in lengths.items():
        if batch > spec.max_batch:
            continue
        length = min(length, spec.max_context or length)
        chunks = _mixed(spec, length, rng)
        rollouts.append(Rollout(f"golden, batch {batch}", _rows(spec, text, batch, length, rng), tuple(chunks)))
    return tuple(rollouts)


def _unit(spec: StreamSpec) -> int:
    """Tokens after which everything in the schedule has happened once."""
    return max(spec.schedule.period, spec.schedule.chunk_multiple)


def _rows(spec: StreamSpec, text: Array | None, batch: int, length: int, rng: np.random.Generator) -> Array:
    if text is None or len(text) <= length:
        return _random(spec, batch, length, rng)
    return _cut(text, _spread(text, batch, length), length)


def _random(spec: StreamSpec, batch: int, length: int, rng: np.random.Generator) -> Array:
    return rng.integers(0, spec.vocab_size, (batch, length), dtype=np.int64)


def _spread(text: Array, parts: int, length: int) -> tuple[int, ...]:
    """Where parts of a text begin that are as far from each other as it allows."""
    return tuple(np.linspace(0, len(text) - length - 1, parts, dtype=np.int64).tolist())


def _cut(text: Array, starts: tuple[int, ...], length: int) -> Array:
    return np.stack([text[start : start + length] for start in starts]).astype(np.int64)


def _mixed(spec: StreamSpec, length: int, rng: np.random.Generator) -> list[int]:
    """Chunk lengths that sum to `length`: single tokens, a few, whole units, long prefills."""
    unit, longest = _unit(spec), spec.schedule.max_chunk
    choices = [1, 1, 1, 2, 3, 5, unit, unit + 1, max(longest // 3, 1), longest, longest + 1]
    chunks: list[int] = []
    while (left := length - sum(chunks)) > 0:
        chunks.append(min(int(rng.choice(choices)), left))
    return chunks


def _edges(spec: StreamSpec) -> list[int]:
    """k m - 1, k m, k m + 1 for several m and for every ring's length, one, and the longest chunk."""
    unit, longest = _unit(spec), spec.schedule.max_chunk
    middle = max(longest // (2 * unit), 1) * unit
    edges = [1, unit - 1, unit, unit + 1, 1, middle - 1, middle, middle + 1, longest, 1, longest - 1, longest + 1]
    if spec.max_context is None:
        rings = {int(state.shape[state.time_axis]) for state in spec.states if state.time_axis is not None}
        edges += [ring + more for ring in sorted(rings) if ring < longest for more in (-1, 0, 1)]
    return [edge for edge in edges if edge > 0]


def _long(
    kind: str,
    text: Array | None,
    steps: int,
    batch: int,
    starts: tuple[int, ...],
    spec: StreamSpec,
    rng: np.random.Generator,
) -> Rollout:
    """A rollout in mixed chunks: of the text that begins at `starts`, or of random tokens."""
    tokens = _cut(text, starts, steps) if text is not None and starts else _random(spec, batch, steps, rng)
    name = f"{kind}, mixed chunks"
    return replace(_bounded(name, tokens, spec, _mixed(spec, steps, rng)), starts=starts)


def _bounded(name: str, tokens: Array, spec: StreamSpec, chunks: list[int], every_state: bool = False) -> Rollout:
    """A rollout whose rows are all reset before they would pass the context."""
    limit = spec.max_context or sum(chunks)
    fitting: list[int] = []
    resets: list[tuple[int, tuple[int, ...]]] = []
    used = 0
    for chunk in chunks:
        while chunk:
            if used == limit:
                resets.append((len(fitting), tuple(range(tokens.shape[0]))))
                used = 0
            part = min(chunk, limit - used)
            fitting.append(part)
            used, chunk = used + part, chunk - part
    return Rollout(name, tokens[:, : sum(fitting)], tuple(fitting), tuple(resets), (), every_state)


def _row_resets(tokens: Array, spec: StreamSpec, rng: np.random.Generator) -> Rollout:
    """Single rows are reset at odd moments, so that rows of one batch are out of phase."""
    length = min(tokens.shape[1], spec.max_context or tokens.shape[1])
    chunks = _mixed(spec, length, rng)
    chunks = [part for chunk in chunks for part in ([chunk] if chunk < 8 else [chunk - 3, 3])]
    batch = tokens.shape[0]
    moments = sorted({max(1, len(chunks) * part // 5) for part in (1, 2, 3, 4)} & set(range(len(chunks))))
    resets = tuple((moment, (int(rng.integers(batch)),)) for moment in moments)
    return Rollout("rows reset in mid-stream", tokens[:, :length], tuple(chunks), resets, every_state=True)
