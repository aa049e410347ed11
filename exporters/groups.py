"""What models that run inside groups of rows, such as patches of bytes, remember of the group they are in.

Given                                              Becomes
  groups of n rows, each for itself                  states of n rows, append: a new group takes the slots of the one
  (B, G n, ..) as (B G, n, ..)                       before; what is older is hidden

How many rows of its group a row follows is known from the position, so nothing is cleared where a group begins. A
call of many tokens takes whole groups, which need nothing remembered; it leaves behind what single tokens would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.stream import Call, Scope, StreamModule
from mscompile.models.attention import Run


def row_of(rows: Tensor, index: Tensor) -> Tensor:
    """Row `index` (B,) of rows (B, S, d), as (B, 1, d)."""
    return rows.gather(1, index[:, None, None].expand(-1, 1, rows.shape[2]))


def in_streams(rows: Tensor, count: Tensor | int) -> Tensor:
    """Keys or values of `count` groups a stream, (B count, H, S, d_head) -> (B, H, count S, d_head)."""
    return rows.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)


class GroupTokens(StreamModule):
    """Collects the tokens of a group of `size`."""

    def __init__(self, size: int, scope: Scope) -> None:
        super().__init__()
        self.size = size
        self.tokens = scope.state("tokens", size, update="append", dtype=torch.int64)
        self.own_states = (self.tokens,)

    def forward(self, tokens: Tensor, call: Call) -> Tensor | None:
        """Tokens (B, T) -> those of the groups that end in this call, (B, G size); None where none does."""
        call.write(self.tokens, tokens.clone())  # an output of a graph cannot be its input
        if not call.single:
            return tokens
        if not call.due(self.size):
            return None
        return torch.cat([call.read(self.tokens)[:, : self.size - 1], tokens], dim=1)


class GroupKeys(StreamModule):
    """Keys and values of the rows so far of a group of `size` rows.

    Rows may be `ahead` of the groups of their tokens: then the first `ahead` rows of a group come with the last tokens
    of the one before.
    """

    def __init__(self, n_head: int, d_head: int, size: int, scope: Scope, ahead: int = 0) -> None:
        super().__init__()
        self.factor, self.size, self.ahead = scope.factor, size, ahead
        self.key = scope.state("key", n_head, size, d_head, update="append", time_axis=2)
        self.value = scope.state("value", n_head, size, d_head, update="append", time_axis=2)
        self.own_states = (self.key, self.value)

    def index(self, call: Call) -> Tensor:
        """Where in its group the next row stands, (B,)."""
        where = ("index in group", self.factor, self.size, self.ahead)
        return call.once(where, lambda: (call.rows_before(self.factor) + self.ahead) % self.size)

    def remember(self, key: Tensor, value: Tensor, call: Call) -> None:
        """New rows, (B, H, S, d_head)."""
        call.write(self.key, key)
        call.write(self.value, value)

    def remembered(self, call: Call) -> Run:
        """The rows of its group before the single row of this call."""
        key = call.read(self.key)
        hidden = call.once(("group", self.factor, self.size, self.ahead), lambda: self._hidden(key.shape[2], call))
        return Run(key, call.read(self.value), hidden)

    def _hidden(self, slots: int, call: Call) -> Tensor:
        """Slots without a row of this group, (B, 1, 1, slots)."""
        before = call.rows_before(self.factor)[:, None]
        age = (before - 1 - torch.arange(slots, device=before.device)) % self.size + 1  # 1 is the newest
        return ((age > self.index(call)[:, None]) | (age > before))[:, None, None]
