"""Long-Short Transformer (Zhu et al., arXiv 2107.02192) with the semantics of the authors' autoregressive code.

A token attends, in one softmax, to a sliding window of rows and to the compressed vectors of all chunks before its own:

    window   ((q + u) . LN_w(W_k x_j) + (q + v) . W_r R(i - j))         the last `window_len` rows, its own included
    chunks   (q . c + q . W_c R(distance))                              `chunk_rank` vectors a chunk of `chunk_size`
    q = W_q x / sqrt(d_head); u and v belong to a layer and are not scaled; values pass the same LayerNorm as keys

A chunk is compressed by weights `softmax over the chunk of W_p x`, of their own for each head and vector. Tokens come
in blocks of `tgt_len`, with a cache of the `mem_len` layer inputs before the block, which starts as zeros and is
attended to. A chunk of the block is projected first and then compressed, `LN_c(P W_k x)`; a chunk of the cache is
compressed first and then projected, `LN_c(W_k P x)`. Heads compress with weights of their own, so these differ, and a
chunk changes when its block ends. `project_first` does away with that: then all chunks are projected first.

A layer with `pre_norm` adds to what it has normalised: `h = LN(x); h = LN(h + attention(h)); h + FF(h)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive, require_switch
from mscompile.models.relative import sinusoid


@dataclass(frozen=True)
class LongShortConfig:
    vocab_size: int
    n_layer: int
    d_model: int
    n_head: int
    d_inner: int
    window_len: int
    chunk_size: int
    mem_len: int
    tgt_len: int  # tokens of a block, `--tokens-per-sample` of the authors
    chunk_rank: int = 1
    clamp_len: int | None = None  # distances in the window beyond this count as this one
    cpos_clamp_len: int | None = None  # the same for distances of chunks, in vectors
    pre_norm: bool = True
    gelu: bool = True  # ReLU otherwise
    bias: bool = False  # in W_q, W_k, W_v and W_o
    project_first: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "n_layer", "d_model", "n_head", "d_inner", "window_len", "chunk_size", "chunk_rank",
            "mem_len", "tgt_len",
        )  # fmt: skip
        require(self.d_model % self.n_head == 0, f"d_model {self.d_model} must be divisible by n_head {self.n_head}")
        require(self.d_model % 2 == 0, f"d_model must be even for sinusoid positions, not {self.d_model}")
        for name in ("window_len", "chunk_size"):
            require(getattr(self, name) >= 2, f"{name} must be at least 2, not {getattr(self, name)}")
        for name in ("mem_len", "tgt_len"):
            require(
                getattr(self, name) % self.chunk_size == 0,
                f"{name} {getattr(self, name)} must be divisible by chunk_size {self.chunk_size}",
            )
        require(
            self.mem_len >= self.window_len,
            f"mem_len {self.mem_len} must be at least window_len {self.window_len}: the window reaches into the cache",
        )
        for name in ("clamp_len", "cpos_clamp_len"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require_switch(self, "pre_norm", "gelu", "bias", "project_first")
        require_dropout(self.dropout)


@dataclass(frozen=True)
class Blank:
    """Rows of a run that were never written: `where` (B, 1, 1, S). All hold the same key and value, (H, 1, d_head)."""

    where: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Run:
    """Keys k, v (B, H, S, d_head) as queries q (B, H, T, d_head), already scaled, see them.

    `query` meets the keys; `by_position` (B, H, T, S) is added to the scores; `hidden` (1 or B, 1, T, S) are not seen.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    by_position: Tensor
    hidden: Tensor
    blank: Blank | None = None

    def scores(self) -> Tensor:
        """(B, H, T, S)."""
        by_content = self.query @ self.key.transpose(-1, -2)
        if self.blank is not None:
            by_content = torch.where(self.blank.where, self.query @ self.blank.key.transpose(-1, -2), by_content)
        scores = by_content + self.by_position
        return scores.masked_fill(self.hidden, torch.finfo(scores.dtype).min)

    def mix(self, weights: Tensor) -> Tensor:
        """Weights (B, H, T, S) -> (B, H, T, d_head)."""
        if self.blank is None:
            return weights @ self.value
        written = weights.masked_fill(self.blank.where, 0.0)
        return written @ self.value + (weights - written).sum(dim=-1, keepdim=True) * self.blank.value


def attend(runs: Sequence[Run]) -> Tensor:
    """One softmax over several runs of keys, (B, H, T, d_head)."""
    weights = torch.cat([run.scores() for run in runs], dim=-1).softmax(dim=-1)
    parts = weights.split([run.key.shape[2] for run in runs], dim=-1)
    return reduce(torch.add, [run.mix(part) for run, part in zip(runs, parts, strict=True)])


