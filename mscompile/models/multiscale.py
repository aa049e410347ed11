"""What the multi-scale language models of Subramanian et al. (arXiv 2005.00581) have in common.

A row at scale k stands for k tokens, and each scale divides the next. Only whole groups of rows are pooled: row g
of scale k exists once token (g + 1) k - 1 is there, and is never seen before.

The paper's text names the three architectures; its equations were not at hand and there is no public code. What is
written here is a reconstruction: pre-norm blocks, mean pooling, learned positions for each scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from mscompile.errors import InputError
from mscompile.models.attention import Block, Stack, row_numbers
from mscompile.models.family import ReferenceModel, require, require_positive
from mscompile.models.scale import Scale, pairs, require_nested

SOURCE = "reconstruction after Subramanian et al., arXiv 2005.00581; no public code"


@dataclass(frozen=True)
class ScalesConfig:
    """Settings of the models with a stack of its own for each scale."""

    vocab_size: int
    d_model: int = 512
    d_ff: int = 2048
    n_head: int = 8
    scales: str = "6@1 6@4"  # layers@factor, finest first
    context: int = 512  # longest stream, in tokens: there are positions for no more

    def __post_init__(self) -> None:
        require_nested("scales", self.scales, self.factors)
        require_sizes(self, self.factors)
        for scale in self.parsed:
            require(scale.layers >= 1, f"scales {self.scales!r} needs at least one layer at factor {scale.factor}")

    @property
    def parsed(self) -> tuple[Scale, ...]:
        return tuple(Scale(*pair) for pair in pairs("scales", self.scales))

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(scale.factor for scale in self.parsed)


def require_sizes(config: Any, factors: tuple[int, ...]) -> None:
    """The sizes that all three models have, and a context with at least one row of the coarsest scale."""
    require_positive(config, "vocab_size", "d_model", "d_ff", "n_head", "context")
    require(
        config.d_model % config.n_head == 0, f"d_model {config.d_model} must be divisible by n_head {config.n_head}"
    )
    require(
        config.context >= factors[-1],
        f"context {config.context} must hold at least one row of the coarsest scale, {factors[-1]} tokens",
    )


def groups(factors: Sequence[int]) -> list[int]:
    """Rows of each scale that one row of the next coarser scale stands for."""
    return [coarser // finer for finer, coarser in pairwise(factors)]


def pool(rows: Tensor, group: int) -> Tensor:
    """Means of whole groups, a last one that is not whole left out: (B, T, d) -> (B, T // group, d)."""
    count = rows.shape[1] // group
    return rows[:, : count * group].unflatten(1, (count, group)).mean(dim=2)


def stack(config: ScalesConfig, layers: int) -> Stack:
    return Stack([Block(config.d_model, config.n_head, config.d_ff) for _ in range(layers)])


class Positions(nn.Module):
    """Learned positions of the rows of one scale."""

    def __init__(self, context: int, factor: int, d_model: int) -> None:
        super().__init__()
        self.context = context
        self.table = nn.Embedding(-(-context // factor), d_model)

    def forward(self, rows: Tensor, numbers: Tensor | None = None) -> Tensor:
        """rows (B, T, d) with row numbers (1 or B, T), from 0 by default -> (B, T, d)."""
        return rows + self.table(row_numbers(rows) if numbers is None else numbers)


class MultiscaleModel(ReferenceModel):
    """Embedding with positions, the body that each model defines, norm and head."""

    def __init__(self, config: Any, factors: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.ModuleList(Positions(config.context, factor, config.d_model) for factor in factors)
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size)

    def body(self, rows: Tensor) -> Tensor:
        """Embedded tokens (B, T, d) -> (B, T, d), causal."""
        raise NotImplementedError

    def full(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.config.context:
            raise InputError(f"{tokens.shape[1]} tokens are more than the {self.config.context} that have positions")
        return self.head(self.norm(self.body(self.positions[0](self.embedding(tokens)))))
