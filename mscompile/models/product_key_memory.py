"""Memory layers: a decoder in which some feed-forwards are look-ups among product keys.

    q = norm(W_q x + b_q)                       one a head, in halves q1, q2
    i, j = the knn best of K1 q1, of K2 q2      n sub-keys each, K1 and K2 of the head
    I = the knn best of s_i + s_j               among knn * knn pairs; slot id = i * n + j
    w = softmax(s[I])                           over the knn of one head

`kind` says what is read from the n * n slots, summed over heads and their knn slots:

    "pkm"       y = sum w V[I]                              Lample et al., arXiv 1907.05242
    "memory+"   y = W_o ((sum w V[I]) * silu(W_g x))        Berges et al., arXiv 2412.09764
    "peer"      y = sum w gelu(x . U[I]) V[I]               the variant of the latter's code

`query_norm` "batch" has the running statistics of training, so that it is an affine map here; "layer" is one
LayerNorm for every half of every query; "none" is none. `mem_share_values` gives all memory layers one table.
The layers around are ordinary: pre-norm, rotary attention, GELU feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mscompile.models.attention import Attention, Block
from mscompile.models.family import (
    Family,
    ReferenceModel,
    require,
    require_dropout,
    require_layers,
    require_positive,
    require_switch,
)

KINDS = ("pkm", "memory+", "peer")
QUERY_NORMS = ("none", "batch", "layer")


@dataclass(frozen=True)
class ProductKeyMemoryConfig:
    vocab_size: int
    d_model: int = 1024
    d_ff: int = 4096
    n_head: int = 16
    n_layer: int = 24
    memory_layers: Sequence[int] = (4, 12, 20)  # from 0
    kind: str = "memory+"
    mem_n_keys: int = 1024  # sub-keys of each half; the square of it is the number of slots
    mem_k_dim: int = 512
    mem_heads: int = 4
    mem_knn: int = 32
    mem_share_values: bool = True
    query_norm: str = "none"
    context: int = 2048
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "d_model", "d_ff", "n_head", "n_layer", "mem_n_keys", "mem_k_dim", "mem_heads",
            "mem_knn", "context",
        )  # fmt: skip
        require(
            self.d_model % (2 * self.n_head) == 0,
            f"d_model {self.d_model} must be a multiple of twice n_head {self.n_head}, for rotary positions",
        )
        require(self.kind in KINDS, f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        require(
            self.query_norm in QUERY_NORMS,
            f"query_norm must be one of {', '.join(QUERY_NORMS)}, not {self.query_norm!r}",
        )
        require(self.mem_k_dim % 2 == 0, f"mem_k_dim must be even, for two halves, not {self.mem_k_dim}")
        require(
            self.mem_knn <= self.mem_n_keys,
            f"mem_knn {self.mem_knn} slots cannot be chosen among mem_n_keys {self.mem_n_keys} sub-keys",
        )
        require_switch(self, "mem_share_values")
        require_dropout(self.dropout)
        require_layers("memory_layers", self.memory_layers, self.n_layer)


class RunningNorm(nn.Module):
    """A BatchNorm in evaluation, with its running statistics: an affine map of each feature."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, (features,) each."""
        scale = self.weight / torch.sqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine()
        return x * scale + shift


class Queries(nn.Module):
    """(B, T, d) -> (B, T, heads, 2, half)."""

    def __init__(self, config: ProductKeyMemoryConfig) -> None:
        super().__init__()
        self.heads, self.d_half = config.mem_heads, config.mem_k_dim // 2
        self.linear = nn.Linear(config.d_model, config.mem_heads * config.mem_k_dim)
        self.norm: nn.Module | None = None
        if config.query_norm == "batch":
            self.norm = RunningNorm(self.linear.out_features)
        elif config.query_norm == "layer":
            self.norm = nn.LayerNorm(self.d_half)

    def split(self, projected: Tensor) -> Tensor:
        """(B, T, heads * 2 * half) -> (B, T, heads, 2, half), each half normalised where the LayerNorm does it."""
        halves = projected.unflatten(-1, (self.heads, 2, self.d_half))
        return self.norm(halves) if isinstance(self.norm, nn.LayerNorm) else halves

    def forward(self, x: Tensor) -> Tensor:
        projected = self.linear(x)
        return self.split(self.norm(projected) if isinstance(self.norm, RunningNorm) else projected)


