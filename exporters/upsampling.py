"""Hourglass upsampling: every fine row uses the newest coarse row, which changes once every k fine rows.

Given                                              Becomes
  expand(coarse)      (B, G, d) -> (B, G k, d)       state expansion (B, k, d), replace: the newest coarse row,
                                                     expanded at its tick; row n takes slot n mod k
                                                     (repeat: one slot, (B, 1, d))
  refined by attention over coarse rows              keys and values of coarse rows appended at each tick
"""

from __future__ import annotations

from torch import Tensor

from exporters.attention import CachedAttention, Cadence
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.hourglass import RepeatExpansion, Upsampling


class StreamUpsampling(StreamModule):
    def __init__(self, module: Upsampling, scope: Scope) -> None:
        super().__init__()
        self.module = module
        self.factor, self.group = scope.factor, module.expansion.group
        self.coarse_factor = self.factor * self.group
        self.slots = 1 if isinstance(module.expansion, RepeatExpansion) else self.group
        self.expansion = scope.state("expansion", self.slots, module.d_model)
        self.own_states = (self.expansion,)
        self.attention: CachedAttention | None = None
        if module.refinement is not None:
            cadence = Cadence(self.factor, self.coarse_factor)
            self.attention = CachedAttention(module.refinement.attention, scope, cadence)

    def forward(self, coarse: Tensor | None, x: Tensor, call: Call) -> Tensor:
        """New coarse rows (B, G, d), None where none is due, and fine rows (B, T, d) -> (B, T, d)."""
        refinement = self.module.refinement
        rows = coarse if coarse is None or refinement is None else self.module.rows_norm(coarse)
        expanded = self._expanded(rows, call)
        if refinement is None or self.attention is None:
            return expanded
        query = self.module.expanded_norm(expanded) + x
        return refinement.finish(query, self.attention(query, rows, call))

    def _expanded(self, rows: Tensor | None, call: Call) -> Tensor:
        if rows is not None:
            expanded = self.module.expansion(rows)  # (B, G, k, d)
            call.write(self.expansion, expanded[:, -1, : self.slots])
            return expanded[:, 0, :1] if call.single else expanded.flatten(1, 2)
        newest = call.read(self.expansion)
        if self.slots == 1:
            return newest
        slot = (call.rows_before(self.factor) % self.group)[:, None, None]
        return newest.gather(1, slot.expand(-1, 1, newest.shape[2]))


RULE = TypeRule(
    name="upsampling",
    why="the newest coarse row serves k fine rows: expand it at its tick and keep it",
    type=Upsampling,
    build=StreamUpsampling,
)