class LongShortAttention(nn.Module):
    def __init__(self, config: LongShortConfig) -> None:
        super().__init__()
        d_model = config.d_model
        self.config, self.n_head, self.d_head = config, config.n_head, d_model // config.n_head
        self.query = nn.Linear(d_model, d_model, bias=config.bias)
        self.key = nn.Linear(d_model, d_model, bias=config.bias)
        self.value = nn.Linear(d_model, d_model, bias=config.bias)
        self.output = nn.Linear(d_model, d_model, bias=config.bias)
        self.weigh = nn.Linear(d_model, config.n_head * config.chunk_rank)  # W_p
        self.window_position = nn.Linear(d_model, d_model, bias=False)  # W_r
        self.chunk_position = nn.Linear(d_model, d_model)  # W_c
        self.window_norm = nn.LayerNorm(d_model)
        self.chunk_norm = nn.LayerNorm(d_model)
        self.content_bias = nn.Parameter(torch.zeros(config.n_head, 1, self.d_head))  # u
        self.position_bias = nn.Parameter(torch.zeros(config.n_head, 1, self.d_head))  # v

    def heads(self, rows: Tensor) -> Tensor:
        """(B, S, d) -> (B, H, S, d_head)."""
        return rows.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)

    def merge(self, mixed: Tensor) -> Tensor:
        """(B, H, T, d_head) -> (B, T, d), projected."""
        return self.output(mixed.transpose(1, 2).flatten(-2))

    def queries(self, rows: Tensor) -> Tensor:
        """(B, T, d) -> (B, H, T, d_head), scaled."""
        return self.heads(self.query(rows)) / math.sqrt(self.d_head)

    def compress(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Whole chunks, rows (B, N chunk_size, d) and their W_p x (B, N chunk_size, H r) -> (B, N r, d)."""
        size, rank = self.config.chunk_size, self.config.chunk_rank
        parts = rows.unflatten(-1, (self.n_head, self.d_head)).unflatten(1, (-1, size)).transpose(2, 3)
        shares = weights.unflatten(-1, (self.n_head, rank)).unflatten(1, (-1, size)).softmax(dim=2)
        vectors = shares.permute(0, 1, 3, 4, 2) @ parts  # (B, N, H, r, size) @ (B, N, H, size, d_head)
        return vectors.transpose(2, 3).flatten(1, 2).flatten(-2)

    def projected_first(self, key: Tensor, value: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks of a block: W_k x and W_v x (B, N chunk_size, d) -> keys and values (B, H, N r, d_head)."""
        key, value = self.compress(key, weights), self.compress(value, weights)
        return self.heads(self.chunk_norm(key)), self.heads(self.chunk_norm(value))

    def compressed_first(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks of the cache: rows (B, N chunk_size, d) -> keys and values (B, H, N r, d_head)."""
        vectors = self.compress(rows, weights)
        key, value = self.key(vectors), self.value(vectors)
        return self.heads(self.chunk_norm(key)), self.heads(self.chunk_norm(value))

    def window_run(
        self, query: Tensor, key: Tensor, value: Tensor, distance: Tensor, blank: Blank | None = None
    ) -> Run:
        """Normalised rows, `distance` (1 or B, T, S) tokens back from the queries."""
        window = self.config.window_len
        table = self._table(self.window_position, window, self.config.clamp_len)
        by_position = _looked_up((query + self.position_bias) @ table, distance)
        hidden = ((distance < 0) | (distance >= window))[:, None]
        return Run(query + self.content_bias, key, value, by_position, hidden, blank)

    def chunk_run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        distance: Tensor,
        hidden: Tensor,
        blank: Blank | None = None,
    ) -> Run:
        """Vectors of chunks, `distance` (1 or B, T, S) back, 0 for the last one before the query's chunk."""
        config = self.config
        farthest = (config.mem_len + config.tgt_len) // config.chunk_size * config.chunk_rank
        table = self._table(self.chunk_position, farthest, config.cpos_clamp_len)
        return Run(query, key, value, _looked_up(query @ table, distance), hidden[:, None], blank)

    def _table(self, projection: nn.Linear, count: int, clamp: int | None) -> Tensor:
        """Position keys of distances 0 .. count - 1, (H, d_head, count)."""
        distance = torch.arange(count, device=projection.weight.device).clamp(max=count if clamp is None else clamp)
        encoded = sinusoid(distance, projection.in_features, projection.weight.dtype)
        return self.heads(projection(encoded)[None])[0].transpose(-1, -2)

    def forward(self, rows: Tensor, cache: Tensor) -> Tensor:
        """A block (B, T, d), T <= tgt_len, after its cache (B, mem_len, d) -> (B, T, d)."""
        query = self.queries(rows)
        key, value = self.key(rows), self.value(rows)
        return self.merge(
            attend([self._window(query, key, value, cache), *self._chunks(query, rows, key, value, cache)])
        )

    def _window(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Run:
        recent = cache[:, -self.config.window_len :]
        keys = self.heads(self.window_norm(torch.cat([self.key(recent), key], dim=1)))
        values = self.heads(self.window_norm(torch.cat([self.value(recent), value], dim=1)))
        place = torch.arange(keys.shape[2], device=key.device)
        distance = place[self.config.window_len :, None] - place[None, :]
        return self.window_run(query, keys, values, distance[None])

    def _chunks(self, query: Tensor, rows: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> list[Run]:
        size, rank = self.config.chunk_size, self.config.chunk_rank
        whole = rows.shape[1] - rows.shape[1] % size  # the last chunk of the last block may be incomplete
        key, value, weights = key[:, :whole], value[:, :whole], self.weigh(rows[:, :whole])
        if self.config.project_first:
            old = self.projected_first(self.key(cache), self.value(cache), self.weigh(cache))
        else:
            old = self.compressed_first(cache, self.weigh(cache))
        place = torch.arange(rows.shape[1], device=rows.device)[:, None] // size * rank  # of a query's own chunk
        runs = []
        for (keys, values), first in ((old, -old[0].shape[2]), (self.projected_first(key, value, weights), 0)):
            number = first + torch.arange(keys.shape[2], device=rows.device)
            distance = (place - 1 - number)[None]
            runs.append(self.chunk_run(query, keys, values, distance, distance < 0))
        return runs


def _looked_up(by_position: Tensor, distance: Tensor) -> Tensor:
    """Scores of all distances (B, H, T, D) -> those of the keys, for distances (1 or B, T, S); any where outside."""
    index = distance.clamp(0, by_position.shape[3] - 1)[:, None]
    return by_position.gather(3, index.expand(by_position.shape[0], by_position.shape[1], -1, -1))


class LongShortLayer(nn.Module):
    def __init__(self, config: LongShortConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = LongShortAttention(config)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.d_model, config.d_inner),
            nn.GELU() if config.gelu else nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_inner, config.d_model),
            nn.Dropout(config.dropout),
        )
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def attention_input(self, rows: Tensor) -> Tensor:
        """What attention sees of the block and of the cache, row by row."""
        return self.attention_norm(rows) if self.pre_norm else rows

    def finish(self, rows: Tensor, attended: Tensor) -> Tensor:
        """Both residuals and the feed-forward, for rows of `attention_input`: (B, T, d) each."""
        h = rows + self.dropout(attended)
        if self.pre_norm:
            h = self.feed_forward_norm(h)
            return h + self.feed_forward(h)
        h = self.attention_norm(h)
        return self.feed_forward_norm(h + self.feed_forward(h))

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        """x (B, T, d), cache (B, mem_len, d), the layer's inputs -> (B, T, d)."""
        rows = self.attention_input(x)
        return self.finish(rows, self.attention(rows, self.attention_input(cache)))


class LongShortTransformer(ReferenceModel):
    def __init__(self, config: LongShortConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LongShortLayer(config) for _ in range(config.n_layer))
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.embedding(tokens) * math.sqrt(self.config.d_model))

    def head(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.dropout(x), self.embedding.weight, self.head_bias)

    def forward(self, tokens: Tensor, cache: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A block of tokens (B, T) and a cache (B, mem_len, d) a layer -> logits (B, T, V), the next cache."""
        x, following = self.embed(tokens), []
        for layer, remembered in zip(self.layers, cache, strict=True):
            following.append(torch.cat([remembered, x], dim=1)[:, -self.config.mem_len :])
            x = layer(x, remembered)
        return self.head(x), following

    def full(self, tokens: Tensor) -> Tensor:
        config = self.config
        zeros = self.embedding.weight.new_zeros(tokens.shape[0], config.mem_len, config.d_model)
        cache, logits = [zeros] * config.n_layer, []
        for block in tokens.split(config.tgt_len, dim=1):
            out, cache = self(block, cache)
            logits.append(out)
        return torch.cat(logits, dim=1)


FAMILY = Family(
    name="long-short",
    title="Long-Short Transformer",
    source="Zhu et al., arXiv 2107.02192; NVIDIA/transformer-ls autoregressive",
    config=LongShortConfig,
    model=LongShortTransformer,
)
