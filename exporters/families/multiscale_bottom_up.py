"""Bottom-up multi-scale model: a scale runs where its rows end; the aggregation remembers the keys of all scales.

Given                                              Becomes
  Stack_s on all rows of scale s                     Stack_s on the row that ends with this token, if one does
  softmax over the ended rows of all scales          softmax over [remembered ; new] keys of every scale
                                                     states scaleK.key, .value (B, H, rows, d_head), append

Exact because a row of any scale, once it has ended, never changes, and neither do its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from exporters.families.multiscale import StreamMultiscale, poolings
from exporters.kv_cache import KeyCache
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.attention import Run
from mscompile.models.multiscale_bottom_up import Aggregation, BottomUp, unfinished


class StreamAggregation(StreamModule):
    def __init__(self, module: Aggregation, scope: Scope) -> None:
        super().__init__()
        self.module = module
        self.caches = nn.ModuleList(
            KeyCache(module.attention.n_head, module.attention.d_head, None, scope.child(f"scale{factor}", factor))
            for factor in module.factors
        )

    def forward(self, scales: list[Tensor | None], call: Call) -> Tensor:
        """The rows of each scale that end in this call, finest first -> (B, T, d)."""
        tokens = scales[0]
        assert tokens is not None, "a row of the finest scale ends with every token"
        runs = []
        for scale, (rows, cache) in enumerate(zip(scales, cast(Sequence[KeyCache], self.caches), strict=True)):
            runs += cache.remembered(tokens.shape[1], call)
            if rows is not None:
                key, value = self.module.keys(rows, scale)
                cache.remember(key, value, call)
                runs.append(Run(key, value, self._unfinished(scale, rows, tokens, call)))
        return self.module.mix(tokens, runs)

    def _unfinished(self, scale: int, rows: Tensor, tokens: Tensor, call: Call) -> Tensor | None:
        """What tokens do not see of the new rows of a scale; a single token sees the row that it ends."""
        if call.single:
            return None
        return unfinished(tokens.shape[1], rows.shape[1], self.module.factors[scale], rows.device)


class StreamBottomUp(StreamMultiscale):
    def __init__(self, model: BottomUp, scope: Scope) -> None:
        factors = list(model.config.factors)
        super().__init__(model, factors, scope)
        self.pooling = poolings(factors, model.config.d_model, scope)
        self.stacks = nn.ModuleList(
            scope.stream(stack, f"scale{factor}.stack", factor)
            for stack, factor in zip(model.stacks, factors, strict=True)
        )
        self.aggregation = scope.stream(model.aggregation, "aggregation")
        self.post = scope.stream(model.post, "post")

    def body(self, rows: Tensor, call: Call) -> Tensor:
        scales: list[Tensor | None] = [self.stacks[0](rows, call)]
        for scale, (pooling, stack) in enumerate(zip(self.pooling, self.stacks[1:], strict=True), start=1):
            entering = self.placed(scale, pooling(scales[-1], call), call)
            scales.append(None if entering is None else stack(entering, call))
        return self.post(self.aggregation(scales, call), call)


RULES = (
    TypeRule(
        "multiscale-bottom-up", "embedding, scales from fine to coarse, aggregation, head", BottomUp, StreamBottomUp
    ),
    TypeRule(
        "aggregation", "keys of ended rows never change: keep those of every scale", Aggregation, StreamAggregation
    ),
)
