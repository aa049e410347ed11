"""Memory Transformer: the memory rows depend on the weights alone, so only their keys and values are left.

Given                                              Becomes
  h' = memory sub-network of h   (m, d)              nothing: run once, here
  keys [W_k h ; W_k x]           (B, H, m + S, d_h)  a constant (1, H, m, d_h), then the cache of plain attention

Exact because memory rows attend to memory rows only: no token ever changes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from exporters.kv_cache import CachedSelfAttention, StreamBlock, numbered
from exporters.root import Root
from exporters.stream import Call, Scope, TypeRule
from mscompile.models.attention import Attention, Run, row_numbers
from mscompile.models.memory_transformer import MemoryLayer, MemoryTransformer


class PrefixedSelfAttention(CachedSelfAttention):
    """Every query also sees constant keys and values, those of `prefix` (1, m, d)."""

    prefix_key: Tensor
    prefix_value: Tensor

    def __init__(self, module: Attention, prefix: Tensor, scope: Scope) -> None:
        super().__init__(module, scope)
        key, value = module.keys(prefix, row_numbers(prefix))
        self.register_buffer("prefix_key", key)
        self.register_buffer("prefix_value", value)

    def runs(self, key: Tensor, value: Tensor, call: Call) -> list[Run]:
        return [Run(self.prefix_key, self.prefix_value), *super().runs(key, value, call)]


class StreamMemoryTransformer(Root):
    bounded = True

    @torch.no_grad()
    def __init__(self, model: MemoryTransformer, scope: Scope) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList()
        memory = model.memory[None]
        for i, layer in enumerate(cast(Iterable[MemoryLayer], model.layers)):
            block = StreamBlock(layer.block, scope.child(f"layer{i:02}"))
            rows = layer.block.attention_norm(memory)
            block.attention = PrefixedSelfAttention(layer.block.attention, rows, scope.child(f"layer{i:02}.attention"))
            self.layers.append(block)
            memory = layer.remember(memory)

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        # A batch row that has reached its end may be carried along: it has no next position.
        x = self.model.embed(tokens, numbered(tokens, 1, call).clamp(max=self.model.config.context - 1))
        for layer in self.layers:
            x = layer(x, call)
        return self.model.head(x)


RULES = (
    TypeRule(
        "memory-prefix",
        "memory rows attend to themselves alone: their keys and values are constants",
        MemoryTransformer,
        StreamMemoryTransformer,
    ),
)
