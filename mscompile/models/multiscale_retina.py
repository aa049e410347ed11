"""Retina multi-scale language model (Subramanian et al., arXiv 2005.00581): coarser with distance. Reconstruction.

One stack on the tokens' rows. In every layer a query sees the newest tokens one by one, older ones as means of
k_2 tokens, those before as means of k_3, and so on; keys and values are projected from the means of the normed rows:

    f_0(t) = t + 1,   f_s(t) = k_(s+1) floor(max(0, t + 1 - w_s) / k_(s+1)),   f_S(t) = 0
    resolution s covers the tokens f_s(t) .. f_(s-1)(t) - 1, in rows of k_s tokens

Each window ends where a row of the next resolution does: no token is left out and none is seen twice, and between
w_s and w_s + k_(s+1) - 1 tokens are seen at resolution s or finer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mscompile.models.attention import Block, Run, Stack, attend, row_numbers
from mscompile.models.family import Family, require, require_positive
from mscompile.models.multiscale import SOURCE, MultiscaleModel, groups, pool, require_sizes
from mscompile.models.scale import pairs, require_nested


@dataclass(frozen=True)
class Resolution:
    """Rows of `factor` tokens each, as far as the newest `window` tokens; 0 is all tokens."""

    window: int
    factor: int


@dataclass(frozen=True)
class RetinaConfig:
    vocab_size: int
    n_layer: int = 12
    d_model: int = 512
    d_ff: int = 2048
    n_head: int = 8
    resolutions: str = "64@1 0@4"  # window@factor, finest first
    context: int = 512  # longest stream, in tokens: there are positions for no more

    def __post_init__(self) -> None:
        factors = tuple(resolution.factor for resolution in self.parsed)
        require_nested("resolutions", self.resolutions, factors)
        require_positive(self, "n_layer")
        require_sizes(self, factors)
        *limited, last = self.parsed
        text = f"resolutions {self.resolutions!r}"
        require(last.window == 0, f"{text} must end with 0@{last.factor}, which sees the rest")
        for near in limited:
            require(near.window >= 1, f"{text}: only the last window may be 0, not that at factor {near.factor}")
        for near, far in pairwise(limited):
            require(
                far.window >= near.window, f"{text}: window {far.window} must be at least the finer one, {near.window}"
            )

    @property
    def parsed(self) -> tuple[Resolution, ...]:
        return tuple(Resolution(*pair) for pair in pairs("resolutions", self.resolutions, "window"))


def sights(resolutions: Sequence[Resolution], positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each resolution the first row that each query sees and the one behind the last, in the shape of positions."""
    ends = [positions + 1]
    for near, far in pairwise(resolutions):
        ends.append((positions + 1 - near.window).clamp(min=0) // far.factor * far.factor)
    ends.append(torch.zeros_like(positions))
    return [
        (first // resolution.factor, end // resolution.factor)
        for (end, first), resolution in zip(pairwise(ends), resolutions, strict=True)
    ]


def outside(sight: tuple[Tensor, Tensor], numbers: Tensor) -> Tensor:
    """What queries (B, T) do not see of rows with these numbers (1 or B, S): (B, 1, T, S)."""
    first, end = sight
    rows = numbers[:, None, :]
    return ((rows < first[:, :, None]) | (rows >= end[:, :, None]))[:, None]


class RetinaBlock(Block):
    """A pre-norm block whose attention sees older rows at coarser resolutions."""

    def __init__(self, config: RetinaConfig) -> None:
        super().__init__(config.d_model, config.n_head, config.d_ff)
        self.resolutions = config.parsed
        self.groups = groups([resolution.factor for resolution in self.resolutions])

    def mix(self, x: Tensor, rows: Tensor, runs: Sequence[Run]) -> Tensor:
        """x (B, T, d), its normed rows as queries and runs of keys -> (B, T, d)."""
        query = self.attention.queries(rows, row_numbers(rows))
        return self.finish(x, self.attention.merge(attend(query, runs)))

    def keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, H, S, d_head) each, of normed rows or their means (B, S, d)."""
        return self.attention.keys(rows, row_numbers(rows))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.attention_norm(x)
        pooled = [rows]
        for group in self.groups:
            pooled.append(pool(pooled[-1], group))
        seen = sights(self.resolutions, row_numbers(rows))
        runs = [
            Run(*self.keys(means), outside(sight, row_numbers(means)))
            for means, sight in zip(pooled, seen, strict=True)
        ]
        return self.mix(x, rows, runs)


class Retina(MultiscaleModel):
    def __init__(self, config: RetinaConfig) -> None:
        super().__init__(config, [1])
        self.stack = Stack([RetinaBlock(config) for _ in range(config.n_layer)])

    def body(self, rows: Tensor) -> Tensor:
        return self.stack(rows)


FAMILY = Family(
    name="multiscale-retina",
    title="Multi-scale, retina (reconstruction)",
    source=SOURCE,
    config=RetinaConfig,
    model=Retina,
)
