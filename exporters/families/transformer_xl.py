"""Transformer-XL: embedding, layers with their memory, head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from exporters.memory import SegmentLayer
from exporters.root import Root
from exporters.stream import Call, Scope, TypeRule
from mscompile.models.transformer_xl import TransformerXL


class StreamTransformerXL(Root):
    def __init__(self, model: TransformerXL, scope: Scope) -> None:
        super().__init__()
        self.model, self.biases = model, model.biases
        self.layers = nn.ModuleList(scope.stream(layer, f"layer{i:02}") for i, layer in enumerate(model.layers))

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        h = self.model.embed(tokens)
        for layer in self.layers:
            h = layer(h, call)
        return self.model.head(h)


class SegmentTransformerXL(StreamTransformerXL):
    def __init__(self, model: TransformerXL, scope: Scope) -> None:
        super().__init__(model, scope)
        self.segment = model.config.tgt_len

    def close(self, call: Call) -> None:
        for layer in cast(Iterable[SegmentLayer], self.layers):
            layer.close(call)


_WHY = "embedding, streaming body, head"
RULES = (
    TypeRule("transformer-xl", _WHY, TransformerXL, StreamTransformerXL, lambda model: model.config.same_length),
    TypeRule("transformer-xl-segments", _WHY, TransformerXL, SegmentTransformerXL),
)
