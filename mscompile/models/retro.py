"""RETRO (Borgeaud et al., arXiv 2112.04426): a decoder that looks up neighbours of every chunk it has read.

    chunk u   = the m tokens um .. um + m - 1; its k neighbours, r tokens each, come from a database outside
    H_u       = rows of chunk u at the first layer with cross-attention, after its self-attention
    E_u       = Encoder(neighbours of chunk u, H_u)                        k r rows, bidirectional

    x = x + attention(norm(x))                                             causal, rotary
    x = x + cross(norm(x), E)                                              in some layers
    x = x + feed_forward(norm(x))

Chunked cross-attention lets the rows um + m - 1 .. um + 2m - 2, the last one of chunk u and all but the last one of
chunk u + 1, attend to E_u. The first m - 1 rows have nothing to attend to and stay as they are.

Wiring of the public labml code (`labml_nn/transformers/retro`): one embedding for tokens and neighbours, H_u after
self-attention and normalised once, rotary positions in self-attention, none beside. RMSNorm as in the paper. From
lucidrains/RETRO-pytorch: another width for the encoder, a null key and value that a row can attend to instead of
neighbours, rotary positions in cross-attention (`cross_rotary`; queries count from m - 1), GELU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mscompile.contracts import HostInput
from mscompile.models.attention import Attention, Run, attend, feed_forward, row_numbers
from mscompile.models.family import Family, ReferenceModel, require, require_layers, require_positive, require_switch

NEIGHBOURS = "neighbours"


@dataclass(frozen=True)
class RetroConfig:
    vocab_size: int
    n_layer: int = 12
    d_model: int = 768
    n_head: int = 12
    d_ff: int = 3072
    cross_layers: Sequence[int] = (5, 8, 11)  # layers with cross-attention, counted from 0
    chunk: int = 64  # m, tokens
    neighbours: int = 2  # k
    neighbour_length: int = 128  # r, tokens
    n_encoder_layer: int = 2
    d_encoder: int = 768
    d_encoder_ff: int = 3072
    null_key: bool = False
    cross_rotary: bool = False
    context: int = 2048  # longest stream, in tokens

    def __post_init__(self) -> None:
        sizes = ("n_layer", "d_model", "n_head", "d_ff", "chunk", "neighbours", "neighbour_length")
        require_positive(self, "vocab_size", *sizes, "n_encoder_layer", "d_encoder", "d_encoder_ff", "context")
        require_switch(self, "null_key", "cross_rotary")
        for name in ("d_model", "d_encoder"):
            width = getattr(self, name)
            require(
                width % (2 * self.n_head) == 0,
                f"{name} {width} must be divisible by twice n_head {self.n_head}, since rotary heads have even width",
            )
        require(self.chunk >= 2, f"chunk must be at least 2 tokens, not {self.chunk}")
        require_layers("cross_layers", self.cross_layers, self.n_layer)


def _norm(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=1e-6)


class CrossAttention(nn.Module):
    """Rows attend to rows of another kind. `null` adds one key and value of its own, which every row sees."""

    def __init__(self, d_model: int, n_head: int, d_context: int, rotary: bool, null: bool) -> None:
        super().__init__()
        self.norm = _norm(d_model)
        self.attention = Attention(d_model, n_head, rotary=rotary, d_context=d_context)
        shape = (n_head, 1, d_model // n_head)
        self.null = nn.ParameterDict({name: torch.randn(shape) for name in ("key", "value")} if null else {})

    def forward(self, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rows (B, T, d) with positions (1 or B, T), and what they attend to, (B, H, S, d_head) -> (B, T, d)."""
        runs = [Run(key, value)]
        if self.null:
            shape = (key.shape[0], -1, -1, -1)
            runs.append(Run(self.null["key"].expand(shape), self.null["value"].expand(shape)))
        return self.attention.merge(attend(self.attention.queries(self.norm(rows), positions), runs))


class EncoderLayer(nn.Module):
    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        width, heads = config.d_encoder, config.n_head
        self.attention_norm = _norm(width)
        self.attention = Attention(width, heads, rotary=True)
        self.cross = CrossAttention(width, heads, config.d_model, config.cross_rotary, null=False)
        self.feed_forward_norm = _norm(width)
        self.feed_forward = feed_forward(width, config.d_encoder_ff)

    def forward(self, rows: Tensor, chunks: Tensor) -> Tensor:
        """Neighbours (N, k, r, d_encoder), and the chunks (N, m, d_model) that they are neighbours of."""
        count, length = rows.shape[1:3]
        normed = self.attention_norm(rows).flatten(0, 1)
        rows = rows + self.attention(normed, normed).unflatten(0, (-1, count))
        place = torch.arange(length, device=rows.device).repeat(count)[None]
        keys = self.cross.attention.keys(chunks, row_numbers(chunks))
        rows = rows + self.cross(rows.flatten(1, 2), place, *keys).unflatten(1, (count, length))
        return rows + self.feed_forward(self.feed_forward_norm(rows))


