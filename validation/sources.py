"""Stand-ins for what a host supplies: seeded functions of the tokens alone, the same wherever they are computed.

Parity, calibration and benchmarks feed the engine and the original with them; what a database would answer is of no
consequence there, as long as it is the same for both and depends on every token.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import prod

import numpy as np

from mscompile.contracts import Array, HostInput, Sources

_STEP, _FIRST, _SECOND = (np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def pseudo(inputs: Iterable[HostInput], seed: int = 0) -> Sources:
    """A source for every host input: hashes of a chunk's tokens, as whole numbers in range or as floats in [-1, 1)."""
    return {given.name: partial(_entries, given, seed) for given in inputs}


def _entries(given: HostInput, seed: int, chunks: Array) -> Array:
    """(N, every) -> (N, *shape)."""
    hashed = np.full(len(chunks), seed, dtype=np.uint64)
    for tokens in chunks.astype(np.uint64).T:
        hashed = _mixed(hashed + tokens + np.uint64(1))
    number = np.arange(prod(given.shape), dtype=np.uint64)
    words = _mixed(hashed[:, None] + number[None] * _STEP).reshape(-1, *given.shape)
    if given.below is not None:
        return (words % np.uint64(given.below)).astype(given.dtype)
    return ((words >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0).astype(given.dtype)


def _mixed(words: Array) -> Array:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    words = words + _STEP
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    mixed: Array = words ^ (words >> np.uint64(31))
    return mixed
