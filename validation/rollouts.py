"""Token streams that a parity check runs: seeded, chained over many calls, with resets and odd lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mscompile.contracts import Array, StreamSpec

BATCH = 3  # rows of the batched rollouts, where the engine takes as many


@dataclass(frozen=True)
class Rollout:
    """Tokens (batch, N) fed in `chunks`, which sum to N; `resets` are (before chunk number, rows)."""

    name: str
    tokens: Array
    chunks: tuple[int, ...]
    resets: tuple[tuple[int, tuple[int, ...]], ...] = ()
    is_text: bool = False  # real text, so that bits per token mean something
    every_state: bool = False  # compare states after every chunk, not only at the end


def standard(spec: StreamSpec, text: Array | None, steps: int, seed: int = 0) -> tuple[Rollout, ...]:
    """The rollouts every engine is gated by.

    `text` is a run of real token ids, `steps` the tokens a row of the two long rollouts consumes. Streams
    longer than the model's context are reset where it ends.
    """
    rng = np.random.default_rng(seed)
    rows = min(BATCH, spec.max_batch)
    unit = _unit(spec)
    short = min(max(4 * unit, 96), steps, 4 * spec.schedule.max_chunk + 7)
    is_text = text is not None and len(text) > steps
    return (
        _long("text" if is_text else "random", _rows(spec, text, 1, steps, rng), spec, rng, is_text),
        _long(
            f"text, batch {rows}" if is_text else f"random, batch {rows}",
            _rows(spec, text, rows, steps, rng),
            spec,
            rng,
            is_text,
        ),
        _bounded("token by token", _rows(spec, text, 1, short, rng), spec, [1] * short, every_state=True),
        _bounded(
            "around multiples",
            _rows(spec, None, min(2, rows), sum(_edges(spec)), rng),
            spec,
            _edges(spec),
            every_state=True,
        ),
        _row_resets(_rows(spec, None, rows, short, rng), spec, rng),
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
        return rng.integers(0, spec.vocab_size, (batch, length), dtype=np.int64)
    starts = np.linspace(0, len(text) - length - 1, batch, dtype=np.int64)
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
    """k m - 1, k m, k m + 1 for several m, one, and the longest chunk."""
    unit, longest = _unit(spec), spec.schedule.max_chunk
    middle = max(longest // (2 * unit), 1) * unit
    edges = [1, unit - 1, unit, unit + 1, 1, middle - 1, middle, middle + 1, longest, 1, longest - 1, longest + 1]
    return [edge for edge in edges if edge > 0]


def _long(name: str, tokens: Array, spec: StreamSpec, rng: np.random.Generator, is_text: bool) -> Rollout:
    return _bounded(f"{name}, mixed chunks", tokens, spec, _mixed(spec, tokens.shape[1], rng), is_text)


def _bounded(
    name: str, tokens: Array, spec: StreamSpec, chunks: list[int], is_text: bool = False, every_state: bool = False
) -> Rollout:
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
    return Rollout(name, tokens[:, : sum(fitting)], tuple(fitting), tuple(resets), is_text, every_state)


def _row_resets(tokens: Array, spec: StreamSpec, rng: np.random.Generator) -> Rollout:
    """Single rows are reset at odd moments, so that rows of one batch are out of phase."""
    length = min(tokens.shape[1], spec.max_context or tokens.shape[1])
    chunks = _mixed(spec, length, rng)
    chunks = [part for chunk in chunks for part in ([chunk] if chunk < 8 else [chunk - 3, 3])]
    batch = tokens.shape[0]
    moments = sorted({max(1, len(chunks) * part // 5) for part in (1, 2, 3, 4)} & set(range(len(chunks))))
    resets = tuple((moment, (int(rng.integers(batch)),)) for moment in moments)
    return Rollout("rows reset in mid-stream", tokens[:, :length], tuple(chunks), resets, every_state=True)
