"""Hourglass: embedding, the finest level with everything inside it, head."""

from __future__ import annotations

from torch import Tensor

from exporters.root import Root
from exporters.stream import Call, Scope, TypeRule
from mscompile.models.hourglass import Hourglass


class StreamHourglass(Root):
    bounded = True

    def __init__(self, model: Hourglass, scope: Scope) -> None:
        super().__init__()
        self.model, self.biases = model, model.biases
        self.level = scope.stream(model.level, "scale1")

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        return self.model.head(self.level(self.model.embedding(tokens), call))


RULES = (TypeRule("hourglass", "embedding, streaming body, head", Hourglass, StreamHourglass),)
