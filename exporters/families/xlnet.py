"""XLNet: embedding, layers with their memory, head, as in Transformer-XL.

Given                                              Becomes
  c = [mems ; h]     mems (B, <= mem_len, d)         c = [mems ; h]   state mems (B, mem_len, d), replace
  new mems = c[-mem_len:] after each call            the same; rows that were never filled are masked
"""

from __future__ import annotations

from torch import Tensor, nn

from exporters.root import Root
from exporters.stream import Call, Scope, TypeRule
from mscompile.models.xlnet import XLNet


class StreamXLNet(Root):
    def __init__(self, model: XLNet, scope: Scope) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList(scope.stream(layer, f"layer{i:02}") for i, layer in enumerate(model.layers))

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        h = self.model.embed(tokens)
        for layer in self.layers:
            h = layer(h, call)
        return self.model.head(h)


RULES = (TypeRule("xlnet", "embedding, streaming body, head", XLNet, StreamXLNet),)
