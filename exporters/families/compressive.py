"""Compressive Transformer: memory and compressed memory, both frozen within a segment of T tokens.

Given                                              Becomes
  c = [cmem ; mem ; x], k, v = W_k c, W_v c          softmax over [remembered ; segment ; new] keys, scored apart
  memory grows from no rows                          full size from the start, rows at its end; others are masked

                         shape                  changed by
  key, value             (B, H, C + M, d_head)  close, replace    of [cmem ; mem]
  segment_key, _value    (B, H, T, d_head)      every call, append
  mem, cmem, segment     (B, M | C | T, d)      close, replace; segment every call, append

Only `close` reads the rows themselves, once a segment: it rolls and compresses them, hands them to the layer that
reads them next, and makes that layer's keys and values. A token costs the projections of its own row. Exact because
nothing in memory changes before a segment is complete. How many rows are remembered follows from the position.

Layers without memory keep the keys and values of their segment only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.compressive import CompressiveConfig, CompressiveLayer, CompressiveTransformer, Memory
from mscompile.models.relative import Biases, Keys, Sight, attend


@dataclass(frozen=True)
class View:
    """How all layers of a call see what was remembered, their segment and the new rows."""

    memory: Sight
    segment: Sight
    new: Sight
    encoded: Tensor  # positions, of which each layer makes its table
    biases: Biases | None


class StreamLayer(StreamModule):
    """A layer without memory, which sees its segment."""

    def __init__(self, layer: CompressiveLayer, scope: Scope, config: CompressiveConfig) -> None:
        super().__init__()
        self.layer = layer
        shape = (config.n_head, config.tgt_len, config.d_model // config.n_head)
        self.segment_key = scope.state("segment_key", *shape, update="append", time_axis=2)
        self.segment_value = scope.state("segment_value", *shape, update="append", time_axis=2)
        self.own_states = (self.segment_key, self.segment_value)

    def forward(self, h: Tensor, view: View, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        attention, rows = self.layer.attention, self.layer.rows(h)
        key, value = attention.heads(attention.key(rows)), attention.heads(attention.value(rows))
        runs = [Keys(call.read(self.segment_key), call.read(self.segment_value), view.segment)]
        runs = [*self.remembered(rows, view, call), *runs, Keys(key, value, view.new)]
        call.write(self.segment_key, key)
        call.write(self.segment_value, value)
        query = attention.heads(attention.query(rows))
        mixed = attend(query, runs, attention.table(view.encoded), view.biases)
        return self.layer.finish(h, attention.merge(mixed))

    def remembered(self, rows: Tensor, view: View, call: Call) -> list[Keys]:
        """Keys from before the segment, and room for `rows` (B, T, d) of it."""
        return []


class RememberingLayer(StreamLayer):
    def __init__(self, layer: CompressiveLayer, scope: Scope, config: CompressiveConfig) -> None:
        super().__init__(layer, scope, config)
        self.config = config
        shape = (config.n_head, config.cmem_len + config.mem_len, config.d_model // config.n_head)
        self.key, self.value = scope.state("key", *shape), scope.state("value", *shape)
        self.mem = scope.state("mem", config.mem_len, config.d_model)
        self.cmem = scope.state("cmem", config.cmem_len, config.d_model)
        self.segment = scope.state("segment", config.tgt_len, config.d_model, update="append")
        self.own_states += (self.key, self.value, self.mem, self.cmem, self.segment)

    def remembered(self, rows: Tensor, view: View, call: Call) -> list[Keys]:
        call.write(self.segment, rows)
        return [Keys(call.read(self.key), call.read(self.value), view.memory)]

    def left(self, call: Call) -> Memory:
        """What the layer leaves at the end of a segment."""
        config, mem, cmem = self.config, call.read(self.mem), call.read(self.cmem)
        dropped = mem[:, : config.tgt_len]
        grown = self._grown(cmem, dropped)
        if config.first_dropped != config.tgt_len:  # segments do not fill memory evenly: the first time fewer drop out
            first = call.once("first dropped", lambda: times_dropped(config, call.position) == 0)
            grown = torch.where(first[:, None, None], self._grown(cmem, dropped[:, -config.first_dropped :]), grown)
        mem = torch.cat([mem, call.read(self.segment)], dim=1)[:, -config.mem_len :]
        return Memory(mem, grown)

    def _grown(self, cmem: Tensor, dropped: Tensor) -> Tensor:
        """Before memory is full these are rows that were never there: their place is masked, and they wander out."""
        assert self.layer.compression is not None
        return torch.cat([cmem, self.layer.compression(dropped)], dim=1)[:, -self.config.cmem_len :]

    def read_from_now_on(self, memory: Memory, call: Call) -> None:
        attention = self.layer.attention
        call.write(self.mem, memory.mem)
        call.write(self.cmem, memory.cmem)
        call.write(self.key, attention.heads(attention.key(memory.rows)))
        call.write(self.value, attention.heads(attention.value(memory.rows)))


def times_dropped(config: CompressiveConfig, position: Tensor) -> Tensor:
    """How often rows fell out of memory before the segment of these positions, (B,)."""
    return (position // config.tgt_len - config.mem_len // config.tgt_len).clamp(min=0)


def remembered_rows(config: CompressiveConfig, position: Tensor) -> Tensor:
    """Rows of memory and of compressed memory in the segment of these positions, (B,)."""
    mem = (position // config.tgt_len * config.tgt_len).clamp(max=config.mem_len)
    usual, first = config.compressed(config.tgt_len), config.compressed(config.first_dropped)
    cmem = times_dropped(config, position) * usual - (usual - first)
    return mem + cmem.clamp(0, config.cmem_len)


class StreamCompressive(Root):
    def __init__(self, model: CompressiveTransformer, scope: Scope) -> None:
        super().__init__()
        self.model, self.segment = model, model.config.tgt_len
        layers: list[StreamLayer] = []
        for number, layer in enumerate(cast(Iterable[CompressiveLayer], model.layers)):
            kind = StreamLayer if layer.compression is None else RememberingLayer
            layers.append(kind(layer, scope.child(f"layer{number:02}"), model.config))
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        h = self.model.embed(tokens)
        view = self._view(h, call)
        for layer in self.layers:
            h = layer(h, view, call)
        return self.model.logits(h)

    def _view(self, h: Tensor, call: Call) -> View:
        config, device = self.model.config, h.device
        slots = config.cmem_len + config.mem_len
        remembered = remembered_rows(config, call.position)[:, None, None]  # (B, 1, 1)
        phase = (call.position % config.tgt_len)[:, None, None]
        new = torch.arange(h.shape[1], device=device)[None, :, None]  # (1, T, 1), rows of this call
        slot = torch.arange(slots, device=device)[None, None]
        place = torch.arange(config.tgt_len, device=device)[None, None]
        ago = new - new.transpose(1, 2)

        def sight(distance: Tensor, visible: Tensor) -> Sight:
            return Sight.of(self.model.entries(distance, remembered), visible, config.reach)

        return View(
            memory=sight(slots + phase + new - slot, slot >= slots - remembered),
            segment=sight(phase + new - place, place < phase),
            new=sight(ago, ago >= 0),
            encoded=self.model.encoded(),
            biases=self.model.biases,
        )

    def close(self, call: Call) -> None:
        layers = [layer for layer in self.layers if isinstance(layer, RememberingLayer)]
        for layer, memory in zip(layers, self.model.rolled([layer.left(call) for layer in layers]), strict=True):
            layer.read_from_now_on(memory, call)


RULES = (
    TypeRule(
        "compressive",
        "memory changes at the end of a segment only: keys and values are kept until then",
        CompressiveTransformer,
        StreamCompressive,
    ),
)