class Encoder(nn.Module):
    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.enter = nn.Linear(config.d_model, config.d_encoder)
        self.chunk_norm = _norm(config.d_model)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_encoder_layer))
        self.norm = _norm(config.d_encoder)

    def forward(self, neighbours: Tensor, chunks: Tensor) -> Tensor:
        """Embedded neighbours (N, k, r, d_model) and H (N, m, d_model) -> E (N, k, r, d_encoder)."""
        rows, chunks = self.enter(neighbours), self.chunk_norm(chunks)
        for layer in self.layers:
            rows = layer(rows, chunks)
        return self.norm(rows)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention in some layers, feed-forward; `Retro` and its streaming form combine them."""

    def __init__(self, config: RetroConfig, crosses: bool) -> None:
        super().__init__()
        self.config = config
        width, heads = config.d_model, config.n_head
        self.attention_norm = _norm(width)
        self.attention = Attention(width, heads, rotary=True)
        self.cross = (
            CrossAttention(width, heads, config.d_encoder, config.cross_rotary, config.null_key) if crosses else None
        )
        self.feed_forward_norm = _norm(width)
        self.feed_forward = feed_forward(width, config.d_ff)

    def finish(self, x: Tensor) -> Tensor:
        """The feed-forward and its residual, (B, T, d)."""
        return x + self.feed_forward(self.feed_forward_norm(x))

    def keys(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, k r, d_head) of E (N, k, r, d_encoder); rows count from 0 in every neighbour."""
        assert self.cross is not None
        count, length = encoded.shape[1:3]
        place = torch.arange(length, device=encoded.device).repeat(count)[None]
        return self.cross.attention.keys(encoded.flatten(1, 2), place)


class Retro(ReferenceModel):
    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.neighbours, config.neighbour_length)
        self.inputs = (HostInput(NEIGHBOURS, "int64", shape, config.chunk, config.vocab_size),)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i in config.cross_layers) for i in range(config.n_layer))
        self.norm = _norm(config.d_model)
        self.output = nn.Linear(config.d_model, config.vocab_size)

    def full(self, tokens: Tensor) -> Tensor:
        return self(tokens, self.supplied(self.inputs[0], tokens))

    def forward(self, tokens: Tensor, neighbours: Tensor) -> Tensor:
        """Tokens (B, T) and the neighbours (B, T // m, k, r) of the whole chunks among them -> logits (B, T, V)."""
        x, encoded = self.embedding(tokens), None
        for layer in cast(Iterable[DecoderLayer], self.layers):
            x = x + layer.attention(layer.attention_norm(x))
            if layer.cross is not None and neighbours.shape[1]:
                if encoded is None:
                    encoded = self.encode(neighbours.flatten(0, 1), self._chunks(x))
                x = x + self._cross(layer, x, encoded)
            x = layer.finish(x)
        return self.head(x)

    def encode(self, neighbours: Tensor, chunks: Tensor) -> Tensor:
        """E (N, k, r, d_encoder) of neighbours (N, k, r) of chunks whose rows are H (N, m, d_model)."""
        return self.encoder(self.embedding(neighbours), chunks)

    def head(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x))

    def _chunks(self, x: Tensor) -> Tensor:
        """Rows (B, T, d) by whole chunks, (B * C, m, d)."""
        size = self.config.chunk
        return x[:, : x.shape[1] // size * size].unflatten(1, (-1, size)).flatten(0, 1)

    def _cross(self, layer: DecoderLayer, x: Tensor, encoded: Tensor) -> Tensor:
        """Chunked cross-attention: rows (B, T, d) shifted left by m - 1, by chunks, to E (B * C, k, r, d_encoder)."""
        assert layer.cross is not None
        size, (batch, length) = self.config.chunk, x.shape[:2]
        served = length - size + 1
        rows = pad(x[:, size - 1 :], (0, 0, 0, -served % size)).unflatten(1, (-1, size))
        place = torch.arange(size - 1, 2 * size - 1, device=x.device)[None]
        mixed = layer.cross(rows.flatten(0, 1), place, *layer.keys(encoded))
        mixed = mixed.unflatten(0, (batch, -1)).flatten(1, 2)[:, :served]
        return pad(mixed, (0, 0, size - 1, 0))


FAMILY = Family(
    name="retro",
    title="RETRO",
    source="Borgeaud et al., arXiv 2112.04426; labmlai/annotated_deep_learning_paper_implementations, "
    "lucidrains/RETRO-pytorch",
    config=RetroConfig,
    model=Retro,
)
