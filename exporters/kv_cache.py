"""Plain causal self-attention: keys and values are kept, new rows are appended.

Given                                              Becomes
  softmax over the rows up to this one               softmax over [remembered ; new] keys, scored apart
  k, v = W_k rows, W_v rows     (B, H, S, d_head)    states key, value (B, H, capacity, d_head), append
  a window of w rows                                 capacity w - 1, as a ring; slots are aged by `position`

Exact because a row of keys never changes once its input row is final; rotary keys are turned by their own row
number. Without a window no row may be lost: refuses where no context length bounds the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.attention import Attention, Block, Run, Stack, attend, later


class CachedSelfAttention(StreamModule):
    def __init__(self, module: Attention, scope: Scope) -> None:
        super().__init__()
        self.module, self.factor = module, scope.factor
        self.capacity = scope.rows(scope.factor) if module.window is None else module.window - 1
        shape = (module.n_head, self.capacity, module.d_head)
        if self.capacity:
            self.key = scope.state("key", *shape, update="append", time_axis=2)
            self.value = scope.state("value", *shape, update="append", time_axis=2)
            self.own_states = (self.key, self.value)

    def forward(self, rows: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d), each row attending to those before it and to itself."""
        numbers = numbered(rows, self.factor, call)
        key, value = self.module.keys(rows, numbers)
        return self.module.merge(attend(self.module.queries(rows, numbers), self.runs(key, value, call)))

    def runs(self, key: Tensor, value: Tensor, call: Call) -> list[Run]:
        """Remembered keys, and the new ones (B, H, T, d_head), which are remembered from now on."""
        count, window = key.shape[2], self.module.window
        causal = None if call.single else later(count, window, key.device)
        new = [Run(key, value, causal)]
        if not self.capacity:
            return new
        remembered = call.read(self.key)
        call.write(self.key, key)
        call.write(self.value, value)
        where = ("remembered", self.factor, self.capacity, window, count)
        hidden = call.once(where, lambda: self._hidden(remembered.shape[2], count, call))
        return [Run(remembered, call.read(self.value), hidden), *new]

    def _hidden(self, slots: int, queries: int, call: Call) -> Tensor:
        """What queries do not see of the slots, (B, 1, T or 1, slots)."""
        before = call.rows_before(self.factor)[:, None]  # (B, 1)
        slot = torch.arange(slots, device=before.device)[None]
        if self.module.window is None:
            return (slot >= before)[:, None, None]
        age = (before - 1 - slot) % self.capacity + 1  # rows back from the first query, 1 is the newest
        ages = age[:, None, :] + torch.arange(queries, device=before.device)[None, :, None]
        return ((ages >= self.module.window) | (age > before)[:, None, :])[:, None]


def numbered(rows: Tensor, factor: int, call: Call) -> Tensor:
    """Row numbers (B, T) of the rows of a call, at a scale."""
    new = torch.arange(rows.shape[1], device=rows.device)
    return call.rows_before(factor)[:, None] + new[None]


class StreamBlock(StreamModule):
    def __init__(self, block: Block, scope: Scope) -> None:
        super().__init__()
        self.block = block
        self.attention = scope.stream(block.attention, "attention")

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.block.finish(x, self.attention(self.block.attention_norm(x), call))


class StreamStack(StreamModule):
    def __init__(self, stack: Stack, scope: Scope) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(scope.stream(block, f"block{i:02}") for i, block in enumerate(stack.blocks))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        for block in self.blocks:
            x = block(x, call)
        return x


_KEPT = "keys of seen rows never change: keep them, append the new ones"
_WHY = "composes the streaming forms of its parts"
RULES = (
    TypeRule("kv-cache", _KEPT, Attention, CachedSelfAttention),
    TypeRule("transformer-block", _WHY, Block, StreamBlock),
    TypeRule("transformer-stack", _WHY, Stack, StreamStack),
)
