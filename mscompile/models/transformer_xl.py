"""Transformer-XL (Dai et al., arXiv 1901.02860) with the semantics of the authors' PyTorch code.

One layer, post-norm (`pre_norm=False`), with c = [mems ; h]:

    h' = LayerNorm(h + W_o attention(h, c))          q from h; k, v from c; no biases; u, v shared by all layers
    out = LayerNorm(h' + W_2 relu(W_1 h' + b_1) + b_2)

With `pre_norm` the LayerNorm is applied to c and to the feed-forward input; memory stays un-normalised.
`mems` are the inputs of every layer, one (B, <= mem_len, d_model) tensor a layer, empty at the start.
(The authors also keep the last layer's output, which nothing reads; like NVIDIA's version we do not.)

`same_length`: every token attends to exactly `mem_len` keys, its own included; then streaming in any
chunks equals running by segments. Without it, a token sees its own segment and `mem_len` rows before it,
so the segment length `tgt_len` is part of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive, require_switch
from mscompile.models.relative import Biases, Geometry, RelativeAttention


@dataclass(frozen=True)
class TransformerXLConfig:
    vocab_size: int
    n_layer: int
    d_model: int
    n_head: int
    d_head: int
    d_inner: int
    mem_len: int
    tgt_len: int
    clamp_len: int | None = None
    same_length: bool = False
    pre_norm: bool = False
    tie_embedding: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "n_layer", "d_model", "n_head", "d_head", "d_inner", "mem_len", "tgt_len")
        require(self.d_model % 2 == 0, f"d_model must be even for sinusoid positions, not {self.d_model}")
        if self.clamp_len is not None:
            require_positive(self, "clamp_len")
        require_switch(self, "same_length", "pre_norm", "tie_embedding")
        require(
            not self.same_length or self.mem_len >= 2, f"same_length needs mem_len of at least 2, not {self.mem_len}"
        )
        require_dropout(self.dropout)

    @property
    def geometry(self) -> Geometry:
        return Geometry(clamp=self.clamp_len, window=self.mem_len if self.same_length else None)


class TransformerXLLayer(nn.Module):
    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.d_model, self.mem_len, self.tgt_len = config.d_model, config.mem_len, config.tgt_len
        self.pre_norm = config.pre_norm
        self.attention = RelativeAttention(
            config.d_model, config.n_head, config.d_head, bias=False, geometry=config.geometry
        )
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.d_model, config.d_inner),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_inner, config.d_model),
            nn.Dropout(config.dropout),
        )
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def attention_input(self, rows: Tensor) -> Tensor:
        """What W_q, W_k and W_v are applied to, row by row."""
        return self.attention_norm(rows) if self.pre_norm else rows

    def combine(self, h: Tensor, attended: Tensor) -> Tensor:
        """Both residuals and the feed-forward: (B, T, d_model) each."""
        h = h + self.dropout(attended)
        if self.pre_norm:
            return h + self.feed_forward(self.feed_forward_norm(h))
        h = self.attention_norm(h)
        return self.feed_forward_norm(h + self.feed_forward(h))

    def forward(self, h: Tensor, mems: Tensor, biases: Biases) -> Tensor:
        """h (B, T, d_model), mems (B, M, d_model) -> (B, T, d_model)."""
        context = self.attention_input(torch.cat([mems, h], dim=1))
        rows = context[:, mems.shape[1] :]
        return self.combine(h, self.attention(rows, context, biases, query_start=mems.shape[1]))


class TransformerXL(ReferenceModel):
    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.content_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))
        self.position_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))
        self.layers = nn.ModuleList(TransformerXLLayer(config) for _ in range(config.n_layer))
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if not config.tie_embedding:
            self.head_weight = nn.Parameter(torch.zeros(config.vocab_size, config.d_model))
        self.dropout = nn.Dropout(config.dropout)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2 or name.endswith("_bias"):
                nn.init.normal_(parameter, std=0.02)

    @property
    def biases(self) -> Biases:
        return Biases(self.content_bias, self.position_bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, d_model)."""
        return self.dropout(self.embedding(tokens) * math.sqrt(self.config.d_model))

    def head(self, h: Tensor) -> Tensor:
        """(B, T, d_model) -> (B, T, V)."""
        weight = self.embedding.weight if self.config.tie_embedding else self.head_weight
        return nn.functional.linear(self.dropout(h), weight, self.head_bias)

    def empty_mems(self, batch: int) -> list[Tensor]:
        empty = self.embedding.weight.new_zeros(batch, 0, self.config.d_model)
        return [empty] * self.config.n_layer

    def forward(self, tokens: Tensor, mems: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One segment: tokens (B, T) and one memory a layer -> logits (B, T, V) and the new memories."""
        h = self.embed(tokens)
        new_mems = []
        for layer, mem in zip(self.layers, mems, strict=True):
            new_mems.append(torch.cat([mem, h], dim=1)[:, -self.config.mem_len :].detach())
            h = layer(h, mem, self.biases)
        return self.head(h), new_mems

    def full(self, tokens: Tensor) -> Tensor:
        logits, _ = self.advance(tokens)
        return logits

    def advance(self, tokens: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        """Segment by segment with the published memories; a segment begun before is run again from its start."""
        mems, begun = carry or (self.empty_mems(tokens.shape[0]), tokens[:, :0])
        logits, rest = [], begun
        for segment in torch.cat([begun, tokens], dim=1).split(self.config.tgt_len, dim=1):
            segment_logits, new_mems = self(segment, mems)
            logits.append(segment_logits)
            final = self.config.same_length or segment.shape[1] == self.config.tgt_len
            mems, rest = (new_mems, segment[:, :0]) if final else (mems, segment)
        return torch.cat(logits, dim=1)[:, -tokens.shape[1] :], (mems, rest)

    def select(self, carry: Any, rows: list[int]) -> Any:
        mems, begun = carry
        return [mem[rows] for mem in mems], begun[rows]


FAMILY = Family(
    name="transformer-xl",
    title="Transformer-XL",
    source="Dai et al., arXiv 1901.02860; kimiyoung/transformer-xl",
    config=TransformerXLConfig,
    model=TransformerXL,
)
