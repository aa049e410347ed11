"""Top-down multi-scale model: the coarse stacks run where their rows end, the finer ones hold the newest coarse row.

Given                                              Becomes
  Stack_s on all rows of scale s                     Stack_s on the row that ends with this token, if one does
  U^s = hold(null_s, C^(s+1))    (B, T, d)           state held (B, d), replace: the newest row of C^(s+1), null_s first

Exact because a row of C^(s+1) depends on tokens up to its own end only, and is used from that token on.
"""

from __future__ import annotations

from torch import Tensor, nn

from exporters.families.multiscale import StreamMultiscale, poolings
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.multiscale_top_down import TopDown, TopDownScale, hold


class StreamTopDownScale(StreamModule):
    def __init__(self, scale: TopDownScale, scope: Scope) -> None:
        super().__init__()
        self.scale, self.group = scale, scale.group
        self.stack = scope.stream(scale.stack, "stack")
        if self.group is not None:
            null = tuple(scale.null.tolist())
            self.newest = scope.state("held", len(null), initial=null)
            self.own_states = (self.newest,)

    def forward(self, rows: Tensor | None, coarse: Tensor | None, call: Call) -> Tensor | None:
        """The rows that end in this call (B, T, d), and the coarser ones that do; None where none does."""
        if rows is None:
            return None
        if self.group is not None:
            rows = self.scale.enter(rows, self._held(coarse, self.group, rows.shape[1], call))
        return self.stack(rows, call)

    def _held(self, coarse: Tensor | None, group: int, count: int, call: Call) -> Tensor:
        """The coarser row that each of `count` rows goes with, (B, count, d)."""
        if coarse is None:
            return call.read(self.newest)[:, None]
        call.write(self.newest, coarse[:, -1])
        return coarse if call.single else hold(call.read(self.newest), coarse, group, count)


class StreamTopDown(StreamMultiscale):
    def __init__(self, model: TopDown, scope: Scope) -> None:
        factors = list(model.config.factors)
        super().__init__(model, factors, scope)
        self.pooling = poolings(factors, model.config.d_model, scope)
        self.scales = nn.ModuleList(
            scope.stream(scale, f"scale{factor}", factor) for scale, factor in zip(model.scales, factors, strict=True)
        )

    def body(self, rows: Tensor, call: Call) -> Tensor:
        means: list[Tensor | None] = [rows]
        for pooling in self.pooling:
            means.append(pooling(means[-1], call))
        placed = [rows, *(self.placed(scale, mean, call) for scale, mean in enumerate(means[1:], start=1))]
        coarse = None
        for scale, entering in reversed(list(zip(self.scales, placed, strict=True))):
            coarse = scale(entering, coarse, call)
        assert coarse is not None, "a row of the finest scale ends with every token"
        return coarse


RULES = (
    TypeRule("multiscale-top-down", "embedding, scales from coarse to fine, head", TopDown, StreamTopDown),
    TypeRule(
        "top-down-scale", "a coarse row serves from its end until the next one's", TopDownScale, StreamTopDownScale
    ),
)
