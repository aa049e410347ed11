"""Hourglass (Nawrot et al., arXiv 2110.13711) with the wiring of the authors' Trax code.

    x = Stack(embedding)                                   every Stack ends in a LayerNorm
    x = x + LayerNorm(Upsample(middle(Shorten(ShiftRight(x, k - 1))), x))
    logits = Dense(Stack(x))

`hierarchy` is a palindrome of `layers@factor`, e.g. "2@1 8@3 2@1" or "2@1 1@2 4@4 1@2 2@1"; a factor is
the number of tokens one row stands for, and each divides the next. Blocks are pre-norm: relative attention
with biases in its projections, then Dense, tanh-GELU, Dense. Two global position biases serve all layers.
Distances are key minus query, in tokens; upsampling counts rows, whatever its depth, as the Trax code does.

Shortening: "average", "linear" (Dense over k rows), or "attention" and "attention-linear", which refine the
average or linear pooling by attention over all rows up to the group. Upsampling: "repeat", "linear"
(k position-specific maps) or "attention", which queries the coarse rows with LN(linear) + x.

The Trax model shifts token ids right by one before all this, so that position p predicts token p. Here
position p consumes token p and predicts the next: feed a leading id 0 to get the Trax outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive
from mscompile.models.relative import Biases, Geometry, RelativeAttention
from mscompile.models.scale import Scale, pairs, require_nested

SHORTENINGS = ("average", "linear", "attention", "attention-linear")
UPSAMPLINGS = ("repeat", "linear", "attention")


def parse_hierarchy(text: str) -> tuple[Scale, ...]:
    """The descending half of a hierarchy, finest first: "2@1 8@3 2@1" -> (2@1, 8@3)."""
    scales = [Scale(*pair) for pair in pairs("hierarchy", text)]
    require(len(scales) % 2 == 1 and scales == scales[::-1], f"hierarchy {text!r} must be a palindrome of odd length")
    half = tuple(scales[: len(scales) // 2 + 1])
    require_nested("hierarchy", text, [scale.factor for scale in half])
    require(half[0].layers >= 1, f"hierarchy {text!r} needs at least one layer at factor 1 on each side")
    return half


@dataclass(frozen=True)
class HourglassConfig:
    vocab_size: int
    d_model: int = 512
    d_ff: int = 2048
    n_head: int = 8
    hierarchy: str = "2@1 8@3 2@1"
    shortening: str = "attention"
    upsampling: str = "attention"
    context: int = 2048  # longest stream, in tokens, that the trained model is meant for
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "d_model", "d_ff", "n_head", "context")
        require(self.d_model % self.n_head == 0, f"d_model {self.d_model} must be divisible by n_head {self.n_head}")
        require(self.d_model % 2 == 0, f"d_model must be even for sinusoid positions, not {self.d_model}")
        require(self.shortening in SHORTENINGS, f"shortening must be one of {SHORTENINGS}, not {self.shortening!r}")
        require(self.upsampling in UPSAMPLINGS, f"upsampling must be one of {UPSAMPLINGS}, not {self.upsampling!r}")
        require_dropout(self.dropout)
        parse_hierarchy(self.hierarchy)

    @property
    def scales(self) -> tuple[Scale, ...]:
        return parse_hierarchy(self.hierarchy)

    @property
    def period(self) -> int:
        return self.scales[-1].factor


def feed_forward(config: HourglassConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.d_model, config.d_ff),
        nn.GELU(approximate="tanh"),
        nn.Dropout(config.dropout),
        nn.Linear(config.d_ff, config.d_model),
        nn.Dropout(config.dropout),
    )


def layer_norm(config: HourglassConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.d_model, eps=1e-6)  # Trax's epsilon; torch's own default is 1e-5


def attention(config: HourglassConfig, geometry: Geometry) -> RelativeAttention:
    return RelativeAttention(
        config.d_model, config.n_head, config.d_model // config.n_head, bias=True, geometry=geometry
    )


class Block(nn.Module):
    def __init__(self, config: HourglassConfig, factor: int) -> None:
        super().__init__()
        self.attention_norm = layer_norm(config)
        self.attention = attention(config, Geometry(scale=-factor))
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward_norm = layer_norm(config)
        self.feed_forward = feed_forward(config)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residuals and the feed-forward: (B, T, d) each."""
        x = x + self.dropout(attended)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def forward(self, x: Tensor, biases: Biases) -> Tensor:
        rows = self.attention_norm(x)
        return self.finish(x, self.attention(rows, rows, biases))


