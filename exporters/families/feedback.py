"""Feedback Transformer: one token a call, since each needs the highest layer's output of the one before.

Given                                              Becomes
  m_t of the last S steps        (B, S, d)           its keys and values   (B, H, S, d_head), append, as a ring
  k, v = W_k n(m), W_v n(m)                          made once a step, for every layer (or once, with `share_kv`)
  zeros before the first step, attended to           slots not written yet count as k_0 = W_k n(0), v_0 = W_v n(0)

Exact because the keys of a memory never change. Slots are aged by `position`. What a new stream attends to is the
same in every slot: one score and one value stand for all of them, and the slots may hold anything. A layer whose
heads have all learned to see less than S steps keeps no more than these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.feedback import FeedbackLayer, FeedbackTransformer, Reader, Remembered, weights


@dataclass(frozen=True)
class Ring:
    """What a reader remembers at a call, slot by slot: key, value (B, H, S, d_head), age (B, S), 1 the newest."""

    key: Tensor
    value: Tensor
    age: Tensor
    written: Tensor  # (B, 1, 1, S)
    blank: Remembered  # of what was before the stream, (1, H, 1, d_head)


class StreamReader(StreamModule):
    def __init__(self, reader: Reader, scope: Scope, d_model: int, d_head: int, reach: int) -> None:
        super().__init__()
        self.reader, self.d_model, self.reach = reader, d_model, reach
        self.key = scope.state("key", reader.n_head, reach, d_head, update="append", time_axis=2)
        self.value = scope.state("value", reader.n_head, reach, d_head, update="append", time_axis=2)
        self.own_states = (self.key, self.value)

    def ring(self, call: Call) -> Ring:
        key = call.read(self.key)
        age, written = call.once(("ages", self.reach), lambda: self._ages(call))
        blank: Remembered = self.reader(key.new_zeros(1, 1, self.d_model))
        return Ring(key, call.read(self.value), age, written, blank)

    def _ages(self, call: Call) -> tuple[Tensor, Tensor]:
        before = call.position[:, None]
        age = (before - 1 - torch.arange(self.reach, device=before.device)[None]) % self.reach + 1
        return age, (age <= before)[:, None, None]

    def remember(self, memory: Tensor, call: Call) -> None:
        """Memory (B, 1, d_model) of this step."""
        key, value = self.reader(memory)
        call.write(self.key, key)
        call.write(self.value, value)


class StreamFeedbackLayer(StreamModule):
    def __init__(self, layer: FeedbackLayer) -> None:
        super().__init__()
        self.layer, self.reach = layer, layer.reach

    def forward(self, h: Tensor, reader: Reader, ring: Ring, table: Tensor) -> Tensor:
        """(B, 1, d_model) -> (B, 1, d_model)."""
        query, slots = self.layer.queries(h, reader), ring.key.shape[2]
        place = (slots - ring.age)[:, None, None].expand(-1, query.shape[1], 1, -1)
        by_place = (query @ table[-slots:].T).gather(3, place)
        by_content = query @ ring.key.transpose(-1, -2)
        scores = torch.where(ring.written, by_content, query @ ring.blank.key.transpose(-1, -2)) + by_place
        if slots > self.reach:  # another layer of this reader sees farther
            scores = scores.masked_fill((ring.age > self.reach)[:, None, None], torch.finfo(scores.dtype).min)
        weight = weights(scores, self.layer.span(ring.age))
        seen = weight.masked_fill(~ring.written, 0.0)
        blank = (weight - seen).sum(dim=-1, keepdim=True)
        return self.layer.finish(h, seen @ ring.value + blank * ring.blank.value)


class StreamFeedback(Root):
    parallel = False

    def __init__(self, model: FeedbackTransformer, scope: Scope) -> None:
        super().__init__()
        self.model, config = model, model.config
        layers = cast(Iterable[FeedbackLayer], model.layers)
        self.layers = nn.ModuleList(StreamFeedbackLayer(layer) for layer in layers)
        self.readers = nn.ModuleList(
            StreamReader(reader, scope.child(f"memory{i:02}"), config.d_model, config.head_width, model.reach(i))
            for i, reader in enumerate(cast(Iterable[Reader], model.readers))
        )

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        model, readers = self.model, cast(Sequence[StreamReader], self.readers)
        rings = [reader.ring(call) for reader in readers]
        outputs = [model.embedding(tokens)]
        for number, layer in enumerate(self.layers):
            which = model.reader(number)
            outputs.append(layer(outputs[-1], readers[which].reader, rings[which], model.position_table))
        memory = model.merged(outputs)
        for reader in readers:
            reader.remember(memory, call)
        return model.head(model.norm(outputs[-1]))


RULES = (
    TypeRule(
        "feedback",
        "the memory of a step never changes: every layer keeps its keys and values of it",
        FeedbackTransformer,
        StreamFeedback,
    ),
)
