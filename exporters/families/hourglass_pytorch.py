"""Hourglass of the package hourglass-transformer-pytorch: the rules of Hourglass, with resampling within groups.

Given                                              Becomes
  pooled row attends to the k rows of its group      nothing more than the k - 1 rows that shortening keeps
  k rows attend to the coarse row of their group     state expansion (B, k or 1, d), replace: what the newest coarse
                                                     row adds to the rows of its group, attention included
  P[positions]                                       P[position + 0 .. T - 1]

Shortening and upsampling run as those of `hourglass.py` without attention beyond the group.
"""

from __future__ import annotations

from torch import Tensor

from exporters.kv_cache import numbered
from exporters.pooling import StreamShortening
from exporters.root import Root
from exporters.scales import StreamLevel
from exporters.stream import Call, Scope, StreamModule, TypeRule
from exporters.upsampling import StreamUpsampling
from mscompile.errors import Refusal
from mscompile.models.hourglass_pytorch import (
    GroupLevel,
    GroupShortening,
    GroupUpsampling,
    GroupValley,
    HourglassPytorch,
)


class StreamHourglassPytorch(Root):
    bounded = True

    def __init__(self, model: HourglassPytorch, scope: Scope) -> None:
        super().__init__()
        if scope.context is not None and scope.context > model.config.context:
            raise Refusal(f"this model has positions for {model.config.context} tokens, not for {scope.context}")
        self.model = model
        self.level = scope.stream(model.level, "scale1")

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        x = self.model.embedding(tokens)
        # A batch row that has reached its end may be carried along: it has no next position.
        numbers = numbered(x, 1, call).clamp(max=self.model.positions.num_embeddings - 1)
        x = self.level(x + self.model.positions(numbers), call)
        return self.model.head(self.model.norm(x))


class StreamGroupValley(StreamModule):
    def __init__(self, valley: GroupValley, scope: Scope) -> None:
        super().__init__()
        coarse = valley.coarse_factor
        self.valley, self.factors = valley, (coarse,)
        self.shortening = scope.stream(valley.shortening, "shortening")
        self.middle = scope.stream(valley.middle, f"scale{coarse}", factor=coarse)
        self.upsampling = scope.stream(valley.upsampling, "upsampling")

    def forward(self, x: Tensor, call: Call) -> Tensor:
        coarse = self.shortening(x, call)
        if coarse is not None:
            coarse = self.middle(coarse, call)
        return self.valley.upsampling.finish(x, self.upsampling(coarse, x, call))


RULES = (
    TypeRule("hourglass-pytorch", "embedding, streaming body, head", HourglassPytorch, StreamHourglassPytorch),
    TypeRule("group-valley", "the coarse scale runs only when one of its rows is due", GroupValley, StreamGroupValley),
    TypeRule("group-level", "composes the streaming forms of its parts", GroupLevel, StreamLevel),
    TypeRule(
        "group-shortening", "a group is pooled and attended to when it is complete", GroupShortening, StreamShortening
    ),
    TypeRule("group-upsampling", "what a coarse row adds to its group is kept", GroupUpsampling, StreamUpsampling),
)
