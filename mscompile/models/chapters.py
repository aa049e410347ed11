"""Mixture of Chapters (arXiv 2603.21096): a decoder that reads a bank of learned memory, a few chapters at a time.

    x = x + attention(RMS x)                       causal, rotary, keys shared by groups of heads; no biases
    x = x + read(RMS x, chapters(x_in))            in `memory_layers` only; x_in is the layer's input
    x = x + W_3 (silu(W_1 RMS x) * W_2 RMS x)

The bank holds `num_memory_tokens` rows in chapters of equal length, and all memory layers share it. The first
`num_shared_chapters` are always read; of the others, a linear router takes `top_k_chapters`:

    p = softmax(W_r mean(x_in over the last `routing_window_size` tokens) + b_r)
    w = the largest p of the routed chapters, made to sum to 1
    rows of a shared chapter count with weight 1, of a routed one with `routed_scaling_factor` w; these weights are
    made to sum to 1 (with no shared chapter they are w), and multiply the rows of their chapter
    read = W_o attention(W_q x -> W_k rows, W_v rows)          no positions, one softmax over all rows

With shared chapters each row of the bank is divided by its root mean square first (`normalize_memory`).

Routing as trained takes the mean over the whole text: a token would choose chapters by what comes after it. Of the
published strategies for inference only "rolling" is causal and has a stream of its own; here every token has its own
window, as when the published code decodes one token at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mscompile.models.attention import Attention, later
from mscompile.models.family import (
    Family,
    ReferenceModel,
    require,
    require_dropout,
    require_layers,
    require_positive,
    require_switch,
)

NOT_CAUSAL = "pools the whole text, so that the chapters of a token depend on the tokens after it"
REFUSED = {
    "sequence": NOT_CAUSAL,
    "sequence-rolling": NOT_CAUSAL,
    "hybrid": f"{NOT_CAUSAL} within the prompt",
    "token": "attends to each chapter apart, which is another model and not offered here",
}


@dataclass(frozen=True)
class ChaptersConfig:
    vocab_size: int
    d_model: int = 768
    d_ff: int = 2304
    n_head: int = 12
    n_kv_head: int = 4
    n_layer: int = 16
    rope_theta: float = 100000.0
    norm_eps: float = 1e-5
    memory_layers: Sequence[int] = (2, 6, 10, 14)  # from 0
    num_memory_tokens: int = 262208
    num_chapters: int = 4097
    num_shared_chapters: int = 1
    top_k_chapters: int = 64
    routed_scaling_factor: float = 2.5
    normalize_memory: bool = True
    memory_n_head: int = 12
    memory_n_kv_head: int = 12
    routing_strategy: str = "rolling"
    routing_window_size: int = 128
    context: int = 1024
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "d_model", "d_ff", "n_head", "n_kv_head", "n_layer", "num_memory_tokens",
            "num_chapters", "top_k_chapters", "memory_n_head", "memory_n_kv_head", "routing_window_size", "context",
        )  # fmt: skip
        require_layers("memory_layers", self.memory_layers, self.n_layer)
        require_switch(self, "normalize_memory")
        require_dropout(self.dropout)
        self._require_heads()
        self._require_routing()

    def _require_heads(self) -> None:
        require(
            self.d_model % (2 * self.n_head) == 0,
            f"d_model {self.d_model} must be a multiple of twice n_head {self.n_head}, for rotary positions",
        )
        require(
            self.d_model % self.memory_n_head == 0,
            f"d_model {self.d_model} must be a multiple of memory_n_head {self.memory_n_head}",
        )
        for heads, shared in (("n_head", "n_kv_head"), ("memory_n_head", "memory_n_kv_head")):
            many, few = getattr(self, heads), getattr(self, shared)
            require(many % few == 0, f"{heads} {many} must be a multiple of {shared} {few}")

    def _require_routing(self) -> None:
        why = REFUSED.get(self.routing_strategy)
        require(
            why is None, f"routing_strategy {self.routing_strategy!r} {why}; the strategy that streams is 'rolling'"
        )
        require(
            self.routing_strategy == "rolling",
            f"routing_strategy must be 'rolling', not {self.routing_strategy!r}",
        )
        require(
            self.num_memory_tokens % self.num_chapters == 0,
            f"num_memory_tokens {self.num_memory_tokens} must be a multiple of num_chapters {self.num_chapters}",
        )
        shared: Any = self.num_shared_chapters
        factor: Any = self.routed_scaling_factor
        require(
            isinstance(shared, int)
            and not isinstance(shared, bool)
            and 0 <= shared <= self.num_chapters - self.top_k_chapters,
            f"num_shared_chapters {shared!r} and top_k_chapters {self.top_k_chapters} must be chapters apart of the "
            f"{self.num_chapters} there are",
        )
        require(
            isinstance(factor, int | float) and factor > 0,
            f"routed_scaling_factor must be above 0, not {factor!r}",
        )

    @property
    def chapter_tokens(self) -> int:
        return self.num_memory_tokens // self.num_chapters


class Router(nn.Module):
    """Chooses chapters by the mean of the last `window` rows: ids and weights (B, T, shared + top_k)."""

    def __init__(self, config: ChaptersConfig) -> None:
        super().__init__()
        self.window, self.top_k = config.routing_window_size, config.top_k_chapters
        self.shared = config.num_shared_chapters
        self.scale = float(config.routed_scaling_factor)
        self.linear = nn.Linear(config.d_model, config.num_chapters)

    def pooled(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d): the mean of each row and those before it, `window` at most."""
        seen = (~later(x.shape[1], self.window, x.device)[0, 0]).to(x.dtype)
        return seen @ x / seen.sum(dim=-1, keepdim=True)

    def choose(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, d) -> ids int64 and weights, which sum to 1; shared chapters first."""
        probability = self.linear(pooled).softmax(dim=-1)[..., self.shared :]
        weights, ids = probability.topk(self.top_k, dim=-1)
        return self.with_shared(ids + self.shared, weights / weights.sum(dim=-1, keepdim=True))

    def with_shared(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Shared chapters before the routed ones, (B, T, top_k) each, whose weights sum to 1."""
        if not self.shared:
            return ids, weights
        whole = self.shared + self.scale
        shared = torch.arange(self.shared, device=ids.device).expand(*ids.shape[:2], -1)
        even = weights.new_full((), 1.0 / whole).expand(*ids.shape[:2], self.shared)
        return torch.cat([shared, ids], dim=-1), torch.cat([even, weights * (self.scale / whole)], dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.choose(self.pooled(x))


class ChapterAttention(nn.Module):
    """Rows attend to the chapters chosen for them."""

    def __init__(self, config: ChaptersConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.memory_n_head, config.memory_n_kv_head
        self.d_head = config.d_model // config.memory_n_head
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, self.n_kv_head * self.d_head, bias=False)
        self.value = nn.Linear(config.d_model, self.n_kv_head * self.d_head, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    def queries(self, rows: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, n_kv_head, group, d_head), scaled."""
        return self.query(rows).unflatten(-1, (self.n_kv_head, -1, self.d_head)) * self.d_head**-0.5

    def forward(self, rows: Tensor, memory: Tensor) -> Tensor:
        """rows (B, T, d), each with its memory (B, T, S, d) -> (B, T, d)."""
        heads = (self.n_kv_head, self.d_head)
        key = self.key(memory).unflatten(-1, heads).movedim(-2, 2)  # (B, T, n_kv_head, S, d_head)
        value = self.value(memory).unflatten(-1, heads).movedim(-2, 2)
        weights = (self.queries(rows) @ key.transpose(-1, -2)).softmax(dim=-1)
        return self.output((weights @ value).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ChaptersBlock(nn.Module):
    """Attention and feed-forward; subclasses put the memory between them."""

    def __init__(self, config: ChaptersConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(
            config.d_model, config.n_head, bias=False, rotary=True, rotary_base=config.rope_theta,
            n_kv_head=config.n_kv_head,
        )  # fmt: skip
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = SwiGLU(config.d_model, config.d_ff)

    def finish(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(self.feed_forward_norm(x))

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d), causal; `bank` (chapters, tokens * d)."""
        return self.finish(x + self.attention(self.attention_norm(x)))


class ChaptersMemoryBlock(ChaptersBlock):
    def __init__(self, config: ChaptersConfig) -> None:
        super().__init__(config)
        self.router = Router(config)
        self.memory_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.memory = ChapterAttention(config)
        nn.init.zeros_(self.memory.output.weight)  # as published: training starts without memory

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        ids, weights = self.router(x)
        x = x + self.attention(self.attention_norm(x))
        chapters = nn.functional.embedding(ids, bank).unflatten(-1, (-1, x.shape[-1]))  # (B, T, chapters, tokens, d)
        memory = (chapters * weights[..., None, None]).flatten(2, 3)
        return self.finish(x + self.memory(self.memory_norm(x), memory))


class Chapters(ReferenceModel):
    def __init__(self, config: ChaptersConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.bank = nn.Parameter(0.02 * torch.randn(config.num_memory_tokens, config.d_model))
        self.blocks = nn.ModuleList(
            ChaptersMemoryBlock(config) if layer in config.memory_layers else ChaptersBlock(config)
            for layer in range(config.n_layer)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def chapters(self) -> Tensor:
        """The bank as it is read: (num_chapters, chapter_tokens * d_model)."""
        config = self.config
        chapters = self.bank.unflatten(0, (config.num_chapters, -1))
        if config.normalize_memory and config.num_shared_chapters:
            chapters = nn.functional.rms_norm(chapters, chapters.shape[-1:], eps=config.norm_eps)
        return chapters.flatten(1)

    def head(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, V), with the weights of the embedding."""
        return nn.functional.linear(self.norm(x), self.embedding.weight)

    def full(self, tokens: Tensor) -> Tensor:
        x, bank = self.embedding(tokens), self.chapters()
        for block in self.blocks:
            x = block(x, bank)
        return self.head(x)


FAMILY = Family(
    name="chapters",
    title="Mixture of Chapters",
    source="arXiv 2603.21096; Tasmay-Tibrewal/Memory",
    config=ChaptersConfig,
    model=Chapters,
)