class Stack(nn.Module):
    """Blocks at one scale and the LayerNorm after them."""

    def __init__(self, config: HourglassConfig, scale: Scale) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, scale.factor) for _ in range(scale.layers))
        self.norm = layer_norm(config)

    def forward(self, x: Tensor, biases: Biases) -> Tensor:
        for block in self.blocks:
            x = block(x, biases)
        return self.norm(x)


class AveragePooling(nn.Module):
    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(B, G * group, d) -> (B, G, d)."""
        return x.unflatten(1, (-1, self.group)).mean(dim=2)


class LinearPooling(nn.Module):
    def __init__(self, d_model: int, group: int) -> None:
        super().__init__()
        self.group = group
        self.linear = nn.Linear(group * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, G * group, d) -> (B, G, d)."""
        return self.linear(x.unflatten(1, (-1, self.group)).flatten(2))


class AttentionRefinement(nn.Module):
    """`y = q + attention(q, rows); y + FFN(LN(y))`, the second half of both attention resamplings."""

    def __init__(self, config: HourglassConfig, geometry: Geometry) -> None:
        super().__init__()
        self.attention = attention(config, geometry)
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward_norm = layer_norm(config)
        self.feed_forward = feed_forward(config)

    def finish(self, query: Tensor, attended: Tensor) -> Tensor:
        y = query + self.dropout(attended)
        return y + self.feed_forward(self.feed_forward_norm(y))

    def forward(self, query: Tensor, rows: Tensor, biases: Biases) -> Tensor:
        return self.finish(query, self.attention(query, rows, biases))


class Shortening(nn.Module):
    """Rows of `factor` tokens to rows of `factor * group`: pooling, then attention refinement where configured."""

    def __init__(self, config: HourglassConfig, factor: int, group: int) -> None:
        super().__init__()
        self.d_model, self.group = config.d_model, group
        linear = config.shortening.endswith("linear")
        self.pooling = LinearPooling(config.d_model, group) if linear else AveragePooling(group)
        self.refinement: AttentionRefinement | None = None
        if config.shortening.startswith("attention"):
            geometry = Geometry(query_step=group, offset=group - 1, scale=-factor)
            self.rows_norm = layer_norm(config)
            self.pooled_norm = layer_norm(config)
            self.refinement = AttentionRefinement(config, geometry)

    def forward(self, shifted: Tensor, biases: Biases) -> Tensor:
        """(B, G * group, d) -> (B, G, d)."""
        if self.refinement is None:
            return self.pooling(shifted)
        rows = self.rows_norm(shifted)
        return self.refinement(self.pooled_norm(self.pooling(rows)), rows, biases)


class RepeatExpansion(nn.Module):
    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, coarse: Tensor) -> Tensor:
        """(B, G, d) -> (B, G, group, d)."""
        return coarse[:, :, None, :].expand(-1, -1, self.group, -1)


class LinearExpansion(nn.Module):
    def __init__(self, d_model: int, group: int) -> None:
        super().__init__()
        self.group = group
        self.linear = nn.Linear(d_model, group * d_model)

    def forward(self, coarse: Tensor) -> Tensor:
        """(B, G, d) -> (B, G, group, d)."""
        return self.linear(coarse).unflatten(2, (self.group, -1))


