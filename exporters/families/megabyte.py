"""MEGABYTE: the global model runs when a patch is complete, the local one for every byte.

Given                                              Becomes
  global rows    (B, K, P d_global)                  one row at the last byte of a patch; states global.blockNN.key,
                                                     .value (B, H, context / P, d_head), append
  spread         (B, K, P, d_local)                  state spread (B, P, d_local), replace: for the patch to come
  local rows     (B K, P, d_local)                   one row a byte, the first one of a patch at the last byte before
                                                     it; states local.blockNN.key, .value (B, H, P, d_head), append,
                                                     see exporters/groups.py

Row 0 of the global model and row 0 of the first patch come before the first byte, from learned paddings. They are
constants, which stand beside the rings; that of the first patch is hidden from all others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters.groups import GroupKeys, GroupTokens, in_streams, row_of
from exporters.kv_cache import KeyCache, numbered
from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.errors import Refusal
from mscompile.models.attention import Block, Run, attend, later, row_numbers
from mscompile.models.megabyte import Megabyte


class _StartedBlock(StreamModule):
    """A block whose rows follow a constant one, `start` (1, 1, d); `after_start` is what the block makes of that."""

    start_key: Tensor  # (1, H, 1, d_head)
    start_value: Tensor

    def __init__(self, block: Block, start: Tensor) -> None:
        super().__init__()
        self.block, self.attention = block, block.attention
        key, value = block.attention.keys(block.attention_norm(start), row_numbers(start))
        self.register_buffer("start_key", key.detach(), persistent=False)
        self.register_buffer("start_value", value.detach(), persistent=False)
        self.after_start = block(start).detach()

    def attend(self, x: Tensor, rows: Tensor, numbers: Tensor, runs: list[Run]) -> Tensor:
        """The block's output for x (B, T, d), whose normalised rows have these numbers (1 or B, T)."""
        return self.block.finish(x, self.attention.merge(attend(self.attention.queries(rows, numbers), runs)))


class GlobalBlock(_StartedBlock):
    def __init__(self, block: Block, start: Tensor, scope: Scope) -> None:
        super().__init__(block, start)
        self.cache = KeyCache(self.attention.n_kv_head, self.attention.d_head, None, scope)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """The rows of the patches that end in this call: (B, G, d) -> (B, G, d)."""
        rows, numbers = self.block.attention_norm(x), numbered(x, self.cache.factor, call) + 1
        key, value = self.attention.keys(rows, numbers)
        runs = [Run(self.start_key, self.start_value), *self.cache.runs(key, value, call)]
        return self.attend(x, rows, numbers, runs)


class LocalBlock(_StartedBlock):
    def __init__(self, block: Block, start: Tensor, size: int, scope: Scope) -> None:
        super().__init__(block, start)
        self.size = size
        self.keys = GroupKeys(self.attention.n_kv_head, self.attention.d_head, size, scope, ahead=1)

    def first(self, x: Tensor, call: Call) -> Tensor:
        """The first row of the patch to come, which sees itself alone: (B, 1, d) -> (B, 1, d)."""
        rows, numbers = self.block.attention_norm(x), row_numbers(x)
        key, value = self.attention.keys(rows, numbers)
        self.keys.remember(key, value, call)
        return self.attend(x, rows, numbers, [Run(key, value)])

    def next(self, x: Tensor, call: Call) -> Tensor:
        """A later row of the patch, (B, 1, d) -> (B, 1, d)."""
        rows, numbers = self.block.attention_norm(x), self.keys.index(call)[:, None]
        key, value = self.attention.keys(rows, numbers)
        self.keys.remember(key, value, call)
        later_patch = (call.position >= self.size)[:, None, None, None]
        start = Run(self.start_key, self.start_value, later_patch)
        return self.attend(x, rows, numbers, [start, self.keys.remembered(call), Run(key, value)])

    def patches(self, x: Tensor, count: int, call: Call) -> Tensor:
        """`count` whole patches a stream, of which the first has begun before and of the last one only row 0 is new."""
        rows, numbers = self.block.attention_norm(x), row_numbers(x)
        key, value = self.attention.keys(rows, numbers)
        new = slice(1, (count - 1) * self.size + 1)
        self.keys.remember(in_streams(key, count)[:, :, new], in_streams(value, count)[:, :, new], call)
        return self.attend(x, rows, numbers, [Run(key, value, later(x.shape[1], device=x.device))])


