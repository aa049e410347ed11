"""XLNet (Yang et al., arXiv 1906.08237) as a causal language model: `attn_type="uni"` of HuggingFace transformers.

A layer is that of Transformer-XL, post-norm, with biases u and v of its own, and

    h' = LayerNorm(h + W_o attention(h, c))
    out = LayerNorm(h' + W_2 f(W_1 h' + b_1) + b_2)       f is `activation`; embeddings are not scaled

A stream equals the published forward called token by token with `use_mems`, from no memory: every token sees itself
and the `mem_len` rows before it. With `same_length` calls of more tokens do the same once memory is full; without, the
tokens of a longer call see more memory, and how much depends on where calls end.

There is one stream of attention: no permutation, no target mapping, no segment ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive, require_switch
from mscompile.models.transformer_xl import TransformerXLConfig, TransformerXLLayer

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class XLNetConfig:
    vocab_size: int
    n_layer: int
    d_model: int
    n_head: int
    d_head: int
    d_inner: int
    mem_len: int
    attn_type: str = "uni"
    clamp_len: int | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-12
    tie_embedding: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "n_layer", "d_model", "n_head", "d_head", "d_inner", "mem_len")
        require(self.d_model % 2 == 0, f"d_model must be even for sinusoid positions, not {self.d_model}")
        require(
            self.attn_type == "uni",
            f"attn_type must be 'uni', not {self.attn_type!r}: with 'bi' every token sees those after it, so there is "
            "no stream to compute",
        )
        if self.clamp_len is not None:
            require_positive(self, "clamp_len")
        require(self.activation in ACTIVATIONS, f"activation must be one of {(*ACTIVATIONS,)}, not {self.activation!r}")
        eps: Any = self.norm_eps
        require(isinstance(eps, float) and 0.0 < eps < 1.0, f"norm_eps must lie between 0 and 1, not {eps!r}")
        require_switch(self, "tie_embedding")
        require_dropout(self.dropout)

    @property
    def layer(self) -> TransformerXLConfig:
        """A layer of it, which is one of Transformer-XL: `same_length` counts the query's own key."""
        return TransformerXLConfig(
            self.vocab_size, self.n_layer, self.d_model, self.n_head, self.d_head, self.d_inner,
            mem_len=self.mem_len + 1, tgt_len=1, clamp_len=self.clamp_len, same_length=True, dropout=self.dropout,
            untie_biases=True,
        )  # fmt: skip


class XLNetLayer(TransformerXLLayer):
    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config.layer)
        self.attention_norm.eps = self.feed_forward_norm.eps = config.norm_eps
        self.feed_forward[1] = ACTIVATIONS[config.activation]()


class XLNet(ReferenceModel):
    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(XLNetLayer(config) for _ in range(config.n_layer))
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if not config.tie_embedding:
            self.head_weight = nn.Parameter(torch.zeros(config.vocab_size, config.d_model))
        self.dropout = nn.Dropout(config.dropout)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, d_model)."""
        rows: Tensor = self.dropout(self.embedding(tokens))
        return rows

    def head(self, h: Tensor) -> Tensor:
        """(B, T, d_model) -> (B, T, V)."""
        weight = self.embedding.weight if self.config.tie_embedding else self.head_weight
        return nn.functional.linear(self.dropout(h), weight, self.head_bias)

    def forward(self, tokens: Tensor, mems: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, T) and one memory (B, <= mem_len, d_model) a layer -> logits (B, T, V) and the new memories."""
        h = self.embed(tokens)
        new_mems = []
        for layer, mem in zip(self.layers, mems, strict=True):
            new_mems.append(torch.cat([mem, h], dim=1)[:, -self.config.mem_len :].detach())
            h = layer(h, mem, layer.biases)
        return self.head(h), new_mems

    def full(self, tokens: Tensor) -> Tensor:
        logits, _ = self.advance(tokens)
        return logits

    def advance(self, tokens: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        """Memory rolls, so that it makes no difference where calls end; long ones are cut to bound their scores."""
        empty = self.embedding.weight.new_zeros(tokens.shape[0], 0, self.config.d_model)
        mems = carry or [empty] * self.config.n_layer
        logits = []
        for part in tokens.split(max(self.config.mem_len, 64), dim=1):
            part_logits, mems = self(part, mems)
            logits.append(part_logits)
        return torch.cat(logits, dim=1), mems

    def select(self, carry: Any, rows: list[int]) -> Any:
        return [mem[rows] for mem in carry]


FAMILY = Family(
    name="xlnet",
    title="XLNet, causal",
    source="Yang et al., arXiv 1906.08237; huggingface/transformers models/xlnet",
    config=XLNetConfig,
    model=XLNet,
)
