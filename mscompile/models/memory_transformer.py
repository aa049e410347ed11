"""Memory Transformer (Burtsev et al., arXiv 2006.11527) as a decoder: learned memory rows before the tokens.

    X = [M ; E[x] + p]        M (m, d) learned, without positions; tokens count from 0

One layer, pre-norm; h memory rows, x token rows, both of the layer's input:

    x' = x + attention(LN x -> LN [h ; x])           a token sees all memory and the tokens up to its own
    h' = h + attention_m(LN_m h -> LN_m h)           memory sees memory, all of it
    each followed by its feed-forward: y + W_2 gelu(W_1 LN y)

`variant` "transformer" (MemTransformer): memory rows pass the same sub-networks as tokens, attention_m = attention.
"controller" (MemCtrl): memory rows have attention, feed-forward and norms of their own.

The paper's memory sees the whole sequence, which an encoder may do. In a decoder that would show every token to
those before it, so memory here is a prefix that attends to itself alone, in either variant. "bottleneck"
(MemBottleneck: tokens see memory only, after memory has seen them) has no causal form and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mscompile.models.attention import Block, later
from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive
from mscompile.models.relative import sinusoid

VARIANTS = ("transformer", "controller")
POSITIONS = ("sinusoid", "learned")


@dataclass(frozen=True)
class MemoryTransformerConfig:
    vocab_size: int
    d_model: int = 512
    d_ff: int = 2048
    n_head: int = 8
    n_layer: int = 6
    num_mem_tokens: int = 10
    variant: str = "transformer"
    positions: str = "sinusoid"
    context: int = 2048
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "d_model", "d_ff", "n_head", "n_layer", "num_mem_tokens", "context"
        )  # fmt: skip
        require(
            self.d_model % self.n_head == 0,
            f"d_model {self.d_model} must be a multiple of n_head {self.n_head}",
        )
        require(
            self.variant != "bottleneck",
            "variant 'bottleneck' has no causal form: tokens would see each other through a memory that has read "
            f"the tokens after them; take one of {', '.join(VARIANTS)}",
        )
        require(self.variant in VARIANTS, f"variant must be one of {', '.join(VARIANTS)}, not {self.variant!r}")
        require(self.positions in POSITIONS, f"positions must be one of {', '.join(POSITIONS)}, not {self.positions!r}")
        require(
            self.positions != "sinusoid" or self.d_model % 2 == 0,
            f"d_model must be even for sinusoid positions, not {self.d_model}",
        )
        require_dropout(self.dropout)


class MemoryLayer(nn.Module):
    """Tokens through `block`; memory rows too, or through `controller` where they have a sub-network of their own."""

    def __init__(self, config: MemoryTransformerConfig) -> None:
        super().__init__()
        self.block = Block(config.d_model, config.n_head, config.d_ff)
        self.controller = (
            Block(config.d_model, config.n_head, config.d_ff) if config.variant == "controller" else None
        )  # fmt: skip

    def remember(self, memory: Tensor) -> Tensor:
        """Memory rows (B, m, d) -> (B, m, d). They see one another only."""
        block = self.controller or self.block
        rows = block.attention_norm(memory)
        return block.finish(memory, block.attention(rows, rows))

    def forward(self, memory: Tensor, x: Tensor) -> Tensor:
        """Tokens (B, T, d) behind memory rows (B, m, d) -> (B, T, d)."""
        rows = self.block.attention_norm(torch.cat([memory, x], dim=1))
        future = later(x.shape[1], device=x.device)
        hidden = torch.cat([future.new_zeros(1, 1, x.shape[1], memory.shape[1]), future], dim=-1)
        return self.block.finish(x, self.block.attention(rows[:, memory.shape[1] :], rows, hidden))


class MemoryTransformer(ReferenceModel):
    def __init__(self, config: MemoryTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.memory = nn.Parameter(torch.randn(config.num_mem_tokens, config.d_model))
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context, config.d_model)
        self.layers = nn.ModuleList(MemoryLayer(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model)
        self.output = nn.Linear(config.d_model, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T) at positions (1 or B, T) -> (B, T, d)."""
        return self.dropout(self.embedding(tokens) + self._encoded(positions))

    def _encoded(self, positions: Tensor) -> Tensor:
        if self.config.positions == "learned":
            return self.position_embedding(positions)
        every = torch.arange(self.config.context, device=positions.device)
        return nn.functional.embedding(positions, sinusoid(every, self.config.d_model, self.memory.dtype))

    def head(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, V)."""
        return self.output(self.norm(x))

    def full(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None])
        memory = self.memory[None].expand(tokens.shape[0], -1, -1)
        for layer in cast(Iterable[MemoryLayer], self.layers):
            x, memory = layer(memory, x), layer.remember(memory)
        return self.head(x)


FAMILY = Family(
    name="memory-transformer",
    title="Memory Transformer",
    source="Burtsev et al., arXiv 2006.11527; no public code of the authors",
    config=MemoryTransformerConfig,
    model=MemoryTransformer,
)
