"""Hierarchical multiscale LSTM: what each layer carries from token to token is its state.

Given                                              Becomes
  h, c (B, n), z (B, 1) of each layer                states layerNN.h, .c (B, n) and .z (B, 1), replace;
                                                     no .z where the last layer has no boundary

One graph consumes one token: the next one needs all of its results, and so there is no prefill. COPY, UPDATE and
FLUSH are computed for every row and selected, as in the reference; no row branches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from exporters.root import Root
from exporters.stream import Call, Scope, TypeRule
from mscompile.contracts import StateSpec
from mscompile.models.hm_lstm import HMLSTM, HMLSTMCell, Layer


class StreamHMLSTM(Root):
    parallel = False

    def __init__(self, model: HMLSTM, scope: Scope) -> None:
        super().__init__()
        self.model = model
        self.layers = [
            self._states(scope.child(f"layer{i:02}"), cell)
            for i, cell in enumerate(cast(Iterable[HMLSTMCell], model.cells))
        ]
        self.own_states = tuple(state for layer in self.layers for state in layer)

    @staticmethod
    def _states(scope: Scope, cell: HMLSTMCell) -> tuple[StateSpec, ...]:
        h, c = scope.state("h", cell.size), scope.state("c", cell.size)
        return (h, c, scope.state("z", 1)) if cell.has_boundary else (h, c)

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        """(B, 1) -> (B, 1, V)."""
        old = [Layer.of(*(call.read(state) for state in layer)) for layer in self.layers]
        new = self.model.step(tokens[:, 0], old)
        for states, values in zip(self.layers, new, strict=True):
            for state, value in zip(states, values, strict=False):  # no state of a boundary that is not there
                call.write(state, value)
        return self.model.output(torch.cat([layer.h for layer in new], dim=-1))[:, None]


RULES = (TypeRule("hm-lstm", "every layer's h, c and boundary are replaced at every token", HMLSTM, StreamHMLSTM),)
