"""Whole models: embedding, streaming body, head.

A Root may also have a segment length: the graph `close` then ends each segment of that many tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from exporters.memory import SegmentLayer
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.hourglass import Hourglass
from mscompile.models.relative import Biases
from mscompile.models.transformer_xl import TransformerXL


class Root(StreamModule):
    """The streaming form of a whole model."""

    biases: Biases
    segment: int | None = None
    bounded = False  # does memory grow with the stream, so that a context length bounds it?

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V)."""
        raise NotImplementedError

    def close(self, call: Call) -> None:
        """End a segment."""


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


class StreamHourglass(Root):
    bounded = True

    def __init__(self, model: Hourglass, scope: Scope) -> None:
        super().__init__()
        self.model, self.biases = model, model.biases
        self.level = scope.stream(model.level, "scale1")

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        return self.model.head(self.level(self.model.embedding(tokens), call))


_WHY = "embedding, streaming body, head"
RULES = (
    TypeRule("transformer-xl", _WHY, TransformerXL, StreamTransformerXL, lambda model: model.config.same_length),
    TypeRule("transformer-xl-segments", _WHY, TransformerXL, SegmentTransformerXL),
    TypeRule("hourglass", _WHY, Hourglass, StreamHourglass),
)
