"""Recurrent Memory Transformer (Bulatov et al., arXiv 2207.06881), with the semantics of booydar/LM-RMT.

A Transformer-XL whose segments of T tokens lie between two copies of the memory M (n, d):

    rows   = [M ; sqrt(d) E[x] ; M]        read rows, tokens, write rows; numbered in this order
    logits = W (last layer's rows of tokens) + b;     next M = last layer's rows of the write rows

Layers, relative attention and the optional cache of `mem_len` rows (the inputs of each layer, memory rows among
them) are those of `transformer_xl.py`. What a row sees:

    read row     all read rows                                       and the cache with `read_mem_from_cache`
    token        the cache, all read rows, the tokens up to its own
    write row    all read rows, all tokens, all write rows           and the cache with `read_mem_from_cache`

A memory row sees memory rows after it, for which there is no distance. The published shift of position scores
gives such pairs what lies there, and trained weights know it: with r_D the position key of distance D and
K = rows in the cache + 2n + T,

    by position(i, j) = (q_i + v) . r_{i-j}                    j <= i
                        0                                      j = i + 1
                        (q_{i+1} + v) . r_{K-(j-i-1)}          j >= i + 2

so that n >= 3 makes memory depend on the length of the segment. A segment that is shorter here runs as the
beginning of a whole one, which no token can tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mscompile.models.family import Family, require, require_dropout, require_positive, require_switch
from mscompile.models.recurrent_memory_segments import Memory, SegmentModel, repeated
from mscompile.models.relative import Biases, Keys, Sight, attend
from mscompile.models.transformer_xl import TransformerXLConfig, TransformerXLLayer


@dataclass(frozen=True)
class RecurrentMemoryConfig:
    vocab_size: int
    n_layer: int
    d_model: int
    n_head: int
    d_head: int
    d_inner: int
    num_mem_tokens: int
    tgt_len: int
    mem_len: int = 0
    read_mem_from_cache: bool = False
    clamp_len: int | None = None
    pre_norm: bool = False
    tie_embedding: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "n_layer", "d_model", "n_head", "d_head", "d_inner", "num_mem_tokens", "tgt_len"
        )
        require(self.d_model % 2 == 0, f"d_model must be even for sinusoid positions, not {self.d_model}")
        if self.mem_len != 0:
            require_positive(self, "mem_len")
        if self.clamp_len is not None:
            require_positive(self, "clamp_len")
        require_switch(self, "read_mem_from_cache", "pre_norm", "tie_embedding")
        require(
            self.mem_len > 0 or not self.read_mem_from_cache,
            "read_mem_from_cache needs a cache: mem_len of at least 1, not 0",
        )
        require_dropout(self.dropout)

    @property
    def layer(self) -> TransformerXLConfig:
        """A layer of it, which is one of Transformer-XL."""
        return TransformerXLConfig(
            self.vocab_size, self.n_layer, self.d_model, self.n_head, self.d_head, self.d_inner,
            max(self.mem_len, 1), self.tgt_len, self.clamp_len, pre_norm=self.pre_norm, dropout=self.dropout,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows of a segment: read rows, tokens, write rows."""
        return self.tgt_len + 2 * self.num_mem_tokens

    @property
    def reach(self) -> int:
        """Distances there can be: 0 up to the oldest row of the cache from the last row of a segment."""
        return self.mem_len + self.rows


