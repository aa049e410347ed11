"""Hourglass shortening: k fine rows become one coarse row, when the group is complete.

Given                                              Becomes
  rows = ShiftRight(x, k - 1)      (B, G k, d)       state rows (B, k - 1, d), replace: the last k - 1 fine rows
  pooled = average | linear        (B, G, d)         pooled at a tick only: fine row number n = 0 mod k
  refined by attention over rows                     keys and values of k rows appended at each tick

The shift makes group g end with fine row g k, so a coarse row is due exactly when n = 0 mod k, and the zeros
that the shift brings in are the state's initial value: they are averaged and attended to, as published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.attention import CachedAttention, Cadence
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.hourglass import Shortening


class StreamShortening(StreamModule):
    def __init__(self, module: Shortening, scope: Scope) -> None:
        super().__init__()
        self.module = module
        self.group = module.group
        self.coarse_factor = scope.factor * module.group
        self.recent = scope.state("rows", self.group - 1, module.d_model)
        self.own_states = (self.recent,)
        self.attention: CachedAttention | None = None
        if module.refinement is not None:
            cadence = Cadence(self.coarse_factor, self.coarse_factor, self.group)
            self.attention = CachedAttention(module.refinement.attention, scope, cadence)

    def forward(self, x: Tensor, call: Call) -> Tensor | None:
        """Fine rows (B, T, d) -> the coarse rows that begin in this call (B, G, d), None where none is due."""
        history = torch.cat([call.read(self.recent), x], dim=1)
        call.write(self.recent, history[:, -(self.group - 1) :])
        if not call.due(self.coarse_factor):
            return None
        shifted = history if call.single else history[:, : x.shape[1]]
        if self.attention is None or self.module.refinement is None:
            return self.module.pooling(shifted)
        rows = self.module.rows_norm(shifted)
        query = self.module.pooled_norm(self.module.pooling(rows))
        return self.module.refinement.finish(query, self.attention(query, rows, call))


RULE = TypeRule(
    name="shortening",
    why="a coarse row is final once its group is complete: pool then, and only then",
    type=Shortening,
    build=StreamShortening,
)