class ProductKeys(nn.Module):
    """Chooses slots: (B, T, d) -> ids (B, T, heads * knn) int64 and weights of the same shape."""

    def __init__(self, config: ProductKeyMemoryConfig) -> None:
        super().__init__()
        self.n_keys, self.knn = config.mem_n_keys, config.mem_knn
        self.queries = Queries(config)
        bound = config.mem_k_dim**-0.5
        keys = torch.empty(config.mem_heads, 2, config.mem_n_keys, config.mem_k_dim // 2).uniform_(-bound, bound)
        self.keys = nn.Parameter(keys)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.choose(self.queries(x))

    def choose(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The same for queries (B, T, heads, 2, half)."""
        rows = queries.flatten(0, 1).permute(1, 2, 0, 3)  # (heads, 2, B * T, half)
        best, index = (rows @ self.keys.transpose(-1, -2)).topk(self.knn, dim=-1)  # of (heads, 2, B * T, n)
        pairs = (best[:, 0, :, :, None] + best[:, 1, :, None, :]).flatten(-2)  # (heads, B * T, knn * knn)
        score, pair = pairs.topk(self.knn, dim=-1)
        first, second = index[:, 0].gather(-1, pair // self.knn), index[:, 1].gather(-1, pair % self.knn)
        shape = (queries.shape[0], queries.shape[1], self.keys.shape[0] * self.knn)
        ids, weights = first * self.n_keys + second, score.softmax(dim=-1)  # (heads, B * T, knn)
        return ids.transpose(0, 1).reshape(shape), weights.transpose(0, 1).reshape(shape)


class Values(nn.Module):
    """What the slots hold: `sum w V[I]`."""

    def __init__(self, slots: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(d_model**-0.5 * torch.randn(slots, d_model))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (B, T, d), which asks; ids and weights (B, T, S) -> (B, T, d)."""
        rows = nn.functional.embedding(ids, self.weight)  # (B, T, S, d)
        return (weights.unsqueeze(-2) @ rows).squeeze(-2)


class Experts(Values):
    """Slots that are experts of one hidden unit: `sum w gelu(x . U[I]) V[I]`."""

    def __init__(self, slots: int, d_model: int) -> None:
        super().__init__(slots, d_model)
        self.down = nn.Parameter(d_model**-0.5 * torch.randn(slots, d_model))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        activation = (nn.functional.embedding(ids, self.down) @ x.unsqueeze(-1)).squeeze(-1)  # (B, T, S)
        return super().forward(x, ids, weights * nn.functional.gelu(activation))


class MemoryBlock(nn.Module):
    """A block whose feed-forward is a memory; the table it reads comes with each call."""

    def __init__(self, config: ProductKeyMemoryConfig) -> None:
        super().__init__()
        d_model = config.d_model
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, config.n_head, rotary=True)
        self.memory_norm = nn.LayerNorm(d_model)
        self.lookup = ProductKeys(config)
        self.gate = nn.Linear(d_model, d_model) if config.kind == "memory+" else None
        self.output = nn.Linear(d_model, d_model) if config.kind == "memory+" else None

    def read(self, x: Tensor, ids: Tensor, weights: Tensor, values: Values) -> Tensor:
        """What the chosen slots hold for x (B, T, d), gated where the kind says so."""
        found: Tensor = values(x, ids, weights)
        if self.gate is None or self.output is None:
            return found
        return self.output(found * nn.functional.silu(self.gate(x)))

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """(B, T, d) -> (B, T, d), causal."""
        x = x + self.attention(self.attention_norm(x))
        rows = self.memory_norm(x)
        ids, weights = self.lookup(rows)
        return x + self.read(rows, ids, weights, values)


class ProductKeyMemory(ReferenceModel):
    def __init__(self, config: ProductKeyMemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            MemoryBlock(config)
            if layer in config.memory_layers
            else Block(config.d_model, config.n_head, config.d_ff, rotary=True)
            for layer in range(config.n_layer)
        )
        table = Experts if config.kind == "peer" else Values
        tables = 1 if config.mem_share_values else len(config.memory_layers)
        self.values = nn.ModuleList(table(config.mem_n_keys**2, config.d_model) for _ in range(tables))
        self.norm = nn.LayerNorm(config.d_model)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def tables(self) -> list[nn.Module | None]:
        """Of each layer, the table that it reads."""
        return [
            self.values[self.config.memory_layers.index(layer) % len(self.values)]
            if layer in self.config.memory_layers
            else None
            for layer in range(self.config.n_layer)
        ]

    def head(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, V)."""
        return self.output(self.norm(x))

    def full(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embedding(tokens))
        for block, values in zip(self.blocks, self.tables(), strict=True):
            x = block(x) if values is None else block(x, values)
        return self.head(x)


FAMILY = Family(
    name="product-key-memory",
    title="Memory layers",
    source="Lample et al., arXiv 1907.05242, facebookresearch/XLM; Berges et al., arXiv 2412.09764, "
    "facebookresearch/memory",
    config=ProductKeyMemoryConfig,
    model=ProductKeyMemory,
)