class RecurrentMemory(SegmentModel):
    def __init__(self, config: RecurrentMemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.memory = nn.Parameter(torch.randn(1, config.d_model).repeat(config.num_mem_tokens, 1))
        self.content_bias = nn.Parameter(0.02 * torch.randn(config.n_head, config.d_head))
        self.position_bias = nn.Parameter(0.02 * torch.randn(config.n_head, config.d_head))
        self.layers = nn.ModuleList(TransformerXLLayer(config.layer) for _ in range(config.n_layer))
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if not config.tie_embedding:
            self.head_weight = nn.Parameter(0.02 * torch.randn(config.vocab_size, config.d_model))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def biases(self) -> Biases:
        return Biases(self.content_bias, self.position_bias)

    @property
    def segment(self) -> int:
        return self.config.tgt_len

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, d)."""
        return self.dropout(self.embedding(tokens) * math.sqrt(self.config.d_model))

    def head(self, rows: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, V)."""
        weight = self.embedding.weight if self.config.tie_embedding else self.head_weight
        return nn.functional.linear(self.dropout(rows), weight, self.head_bias)

    def begin(self, batch: int) -> Memory:
        """Memory rows (B, n, d), and the cache of each layer (B, 0 rows yet, d)."""
        memory = repeated(self.memory, batch)
        return (memory, *([memory[:, :0]] * self.config.n_layer))

    def forward(self, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        remembered, *caches = memory
        count, length = self.config.num_mem_tokens, tokens.shape[1]
        whole = nn.functional.pad(tokens, (0, self.segment - length))
        rows = torch.cat([remembered, self.embed(whole), remembered], dim=1)
        cached = caches[0].shape[1]
        sight = self._sight(cached, rows.device)
        new_caches = []
        for layer, cache in zip(cast(Iterable[TransformerXLLayer], self.layers), caches, strict=True):
            context = torch.cat([cache, rows], dim=1)
            new_caches.append(context[:, max(context.shape[1] - self.config.mem_len, 0) :])
            rows = self._layer(layer, rows, context, sight)
        return self.head(rows[:, count : count + length]), (rows[:, -count:], *new_caches)

    def _layer(self, layer: TransformerXLLayer, rows: Tensor, context: Tensor, sight: Sight) -> Tensor:
        attention = layer.attention
        normed = layer.attention_input(context)
        query = attention.heads(attention.query(normed[:, context.shape[1] - rows.shape[1] :]))
        keys = Keys(attention.heads(attention.key(normed)), attention.heads(attention.value(normed)), sight)
        table = attention.table(attention.encode(attention.geometry.distances(self.config.reach, rows.device)))
        return layer.combine(rows, attention.merge(attend(query, [keys], table, self.biases, shifted)))

    def _sight(self, cached: int, device: torch.device) -> Sight:
        """How the rows of a whole segment see [cache ; rows]."""
        config = self.config
        query = torch.arange(cached, cached + config.rows, device=device)[:, None]
        key = torch.arange(cached + config.rows, device=device)[None, :]
        reads, writes = cached + config.num_mem_tokens, cached + config.rows - config.num_mem_tokens
        in_memory = (query < reads) | (query >= writes)
        together = ((query < reads) & (key < reads)) | ((query >= writes) & (key >= writes))
        visible = (key <= query) | together
        if not config.read_mem_from_cache:
            visible = visible & ~(in_memory & (key < cached))
        index = shifted_index(query - key, cached + config.rows, config.reach)
        return Sight.of(index[None], visible[None], 2 * config.reach + 1)


def shifted(by_position: Tensor) -> Tensor:
    """Position scores (B, H, S, D), a zero, and those of the next row: (B, H, S, 2 D + 1).

    `shifted_index` says which entry is whose.
    """
    following = nn.functional.pad(by_position[:, :, 1:], (0, 0, 0, 1))
    return torch.cat([by_position, torch.zeros_like(by_position[..., :1]), following], dim=-1)


def shifted_index(distance: Tensor, rows: Tensor | int, reach: int) -> Tensor:
    """Entries of `shifted` for signed distances query - key, in a segment of `rows` rows with its cache."""
    later = torch.where(distance == -1, reach, reach + 2 + rows + distance)
    return torch.where(distance >= 0, distance, later)


FAMILY = Family(
    name="recurrent-memory",
    title="Recurrent Memory Transformer",
    source="Bulatov et al., arXiv 2207.06881; booydar/LM-RMT",
    config=RecurrentMemoryConfig,
    model=RecurrentMemory,
)
