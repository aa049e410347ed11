"""Mixture of Chapters with rolling routing: every memory layer remembers its last inputs; the bank is a constant.

Given                                              Becomes
  mean of the last w inputs                          sums over [remembered ; new], state routing (B, w - 1, d), append
  top k of softmax(logits), made to sum to 1         softmax(top k of logits)
  K = W_k (c m)     for all rows m of the chapters   (W_k^T q) . m, times c: projects H queries, not S rows
  W_v sum a c m                                      the same, projected after the sum
  bank / its root mean square                        computed once, one initializer for all layers

The exchange of projections is exact because they are linear and have no bias. For one token of the published size
(S = 4160 rows, d = 768, 12 heads) it leaves 0.16 of 9.8 GFLOP a memory layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.chapters import ChapterAttention, Chapters, ChaptersBlock, ChaptersMemoryBlock, Router


class RollingRouter(StreamModule):
    def __init__(self, router: Router, scope: Scope) -> None:
        super().__init__()
        self.router, self.capacity = router, router.window - 1
        if self.capacity:
            d_model = router.linear.in_features
            self.rows = scope.state("rows", self.capacity, d_model, update="append")
            self.own_states = (self.rows,)

    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """(B, T, d) -> ids int64 and weights of chapters, (B, T, chapters)."""
        logits = self.router.linear(self._pooled(x, call))[..., self.router.shared :]
        best, ids = logits.topk(self.router.top_k, dim=-1)
        return self.router.with_shared(ids + self.router.shared, best.softmax(dim=-1))

    def _pooled(self, x: Tensor, call: Call) -> Tensor:
        if not self.capacity:
            return x
        remembered = call.read(self.rows)
        call.write(self.rows, x)
        where = ("shares", self.router.window)
        old, new = call.once(where, lambda: self._shares(x, remembered.shape[1], call))
        return old @ remembered + new @ x

    def _shares(self, x: Tensor, slots: int, call: Call) -> tuple[Tensor, Tensor]:
        """How much remembered and new rows count in each mean, (B, T, slots) and (B, T, T)."""
        window, before = self.router.window, call.position[:, None, None]
        row = torch.arange(x.shape[1], device=x.device)
        slot = torch.arange(slots, device=x.device)
        age = (before - 1 - slot) % self.capacity + 1  # of slots at the first new row, (B, 1, slots)
        old = (age + row[:, None] < window) & (age <= before)
        back = row[:, None] - row[None, :]
        new = (back >= 0) & (back < window)
        count = (before + row[:, None] + 1).clamp(max=window).to(x.dtype)  # (B, T, 1)
        return old.to(x.dtype) / count, new.to(x.dtype) / count


class AbsorbedChapterAttention(nn.Module):
    """Attention to chapters, with keys and values left unprojected."""

    def __init__(self, attention: ChapterAttention) -> None:
        super().__init__()
        self.attention = attention
        self.heads = (attention.n_kv_head, attention.d_head)

    def forward(self, rows: Tensor, memory: Tensor, weights: Tensor) -> Tensor:
        """rows (B, T, d), each with its memory (B, T, S, d) and the weights of that, (B, T, S) -> (B, T, d)."""
        attention, weights = self.attention, weights.unsqueeze(-2)
        key = attention.key.weight.unflatten(0, self.heads)  # (n_kv_head, d_head, d)
        value = attention.value.weight.unflatten(0, self.heads).transpose(-1, -2)
        queries = (attention.queries(rows) @ key).flatten(2, 3)  # (B, T, n_head, d)
        shares = (queries @ memory.transpose(-1, -2) * weights).softmax(dim=-1) * weights
        mixed = (shares @ memory).unflatten(2, (attention.n_kv_head, -1)) @ value
        return attention.output(mixed.flatten(2))


class StreamChaptersBlock(StreamModule):
    def __init__(self, block: ChaptersBlock, scope: Scope) -> None:
        super().__init__()
        self.block = block
        self.attention = scope.stream(block.attention, "attention")

    def attend(self, x: Tensor, call: Call) -> Tensor:
        return x + self.attention(self.block.attention_norm(x), call)

    def forward(self, x: Tensor, bank: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d); `bank` (chapters, tokens * d)."""
        return self.block.finish(self.attend(x, call))


class StreamChaptersMemoryBlock(StreamChaptersBlock):
    def __init__(self, block: ChaptersMemoryBlock, scope: Scope) -> None:
        super().__init__(block, scope)
        self.router = scope.stream(block.router, "routing")
        self.norm, self.memory = block.memory_norm, AbsorbedChapterAttention(block.memory)

    def forward(self, x: Tensor, bank: Tensor, call: Call) -> Tensor:
        ids, weights = self.router(x, call)
        x = self.attend(x, call)
        chapters = nn.functional.embedding(ids, bank).unflatten(-1, (-1, x.shape[-1]))  # (B, T, chapters, tokens, d)
        of_rows = weights.unsqueeze(-1).expand(chapters.shape[:4]).flatten(2)
        return self.block.finish(x + self.memory(self.norm(x), chapters.flatten(2, 3), of_rows))


class StreamChapters(Root):
    bounded = True

    def __init__(self, model: Chapters, scope: Scope) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("bank", model.chapters())
        self.blocks = nn.ModuleList(scope.stream(block, f"layer{i:02}") for i, block in enumerate(model.blocks))

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        x = self.model.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.bank, call)
        return self.model.head(x)


RULES = (
    TypeRule("chapters", "embedding, blocks, head; the bank is made ready once", Chapters, StreamChapters),
    TypeRule(
        "chapters-memory",
        "projections of chapters are exchanged with sums over them",
        ChaptersMemoryBlock,
        StreamChaptersMemoryBlock,
    ),
    TypeRule("chapters-block", "composes the streaming forms of its parts", ChaptersBlock, StreamChaptersBlock),
    TypeRule("rolling-routing", "a window of inputs is a ring of rows", Router, RollingRouter),
)
