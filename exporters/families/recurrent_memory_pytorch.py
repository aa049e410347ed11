"""Recurrent Memory Transformer of recurrent-memory-transformer-pytorch: memory rows see each other both ways.

    read rows      see the null key and all read rows
    token p        sees the null key, all read rows and the tokens up to its own
    write rows     see everything

Read rows, tokens and write rows carry the first layer's values beside their streams, row by row, so that values
can be kept after they are mixed. Without `always_have_read_memories` the first segment hides the read rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from exporters.memory_rows import SegmentCache, SegmentLayer, SegmentRoot, in_first_segment, phase, unwritten
from exporters.stream import Call, Scope, TypeRule
from mscompile.models.attention import Run, later
from mscompile.models.recurrent_memory_pytorch import (
    FIRST_TOKEN,
    RecurrentMemoryPytorch,
    RecurrentMemoryPytorchLayer,
    Rows,
    Turn,
)
from mscompile.models.recurrent_memory_segments import repeated


class StreamRecurrentMemoryPytorchLayer(SegmentLayer):
    """`first` are the first segment's read rows as they enter this layer."""

    def __init__(
        self, layer: RecurrentMemoryPytorchLayer, model: RecurrentMemoryPytorch, first: Rows, scope: Scope
    ) -> None:
        super().__init__()
        self.layer, self.model, self.segment = layer, model, model.segment
        self.null = layer.null(model.turn(torch.full((1, 1), FIRST_TOKEN - 1)))
        self.turns = model.turn(FIRST_TOKEN + torch.arange(self.segment)[None])  # one for each token of a segment
        self.cache = SegmentCache(*self.open(first)[1:], self.segment, scope)

    def forward(self, rows: Rows, call: Call) -> Rows:
        count = rows.streams.shape[1]
        made = self.layer.project(rows, call.once("turn", lambda: self._turn(count, call)))
        self.cache.append(made.key, made.value, call)
        before = Run(*self.cache.tokens(call), unwritten(self.segment, call))
        new = Run(made.key, made.value, None if call.single else later(count, device=made.key.device))
        return self.layer.finish(made, [self.null, self._read(call), before, new])

    def write(self, rows: Rows, call: Call) -> Rows:
        made = self.layer.project(rows, None)
        seen = [self.null, self._read(call), Run(*self.cache.tokens(call))]
        return self.layer.finish(made, [*seen, Run(made.key, made.value)])

    def open(self, rows: Rows) -> tuple[Rows, Tensor, Tensor]:
        made = self.layer.project(rows, None)
        return self.layer.finish(made, [self.null, Run(made.key, made.value)]), made.key, made.value

    def _turn(self, count: int, call: Call) -> Turn | None:
        if self.turns is None:
            return None
        tokens = phase(self.segment, call)[:, None] + torch.arange(count, device=call.position.device)[None]
        cos, sin = (nn.functional.embedding(tokens, table[0]) for table in (self.turns.cos, self.turns.sin))
        return Turn(cos, sin)

    def _read(self, call: Call) -> Run:
        if self.model.config.always_have_read_memories:
            return Run(*self.cache.read_rows(call))
        return Run(*self.cache.read_rows(call), in_first_segment(self.segment, call)[:, None, None, None])


class StreamRecurrentMemoryPytorch(SegmentRoot):
    @torch.no_grad()
    def __init__(self, model: RecurrentMemoryPytorch, scope: Scope) -> None:
        super().__init__(torch.zeros_like(model.read_memory), model.segment, scope)
        self.model = model
        self.layers = nn.ModuleList()
        rows = self.read_rows(self.first_memory[None])
        for i, module in enumerate(cast(Iterable[RecurrentMemoryPytorchLayer], model.layers)):
            layer = StreamRecurrentMemoryPytorchLayer(module, model, rows, scope.child(f"layer{i:02}"))
            self.layers.append(layer)
            rows, _, _ = layer.open(rows)

    def token_rows(self, tokens: Tensor, call: Call) -> Rows:
        new = torch.arange(tokens.shape[1], device=tokens.device)
        return self.model.spread(self.model.embed(tokens, phase(self.model.segment, call)[:, None] + new[None]))

    def read_rows(self, memory: Tensor) -> Rows:
        return self.model.spread(self.model.read_rows(memory))

    def write_rows(self, call: Call) -> Rows:
        if self.model.config.add_write_to_next_write_mem:
            return self.model.spread(self.model.write_rows(self.remembered(call)))
        return self.model.spread(repeated(self.model.write_memory, call.position.shape[0]))

    def finish(self, rows: Rows) -> Tensor:
        return self.model.finish(rows)

    def logits(self, rows: Tensor) -> Tensor:
        return self.model.output(rows)


RULES = (
    TypeRule(
        "recurrent-memory-pytorch",
        "tokens never see write rows: memory is written at the end of each segment",
        RecurrentMemoryPytorch,
        StreamRecurrentMemoryPytorch,
    ),
)
