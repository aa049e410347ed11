"""Recurrent Memory Transformer around a decoder: causal everywhere, positions count every row of the segment.

read rows      at 0 .. n - 1            see the read rows up to their own
token p        at n + p                 sees all read rows and the tokens up to its own
write rows     at n + T .. 2n + T - 1   see read rows, tokens and the write rows up to their own
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from exporters.memory_rows import SegmentCache, SegmentLayer, SegmentRoot, phase, unwritten
from exporters.stream import Call, Scope, TypeRule
from mscompile.models.attention import Attention, Block, Run, attend, later, row_numbers
from mscompile.models.recurrent_memory_wrapper import RecurrentMemoryWrapper


class WrapperLayer(SegmentLayer):
    """`first` (1, n, d) are the first segment's read rows as they enter this layer."""

    def __init__(self, block: Block, first: Tensor, segment: int, scope: Scope) -> None:
        super().__init__()
        self.block, self.segment = block, segment
        self.cache = SegmentCache(*self.open(first)[1:], segment, scope)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        query, key, value = self._projected(x)
        self.cache.append(key, value, call)
        before = Run(*self.cache.tokens(call), unwritten(self.segment, call))
        new = Run(key, value, None if call.single else later(x.shape[1], device=x.device))
        return self._finished(x, query, [Run(*self.cache.read_rows(call)), before, new])

    def write(self, x: Tensor, call: Call) -> Tensor:
        query, key, value = self._projected(x)
        seen = [Run(*self.cache.read_rows(call)), Run(*self.cache.tokens(call))]
        return self._finished(x, query, [*seen, self._causal(key, value)])

    def open(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._projected(x)
        return self._finished(x, query, [self._causal(key, value)]), key, value

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, S, d_h) each."""
        attention: Attention = self.block.attention
        rows = self.block.attention_norm(x)
        return attention.queries(rows, row_numbers(rows)), *attention.keys(rows, row_numbers(rows))

    def _causal(self, key: Tensor, value: Tensor) -> Run:
        return Run(key, value, later(key.shape[2], device=key.device))

    def _finished(self, x: Tensor, query: Tensor, runs: list[Run]) -> Tensor:
        return self.block.finish(x, self.block.attention.merge(attend(query, runs)))


class StreamRecurrentMemoryWrapper(SegmentRoot):
    @torch.no_grad()
    def __init__(self, model: RecurrentMemoryWrapper, scope: Scope) -> None:
        super().__init__(model.memory, model.segment, scope)
        self.model = model
        self.layers = nn.ModuleList()
        rows = self.read_rows(model.memory[None])
        for i, block in enumerate(cast(Iterable[Block], model.stack.blocks)):
            layer = WrapperLayer(block, rows, model.segment, scope.child(f"layer{i:02}"))
            self.layers.append(layer)
            rows, _, _ = layer.open(rows)

    def token_rows(self, tokens: Tensor, call: Call) -> Tensor:
        before = self.model.config.num_mem_tokens + phase(self.model.segment, call)[:, None]
        positions = before + torch.arange(tokens.shape[1], device=tokens.device)[None]
        return self.model.placed(self.model.embedding(tokens), positions)

    def read_rows(self, memory: Tensor) -> Tensor:
        return self.model.placed(memory, row_numbers(memory))

    def write_rows(self, call: Call) -> Tensor:
        memory, before = self.remembered(call), self.model.config.num_mem_tokens + self.model.segment
        return self.model.placed(memory, before + row_numbers(memory))

    def finish(self, rows: Tensor) -> Tensor:
        return self.model.norm(rows)

    def logits(self, rows: Tensor) -> Tensor:
        return self.model.logits(rows)


RULES = (
    TypeRule(
        "recurrent-memory-wrapper",
        "tokens never see write rows: memory is written at the end of each segment",
        RecurrentMemoryWrapper,
        StreamRecurrentMemoryWrapper,
    ),
)
