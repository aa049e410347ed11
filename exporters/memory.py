"""The segment-recurrent memory of Transformer-XL, in its two exact streaming forms.

Case 1, rolling (`same_length`, window w): every token sees exactly w keys, so memory may roll with every call.

Given                                              Becomes
  c = [mems ; h]     mems (B, <= M, d)               c = [mems ; h]   state mems (B, w - 1, d), replace
  new mems = c[-M:] after each segment               mems.out = c[-(w - 1):] after each call

Case 2, segment (no `same_length`): a token sees its own segment and the M rows before it, so memory is frozen
within a segment of T tokens. (Rolling it token by token is a different model.)

  c = [mems ; segment ; h]   states mems (B, M, d), replace; segment (B, T, d), append
  at the end of a segment, graph `close`: mems.out = [mems ; segment][-M:]

The published memory starts empty and grows; here it has full size from the start and unfilled rows are masked,
unless the layer attends to them as zeros (`attends_empty`), which is what the states begin with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.relative import Keys, Sight, attend
from mscompile.models.transformer_xl import TransformerXLLayer


class _RecurrentLayer(StreamModule):
    def __init__(self, layer: TransformerXLLayer) -> None:
        super().__init__()
        self.layer = layer

    def attend(self, h: Tensor, rows: Tensor, sight: Sight, distances: Tensor, call: Call) -> Tensor:
        """The layer's output for the last of `rows`, which are those of h, ready for the projections."""
        attention = self.layer.attention
        query = attention.heads(attention.query(rows[:, rows.shape[1] - h.shape[1] :]))
        keys = Keys(attention.heads(attention.key(rows)), attention.heads(attention.value(rows)), sight)
        table = attention.table(call.once("positions", lambda: attention.encode(distances)))
        biases = self.layer.biases or call.biases
        return self.layer.combine(h, attention.merge(attend(query, [keys], table, biases)))


class RollingLayer(_RecurrentLayer):
    def __init__(self, layer: TransformerXLLayer, scope: Scope) -> None:
        super().__init__(layer)
        window = layer.attention.geometry.window
        assert window is not None
        self.window = window
        self.mems = scope.state("mems", window - 1, layer.d_model)
        self.own_states = (self.mems,)

    def forward(self, h: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        remembered = self.window - 1
        context = torch.cat([call.read(self.mems), h], dim=1)
        call.write(self.mems, context[:, -remembered:])
        sight, distances = call.once("sight", lambda: self._sight(h, call))
        return self.attend(h, self.layer.attention_input(context), sight, distances, call)

    def _sight(self, h: Tensor, call: Call) -> tuple[Sight, Tensor]:
        """How h sees [mems ; h], and the distances in the table of positions."""
        remembered, geometry = self.window - 1, self.layer.attention.geometry
        queries = torch.arange(h.shape[1], device=h.device)[:, None] + remembered
        keys = torch.arange(remembered + h.shape[1], device=h.device)[None, :]
        index = geometry.index(queries, keys)[None]
        visible = geometry.visible(index)
        if not self.layer.attends_empty:
            visible = visible & (keys >= remembered - call.position[:, None])[:, None, :]
        distances = geometry.distances(self.window, h.device)
        if call.single:  # one query sees one distance a key: a table in the order of the keys needs no shift
            return Sight(None, ~visible[:, None]), distances[index[0, 0]]
        return Sight.of(index, visible, self.window), distances


class SegmentLayer(_RecurrentLayer):
    def __init__(self, layer: TransformerXLLayer, scope: Scope) -> None:
        super().__init__(layer)
        self.mem_len, self.tgt_len = layer.mem_len, layer.tgt_len
        self.mems = scope.state("mems", self.mem_len, layer.d_model)
        self.segment = scope.state("segment", self.tgt_len, layer.d_model, update="append")
        self.own_states = (self.mems, self.segment)

    def forward(self, h: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        rows = self.layer.context(call.read(self.mems), call.read(self.segment), h)
        call.write(self.segment, h)
        sight, distances = call.once("sight", lambda: self._sight(h, call))
        return self.attend(h, rows, sight, distances, call)

    def _sight(self, h: Tensor, call: Call) -> tuple[Sight, Tensor]:
        """How h sees [mems ; segment ; h], and the distances in the table of positions."""
        phase = (call.position % self.tgt_len)[:, None]  # tokens of this segment before the call, (B, 1)
        new = torch.arange(h.shape[1], device=h.device)
        old = torch.arange(self.mem_len + self.tgt_len, device=h.device)
        # Rows are numbered from the first remembered one: mems, then this segment's, then h.
        keys = torch.cat([old[None, :].expand(phase.shape[0], -1), self.mem_len + phase + new[None, :]], dim=1)
        queries = (self.mem_len + phase + new[None, :])[:, :, None]  # (B, T, 1)
        filled = old < self.mem_len + phase
        if not self.layer.attends_empty:
            filled = filled & (old >= self.mem_len - (call.position[:, None] - phase))
        written = torch.cat([filled, (new >= 0)[None, :].expand(phase.shape[0], -1)], dim=1)
        geometry, reach = self.layer.attention.geometry, self.mem_len + self.tgt_len
        index = geometry.index(queries, keys[:, None, :])
        visible = geometry.visible(index) & written[:, None, :]
        entries = self.layer.entries(index, keys[:, None, :])
        return Sight.of(entries, visible, reach), geometry.distances(reach, h.device)

    def close(self, call: Call) -> None:
        """End a segment of tgt_len tokens."""
        rows = torch.cat([call.read(self.mems), call.read(self.segment)], dim=1)
        call.write(self.mems, rows[:, -self.mem_len :])


ROLLING = TypeRule(
    name="rolling-memory",
    why="with same_length every token sees the same number of keys, so memory may roll with every call",
    type=TransformerXLLayer,
    build=RollingLayer,
    condition=lambda layer: layer.rolls,
)
SEGMENT = TypeRule(
    name="segment-memory",
    why="without same_length a token sees its segment and the memory before it: memory is frozen within a segment",
    type=TransformerXLLayer,
    build=SegmentLayer,
)
