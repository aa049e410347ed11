"""MEGABYTE as the package MEGABYTE-pytorch has it (lucidrains, PyPI, 0.3.6): stages of transformers, coarse to fine.

`max_seq_len` says how many rows each stage sees, and so what a row stands for: with (1024, 8, 4) a row of the first
stage is 32 tokens, one of the second is 4, one of the third is a token. A stage runs in groups of `size` rows, each
group for itself; a group belongs to one row of the stage above.

    rows of tokens   r_j = E[x_j] + pos_j                                                        the finest stage
                     r_j = LN(W LN(concatenated E[x] of row j)) + pos_j                          the others
    a group          h = RMSNorm(layers([start ; r_0 + above_0 ; r_1 + above_1 ; ..]))           causal
    above            row j of a group gives W h_j, cut into rows, to the rows of its own group below
    logits           W h_(j + 1) of the finest stage: they follow row j and predict the token after it

So a group knows what is before it, from h_j, which comes before its own row j in the stage above. The start of a
group gets nothing from above: the first token of a patch is predicted from the patch before it, unlike in the paper.
Before each attention and each feed-forward the second half of the channels is shifted by one row inside the group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mscompile.models.attention import Attention, feed_forward
from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive, require_switch


@dataclass(frozen=True)
class MegabytePytorchConfig:
    vocab_size: int
    dim: Sequence[int]  # width of each stage, coarse to fine
    depth: Sequence[int]  # layers
    max_seq_len: Sequence[int]  # rows of a group, see above
    dim_head: int = 64
    heads: int = 8
    ff_mult: int = 4
    rel_pos: bool = False  # rotary positions inside a group
    pos_emb: bool = False  # learned positions inside a group
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "dim_head", "heads", "ff_mult")
        stages = [_whole_numbers(self, name) for name in ("dim", "depth", "max_seq_len")]
        require(
            len({len(numbers) for numbers in stages}) == 1 and len(stages[0]) >= 2,
            "dim, depth and max_seq_len must have one number a stage, of at least two stages, "
            f"not {', '.join(str(len(numbers)) for numbers in stages)}",
        )
        require(
            min(self.max_seq_len) >= 2, f"max_seq_len must be at least 2 in every stage, not {list(self.max_seq_len)}"
        )
        require(min(self.dim) >= 2, f"dim must be at least 2 in every stage, not {list(self.dim)}")
        require_switch(self, "rel_pos", "pos_emb")
        require(not self.rel_pos or self.dim_head % 2 == 0, f"rel_pos needs an even dim_head, not {self.dim_head}")
        require_dropout(self.dropout)

    @property
    def context(self) -> int:
        """Longest stream, in tokens."""
        return math.prod(self.max_seq_len)

    @property
    def factors(self) -> tuple[int, ...]:
        """Tokens of a row, for each stage."""
        return tuple(math.prod(self.max_seq_len[stage + 1 :]) for stage in range(len(self.max_seq_len)))


def _whole_numbers(config: Any, name: str) -> Sequence[int]:
    value = getattr(config, name)
    require(
        isinstance(value, list | tuple) and all(type(number) is int and number >= 1 for number in value),
        f"{name} must be whole numbers of at least 1, one a stage, not {value!r}",
    )
    numbers: Sequence[int] = value
    return numbers


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-8) * self.weight


def second_half(x: Tensor) -> Tensor:
    """The channels that are shifted."""
    return x[..., x.shape[-1] - x.shape[-1] // 2 :]


def shifted(x: Tensor, before: Tensor) -> Tensor:
    """x (B, T, d) with the second half of its channels one row later; `before` (B, 1, d // 2) come first."""
    moving = torch.cat([before, second_half(x)[:, :-1]], dim=1)
    return torch.cat([x[..., : x.shape[-1] - x.shape[-1] // 2], moving], dim=-1)


class ShiftedLayer(nn.Module):
    def __init__(self, dim: int, config: MegabytePytorchConfig) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = RMSNorm(dim), RMSNorm(dim)
        self.attention = Attention(dim, config.heads, d_head=config.dim_head, bias=False, rotary=config.rel_pos)
        self.feed_forward = feed_forward(dim, dim * config.ff_mult)

    def forward(self, x: Tensor) -> Tensor:
        """Whole groups from their start on, (N, T, d) -> (N, T, d)."""
        zeros = torch.zeros_like(second_half(x)[:, :1])
        x = x + self.attention(self.attention_norm(shifted(x, zeros)))
        return x + self.feed_forward(self.feed_forward_norm(shifted(x, zeros)))


class Stage(nn.Module):
    """Rows of `factor` tokens in groups of `size`."""

    def __init__(self, config: MegabytePytorchConfig, number: int) -> None:
        super().__init__()
        dim, self.size = config.dim[number], config.max_seq_len[number]
        self.factor, self.finest = config.factors[number], number == len(config.dim) - 1
        self.start = nn.Parameter(torch.randn(dim))
        self.position = nn.Embedding(self.size, dim) if config.pos_emb else None
        self.embedding = nn.Embedding(config.vocab_size, config.dim[-1])
        self.layers = nn.ModuleList(ShiftedLayer(dim, config) for _ in range(config.depth[number]))
        self.norm = RMSNorm(dim)
        if not self.finest:
            width = self.factor * config.dim[-1]
            self.patch_norm, self.patch, self.row_norm = nn.LayerNorm(width), nn.Linear(width, dim), nn.LayerNorm(dim)
            self.below = config.max_seq_len[number + 1]  # rows of a group below
            self.spread = nn.Linear(dim, self.below * config.dim[number + 1])

    def embed(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Tokens (B, R factor) -> rows (B, R, d), of which `index` (1 or B, R) says which ones of their groups."""
        rows: Tensor = self.embedding(tokens)
        if not self.finest:
            rows = rows.unflatten(1, (-1, self.factor)).flatten(2)
            rows = self.row_norm(self.patch(self.patch_norm(rows)))
        return rows if self.position is None else rows + self.position(index)

    def started(self, tokens: Tensor, above: Tensor | None) -> Tensor:
        """Tokens (B, R factor) and what `above` (N, T, d) has for their groups -> groups with starts, (N, T + 1, d)."""
        index = torch.arange(tokens.shape[1] // self.factor, device=tokens.device) % self.size
        rows = self.embed(tokens, index[None])
        if above is not None:
            rows = rows.reshape(above.shape) + above
        return torch.cat([self.start.expand(rows.shape[0], 1, -1), rows], dim=1)

    def forward(self, tokens: Tensor, above: Tensor | None) -> Tensor:
        """As `started` -> (N, T + 1, d)."""
        x = self.started(tokens, above)
        for layer in self.layers:
            x = layer(x)
        normed: Tensor = self.norm(x)
        return normed

    def above(self, x: Tensor) -> Tensor:
        """Of rows (N, T, d), what their groups below get, (N, T, below, d of the stage below)."""
        return self.spread(x).unflatten(2, (self.below, -1))


class MegabytePytorch(ReferenceModel):
    def __init__(self, config: MegabytePytorchConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(Stage(config, number) for number in range(len(config.dim)))
        self.head = nn.Linear(config.dim[-1], config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), T <= context -> logits (B, T, V).

        The last patch is filled up on the right, where nothing that is kept can see.
        """
        *coarser, finest = cast(Sequence[Stage], self.stages)
        filled = nn.functional.pad(tokens, (0, -tokens.shape[1] % coarser[0].factor))
        above: Tensor | None = None
        for stage in coarser:
            above = stage.above(stage(filled, above)[:, :-1]).flatten(0, 1)
        logits: Tensor = self.head(finest(filled, above)[:, 1:]).reshape(*filled.shape, -1)
        return logits[:, : tokens.shape[1]]

    def full(self, tokens: Tensor) -> Tensor:
        return self(tokens)


FAMILY = Family(
    name="megabyte-pytorch",
    title="MEGABYTE (MEGABYTE-pytorch)",
    source="Yu et al., arXiv 2305.07185; lucidrains/MEGABYTE-pytorch 0.3.6",
    config=MegabytePytorchConfig,
    model=MegabytePytorch,
)
