"""Recurrent Memory Transformer as a wrapper of a GPT-2 (Bulatov et al., arXiv 2207.06881 and 2304.11062).

Follows `MemoryCell` and `RecurrentWrapper` of booydar/recurrent-memory-transformer around an unchanged decoder:

    rows   = [M ; E[x] ; M] + P[0 .. 2n + T - 1]       M (n, d) the memory: read rows first, write rows last
    rows   = LN(Block(.. Block(rows)))                 pre-norm, causal over all rows, memory rows included
    logits = W rows of tokens;   next M = rows of the write rows, after the final LayerNorm

    Block(x) = y + W_2 gelu(W_1 LN(y) + b_1) + b_2,  y = x + attention(LN x)           the tanh form of GELU

Positions are absolute and count every row of the segment: token t stands at n + t. The first memory is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mscompile.models.attention import Block, Stack
from mscompile.models.family import (
    Family,
    require,
    require_dropout,
    require_positive,
    require_switch,
)
from mscompile.models.recurrent_memory_segments import Memory, SegmentModel, repeated, split_rows


@dataclass(frozen=True)
class RecurrentMemoryWrapperConfig:
    vocab_size: int
    num_mem_tokens: int
    segment_size: int
    n_layer: int = 12
    d_model: int = 768
    n_head: int = 12
    d_ff: int = 3072
    n_positions: int = 1024
    segment_alignment: str = "left"
    tie_embedding: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "num_mem_tokens", "segment_size", "n_layer", "d_model", "n_head", "d_ff", "n_positions"
        )
        require(self.d_model % self.n_head == 0, f"d_model {self.d_model} must be a multiple of n_head {self.n_head}")
        require(
            self.segment_alignment == "left",
            f"segment_alignment must be 'left', not {self.segment_alignment!r}: otherwise where the first segment "
            "ends depends on how many tokens will follow, which a stream cannot know",
        )
        rows = self.segment_size + 2 * self.num_mem_tokens
        require(
            rows <= self.n_positions,
            f"a segment of {self.segment_size} tokens between 2 x {self.num_mem_tokens} memory rows needs n_positions "
            f"of at least {rows}, not {self.n_positions}",
        )
        require_switch(self, "tie_embedding")
        require_dropout(self.dropout)


def gpt2_block(config: RecurrentMemoryWrapperConfig) -> Block:
    block = Block(config.d_model, config.n_head, config.d_ff)
    block.feed_forward = nn.Sequential(
        nn.Linear(config.d_model, config.d_ff), nn.GELU(approximate="tanh"), nn.Linear(config.d_ff, config.d_model)
    )
    return block


class RecurrentMemoryWrapper(SegmentModel):
    def __init__(self, config: RecurrentMemoryWrapperConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.n_positions, config.d_model)
        self.memory = nn.Parameter(torch.randn(config.num_mem_tokens, config.d_model))
        self.stack = Stack([gpt2_block(config) for _ in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.d_model)
        if not config.tie_embedding:
            self.head_weight = nn.Parameter(0.02 * torch.randn(config.vocab_size, config.d_model))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def segment(self) -> int:
        return self.config.segment_size

    def begin(self, batch: int) -> Memory:
        return (repeated(self.memory, batch),)

    def placed(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rows (B, S, d) with the embedding of their positions (1 or B, S) within the segment."""
        return self.dropout(rows + self.position_embedding(positions))

    def logits(self, rows: Tensor) -> Tensor:
        """Rows (B, T, d) after the final LayerNorm -> (B, T, V)."""
        return nn.functional.linear(rows, self.embedding.weight if self.config.tie_embedding else self.head_weight)

    def forward(self, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        (remembered,) = memory
        rows = torch.cat([remembered, self.embedding(tokens), remembered], dim=1)
        rows = self.placed(rows, torch.arange(rows.shape[1], device=rows.device)[None])
        count = self.config.num_mem_tokens
        _, seen, written = split_rows(self.norm(self.stack(rows)), (count, tokens.shape[1], count))
        return self.logits(seen), (written,)


FAMILY = Family(
    name="recurrent-memory-wrapper",
    title="Recurrent Memory Transformer, as a wrapper of a decoder",
    source="Bulatov et al., arXiv 2207.06881 and 2304.11062; booydar/recurrent-memory-transformer",
    config=RecurrentMemoryWrapperConfig,
    model=RecurrentMemoryWrapper,
)
