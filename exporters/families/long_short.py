"""Long-Short Transformer: a ring for the window, and every chunk compressed once, in both of its forms.

Given                                              Becomes
  window keys LN_w(W_k x)     (B, H, S, d_head)      states key, value (B, H, window_len - 1, d_head), append
  P x of a chunk of C rows, P = softmax(W_p x)       state rows (B, C, 3 d + H r), append: what the last row of the
                                                     chunk needs of the others: x, W_k x, W_v x and W_p x
  chunk of the block  LN_c(P W_k x)                  states block.key, .value (B, H, tgt_len / C, r d_head), append
  chunk of the cache  LN_c(W_k P x)                  states cache.key, .value (B, H, (mem_len + tgt_len) / C, r d_head)

Both forms are made at the last token of a chunk, when all of its rows are there. Which one a token sees follows from
its position: chunks of its own block in the first form, those of the `mem_len` tokens before the block in the second.
So nothing happens where a block ends, and a call may run past it. With `project_first` there is one form, the cache's.

Before the stream there are zeros, which are attended to as published. They give the same key and value everywhere,
so slots that were not written count as those.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.contracts import StateSpec
from mscompile.models.long_short import (
    Blank,
    LongShortAttention,
    LongShortConfig,
    LongShortLayer,
    LongShortTransformer,
    Run,
    attend,
)

Pair = tuple[Tensor, Tensor]  # keys and values


class Memory(StreamModule):
    """A ring of keys and values, `rows` of `width` for each head, and what stands for those before the stream."""

    def __init__(self, module: LongShortAttention, scope: Scope, rows: int, width: int, blank: Pair) -> None:
        super().__init__()
        self.module, self.config, self.capacity = module, module.config, rows
        shape = (module.n_head, rows, width)
        self.key = scope.state("key", *shape, update="append", time_axis=2)
        self.value = scope.state("value", *shape, update="append", time_axis=2)
        self.own_states: tuple[StateSpec, ...] = (self.key, self.value)
        for name, rows_of_zeros in zip(("blank_key", "blank_value"), blank, strict=True):
            self.register_buffer(name, rows_of_zeros[0].detach(), persistent=False)

    def numbers(self, factor: int, call: Call) -> Tensor:
        """Row number that each slot holds, (B, rows); negative ones come before the stream."""
        newest = call.rows_before(factor)[:, None] - 1
        return newest - (newest - torch.arange(self.capacity, device=newest.device)) % self.capacity

    def blank(self, numbers: Tensor) -> Blank:
        return Blank((numbers < 0)[:, None, None], self.get_buffer("blank_key"), self.get_buffer("blank_value"))


class WindowMemory(Memory):
    def runs(self, query: Tensor, new: Pair, call: Call) -> list[Run]:
        """Rows of earlier calls and those of this one, (B, H, T, d_head) each."""
        place = torch.arange(query.shape[2], device=query.device)
        numbers = call.once("window", lambda: self.numbers(1, call))
        distance = call.once("distance", lambda: (call.position[:, None] + place)[:, :, None] - numbers[:, None])
        old = self.module.window_run(query, call.read(self.key), call.read(self.value), distance, self.blank(numbers))
        for state, rows in zip(self.own_states, new, strict=True):
            call.write(state, rows)
        return [old, self.module.window_run(query, *new, (place[:, None] - place)[None])]


class ChunkMemory(Memory):
    """Vectors of chunks in one form: for tokens of their `own` block, for those to which they are `past`, or both."""

    def __init__(self, module: LongShortAttention, scope: Scope, blank: Pair, *, past: bool, own: bool) -> None:
        config = module.config
        self.past, self.own, self.rank = past, own, config.chunk_rank
        reach = config.mem_len if past else 0
        rows = (reach + config.tgt_len) // config.chunk_size
        super().__init__(module, scope, rows, config.chunk_rank * module.d_head, blank)

    def runs(self, query: Tensor, new: Pair | None, call: Call) -> list[Run]:
        """Chunks of earlier calls, and those that end in this one, keys and values (B, H, N r, d_head)."""
        size = self.config.chunk_size
        numbers = call.once(("chunks", self.capacity), lambda: self._vectors(self.numbers(size, call)))
        key, value = (call.read(state).unflatten(3, (self.rank, -1)).flatten(2, 3) for state in self.own_states)
        old = self._run(query, (key, value), numbers, call, self.blank(numbers))
        if new is None:
            return [old]
        for state, vectors in zip(self.own_states, new, strict=True):
            call.write(state, vectors.unflatten(2, (-1, self.rank)).flatten(3))
        if call.single:
            return [old]
        ended = torch.arange(new[0].shape[2] // self.rank, device=query.device)
        return [old, self._run(query, new, self._vectors(call.rows_before(size)[:, None] + ended), call)]

    def _vectors(self, chunks: Tensor) -> Tensor:
        """Numbers of chunks (B, N) -> of their vectors (B, N r)."""
        return (chunks[..., None] * self.rank + torch.arange(self.rank, device=chunks.device)).flatten(1)

    def _run(self, query: Tensor, vectors: Pair, numbers: Tensor, call: Call, blank: Blank | None = None) -> Run:
        where = ("sight", self.past, self.own, blank is None)
        distance, hidden = call.once(where, lambda: self._sight(query.shape[2], numbers, call))
        return self.module.chunk_run(query, *vectors, distance, hidden, blank)

    def _sight(self, queries: int, numbers: Tensor, call: Call) -> Pair:
        """How far back vectors of these numbers are, and which are not seen: (B, T, N r) each."""
        config = self.config
        position = call.position[:, None, None] + torch.arange(queries, device=numbers.device)[:, None]
        block = position - position % config.tgt_len  # where it begins
        first = block - config.mem_len if self.past else block
        end = position if self.own else block
        number = numbers[:, None]
        hidden = (number < self._vectors_before(first)) | (number >= self._vectors_before(end))
        return self._vectors_before(position) - 1 - number, hidden

    def _vectors_before(self, position: Tensor) -> Tensor:
        """Vectors of the chunks before the one that a position is in."""
        return position // self.config.chunk_size * self.rank


class StreamLongShortAttention(StreamModule):
    def __init__(self, module: LongShortAttention, scope: Scope, before: Tensor) -> None:
        """`before` (1, 1, d) is the row that attention sees everywhere before the stream."""
        super().__init__()
        self.module, self.config = module, module.config
        size = self.config.chunk_size
        self.factors = (size,)
        self.rows = scope.state("rows", size, sum(_widths(self.config)), update="append")
        self.own_states = (self.rows,)
        key, value = module.key(before), module.value(before)
        in_window = (module.heads(module.window_norm(key)), module.heads(module.window_norm(value)))
        in_chunk = (module.heads(module.chunk_norm(key)), module.heads(module.chunk_norm(value)))
        one_form = self.config.project_first
        self.window = WindowMemory(module, scope, self.config.window_len - 1, module.d_head, in_window)
        self.cache = ChunkMemory(module, scope.child("cache"), in_chunk, past=True, own=one_form)
        self.block = None if one_form else ChunkMemory(module, scope.child("block"), in_chunk, past=False, own=True)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        module = self.module
        query, key, value = module.queries(x), module.key(x), module.value(x)
        projected, compressed = self._forms(x, key, value, call)
        new = (module.heads(module.window_norm(key)), module.heads(module.window_norm(value)))
        runs = self.window.runs(query, new, call) + self.cache.runs(query, compressed, call)
        if self.block is not None:
            runs += self.block.runs(query, projected, call)
        return module.merge(attend(runs))

    def _forms(self, x: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Pair | None, Pair | None]:
        """The chunks that end in this call, as their own block sees them, and as later ones do."""
        parts = [key, value, self.module.weigh(x), *([] if self.config.project_first else [x])]
        rows, size = torch.cat(parts, dim=-1), self.config.chunk_size
        call.write(self.rows, rows)
        if not call.due(size):
            return None, None
        if call.single:
            rows = torch.cat([call.read(self.rows)[:, : size - 1], rows], dim=1)
        key, value, weights, *rest = rows.split(_widths(self.config), dim=-1)
        projected = self.module.projected_first(key, value, weights)
        return projected, self.module.compressed_first(rest[0], weights) if rest else projected


def _widths(config: LongShortConfig) -> list[int]:
    """Of W_k x, W_v x and W_p x, and of x where chunks are compressed first."""
    return [config.d_model] * 2 + [config.n_head * config.chunk_rank] + [config.d_model] * (not config.project_first)


class StreamLongShortLayer(StreamModule):
    def __init__(self, layer: LongShortLayer, scope: Scope) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            zeros = layer.feed_forward_norm.weight.new_zeros(1, 1, layer.feed_forward_norm.weight.shape[0])
            before = layer.attention_input(zeros)
            self.attention = StreamLongShortAttention(layer.attention, scope, before)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        rows = self.layer.attention_input(x)
        return self.layer.finish(rows, self.attention(rows, call))


class StreamLongShort(Root):
    ticks = "end"

    def __init__(self, model: LongShortTransformer, scope: Scope) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList(scope.stream(layer, f"layer{i:02}") for i, layer in enumerate(model.layers))

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        x = self.model.embed(tokens)
        for layer in self.layers:
            x = layer(x, call)
        return self.model.head(x)


_CHUNKS = "a chunk never changes once its rows are there: compress it then, in the form of the block and of the cache"
RULES = (
    TypeRule("long-short", "embedding, streaming body, head", LongShortTransformer, StreamLongShort),
    TypeRule("window-and-chunks", _CHUNKS, LongShortLayer, StreamLongShortLayer),
)
