"""Multi-scale heads: those that see equally far share a cache, and none is longer than they see.

Given                                              Becomes
  head h sees `windows[h]` positions                 for each distinct window w of a layer, with H_w heads:
                                                     states windowW.key, .value (B, H_w, w - 1, d_head), append
                                                     unlimited.key, .value (B, H_0, context, d_head) where w is 0

Where every head has a window the stream has no end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters.kv_cache import KeyCache, numbered
from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.attention import attend
from mscompile.models.multiscale_heads import HeadsBlock, MultiscaleHeads


class StreamHeadsBlock(StreamModule):
    order: Tensor  # by window, so that heads of one window are neighbours
    back: Tensor

    def __init__(self, block: HeadsBlock, scope: Scope) -> None:
        super().__init__()
        self.block, self.factor = block, scope.factor
        windows = torch.tensor(block.windows)
        distinct, self.counts = (values.tolist() for values in windows.unique(return_counts=True))
        self.register_buffer("order", windows.argsort(stable=True))
        self.register_buffer("back", self.order.argsort())
        self.caches = nn.ModuleList(
            KeyCache(
                count, block.attention.d_head, window or None, scope.child(f"window{window}" if window else "unlimited")
            )
            for window, count in zip(distinct, self.counts, strict=True)
        )

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        attention, rows = self.block.attention, self.block.attention_norm(x)
        numbers = numbered(rows, self.factor, call)
        key, value = attention.keys(rows, numbers)
        heads = (self._grouped(each) for each in (attention.queries(rows, numbers), key, value))
        mixed = [
            attend(query, cache.runs(key, value, call))
            for cache, query, key, value in zip(self.caches, *heads, strict=True)
        ]
        return self.block.finish(x, attention.merge(torch.cat(mixed, dim=1).index_select(1, self.back)))

    def _grouped(self, heads: Tensor) -> tuple[Tensor, ...]:
        """(B, H, T, d_head) -> (B, H_w, T, d_head) for each distinct window."""
        return heads.index_select(1, self.order).split(self.counts, dim=1)


class StreamMultiscaleHeads(Root):
    def __init__(self, model: MultiscaleHeads, scope: Scope) -> None:
        super().__init__()
        self.model = model
        self.bounded = any(0 in windows for windows in model.config.windows)
        self.stack = scope.stream(model.stack, "stack")

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        return self.model.head(self.model.norm(self.stack(self.model.embedding(tokens), call)))


RULES = (
    TypeRule("multiscale-heads", "embedding, blocks, head", MultiscaleHeads, StreamMultiscaleHeads),
    TypeRule("windowed-heads", "a head keeps the keys that it can still see", HeadsBlock, StreamHeadsBlock),
)
