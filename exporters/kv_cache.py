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


class KeyCache(StreamModule):
    """Keys and values of `n_head` heads that see `window` rows, their own included; None is all."""

    def __init__(self, n_head: int, d_head: int, window: int | None, scope: Scope) -> None:
        super().__init__()
        self.window, self.factor = window, scope.factor
        self.capacity = scope.rows(scope.factor) if window is None else window - 1
        if self.capacity:
            self.key = scope.state("key", n_head, self.capacity, d_head, update="append", time_axis=2)
            self.value = scope.state("value", n_head, self.capacity, d_head, update="append", time_axis=2)
            self.own_states = (self.key, self.value)

    def runs(self, key: Tensor, value: Tensor, call: Call) -> list[Run]:
        """Remembered keys, and the new ones (B, H, T, d_head), which are remembered from now on."""
        remembered = self.remembered(key.shape[2], call)
        self.remember(key, value, call)
        causal = None if call.single else later(key.shape[2], self.window, key.device)
        return [*remembered, Run(key, value, causal)]

    def remembered(self, queries: int, call: Call) -> list[Run]:
        """The keys of rows before this call, as the rows of this call see them; none where `window` is 1."""
        if not self.capacity:
            return []
        key = call.read(self.key)
        where = ("remembered", self.factor, self.capacity, self.window, str(queries))  # symbols have no hash
        hidden = call.once(where, lambda: self._hidden(key.shape[2], queries, call))
        return [Run(key, call.read(self.value), hidden)]

    def remember(self, key: Tensor, value: Tensor, call: Call) -> None:
        if self.capacity:
            call.write(self.key, key)
            call.write(self.value, value)

    def _hidden(self, slots: int, queries: int, call: Call) -> Tensor:
        """What queries do not see of the slots, (B, 1, T or 1, slots)."""
        before = call.rows_before(self.factor)[:, None]  # (B, 1)
        slot = torch.arange(slots, device=before.device)[None]
        if self.window is None:
            return (slot >= before)[:, None, None]
        age = (before - 1 - slot) % self.capacity + 1  # rows back from the first query, 1 is the newest
        ages = age[:, None, :] + torch.arange(queries, device=before.device)[None, :, None]
        return ((ages >= self.window) | (age > before)[:, None, :])[:, None]


class CachedSelfAttention(KeyCache):
    def __init__(self, module: Attention, scope: Scope) -> None:
        super().__init__(module.n_kv_head, module.d_head, module.window, scope)
        self.module = module

    def forward(self, rows: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d), each row attending to those before it and to itself."""
        numbers = numbered(rows, self.factor, call)
        key, value = self.module.keys(rows, numbers)
        return self.module.merge(attend(self.module.queries(rows, numbers), self.runs(key, value, call)))


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
