"""Relative attention over everything seen so far: keys and values are kept, new rows are appended.

Given                                              Becomes
  k, v = W_k rows, W_v rows     (B, S, d)            k_new, v_new = W_k rows, W_v rows   (B, S_new, d)
  softmax over all S keys                            softmax over [remembered ; new] keys, scored apart
                                                     states key, value (B, H, capacity, d_head), append

Slot s of a state holds key row s, so n(i, s) and with it causality and distance follow from the geometry;
slots that were not written yet are masked. Position keys `W_r sinusoid(...)` depend on weights and the
capacity only. Exact because a row of keys never changes once its input row is final.

Refuses where no context length bounds the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.relative import Keys, RelativeAttention, attend


class CachedAttention(StreamModule):
    def __init__(self, module: RelativeAttention, scope: Scope, rows: int) -> None:
        super().__init__()
        self.module = module
        self.capacity = rows
        geometry = module.geometry
        last_query = (rows * geometry.key_step - 1) // geometry.query_step
        self.table_size = geometry.table_size(last_query)
        shape = (module.n_head, rows, module.d_head)
        self.key = scope.state("key", *shape, update="append", time_axis=2)
        self.value = scope.state("value", *shape, update="append", time_axis=2)
        self.own_states = (self.key, self.value)

    def forward(self, x: Tensor, rows: Tensor | None, call: Call, first_query: Tensor, first_key: Tensor) -> Tensor:
        """x (B, T, d) attends to the remembered key rows and to `rows` (B, S_new, d), where there are any.

        `first_query` (B,) numbers the first query row, `first_key` the first new key row, which is also how
        many are remembered. New rows begin where queries do: n(first_query, first_key) = offset.
        """
        module, geometry = self.module, self.module.geometry
        queries = torch.arange(x.shape[1], device=x.device)
        slots = torch.arange(self.capacity, device=x.device)
        index = geometry.index((first_query[:, None] + queries[None, :])[:, :, None], slots[None, None, :])
        written = slots[None, None, :] < first_key[:, None, None]
        runs = [Keys(call.read(self.key), call.read(self.value), index, written)]
        if rows is not None:
            key, value = module.heads(module.key(rows)), module.heads(module.value(rows))
            call.write(self.key, key)
            call.write(self.value, value)
            new = geometry.index(queries[:, None], torch.arange(rows.shape[1], device=x.device)[None, :])[None]
            runs.append(Keys(key, value, new, geometry.visible(new)))
        table = module.table(geometry.distances(self.table_size, x.device))
        return module.merge(attend(module.heads(module.query(x)), runs, table, call.biases))


def _build(module: RelativeAttention, scope: Scope) -> StreamModule:
    return CachedAttention(module, scope, scope.rows(scope.factor))


RULE = TypeRule(
    name="cached-attention",
    why="keys and values of seen rows never change: keep them, append the new ones",
    type=RelativeAttention,
    build=_build,
    condition=lambda module: module.geometry.window is None,
)
