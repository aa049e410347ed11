"""Levels of a multi-rate model: a coarser scale runs only when one of its rows is due.

Given                                              Becomes
  x + LN(up(middle(down(x)), x))                     down and middle run where n = 0 mod k, up always
"""

from __future__ import annotations

from torch import Tensor, nn

from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.hourglass import Block, Level, Stack, Valley


class StreamBlock(StreamModule):
    def __init__(self, block: Block, scope: Scope) -> None:
        super().__init__()
        self.block = block
        self.attention = scope.stream(block.attention, "attention")

    def forward(self, x: Tensor, call: Call) -> Tensor:
        rows = self.block.attention_norm(x)
        return self.block.finish(x, self.attention(rows, rows, call))


class StreamStack(StreamModule):
    def __init__(self, stack: Stack, scope: Scope) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(scope.stream(block, f"block{i:02}") for i, block in enumerate(stack.blocks))
        self.norm = stack.norm

    def forward(self, x: Tensor, call: Call) -> Tensor:
        for block in self.blocks:
            x = block(x, call)
        return self.norm(x)


class StreamValley(StreamModule):
    def __init__(self, valley: Valley, scope: Scope) -> None:
        super().__init__()
        coarse = valley.factor * valley.group
        self.factors = (coarse,)
        self.shortening = scope.stream(valley.shortening, "shortening")
        self.middle = scope.stream(valley.middle, f"scale{coarse}", factor=coarse)
        self.upsampling = scope.stream(valley.upsampling, "upsampling")
        self.norm = valley.norm

    def forward(self, x: Tensor, call: Call) -> Tensor:
        coarse = self.shortening(x, call)
        if coarse is not None:
            coarse = self.middle(coarse, call)
        return x + self.norm(self.upsampling(coarse, x, call))


class StreamLevel(StreamModule):
    def __init__(self, level: Level, scope: Scope) -> None:
        super().__init__()
        self.pre = scope.stream(level.pre, "pre")
        self.valley = None if level.valley is None else scope.stream(level.valley, "valley")
        self.post = None if level.post is None else scope.stream(level.post, "post")

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = self.pre(x, call)
        if self.valley is not None and self.post is not None:
            x = self.post(self.valley(x, call), call)
        return x


_WHY = "composes the streaming forms of its parts"
RULES = (
    TypeRule("block", _WHY, Block, StreamBlock),
    TypeRule("stack", _WHY, Stack, StreamStack),
    TypeRule("valley", "the coarse scale runs only when one of its rows is due", Valley, StreamValley),
    TypeRule("level", _WHY, Level, StreamLevel),
)
