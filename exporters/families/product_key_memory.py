"""Memory layers: embedding, blocks, head; the tables of values go from the root to the blocks that read them.

Given                                              Becomes
  x + attention(LN x)                                the same with remembered keys
  q = BatchNorm(W x + b)        (B, T, h * k)        q = W' x + b',  W' = s W,  b' = s (b - mean) + shift
  layers read V                 (n * n, d)           one initializer, gathered from by each of them

A look-up remembers nothing: it is the same for one token as for many. The normalisation folded away is that of the
running statistics, s = scale / sqrt(variance + eps).
"""

from __future__ import annotations

from torch import Tensor, nn

from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.product_key_memory import MemoryBlock, ProductKeyMemory, Queries, RunningNorm, Values


def folded(queries: Queries) -> nn.Linear:
    """The projection to queries, with the BatchNorm behind it where there is one."""
    linear, norm = queries.linear, queries.norm
    if not isinstance(norm, RunningNorm):
        return linear
    scale, shift = norm.affine()
    result = nn.Linear(linear.in_features, linear.out_features, device="meta", dtype=linear.weight.dtype)
    result.weight = nn.Parameter(linear.weight * scale[:, None], requires_grad=False)
    result.bias = nn.Parameter(linear.bias * scale + shift, requires_grad=False)
    return result


class StreamMemoryBlock(StreamModule):
    def __init__(self, block: MemoryBlock, scope: Scope) -> None:
        super().__init__()
        self.block = block
        self.attention = scope.stream(block.attention, "attention")
        self.query = folded(block.lookup.queries)

    def forward(self, x: Tensor, values: Values, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        block = self.block
        x = x + self.attention(block.attention_norm(x), call)
        rows = block.memory_norm(x)
        lookup = block.lookup
        ids, weights = lookup.choose(lookup.queries.split(self.query(rows)))
        return x + block.read(rows, ids, weights, values)


class StreamProductKeyMemory(Root):
    bounded = True

    def __init__(self, model: ProductKeyMemory, scope: Scope) -> None:
        super().__init__()
        self.model = model
        self.blocks = nn.ModuleList(scope.stream(block, f"layer{i:02}") for i, block in enumerate(model.blocks))

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        x = self.model.embedding(tokens)
        for block, values in zip(self.blocks, self.model.tables(), strict=True):
            x = block(x, call) if values is None else block(x, values, call)
        return self.model.head(x)


RULES = (
    TypeRule("product-key-memory", "embedding, blocks, head", ProductKeyMemory, StreamProductKeyMemory),
    TypeRule("memory-block", "a look-up needs no memory; its BatchNorm is affine", MemoryBlock, StreamMemoryBlock),
)
