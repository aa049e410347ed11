"""Segatron-XL: rings of keys and values, and of the sentence and paragraph that each of them stands in.

Given                                              Becomes
  mems (B, M, d) a layer, c = [mems ; h]             states key, value (B, H, R, d_head), append: a ring of R rows
  mems_pst, the indices of remembered rows           state places (B, R, 2) int64, append, in the same order
  indices that preprocessing has counted             states place, ended (B, 2) int64, replace: counted in the graph
  frozen memory, where there is no same_length       R = M + T - 1 and a mask: rows before the segment, at most M back

R is w - 1 with `same_length` of w keys. Slot s of a ring holds the row that is (position - 1 - s) mod R + 1 before the
first query. Sentence and paragraph distances are differences of places. Exact because neither the keys of a row nor
its place ever change; what a token may see follows from `position` alone, so no graph closes a segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.relative import Keys, Sight, attend
from mscompile.models.segatron import Segatron, SegatronConfig, SegatronLayer, sight


def capacity(config: SegatronConfig) -> int:
    """Rows before its own that a token may see at most."""
    return config.mem_len - 1 if config.same_length else config.mem_len + config.tgt_len - 1


@dataclass(frozen=True)
class Sights:
    """How the rows of a call see remembered rows, and one another; `distances` (D,) are those of each table."""

    remembered: Sight
    new: Sight
    distances: Tensor


class RingLayer(StreamModule):
    def __init__(self, layer: SegatronLayer, scope: Scope) -> None:
        super().__init__()
        self.layer = layer
        attention = layer.attention
        shape = (attention.n_head, capacity(layer.config), attention.d_head)
        self.key = scope.state("key", *shape, update="append", time_axis=2)
        self.value = scope.state("value", *shape, update="append", time_axis=2)
        self.own_states = (self.key, self.value)

    def forward(self, h: Tensor, sights: Sights, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        attention, rows = self.layer.attention, self.layer.attention_input(h)
        query, key, value = (
            attention.heads(project(rows)) for project in (attention.query, attention.key, attention.value)
        )
        runs = [Keys(call.read(self.key), call.read(self.value), sights.remembered), Keys(key, value, sights.new)]
        call.write(self.key, key)
        call.write(self.value, value)
        table = attention.table(call.once("positions", lambda: attention.encode(sights.distances)))
        return self.layer.combine(h, attention.merge(attend(query, runs, table, self.layer.biases or call.biases)))


class StreamSegatron(Root):
    def __init__(self, model: Segatron, scope: Scope) -> None:
        super().__init__()
        self.model, self.biases, self.config = model, model.biases, model.config
        self.capacity = capacity(self.config)
        self.place = scope.state("place", 2, dtype=torch.int64)
        self.ended = scope.state("ended", 2, dtype=torch.int64)
        self.places = scope.state("places", self.capacity, 2, update="append", dtype=torch.int64)
        self.own_states = (self.place, self.ended, self.places)
        self.layers = nn.ModuleList(scope.stream(layer, f"layer{i:02}") for i, layer in enumerate(model.layers))

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        places, ends = self.model.boundaries(tokens, call.read(self.place), call.read(self.ended))
        sights = self.sights(call.read(self.places), places, call)
        call.write(self.place, places[:, -1])
        call.write(self.ended, ends[:, -1])
        call.write(self.places, places)
        h = self.model.embed(tokens)
        for layer in self.layers:
            h = layer(h, sights, call)
        return self.model.head(h)

    def sights(self, old: Tensor, new: Tensor, call: Call) -> Sights:
        """Places of remembered rows (B, R, 2) and of the call's (B, T, 2)."""
        size, before = self.capacity + 1, call.position[:, None]
        slots, rows = (torch.arange(places.shape[1], device=places.device) for places in (old, new))
        age = (before - 1 - slots) % self.capacity + 1  # (B, R), 1 is the newest
        reach = self.reach(before + rows)[:, :, None]
        index = rows[None, :, None] + age[:, None]  # (B, T, R)
        remembered = sight(index, (index < reach) & (age <= before)[:, None], new, old, size)
        index = (rows[:, None] - rows)[None]  # (1, T, T)
        visible = (index >= 0) & (index < reach)
        return Sights(
            remembered, sight(index, visible, new, new, size), self.config.geometry.distances(size, new.device)
        )

    def reach(self, position: Tensor) -> Tensor:
        """How many keys tokens at `position` (B, T) may see, their own included."""
        if self.config.same_length:
            return torch.full_like(position, self.config.mem_len)
        return self.config.mem_len + position % self.config.tgt_len + 1


RULES = (
    TypeRule("segatron-xl", "counts sentences and paragraphs, and remembers them row by row", Segatron, StreamSegatron),
    TypeRule("segatron-ring", "keys of seen rows never change: keep them in a ring", SegatronLayer, RingLayer),
)
