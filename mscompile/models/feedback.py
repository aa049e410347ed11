"""Feedback Transformer (Fan et al., arXiv 2002.09402), as facebookresearch/transformer-sequential has it.

Every layer sees the same memory: one vector a step, of all that the model made in that step, the highest layer's
output included. So step t needs step t - 1 whole, and there is no parallel form.

    h_0 = E[x_t],  h_l = Layer_l(h_(l-1), m_(t-S) .. m_(t-1))      its own step is not among them
    m_t = sum_l softmax(w)_l h_l                                   l = 0 .. L; m is zeros before the first step
    Layer(h) = LN(h' + FFN(h')),  h' = LN(h + W_o attention(h))    no biases but the FFN's, which has a ReLU
    score_j = (q . k_j + q . p_j) / sqrt(d_head)                   p_j for the place of m_j among the S: one table for
                                                                   all layers and heads

With `pre_norm` LN stands before attention and FFN instead, memory passes the LN of the layer that reads it, and one
more LN stands before the head. With `share_kv` all layers have the same W_k and W_v, and that LN in common.

With `span_ramp` R (adaptive span, Sukhbaatar et al., arXiv 1905.07799) each head has learned how far it sees, z S:
weights are multiplied by clamp((z S - age + 1) / R + 1, 0, 1), age 1 being the newest, and divided by their sum.
Memories that no head of a layer sees are left out before the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mscompile.models.attention import feed_forward
from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive, require_switch

SPAN_EPSILON = 1e-8  # keeps the sum of weights off 0, as published


@dataclass(frozen=True)
class FeedbackConfig:
    vocab_size: int
    n_layer: int
    d_model: int
    n_head: int
    d_ff: int
    mem_len: int  # steps that a layer sees, S
    d_head: int | None = None  # d_model / n_head where not given
    pre_norm: bool = False
    share_kv: bool = False
    span_ramp: int | None = None  # no adaptive span where not given
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "n_layer", "d_model", "n_head", "d_ff", "mem_len")
        require_switch(self, "pre_norm", "share_kv")
        require_dropout(self.dropout)
        for name in ("d_head", "span_ramp"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require(
            self.d_head is not None or self.d_model % self.n_head == 0,
            f"{self.n_head} heads do not divide d_model {self.d_model}: set d_head",
        )

    @property
    def head_width(self) -> int:
        return self.d_head or self.d_model // self.n_head


class Remembered(NamedTuple):
    """Memory as layers read it, oldest first: key, value (B, H, S, d_head)."""

    key: Tensor
    value: Tensor


class Reader(nn.Module):
    """Memory (B, S, d_model) -> keys and values; with `share_kv` one for all layers."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.n_head, width = config.n_head, config.n_head * config.head_width
        self.norm = nn.LayerNorm(config.d_model) if config.pre_norm else nn.Identity()
        self.key = nn.Linear(config.d_model, width, bias=False)
        self.value = nn.Linear(config.d_model, width, bias=False)

    def forward(self, memory: Tensor) -> Remembered:
        rows = self.norm(memory)
        return Remembered(self.heads(self.key(rows)), self.heads(self.value(rows)))

    def heads(self, rows: Tensor) -> Tensor:
        """(B, S, H * d_head) -> (B, H, S, d_head)."""
        return rows.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class FeedbackLayer(nn.Module):
    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.config, width = config, config.n_head * config.head_width
        self.query = nn.Linear(config.d_model, width, bias=False)
        self.output = nn.Linear(width, config.d_model, bias=False)
        if not config.pre_norm:  # with it, the reader's
            self.attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = feed_forward(config.d_model, config.d_ff, nn.ReLU)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        if config.span_ramp is not None:
            self.span_ratio = nn.Parameter(torch.zeros(config.n_head))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def reach(self) -> int:
        """Steps that some head sees, of the newest ones."""
        config = self.config
        if config.span_ramp is None:
            return config.mem_len
        longest = math.ceil(float(self.span_ratio.max()) * config.mem_len + config.span_ramp)
        return max(1, min(config.mem_len, longest))

    def span(self, age: Tensor) -> Tensor | None:
        """What the weight of a memory of some age (..., S) is multiplied by, (..., H, 1, S)."""
        if self.config.span_ramp is None:
            return None
        longest = self.span_ratio[:, None, None] * self.config.mem_len
        return ((longest - age[..., None, None, :] + 1) / self.config.span_ramp + 1).clamp(0, 1)

    def queries(self, h: Tensor, reader: Reader) -> Tensor:
        """(B, 1, d_model) -> (B, H, 1, d_head), scaled."""
        return reader.heads(self.query(reader.norm(h))) / math.sqrt(self.config.head_width)

    def finish(self, h: Tensor, mixed: Tensor) -> Tensor:
        """Both residuals and the feed-forward: h (B, 1, d_model), mixed (B, H, 1, d_head)."""
        h = h + self.dropout(self.output(mixed.transpose(1, 2).flatten(-2)))
        if self.config.pre_norm:
            return h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))
        h = self.attention_norm(h)
        return self.feed_forward_norm(h + self.dropout(self.feed_forward(h)))

    def forward(self, h: Tensor, reader: Reader, seen: Remembered, table: Tensor) -> Tensor:
        """One step (B, 1, d_model), with the positions (mem_len, d_head) of all memories."""
        reach = self.reach
        key, value = (rows[:, :, -reach:] for rows in seen)
        query = self.queries(h, reader)
        scores = query @ key.transpose(-1, -2) + query @ table[-reach:].T
        age = torch.arange(reach, 0, -1, device=h.device)
        return self.finish(h, weights(scores, self.span(age)) @ value)


