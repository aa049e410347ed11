"""Relative attention over everything seen so far: keys and values are kept, new rows are appended.

Given                                              Becomes
  k, v = W_k rows, W_v rows     (B, S, d)            k_new, v_new = W_k rows, W_v rows   (B, S_new, d)
  softmax over all S keys                            softmax over [remembered ; new] keys, scored apart
                                                     states key, value (B, H, capacity, d_head), append

Slot s of a state holds key row s, so n(i, s) and with it causality and distance follow from the geometry;
slots that were not written yet are masked. A call of many tokens is given only the slots that can have been
written, so that it costs what its context is worth. Position keys `W_r sinusoid(...)` depend on weights and the
capacity only. Exact because a row of keys never changes once its input row is final.

Refuses where no context length bounds the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.relative import Keys, RelativeAttention, Sight, attend


@dataclass(frozen=True)
class Cadence:
    """How fast rows come: a query row every `query` tokens, `keys` key rows together every `key` tokens."""

    query: int
    key: int
    keys: int = 1


class CachedAttention(StreamModule):
    def __init__(self, module: RelativeAttention, scope: Scope, cadence: Cadence) -> None:
        super().__init__()
        self.module, self.cadence = module, cadence
        self.capacity = scope.rows(cadence.key) * cadence.keys
        geometry = module.geometry
        last_query = (self.capacity * geometry.key_step - 1) // geometry.query_step
        self.table_size = geometry.table_size(last_query)
        shape = (module.n_head, self.capacity, module.d_head)
        self.key = scope.state("key", *shape, update="append", time_axis=2)
        self.value = scope.state("value", *shape, update="append", time_axis=2)
        self.own_states = (self.key, self.value)

    def forward(self, x: Tensor, rows: Tensor | None, call: Call) -> Tensor:
        """x (B, T, d) attends to the remembered key rows and to new `rows` (B, S, d), where there are any.

        New key rows begin where the queries of their call do: n of the first pair is the geometry's offset.
        """
        module, geometry = self.module, self.module.geometry
        where = (geometry, self.cadence)
        key, value = call.read(self.key), call.read(self.value)
        table_size = self._reach(x, key.shape[2], call)
        remembered = call.once(("remembered", where), lambda: self._remembered(x, key.shape[2], table_size, call))
        runs = [Keys(key, value, remembered)]
        if rows is not None:
            new_key, new_value = module.heads(module.key(rows)), module.heads(module.value(rows))
            call.write(self.key, new_key)
            call.write(self.value, new_value)
            runs.append(
                Keys(new_key, new_value, call.once(("new", where), lambda: self._new(x, rows, table_size, call)))
            )
        encoded = call.once(("positions", where), lambda: module.encode(geometry.distances(self.table_size, x.device)))
        table = module.table(encoded) if call.single else module.table(encoded)[:, :, :table_size]
        return module.merge(attend(module.heads(module.query(x)), runs, table, call.biases))

    def _reach(self, x: Tensor, slots: int, call: Call) -> int:
        """Entries of the table of positions that this call can look at."""
        if call.single:
            return self.table_size
        geometry = self.module.geometry
        return geometry.table_size(slots * geometry.key_step // geometry.query_step + x.shape[1] - 1)

    def _remembered(self, x: Tensor, capacity: int, table_size: int, call: Call) -> Sight:
        """The slots of the states: those that were written are seen by every query."""
        first_query = call.rows_before(self.cadence.query)
        count = call.rows_before(self.cadence.key) * self.cadence.keys
        queries = first_query[:, None] + torch.arange(x.shape[1], device=x.device)[None, :]
        slots = torch.arange(capacity, device=x.device)[None, None, :]
        index = self.module.geometry.index(queries[:, :, None], slots)
        return self._seen(index, slots < count[:, None, None], table_size)

    def _new(self, x: Tensor, rows: Tensor, table_size: int, call: Call) -> Sight:
        """The rows of this call. A single query sees all of them, each at a distance known beforehand."""
        if call.single:
            geometry, keys = self.module.geometry, torch.arange(rows.shape[1], device=x.device)
            assert geometry.offset >= geometry.key_step * (rows.shape[1] - 1), "no row comes later than the query"
            return Sight(geometry.index(torch.zeros_like(keys), keys), None)
        queries = torch.arange(x.shape[1], device=x.device)[:, None]
        index = self.module.geometry.index(queries, torch.arange(rows.shape[1], device=x.device)[None, :])[None]
        return self._seen(index, self.module.geometry.visible(index), table_size)

    def _seen(self, index: Tensor, visible: Tensor, table_size: int) -> Sight:
        """Entries behind the whole table belong to hidden keys, as those behind its part for this call do."""
        return Sight.of(index.clamp(max=self.table_size - 1), visible, table_size)


def _build(module: RelativeAttention, scope: Scope) -> StreamModule:
    return CachedAttention(module, scope, Cadence(scope.factor, scope.factor))


RULE = TypeRule(
    name="cached-attention",
    why="keys and values of seen rows never change: keep them, append the new ones",
    type=RelativeAttention,
    build=_build,
    condition=lambda module: module.geometry.window is None,
)
