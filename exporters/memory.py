"""The segment-recurrent memory of Transformer-XL, in its two exact streaming forms.

Case 1, rolling (`same_length`, window w): every token sees exactly w keys, so memory may roll with every call.

Given                                              Becomes
  c = [mems ; h]     mems (B, <= M, d)               c = [mems ; h]   state mems (B, w - 1, d), replace
  new mems = c[-M:] after each segment               mems.out = c[-(w - 1):] after each call

Case 2, segment (no `same_length`): a token sees its own segment and the M rows before it, so memory is frozen
within a segment of T tokens. (Rolling it token by token is a different model.)

  c = [mems ; segment ; h]   states mems (B, M, d), replace; segment (B, T, d), append
  at the end of a segment, graph `close`: mems.out = [mems ; segment][-M:]

The published memory starts empty and grows; here it has full size from the start and unfilled rows are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.relative import Keys, attend
from mscompile.models.transformer_xl import TransformerXLLayer


class _RecurrentLayer(StreamModule):
    def __init__(self, layer: TransformerXLLayer) -> None:
        super().__init__()
        self.layer = layer

    def attend(self, h: Tensor, context: Tensor, index: Tensor, visible: Tensor, reach: int, call: Call) -> Tensor:
        """The layer's output for the last rows of `context`, which are those of h."""
        attention = self.layer.attention
        distances = attention.geometry.distances(reach, h.device)
        rows = self.layer.attention_input(context)
        key, value = attention.heads(attention.key(rows)), attention.heads(attention.value(rows))
        query = attention.heads(attention.query(rows[:, context.shape[1] - h.shape[1] :]))
        if call.single and index.shape[0] == 1:  # one query sees one distance a key: no shift is needed
            table = attention.table(distances[index[0, 0].clamp(0, reach - 1)])
            keys = Keys(key, value, None, visible)
        else:
            table, keys = attention.table(distances), Keys(key, value, index, visible)
        return self.layer.combine(h, attention.merge(attend(query, [keys], table, call.biases)))


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
        queries = torch.arange(h.shape[1], device=h.device)[:, None] + remembered
        keys = torch.arange(context.shape[1], device=h.device)
        geometry = self.layer.attention.geometry
        index = geometry.index(queries, keys[None, :])[None]
        filled = keys[None, :] >= remembered - call.position[:, None]
        visible = geometry.visible(index) & filled[:, None, :]
        return self.attend(h, context, index, visible, self.window, call)


class SegmentLayer(_RecurrentLayer):
    def __init__(self, layer: TransformerXLLayer, scope: Scope) -> None:
        super().__init__(layer)
        self.mem_len, self.tgt_len = layer.mem_len, layer.tgt_len
        self.mems = scope.state("mems", self.mem_len, layer.d_model)
        self.segment = scope.state("segment", self.tgt_len, layer.d_model, update="append")
        self.own_states = (self.mems, self.segment)

    def forward(self, h: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        context = torch.cat([call.read(self.mems), call.read(self.segment), h], dim=1)
        call.write(self.segment, h)
        phase = (call.position % self.tgt_len)[:, None]  # tokens of this segment before the call, (B, 1)
        new = torch.arange(h.shape[1], device=h.device)
        old = torch.arange(self.mem_len + self.tgt_len, device=h.device)
        # Rows are numbered from the first remembered one: mems, then this segment's, then h.
        keys = torch.cat([old[None, :].expand(phase.shape[0], -1), self.mem_len + phase + new[None, :]], dim=1)
        queries = (self.mem_len + phase + new[None, :])[:, :, None]  # (B, T, 1)
        filled = (old >= self.mem_len - (call.position[:, None] - phase)) & (old < self.mem_len + phase)
        written = torch.cat([filled, (new >= 0)[None, :].expand(phase.shape[0], -1)], dim=1)
        index = self.layer.attention.geometry.index(queries, keys[:, None, :])
        visible = self.layer.attention.geometry.visible(index) & written[:, None, :]
        return self.attend(h, context, index, visible, self.mem_len + self.tgt_len, call)

    def close(self, call: Call) -> None:
        """End a segment of tgt_len tokens."""
        rows = torch.cat([call.read(self.mems), call.read(self.segment)], dim=1)
        call.write(self.mems, rows[:, -self.mem_len :])


ROLLING = TypeRule(
    name="rolling-memory",
    why="with same_length every token sees the same number of keys, so memory may roll with every call",
    type=TransformerXLLayer,
    build=RollingLayer,
    condition=lambda layer: layer.attention.geometry.window is not None,
)
SEGMENT = TypeRule(
    name="segment-memory",
    why="without same_length a token sees its segment and the memory before it: memory is frozen within a segment",
    type=TransformerXLLayer,
    build=SegmentLayer,
)
