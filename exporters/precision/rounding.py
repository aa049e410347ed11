"""Weights to whole numbers: symmetric rounding in blocks, w ~ scale * q.

A matrix (K, N) is cut along K, the axis that a product sums over, into blocks of `block` rows; each column of a
block has a scale of its own. The scale is the largest magnitude over 2^(bits-1) - 1, times the factor in CLIPPING
that leaves the least squared error: to clip the few largest weights a little makes all others finer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mscompile.contracts import Array

CLIPPING = tuple(1 - 0.04 * step for step in range(11))  # 1.00 to 0.60
SMALLEST_BLOCK = 16  # runtimes take powers of two from here


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded."""

    bits: int
    block: int | None  # rows that share a scale; None: the whole column
    clip: bool = True  # look for the best scale; otherwise the largest weight is always kept

    @property
    def levels(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def block_of(self, rows: int) -> int | None:
        """The largest block, halved until it divides `rows`; None where none does, or one would hold all."""
        block = self.block
        while block is not None and block >= SMALLEST_BLOCK:
            if rows % block == 0:
                return block if block < rows else None
            block //= 2
        return None


@dataclass(frozen=True)
class Rounded:
    """A matrix (K, N) as integers and scales: scale (N,) for whole columns, otherwise (K / block, N)."""

    integers: Array  # int8, (K, N)
    scale: Array  # float32
    block: int | None

    def restored(self) -> Array:
        """The float32 matrix that these numbers stand for."""
        scale = self.scale if self.block is None else np.repeat(self.scale, self.block, axis=0)
        restored: Array = self.integers.astype(np.float32) * scale
        return restored


def rounded(matrix: Array, scheme: Scheme) -> Rounded:
    """`matrix` (K, N) float32 in the scheme's integers."""
    rows, columns = matrix.shape
    block = scheme.block_of(rows)
    cut = np.asarray(matrix, np.float32).reshape(-1, block or rows, columns)
    largest = np.abs(cut).max(axis=1, keepdims=True) / np.float32(scheme.levels[1])
    widest = np.where(largest > 0, largest, np.float32(1))
    scale = _best(cut, widest, scheme) if scheme.clip else widest
    integers = _integers(cut, scale, scheme).astype(np.int8).reshape(rows, columns)
    return Rounded(integers, scale[:, 0] if block else scale[0, 0], block)


def _best(cut: Array, widest: Array, scheme: Scheme) -> Array:
    """Of all clipped scales, for each block the one with the least squared error."""
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for factor in CLIPPING:
        scale = widest * np.float32(factor)
        error = np.square(_integers(cut, scale, scheme) * scale - cut).sum(axis=1, keepdims=True)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best


def _integers(cut: Array, scale: Array, scheme: Scheme) -> Array:
    integers: Array = np.clip(np.rint(cut / scale), *scheme.levels)
    return integers
