"""Recurrent Memory Transformer: memory rows and, where there is one, a cache of whole segments behind them.

Rows of a segment are numbered from its first read row: read rows 0 .. n - 1, token p at n + p, write rows from
n + T; slot c of the cache at c - mem_len.

Given                                              Becomes
  cache of layer inputs    (B, mem_len, d)           their keys and values: states cache.key, cache.value
  [cache ; rows][-mem_len:] after each segment         (B, H, mem_len, d_h), replace; `close` joins the cache, read
                                                       rows, tokens and write rows and keeps the newest

Exact because keys and values are made row by row. How much of the cache is filled follows from `position`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from exporters.memory_rows import SegmentCache, SegmentLayer, SegmentRoot, phase
from exporters.stream import Call, Scope, TypeRule
from mscompile.models.recurrent_memory import (
    RecurrentMemory,
    RecurrentMemoryConfig,
    shifted,
    shifted_index,
)
from mscompile.models.relative import Biases, Keys, Sight, attend
from mscompile.models.transformer_xl import TransformerXLLayer


class Order:
    """How the rows of a segment see each other."""

    def __init__(self, config: RecurrentMemoryConfig) -> None:
        self.config = config
        self.reads = torch.arange(config.num_mem_tokens)
        self.tokens = config.num_mem_tokens + torch.arange(config.tgt_len)
        self.writes = config.num_mem_tokens + config.tgt_len + self.reads
        self.cached = torch.arange(config.mem_len) - config.mem_len

    def filled(self, segments: Tensor) -> Tensor:
        """Rows in the cache after these many segments, (B,)."""
        return (segments * self.config.rows).clamp(max=self.config.mem_len)

    def back(self, query: Tensor, key: Tensor, hidden: Tensor | None = None) -> Sight:
        """Keys (S,) as queries (1 or B, T) that come after them see them; `hidden` is (B, 1 or T, S)."""
        index = (query[:, :, None] - key).clamp(0, self.config.reach - 1)
        return Sight(index[:, None], None if hidden is None else hidden[:, None])

    def together(self, filled: Tensor) -> Sight:
        """Memory rows (n) as they see one another, those after them included."""
        distance = (self.reads[:, None] - self.reads)[None]  # (1, n, n)
        index = shifted_index(distance, (filled + self.config.rows)[:, None, None], self.config.reach)
        return Sight(index[:, None], None)

    def cache(self, query: Tensor, filled: Tensor) -> Sight:
        """The cache as queries (1 or B, T) see it, `filled` (B,) rows of it."""
        return self.back(query, self.cached, (self.cached < -filled[:, None])[:, None])


class RecurrentMemoryLayer(SegmentLayer):
    """`first` (1, n, d) are the first segment's read rows as they enter this layer."""

    def __init__(
        self, layer: TransformerXLLayer, biases: Biases, config: RecurrentMemoryConfig, first: Tensor, scope: Scope
    ) -> None:
        super().__init__()
        self.layer, self.biases, self.config, self.order = layer, biases, config, Order(config)
        self.cache = SegmentCache(*self.open(first)[1:], config.tgt_len, scope)
        if config.mem_len:
            shape = (config.n_head, config.mem_len, config.d_head)
            self.cached_key, self.cached_value = scope.state("cache.key", *shape), scope.state("cache.value", *shape)
            self.own_states = (self.cached_key, self.cached_value)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        query, key, value = self._projected(x)
        self.cache.append(key, value, call)
        sights = call.once("sights of tokens", lambda: self._sights(x.shape[1], call))
        made = [self.cache.read_rows(call), self.cache.tokens(call), (key, value)]
        if self.config.mem_len:
            made.append(self._cached(call))
        runs = [Keys(*pair, sight) for pair, sight in zip(made, sights, strict=True)]
        return self._finished(x, query, runs, None)

    def write(self, x: Tensor, call: Call) -> Tensor:
        query, key, value = self._projected(x)
        read, tokens, order = self.cache.read_rows(call), self.cache.tokens(call), self.order
        rows = order.writes[None]
        runs = [Keys(*read, order.back(rows, order.reads)), Keys(*tokens, order.back(rows, order.tokens))]
        filled = order.filled(call.position // self.config.tgt_len)
        if self.config.mem_len:
            cached = self._cached(call)
            self._keep([cached, read, tokens, (key, value)], call)
            if self.config.read_mem_from_cache:
                runs.append(Keys(*cached, order.cache(rows, filled)))
        return self._finished(x, query, [*runs, Keys(key, value, order.together(filled))], shifted)

    def open(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read rows of a first segment, with nothing in the cache."""
        return self._open(x, torch.zeros(1, dtype=torch.int64), None)

    def read(self, x: Tensor, call: Call) -> Tensor:
        filled = self.order.filled(call.position // self.config.tgt_len + 1)
        seen = None
        if self.config.read_mem_from_cache:
            key, value = call.written[self.cached_key.name], call.written[self.cached_value.name]  # by `write`
            seen = Keys(key, value, self.order.cache(self.order.reads[None], filled))
        x, key, value = self._open(x, filled, seen)
        self.cache.begin(key, value, call)
        return x

    def _open(self, x: Tensor, filled: Tensor, cached: Keys | None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._projected(x)
        runs = [Keys(key, value, self.order.together(filled)), *([cached] if cached else [])]
        return self._finished(x, query, runs, shifted), key, value

    def _sights(self, count: int, call: Call) -> list[Sight]:
        """How tokens see read rows, tokens before the call, those of the call, and the cache where there is one."""
        order, before = self.order, phase(self.config.tgt_len, call)[:, None]  # (B, 1)
        new = torch.arange(count)
        query = self.config.num_mem_tokens + before + new  # (B, T)
        later = None if call.single else (new[:, None] < new)[None]
        unwritten = (order.tokens >= self.config.num_mem_tokens + before)[:, None]
        sights = [
            order.back(query, order.reads),
            order.back(query, order.tokens, unwritten),
            order.back(new[None], new, later),
        ]
        if self.config.mem_len:
            sights.append(order.cache(query, order.filled(call.position // self.config.tgt_len)))
        return sights

    def _cached(self, call: Call) -> tuple[Tensor, Tensor]:
        return call.read(self.cached_key), call.read(self.cached_value)

    def _keep(self, made: list[tuple[Tensor, Tensor]], call: Call) -> None:
        """The cache of the next segment: the newest rows of all, in their order."""
        for state, rows in zip((self.cached_key, self.cached_value), zip(*made, strict=True), strict=True):
            call.write(state, torch.cat(rows, dim=2)[:, :, -self.config.mem_len :])

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, S, d_h) each."""
        attention, rows = self.layer.attention, self.layer.attention_input(x)
        projections = (attention.query, attention.key, attention.value)
        query, key, value = (attention.heads(project(rows)) for project in projections)
        return query, key, value

    def _finished(self, x: Tensor, query: Tensor, runs: list[Keys], widen: Callable[[Tensor], Tensor] | None) -> Tensor:
        attention = self.layer.attention
        table = attention.table(attention.encode(attention.geometry.distances(self.config.reach)))
        return self.layer.combine(x, attention.merge(attend(query, runs, table, self.biases, widen)))


class StreamRecurrentMemory(SegmentRoot):
    @torch.no_grad()
    def __init__(self, model: RecurrentMemory, scope: Scope) -> None:
        super().__init__(model.memory, model.segment, scope)
        self.model, self.biases = model, model.biases
        self.layers = nn.ModuleList()
        rows = model.memory[None]
        for i, module in enumerate(cast(Iterable[TransformerXLLayer], model.layers)):
            layer = RecurrentMemoryLayer(module, model.biases, model.config, rows, scope.child(f"layer{i:02}"))
            self.layers.append(layer)
            rows, _, _ = layer.open(rows)

    def token_rows(self, tokens: Tensor, call: Call) -> Tensor:
        return self.model.embed(tokens)

    def read_rows(self, memory: Tensor) -> Tensor:
        return memory

    def write_rows(self, call: Call) -> Tensor:
        return self.remembered(call)

    def finish(self, rows: Tensor) -> Tensor:
        return rows

    def logits(self, rows: Tensor) -> Tensor:
        return self.model.head(rows)


RULES = (
    TypeRule(
        "recurrent-memory",
        "tokens never see write rows: memory is written at the end of each segment",
        RecurrentMemory,
        StreamRecurrentMemory,
    ),
)
