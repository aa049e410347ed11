"""Scales as configurations write them: `layers@factor`, such as "2@1 8@4"; a row at a factor stands for so many tokens.

The finest factor is 1, and each divides the next one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mscompile.models.family import require


@dataclass(frozen=True)
class Scale:
    """One scale of a model: `layers` blocks on rows of `factor` tokens each."""

    layers: int
    factor: int


def pairs(setting: str, text: str, number: str = "layers") -> tuple[tuple[int, int], ...]:
    """Such as "2@1 4@4" -> ((2, 1), (4, 4)). Refusals name the `setting`, and what stands before each factor."""
    require(isinstance(text, str), f"{setting} must be a text such as '2@1 4@4', not {text!r}")
    found = []
    for word in text.split():
        match = re.fullmatch(r"(\d+)@(\d+)", word)
        require(match is not None, f"{setting} entry {word!r} must read {number}@factor, for example 2@1")
        assert match is not None
        found.append((int(match[1]), int(match[2])))
    return tuple(found)


def require_nested(setting: str, text: str, factors: Sequence[int]) -> None:
    """Refuse factors that do not go from 1 to multiples of the one before, finest first."""
    require(bool(factors) and factors[0] == 1, f"{setting} {text!r} must start at factor 1")
    for finer, coarser in pairwise(factors):
        require(
            coarser > finer and coarser % finer == 0,
            f"{setting} {text!r}: factor {coarser} must be a larger multiple of {finer}",
        )