class Upsampling(nn.Module):
    """Coarse rows back to fine ones: expansion, then attention refinement where configured."""

    def __init__(self, config: HourglassConfig, group: int) -> None:
        super().__init__()
        self.d_model = config.d_model
        repeat = config.upsampling == "repeat"
        self.expansion = RepeatExpansion(group) if repeat else LinearExpansion(config.d_model, group)
        self.refinement: AttentionRefinement | None = None
        if config.upsampling == "attention":
            self.rows_norm = layer_norm(config)
            self.expanded_norm = layer_norm(config)
            self.refinement = AttentionRefinement(config, Geometry(key_step=group, scale=-1))

    def forward(self, coarse: Tensor, x: Tensor, biases: Biases) -> Tensor:
        """coarse (B, G, d), x (B, G * group, d) -> (B, G * group, d)."""
        if self.refinement is None:
            return self.expansion(coarse).flatten(1, 2)
        rows = self.rows_norm(coarse)
        query = self.expanded_norm(self.expansion(rows).flatten(1, 2)) + x
        return self.refinement(query, rows, biases)


class Valley(nn.Module):
    """Shorten, run the coarser level, come back up: `x + LN(Upsample(middle(Shorten(ShiftRight(x))), x))`."""

    def __init__(self, config: HourglassConfig, scales: tuple[Scale, ...]) -> None:
        super().__init__()
        self.factor, self.group = scales[0].factor, scales[1].factor // scales[0].factor
        self.shortening = Shortening(config, self.factor, self.group)
        self.middle = Level(config, scales[1:])
        self.upsampling = Upsampling(config, self.group)
        self.norm = layer_norm(config)

    def forward(self, x: Tensor, biases: Biases) -> Tensor:
        shifted = torch.cat([x.new_zeros(x.shape[0], self.group - 1, x.shape[2]), x], dim=1)[:, : x.shape[1]]
        coarse = self.middle(self.shortening(shifted, biases), biases)
        return x + self.norm(self.upsampling(coarse, x, biases))


class Level(nn.Module):
    """One scale: stack, valley to the coarser scales, stack; or a single stack at the bottom."""

    def __init__(self, config: HourglassConfig, scales: tuple[Scale, ...]) -> None:
        super().__init__()
        self.pre = Stack(config, scales[0])
        self.valley = Valley(config, scales) if len(scales) > 1 else None
        self.post = Stack(config, scales[0]) if len(scales) > 1 else None

    def forward(self, x: Tensor, biases: Biases) -> Tensor:
        x = self.pre(x, biases)
        if self.valley is not None and self.post is not None:
            x = self.post(self.valley(x, biases), biases)
        return x


class Hourglass(ReferenceModel):
    def __init__(self, config: HourglassConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        d_head = config.d_model // config.n_head
        self.content_bias = nn.Parameter(torch.zeros(config.n_head, d_head))
        self.position_bias = nn.Parameter(torch.zeros(config.n_head, d_head))
        self.level = Level(config, config.scales)
        self.head = nn.Linear(config.d_model, config.vocab_size)

    @property
    def biases(self) -> Biases:
        return Biases(self.content_bias, self.position_bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) of any length -> logits (B, T, V).

        The coarse scales need whole groups: the tokens are padded on the right, where nothing that is
        kept can see, and the padding is cut off again.
        """
        length = tokens.shape[1]
        padded = nn.functional.pad(tokens, (0, -length % self.config.period))
        x = self.dropout(self.embedding(padded))
        logits: Tensor = self.head(self.level(x, self.biases))
        return logits[:, :length]

    def full(self, tokens: Tensor) -> Tensor:
        return self(tokens)


FAMILY = Family(
    name="hourglass",
    title="Hourglass",
    source="Nawrot et al., arXiv 2110.13711; google/trax models/research/hourglass.py",
    config=HourglassConfig,
    model=Hourglass,
)
