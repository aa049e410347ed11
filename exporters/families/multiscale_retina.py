"""Retina multi-scale model: for each resolution a ring of keys that is as long as its window.

Given                                              Becomes
  keys of rows of k_s tokens, up to w_s tokens       states scaleK.key, .value (B, H, R_s, d_head), append, with
                                                     R_s = (w_s + k_(s+1) - 2) // k_s; all rows at the last resolution
  means of normed rows                               states scaleK.pooling.sum (B, d), replace

The number of a remembered row follows from its slot and `position`, and what a query sees of it from both numbers.
The token that ends a coarse row never sees that row: it only remembers it. Exact because a row never changes once
it has ended, and a row that has left its ring is out of every later query's window.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from exporters.families.multiscale import StreamMultiscale, poolings
from exporters.kv_cache import KeyCache, numbered
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.attention import Run
from mscompile.models.multiscale_retina import Resolution, Retina, RetinaBlock, outside, sights

Sight = tuple[Tensor, Tensor]


def seen_rows(near: Resolution, far: Resolution) -> int:
    """Rows of `near` that a ring must be long for, with the newest: its window and what is left of a row of `far`."""
    return (near.window + far.factor - 2) // near.factor + 1


class ResolutionCache(KeyCache):
    """The keys at one resolution."""

    def __init__(self, block: RetinaBlock, rows: int | None, scope: Scope) -> None:
        attention = block.attention
        super().__init__(attention.n_head, attention.d_head, rows, scope)
        self.block = block

    def see(self, rows: Tensor | None, sight: Sight, call: Call) -> list[Run]:
        """The remembered keys, and those of the rows (B, S, d) that end in this call, where any do."""
        old = call.read(self.key)
        hidden = call.once(("seen rows", self.factor), lambda: outside(sight, self._numbers(old.shape[2], call)))
        runs = [Run(old, call.read(self.value), hidden)]
        if rows is None:
            return runs
        key, value = self.block.keys(rows)
        self.remember(key, value, call)
        if not call.single:
            new = call.once(("new rows", self.factor), lambda: outside(sight, numbered(rows, self.factor, call)))
            runs.append(Run(key, value, new))
        elif self.factor == 1:
            runs.append(Run(key, value))
        return runs

    def _numbers(self, slots: int, call: Call) -> Tensor:
        """The row number in each slot, negative where there is none yet: (B, slots)."""
        newest = call.rows_before(self.factor)[:, None] - 1
        return newest - (newest - torch.arange(slots, device=newest.device)) % self.capacity


class StreamRetinaBlock(StreamModule):
    def __init__(self, block: RetinaBlock, scope: Scope) -> None:
        super().__init__()
        self.block = block
        resolutions = block.resolutions
        factors = [resolution.factor for resolution in resolutions]
        self.pooling = poolings(factors, block.attention_norm.normalized_shape[0], scope)
        lengths = [min(seen_rows(near, far), scope.rows(near.factor) + 1) for near, far in pairwise(resolutions)]
        self.caches = nn.ModuleList(
            ResolutionCache(block, rows, scope.child(f"scale{factor}", factor))
            for rows, factor in zip([*lengths, None], factors, strict=True)
        )

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        rows = self.block.attention_norm(x)
        pooled: list[Tensor | None] = [rows]
        for pooling in self.pooling:
            pooled.append(pooling(pooled[-1], call))
        seen = call.once("sights", lambda: sights(self.block.resolutions, numbered(rows, 1, call)))
        caches = zip(cast(Sequence[ResolutionCache], self.caches), pooled, seen, strict=True)
        return self.block.mix(x, rows, [run for cache, means, sight in caches for run in cache.see(means, sight, call)])


class StreamRetina(StreamMultiscale):
    def __init__(self, model: Retina, scope: Scope) -> None:
        super().__init__(model, [1], scope)
        self.stack = scope.stream(model.stack, "stack")

    def body(self, rows: Tensor, call: Call) -> Tensor:
        return self.stack(rows, call)


RULES = (
    TypeRule("multiscale-retina", "embedding, blocks, head", Retina, StreamRetina),
    TypeRule(
        "retina-block",
        "a row of each resolution is final once it has ended: keep its keys",
        RetinaBlock,
        StreamRetinaBlock,
    ),
)
