"""What an engine loses on real text, with a confidence interval.

The loss is paired: for every token of the text, what it costs the engine in nats less what it costs the original, so
that the difficulty of the text cancels. Neighbouring differences are correlated, since memory carries an error on, so
the interval is of means over segments of neighbouring tokens (batch means; Law and Kelton, Simulation Modeling and
Analysis, section 9.5.3): segments longer than the correlation are nearly independent, and the mean of thirty and more
is nearly normal. Unlike a bootstrap, that is the same each time, and it takes no choice but the length of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mscompile.contracts import Array

LEAST_TOKENS = 2048  # with fewer, the noise of the loss is as large as the limits
SEGMENT = 64  # tokens; with LEAST_TOKENS that gives 32 segments
NORMAL = 1.96  # standard errors on either side, for 95 %

Losses = tuple[Sequence[int], Array, Array]  # where rows begin in the text; nats (batch, N) of the original, the engine


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on real text, of the engine against the original on the same tokens."""

    tokens: int  # of the text that were scored; one that was read in several rollouts counts once
    loss: float  # perplexity of the engine over that of the original, minus 1
    standard_error: float  # of the loss
    low: float  # the 95 % confidence interval of the loss
    high: float
    reference: float  # perplexity of the original
    engine: float


def perplexity(texts: Sequence[Losses]) -> Perplexity | None:
    """The loss over all text; None where fewer than LEAST_TOKENS were scored."""
    if sum(original.size for _, original, _ in texts) < LEAST_TOKENS:
        return None
    known, original, engine = _by_place(texts)
    lost = engine - original
    mean, error = float(lost.mean()), _standard_error(known, lost)
    loss, low, high = (float(np.expm1(mean + side * NORMAL * error)) for side in (0, -1, 1))
    perplexities = float(np.exp(original.mean())), float(np.exp(engine.mean()))
    return Perplexity(len(lost), loss, (1 + loss) * error, low, high, *perplexities)


def _by_place(texts: Sequence[Losses]) -> tuple[Array, Array, Array]:
    """Places in the text that were scored, in order, and the mean nats there of the original and of the engine."""
    length = max(start + original.shape[1] for starts, original, _ in texts for start in starts)
    count, totals = np.zeros(length), np.zeros((2, length))
    for starts, *nats in texts:
        for row, start in enumerate(starts):
            read = slice(start, start + nats[0].shape[1])
            count[read] += 1
            totals[:, read] += [part[row] for part in nats]
    known = np.flatnonzero(count)
    original, engine = totals[:, known] / count[known]
    return known, original, engine


def _standard_error(known: Array, lost: Array) -> float:
    """Of the mean of `lost` at the places `known`, from its means over segments of the text."""
    _, segment = np.unique(known // SEGMENT, return_inverse=True)
    sizes = np.bincount(segment)
    apart = np.bincount(segment, lost) - sizes * lost.mean()  # sums over segments, less what the mean gives
    count = len(sizes)
    return float(np.sqrt((apart**2).sum() * count / max(count - 1, 1)) / len(lost))