class StreamMegabyte(Root):
    ticks = "end"
    bounded = True
    first_spread: Tensor  # (1, P, d_local), of the patch at the start of a stream

    def __init__(self, model: Megabyte, scope: Scope) -> None:
        super().__init__()
        config = model.config
        self.model, self.size = model, config.patch_size
        self.factors = (self.size,)
        if scope.context is not None and scope.context > config.context:
            raise Refusal(
                f"the model has {config.context} positions, so a stream of {scope.context} tokens is too long; "
                f"export with --context {config.context} or less"
            )
        self.spread = scope.state("spread", self.size, config.d_local)
        self.own_states = (self.spread,)
        self.patch = GroupTokens(self.size, scope)
        with torch.no_grad():
            self._start(scope)

    def _start(self, scope: Scope) -> None:
        """The blocks, and what they make of the paddings."""
        model, row = self.model, self.model.global_pad[None, None]
        self.global_blocks, self.local_blocks = nn.ModuleList(), nn.ModuleList()
        for i, block in enumerate(model.global_model.blocks):
            part = GlobalBlock(block, row, scope.child(f"global.block{i:02}", self.size))  # type: ignore[arg-type]
            self.global_blocks.append(part)
            row = part.after_start
        self.register_buffer("first_spread", model.spread(row)[:, 0], persistent=False)
        row = self.first_spread[:, :1] + model.local_pad
        for i, block in enumerate(model.local_model.blocks):
            local = LocalBlock(block, row, self.size, scope.child(f"local.block{i:02}"))  # type: ignore[arg-type]
            self.local_blocks.append(local)
            row = local.after_start

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        patch = self.patch(tokens, call)
        if patch is None:
            place = (call.position + 1) % self.size  # in range for rows of other phases, too, which run along
            x = row_of(self._spread(call), place) + self.model.local_embedding(tokens)
            for block in self.local_blocks:
                x = block.next(x, call)  # type: ignore[operator]
            return self.model.head(x)
        spread = self._global(patch, call)
        if call.single:
            x = spread[:, 0, :1] + self.model.local_pad
            for block in self.local_blocks:
                x = block.first(x, call)  # type: ignore[operator]
            return self.model.head(x)
        return self._patches(tokens, torch.cat([self._spread(call)[:, None], spread], dim=1), call)

    def _spread(self, call: Call) -> Tensor:
        """Of the patch that this call begins in, (B, P, d_local)."""
        at_start = (call.position < self.size)[:, None, None]
        return torch.where(at_start, self.first_spread, call.read(self.spread))

    def _global(self, patch: Tensor, call: Call) -> Tensor:
        """Whole patches (B, G P) -> what the patches after them get, (B, G, P, d_local)."""
        begin = call.rows_before(self.size) * self.size
        x = self.model.patches(patch, begin[:, None] + row_numbers(patch))
        for block in self.global_blocks:
            x = block(x, call)
        spread = self.model.spread(x)
        call.write(self.spread, spread[:, -1])
        return spread

    def _patches(self, tokens: Tensor, spread: Tensor, call: Call) -> Tensor:
        """Whole patches (B, G P), and what they and the one after them get, (B, G + 1, P, d_local)."""
        filled = nn.functional.pad(tokens, (0, self.size))
        x = self.model.local_rows(filled, spread)
        for block in self.local_blocks:
            x = block.patches(x, spread.shape[1], call)  # type: ignore[operator]
        return self.model.head(x.reshape(*filled.shape, -1)[:, 1 : tokens.shape[1] + 1])


RULES = (TypeRule("megabyte", "the global model runs when a patch is complete", Megabyte, StreamMegabyte),)
