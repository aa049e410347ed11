"""RETRO: chunked cross-attention whose neighbours the host supplies when a chunk is complete.

Given                                              Becomes
  E_u = Encoder(neighbours_u, H_u)                   runs with the last token of a chunk (graph `decode_m`), which
                                                     takes the input neighbours (B, 1, k, r); `decode_1` has no encoder
  H_u, rows of the chunk at the first                state chunk (B, m, d), append: slot s holds row s of the chunk
  layer with cross-attention
  cross(x, E_u) for the next m rows                  states key, value (B, H, k r, d_head) of E_u, replace

The neighbours depend on the tokens of the chunk only, which the host knows before it runs anything, so layers below
the encoder, the encoder and those above are one graph. Exact because E_u serves no row before the one that completes
its chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.retro import DecoderLayer, Retro


class StreamCross(StreamModule):
    """The cross-attention of one layer: to what was encoded last, and to what this call encodes."""

    def __init__(self, layer: DecoderLayer, scope: Scope) -> None:
        super().__init__()
        assert layer.cross is not None
        config = layer.config
        self.layer, self.cross, self.size = layer, layer.cross, config.chunk
        shape = (config.n_head, config.neighbours * config.neighbour_length, config.d_model // config.n_head)
        self.key, self.value = scope.state("key", *shape), scope.state("value", *shape)
        self.own_states = (self.key, self.value)

    def forward(self, x: Tensor, encoded: Tensor | None, call: Call) -> Tensor:
        """Rows (B, T, d), and E (B, C, k, r, d_encoder) of the chunks that end in this call -> (B, T, d)."""
        mixed = self._single(x, encoded, call) if encoded is None or call.single else self._many(x, encoded, call)
        return mixed.masked_fill(call.once("before the first chunk", lambda: self._unserved(x, call)), 0.0)

    def _single(self, x: Tensor, encoded: Tensor | None, call: Call) -> Tensor:
        if encoded is None:
            key, value = call.read(self.key), call.read(self.value)
        else:
            key, value = self.layer.keys(encoded[:, 0])
            self._keep(key, value, call)
        place = (call.position[:, None] + 1) % self.size + self.size - 1
        return self.cross(x, place, key, value)

    def _many(self, x: Tensor, encoded: Tensor, call: Call) -> Tensor:
        """Groups of m rows, each with its E: the remembered one serves the first m - 1 rows, E_u the m after those."""
        (batch, length), count = x.shape[:2], encoded.shape[1]
        new = (rows.unflatten(0, (batch, count)) for rows in self.layer.keys(encoded.flatten(0, 1)))
        remembered = (call.read(state)[:, None] for state in (self.key, self.value))
        key, value = (torch.cat(pair, dim=1) for pair in zip(remembered, new, strict=True))
        self._keep(key[:, -1], value[:, -1], call)
        groups = pad(x, (0, 0, 1, self.size - 1)).unflatten(1, (count + 1, self.size)).flatten(0, 1)  # one row late
        place = torch.arange(self.size - 1, 2 * self.size - 1, device=x.device)[None]
        mixed = self.cross(groups, place, key.flatten(0, 1), value.flatten(0, 1))
        return mixed.unflatten(0, (batch, count + 1)).flatten(1, 2)[:, 1 : length + 1]

    def _keep(self, key: Tensor, value: Tensor, call: Call) -> None:
        call.write(self.key, key)
        call.write(self.value, value)

    def _unserved(self, x: Tensor, call: Call) -> Tensor:
        """Rows before the first whole chunk, (B, T, 1)."""
        number = call.position[:, None] + torch.arange(x.shape[1], device=x.device)[None]
        return (number < self.size - 1)[..., None]


class StreamDecoderLayer(StreamModule):
    def __init__(self, layer: DecoderLayer, scope: Scope) -> None:
        super().__init__()
        self.layer = layer
        self.attention = scope.stream(layer.attention, "attention")
        self.cross = None if layer.cross is None else StreamCross(layer, scope.child("cross"))

    def attend(self, x: Tensor, call: Call) -> Tensor:
        return x + self.attention(self.layer.attention_norm(x), call)

    def finish(self, x: Tensor, encoded: Tensor | None, call: Call) -> Tensor:
        if self.cross is not None:
            x = x + self.cross(x, encoded, call)
        return self.layer.finish(x)


class StreamRetro(Root):
    ticks = "end"
    bounded = True

    def __init__(self, model: Retro, scope: Scope) -> None:
        super().__init__()
        config = model.config
        self.model, self.size, self.inputs, self.factors = model, config.chunk, model.inputs, (config.chunk,)
        self.first = config.cross_layers[0]
        self.layers = nn.ModuleList(scope.stream(layer, f"layer{i:02}") for i, layer in enumerate(model.layers))
        self.chunk = scope.state("chunk", config.chunk, config.d_model, update="append")
        self.own_states = (self.chunk,)

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        x, encoded = self.model.embedding(tokens), None
        for number, layer in enumerate(cast(Iterable[StreamDecoderLayer], self.layers)):
            x = layer.attend(x, call)
            if number == self.first:
                encoded = self._encoded(x, call)
            x = layer.finish(x, encoded, call)
        return self.model.head(x)

    def _encoded(self, x: Tensor, call: Call) -> Tensor | None:
        """E (B, C, k, r, d_encoder) of the chunks that end in this call."""
        call.write(self.chunk, x)
        if not call.due(self.size):
            return None
        whole = torch.cat([call.read(self.chunk)[:, : self.size - 1], x], dim=1) if call.single else x
        neighbours = call.given(self.inputs[0])
        shape = neighbours.shape[:2]
        chunks = whole.unflatten(1, (shape[1], self.size))
        return self.model.encode(neighbours.flatten(0, 1), chunks.flatten(0, 1)).unflatten(0, shape)


RULES = (
    TypeRule("retro", "the encoder runs where a chunk ends, with neighbours from the host", Retro, StreamRetro),
    TypeRule(
        "retro-layer", "keys and values of encoded neighbours serve the next chunk", DecoderLayer, StreamDecoderLayer
    ),
)
