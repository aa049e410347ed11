"""Memory rows of a model that runs by segments: read rows before the tokens, write rows after them.

Given                                              Becomes
  rows = [M ; x ; M]   (B, n + T + n, d)             the same keys and values, made in three kinds of calls:
  one pass over all rows of a segment                  tokens (decode, prefill)   see read rows, tokens so far
  next M = final rows of the last n                    `close`, write rows        see read rows, all tokens
                                                       `close`, read rows         of the next segment, from the new M

States: memory (B, n, d), replace; for each layer read.key, read.value (B, H, n, d_h), replace, and
key, value (B, H, T, d_h), append, the tokens of this segment: token p of it lies in slot p.

Exact because tokens never see write rows, nor read rows tokens. In the first segment memory and the read rows'
keys depend on the weights alone: they are constants, taken where `position` lies in that segment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule


class SegmentCache(StreamModule):
    """Keys and values of one layer's segment so far; `key`, `value` (1, H, n, d_h) are those of its first read rows."""

    first_key: Tensor
    first_value: Tensor

    def __init__(self, key: Tensor, value: Tensor, segment: int, scope: Scope) -> None:
        super().__init__()
        self.segment = segment
        self.register_buffer("first_key", key)
        self.register_buffer("first_value", value)
        _, heads, rows, width = key.shape
        self.read_key = scope.state("read.key", heads, rows, width)
        self.read_value = scope.state("read.value", heads, rows, width)
        self.key = scope.state("key", heads, segment, width, update="append", time_axis=2)
        self.value = scope.state("value", heads, segment, width, update="append", time_axis=2)
        self.own_states = (self.read_key, self.read_value, self.key, self.value)

    def begin(self, key: Tensor, value: Tensor, call: Call) -> None:
        """The read rows of the next segment."""
        call.write(self.read_key, key)
        call.write(self.read_value, value)

    def append(self, key: Tensor, value: Tensor, call: Call) -> None:
        """More tokens of this segment."""
        call.write(self.key, key)
        call.write(self.value, value)

    def read_rows(self, call: Call) -> tuple[Tensor, Tensor]:
        """Keys and values of this segment's read rows."""
        first = in_first_segment(self.segment, call)[:, None, None, None]
        read_key, read_value = call.read(self.read_key), call.read(self.read_value)
        return torch.where(first, self.first_key, read_key), torch.where(first, self.first_value, read_value)

    def tokens(self, call: Call) -> tuple[Tensor, Tensor]:
        """Keys and values of this segment's tokens before the call; in `close`, of all of them."""
        return call.read(self.key), call.read(self.value)


class SegmentLayer(StreamModule):
    """One layer. `rows` is whatever goes from layer to layer."""

    cache: SegmentCache

    def forward(self, rows: Any, call: Call) -> Any:
        """Tokens of this call."""
        raise NotImplementedError

    def write(self, rows: Any, call: Call) -> Any:
        """Write rows, when all tokens of the segment are there."""
        raise NotImplementedError

    def open(self, rows: Any) -> tuple[Any, Tensor, Tensor]:
        """Read rows, which see nothing but themselves, and their keys and values (B, H, n, d_h)."""
        raise NotImplementedError

    def read(self, rows: Any, call: Call) -> Any:
        """Read rows of the next segment, whose keys and values are kept for it."""
        rows, key, value = self.open(rows)
        self.cache.begin(key, value, call)
        return rows


class SegmentRoot(Root):
    """`memory` (n, d) is that of a new stream. Subclasses make rows of memory and of tokens, and add the layers."""

    layers: nn.ModuleList
    first_memory: Tensor

    def __init__(self, memory: Tensor, segment: int, scope: Scope) -> None:
        super().__init__()
        self.segment = segment
        self.register_buffer("first_memory", memory.detach())
        self.memory = scope.state("memory", *memory.shape)
        self.own_states = (self.memory,)

    def token_rows(self, tokens: Tensor, call: Call) -> Any:
        raise NotImplementedError

    def read_rows(self, memory: Tensor) -> Any:
        raise NotImplementedError

    def write_rows(self, call: Call) -> Any:
        raise NotImplementedError

    def finish(self, rows: Any) -> Tensor:
        """What leaves the last layer, as it is handed on and as logits are made of it: (B, S, d)."""
        raise NotImplementedError

    def logits(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def remembered(self, call: Call) -> Tensor:
        """The memory of this segment, (B, n, d)."""
        assert self.segment is not None
        first = in_first_segment(self.segment, call)[:, None, None]
        return torch.where(first, self.first_memory, call.read(self.memory))

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        rows = self.token_rows(tokens, call)
        for layer in self.layers:
            rows = layer(rows, call)
        return self.logits(self.finish(rows))

    def close(self, call: Call) -> None:
        layers = cast(Iterable[SegmentLayer], self.layers)
        rows = self.write_rows(call)
        for layer in layers:
            rows = layer.write(rows, call)
        memory = self.finish(rows)
        call.write(self.memory, memory)
        rows = self.read_rows(memory)
        for layer in layers:
            rows = layer.read(rows, call)


def in_first_segment(segment: int, call: Call) -> Tensor:
    """Which streams are in their first segment, (B,)."""
    return call.once("in first segment", lambda: call.position < segment)


def phase(segment: int, call: Call) -> Tensor:
    """Tokens of this segment before the call, (B,)."""
    return call.once("phase", lambda: call.position % segment)


def unwritten(segment: int, call: Call) -> Tensor:
    """Slots of this segment that hold no token of it yet, (B, 1, 1, segment)."""

    def compute() -> Tensor:
        before = phase(segment, call)
        return (torch.arange(segment, device=before.device)[None] >= before[:, None])[:, None, None]

    return call.once("unwritten", compute)
