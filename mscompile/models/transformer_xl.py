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

`cutoffs`, `div_val` and `d_embed` give it an adaptive embedding and softmax (`adaptive.py`); with cutoffs its
outputs are log-probabilities. With `untie_biases` every layer has its own u and v.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mscompile.models.adaptive import Adaptive, Clusters
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
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    d_embed: int | None = None  # d_model where there is none
    tie_projections: bool = False
    untie_biases: bool = False

    def __post_init__(self) -> None:
        cutoffs: Any = self.cutoffs
        is_list = isinstance(cutoffs, list | tuple) and all(isinstance(cut, int) for cut in cutoffs)
        require(is_list, f"cutoffs must be a list of token ids, not {cutoffs!r}")
        object.__setattr__(self, "cutoffs", tuple(cutoffs))
        require_positive(self, "vocab_size", "n_layer", "d_model", "n_head", "d_head", "d_inner", "mem_len", "tgt_len")
        require(self.d_model % 2 == 0, f"d_model must be even for sinusoid positions, not {self.d_model}")
        if self.clamp_len is not None:
            require_positive(self, "clamp_len")
        require_switch(self, "same_length", "pre_norm", "tie_embedding", "tie_projections", "untie_biases")
        require(
            not self.same_length or self.mem_len >= 2, f"same_length needs mem_len of at least 2, not {self.mem_len}"
        )
        require_dropout(self.dropout)
        self._require_clusters()

    def _require_clusters(self) -> None:
        require_positive(self, "div_val", *(["d_embed"] if self.d_embed is not None else []))
        ids = (0, *self.cutoffs, self.vocab_size)
        require(
            list(ids) == sorted(set(ids)), f"cutoffs must rise between 0 and vocab_size {self.vocab_size}, not {ids}"
        )
        require(
            min(self.clusters.widths) >= 1,
            f"d_embed {self.clusters.d_embed} cannot be divided by div_val {self.div_val} in {len(ids) - 1} clusters",
        )

    @property
    def clusters(self) -> Clusters:
        width = self.d_model if self.d_embed is None else self.d_embed
        return Clusters(self.vocab_size, self.d_model, width, self.cutoffs, self.div_val)

    def adaptive(self) -> Adaptive | None:
        if not self.cutoffs and not self.clusters.projected:
            return None
        return Adaptive(self.clusters, self.tie_embedding, self.tie_projections)

    @property
    def rolls(self) -> bool:
        """Does it make no difference where segments end?"""
        return self.same_length

    @property
    def geometry(self) -> Geometry:
        return Geometry(clamp=self.clamp_len, window=self.mem_len if self.same_length else None)


class TransformerXLLayer(nn.Module):
    attends_empty = False  # are memory rows that were never filled attended to, as zeros?

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.d_model, self.mem_len, self.tgt_len = config.d_model, config.mem_len, config.tgt_len
        self.pre_norm, self.rolls = config.pre_norm, config.rolls
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
        self.untie_biases = config.untie_biases
        if config.untie_biases:
            self.content_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))
            self.position_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))

    @property
    def biases(self) -> Biases | None:
        """The layer's own u and v, where it has any."""
        return Biases(self.content_bias, self.position_bias) if self.untie_biases else None

    def attention_input(self, rows: Tensor) -> Tensor:
        """What W_q, W_k and W_v are applied to, row by row."""
        return self.attention_norm(rows) if self.pre_norm else rows

    def context(self, mems: Tensor, *rows: Tensor) -> Tensor:
        """What W_k and W_v are applied to: mems (B, M, d) from before this segment, and rows of it (B, S, d) each."""
        return self.attention_input(torch.cat([mems, *rows], dim=1))

    def entries(self, index: Tensor, keys: Tensor) -> Tensor:
        """Table entries of n(i, j); `keys` (broadcastable) number the rows from the oldest that is remembered."""
        del keys
        return index

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
    layer_type: type[TransformerXLLayer] = TransformerXLLayer

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.config = config
        self.adaptive = config.adaptive()
        if not config.untie_biases:
            self.content_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))
            self.position_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))
        if self.adaptive is None:
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
            if not config.tie_embedding:
                self.head_weight = nn.Parameter(torch.zeros(config.vocab_size, config.d_model))
        self.layers = nn.ModuleList(self.layer_type(config) for _ in range(config.n_layer))
        self.dropout = nn.Dropout(config.dropout)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2 or name.endswith("_bias"):
                nn.init.normal_(parameter, std=0.02)

    @property
    def biases(self) -> Biases | None:
        """u and v, where all layers share them."""
        return None if self.config.untie_biases else Biases(self.content_bias, self.position_bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, d_model)."""
        return self.dropout(self.look_up(tokens) * math.sqrt(self.config.d_model))

    def look_up(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, d_model), as the table has it."""
        if self.adaptive is not None:
            return self.adaptive.embed(tokens)
        rows: Tensor = self.embedding(tokens)
        return rows

    def head(self, h: Tensor) -> Tensor:
        """(B, T, d_model) -> (B, T, V)."""
        h = self.dropout(h)
        if self.adaptive is not None:
            return self.adaptive.head(h)
        weight = self.embedding.weight if self.config.tie_embedding else self.head_weight
        return nn.functional.linear(h, weight, self.head_bias)

    def empty_mems(self, batch: int) -> list[Tensor]:
        empty = next(self.parameters()).new_zeros(batch, 0, self.config.d_model)
        return [empty] * self.config.n_layer

    def forward(self, tokens: Tensor, mems: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One segment: tokens (B, T) and one memory a layer -> logits (B, T, V) and the new memories."""
        h = self.embed(tokens)
        new_mems = []
        for layer, mem in zip(self.layers, mems, strict=True):
            new_mems.append(torch.cat([mem, h], dim=1)[:, -self.config.mem_len :].detach())
            h = layer(h, mem, layer.biases or self.biases)
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
            final = self.config.rolls or segment.shape[1] == self.config.tgt_len
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
