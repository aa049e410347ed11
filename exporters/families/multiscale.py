"""What the streams of multi-scale models share: pooling that waits for whole groups, positions, embedding and head.

Given                                              Becomes
  pool(rows, k)     (B, T, d) -> (B, T // k, d)      state sum (B, d), replace: of the group so far;
                                                     a coarse row comes with the last row of its group only
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters.kv_cache import numbered
from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.errors import Refusal
from mscompile.models.multiscale import MultiscaleModel, Positions, groups, pool


class StreamPooling(StreamModule):
    """Rows of `scope.factor` tokens to rows `group` times as long, None where none ends in a call."""

    def __init__(self, group: int, width: int, scope: Scope) -> None:
        super().__init__()
        self.group, self.coarse_factor = group, scope.factor * group
        self.factors = (self.coarse_factor,)
        self.sum = scope.state("sum", width)
        self.own_states = (self.sum,)

    def forward(self, rows: Tensor | None, call: Call) -> Tensor | None:
        """(B, T, d) -> (B, T / group, d). Calls of many tokens bring whole groups and leave the sum at zero."""
        if rows is None:
            return None
        if not call.single:
            return pool(rows, self.group)
        total = call.read(self.sum) + rows[:, 0]
        if not call.due(self.coarse_factor):
            call.write(self.sum, total)
            return None
        call.write(self.sum, torch.zeros_like(total))
        return (total / self.group)[:, None]


def poolings(factors: list[int], width: int, scope: Scope) -> nn.ModuleList:
    """From each scale to the next, finest first."""
    return nn.ModuleList(
        StreamPooling(group, width, scope.child(f"scale{factor * group}.pooling", factor))
        for factor, group in zip(factors[:-1], groups(factors), strict=True)
    )


class StreamPositions(StreamModule):
    def __init__(self, module: Positions, scope: Scope) -> None:
        super().__init__()
        if scope.context is not None and scope.context > module.context:
            raise Refusal(
                f"{scope.name}: the model has positions for {module.context} tokens, so a stream cannot have "
                f"{scope.context}; export with a context of {module.context} or less"
            )
        self.module, self.factor = module, scope.factor

    def forward(self, rows: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d). A batch row at the end of its context may be carried along: its result is dropped."""
        numbers = numbered(rows, self.factor, call).clamp(max=self.module.table.num_embeddings - 1)
        return self.module(rows, numbers)


class StreamMultiscale(Root):
    ticks = "end"
    bounded = True

    def __init__(self, model: MultiscaleModel, factors: list[int], scope: Scope) -> None:
        super().__init__()
        self.model = model
        self.positions = nn.ModuleList(
            scope.stream(positions, f"scale{factor}.positions", factor)
            for positions, factor in zip(model.positions, factors, strict=True)
        )

    def placed(self, scale: int, rows: Tensor | None, call: Call) -> Tensor | None:
        """The rows of a scale that end in this call, with their positions."""
        return None if rows is None else self.positions[scale](rows, call)

    def body(self, rows: Tensor, call: Call) -> Tensor:
        """Embedded tokens (B, T, d) -> (B, T, d)."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        rows = self.positions[0](self.model.embedding(tokens), call)
        return self.model.head(self.model.norm(self.body(rows, call)))


RULES = (TypeRule("learned-positions", "a row's position is its number in the stream", Positions, StreamPositions),)
