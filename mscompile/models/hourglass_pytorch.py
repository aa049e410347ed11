"""Hourglass (Nawrot et al., arXiv 2110.13711) with the semantics of the package hourglass-transformer-pytorch.

    x      = E[tokens] + P[positions]
    Level  = Post(Valley(Pre(x)))                       the coarsest level is one stack of blocks
    Valley : shifted = ShiftRight(x, k - 1)
             pooled  = average | linear (k rows)        then, with attention, one block in which the pooled row
                                                        attends to the k rows of its own group
             coarse  = Level(pooled)
             y       = x + repeat | linear (coarse)     then, with attention, one block in which a row attends to
                                                        the one coarse row of its group
    logits = W LayerNorm(Level(x)) + b

Blocks are pre-norm with erf GELU and no positions; queries, keys and values have no biases, and rows that are attended
to by other rows are not normed. It differs from the Trax model (`hourglass.py`) in all of this: absolute positions,
no LayerNorm after a stack or a valley, resampling by attention within a group. Depths before and after a valley may
differ.

Attention to one row is that row: its weight is 1 whatever the query, so that what the upsampling adds is one row for
the whole group, y = x + expand(coarse) + W_o W_v coarse.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn

from mscompile.models.attention import Block, Stack, feed_forward
from mscompile.models.family import Family, ReferenceModel, require, require_positive, require_switch
from mscompile.models.hourglass import AveragePooling, LinearExpansion, LinearPooling, RepeatExpansion

FF_MULT = 4


@dataclass(frozen=True)
class HourglassPytorchConfig:
    vocab_size: int
    d_model: int
    n_head: int
    d_head: int
    pre_layers: tuple[int, ...]  # blocks before each valley, finest first
    middle_layers: int  # blocks of the coarsest level
    post_layers: tuple[int, ...]  # blocks after each valley, finest first
    shorten_factors: tuple[int, ...]  # rows of the finer level that one row of the coarser one stands for
    context: int  # tokens that have a position
    linear: bool = False  # resampling by linear maps instead of average and repetition
    attention: bool = True  # and refined by attention

    def __post_init__(self) -> None:
        for name in ("pre_layers", "post_layers", "shorten_factors"):
            values, least = getattr(self, name), 2 if name == "shorten_factors" else 0
            require(
                isinstance(values, list | tuple) and all(type(value) is int and value >= least for value in values),
                f"{name} must be a list of whole numbers of at least {least}, not {values!r}",
            )
            object.__setattr__(self, name, tuple(values))
        require_positive(self, "vocab_size", "d_model", "n_head", "d_head", "middle_layers", "context")
        require_switch(self, "linear", "attention")
        counts = {len(self.pre_layers), len(self.post_layers), len(self.shorten_factors)}
        require(
            len(counts) == 1,
            f"pre_layers {self.pre_layers}, post_layers {self.post_layers} and shorten_factors {self.shorten_factors} "
            "must be of one length, the number of valleys",
        )

    @property
    def factors(self) -> tuple[int, ...]:
        """Tokens per row of each level, finest first."""
        return (1, *accumulate(self.shorten_factors, mul))


def block(config: HourglassPytorchConfig) -> Block:
    made = Block(config.d_model, config.n_head, FF_MULT * config.d_model, bias=False, d_head=config.d_head)
    made.attention.output = nn.Linear(config.n_head * config.d_head, config.d_model)
    return made


class GroupShortening(nn.Module):
    """k rows to one, which then attends to these k."""

    refinement = None  # nothing is attended to beyond the group

    def __init__(self, config: HourglassPytorchConfig, group: int) -> None:
        super().__init__()
        self.d_model, self.group = config.d_model, group
        self.pool = LinearPooling(config.d_model, group) if config.linear else AveragePooling(group)
        self.block = block(config) if config.attention else None

    def pooling(self, shifted: Tensor) -> Tensor:
        """(B, G * group, d) -> (B, G, d)."""
        pooled: Tensor = self.pool(shifted)
        if self.block is None:
            return pooled
        rows = shifted.unflatten(1, (-1, self.group)).flatten(0, 1)
        query = self.block.attention_norm(pooled).flatten(0, 1)[:, None]
        return self.block.finish(pooled, self.block.attention(query, rows).reshape(pooled.shape))


class OneRow(nn.Module):
    """Attention to a single row."""

    def __init__(self, config: HourglassPytorchConfig) -> None:
        super().__init__()
        self.value = nn.Linear(config.d_model, config.n_head * config.d_head, bias=False)
        self.output = nn.Linear(config.n_head * config.d_head, config.d_model)

    def forward(self, row: Tensor) -> Tensor:
        mixed: Tensor = self.output(self.value(row))
        return mixed


class AttendedRepeat(RepeatExpansion):
    def __init__(self, config: HourglassPytorchConfig, group: int) -> None:
        super().__init__(group)
        self.attention = OneRow(config)

    def forward(self, coarse: Tensor) -> Tensor:
        return super().forward(coarse + self.attention(coarse))


class AttendedLinear(LinearExpansion):
    def __init__(self, config: HourglassPytorchConfig, group: int) -> None:
        super().__init__(config.d_model, group)
        self.attention = OneRow(config)

    def forward(self, coarse: Tensor) -> Tensor:
        return super().forward(coarse) + self.attention(coarse)[:, :, None]


def expansion(config: HourglassPytorchConfig, group: int) -> RepeatExpansion | LinearExpansion:
    if config.attention:
        return AttendedLinear(config, group) if config.linear else AttendedRepeat(config, group)
    return LinearExpansion(config.d_model, group) if config.linear else RepeatExpansion(group)


class GroupUpsampling(nn.Module):
    """One coarse row to k rows that are added to the fine ones."""

    refinement = None

    def __init__(self, config: HourglassPytorchConfig, group: int) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.expansion = expansion(config, group)
        self.attends = config.attention
        if config.attention:
            self.feed_forward_norm = nn.LayerNorm(config.d_model)
            self.feed_forward = feed_forward(config.d_model, FF_MULT * config.d_model)

    def finish(self, x: Tensor, expanded: Tensor) -> Tensor:
        """(B, T, d) each -> (B, T, d)."""
        y = x + expanded
        return y + self.feed_forward(self.feed_forward_norm(y)) if self.attends else y


class GroupValley(nn.Module):
    def __init__(self, config: HourglassPytorchConfig, level: int) -> None:
        super().__init__()
        self.group = config.shorten_factors[level]
        self.coarse_factor = config.factors[level + 1]
        self.shortening = GroupShortening(config, self.group)
        self.middle = GroupLevel(config, level + 1)
        self.upsampling = GroupUpsampling(config, self.group)

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.cat([x.new_zeros(x.shape[0], self.group - 1, x.shape[2]), x], dim=1)[:, : x.shape[1]]
        coarse = self.middle(self.shortening.pooling(shifted))
        return self.upsampling.finish(x, self.upsampling.expansion(coarse).flatten(1, 2))


class GroupLevel(nn.Module):
    """One scale: blocks, a valley to the coarser scales, blocks; or blocks alone where it is the coarsest."""

    def __init__(self, config: HourglassPytorchConfig, level: int = 0) -> None:
        super().__init__()
        inner = level < len(config.shorten_factors)
        pre = config.pre_layers[level] if inner else config.middle_layers
        self.pre = Stack([block(config) for _ in range(pre)])
        self.valley = GroupValley(config, level) if inner else None
        self.post = Stack([block(config) for _ in range(config.post_layers[level])]) if inner else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        if self.valley is not None and self.post is not None:
            x = self.post(self.valley(x))
        return x


class HourglassPytorch(ReferenceModel):
    def __init__(self, config: HourglassPytorchConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model)
        self.level = GroupLevel(config)
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V). Rows are padded to whole groups on the right, where nothing kept sees."""
        length = tokens.shape[1]
        x = self.embedding(tokens) + self.positions(torch.arange(length, device=tokens.device))
        padded = nn.functional.pad(x, (0, 0, 0, -length % self.config.factors[-1]))
        logits: Tensor = self.head(self.norm(self.level(padded)))
        return logits[:, :length]

    def full(self, tokens: Tensor) -> Tensor:
        return self(tokens)


FAMILY = Family(
    name="hourglass-pytorch",
    title="Hourglass, PyTorch package",
    source="Nawrot et al., arXiv 2110.13711; lucidrains/hourglass-transformer-pytorch",
    config=HourglassPytorchConfig,
    model=HourglassPytorch,
)