def weights(scores: Tensor, span: Tensor | None) -> Tensor:
    """(B, H, 1, S) -> (B, H, 1, S), where `span` gives every head its own reach."""
    softmax = scores.softmax(dim=-1)
    if span is None:
        return softmax
    softmax = softmax * span
    return softmax / (softmax.sum(dim=-1, keepdim=True) + SPAN_EPSILON)


class FeedbackTransformer(ReferenceModel):
    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_table = nn.Parameter(torch.empty(config.mem_len, config.head_width))  # oldest first
        self.layers = nn.ModuleList(FeedbackLayer(config) for _ in range(config.n_layer))
        self.readers = nn.ModuleList(Reader(config) for _ in range(1 if config.share_kv else config.n_layer))
        self.layer_weights = nn.Parameter(torch.zeros(config.n_layer + 1))
        self.norm = nn.LayerNorm(config.d_model) if config.pre_norm else nn.Identity()
        self.head = nn.Linear(config.d_model, config.vocab_size)
        nn.init.normal_(self.position_table, std=0.02)

    def reader(self, layer: int) -> int:
        """Which reader a layer has."""
        return 0 if self.config.share_kv else layer

    def reach(self, reader: int) -> int:
        """Steps that some layer of a reader sees."""
        layers = cast(Iterable[FeedbackLayer], self.layers)
        return max(layer.reach for number, layer in enumerate(layers) if self.reader(number) == reader)

    def merged(self, outputs: Sequence[Tensor]) -> Tensor:
        """The memory of a step, of the embedding and every layer's output: (B, 1, d_model) each."""
        return torch.einsum("l,lbtd->btd", self.layer_weights.softmax(dim=0), torch.stack(tuple(outputs)))

    def empty(self, batch: int) -> list[Remembered]:
        """Memory before the first step, for each reader."""
        zeros = self.head.weight.new_zeros(batch, 1, self.config.d_model)
        blank = [reader(zeros) for reader in self.readers]
        return [Remembered(*(rows.expand(-1, -1, self.reach(i), -1) for rows in blank[i])) for i in range(len(blank))]

    def forward(self, tokens: Tensor, remembered: Sequence[Remembered]) -> tuple[Tensor, list[Remembered]]:
        """One step: tokens (B, 1) -> logits (B, 1, V), and what every reader remembers after it."""
        outputs = [self.embedding(tokens)]
        for number, layer in enumerate(self.layers):
            which = self.reader(number)
            outputs.append(layer(outputs[-1], self.readers[which], remembered[which], self.position_table))
        memory = self.merged(outputs)
        after = [
            Remembered(*(torch.cat([old[:, :, 1:], new], dim=2) for old, new in zip(seen, reader(memory), strict=True)))
            for reader, seen in zip(self.readers, remembered, strict=True)
        ]
        return self.head(self.norm(outputs[-1])), after

    def full(self, tokens: Tensor) -> Tensor:
        logits, _ = self.advance(tokens)
        return logits

    def advance(self, tokens: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        remembered, logits = carry or self.empty(tokens.shape[0]), []
        for token in tokens.split(1, dim=1):
            step, remembered = self(token, remembered)
            logits.append(step)
        return torch.cat(logits, dim=1), remembered

    def select(self, carry: Any, rows: list[int]) -> Any:
        return [Remembered(key[rows], value[rows]) for key, value in carry]


FAMILY = Family(
    name="feedback",
    title="Feedback Transformer",
    source="Fan et al., arXiv 2002.09402; facebookresearch/transformer-sequential",
    config=FeedbackConfig,
    model=FeedbackTransformer,
)
