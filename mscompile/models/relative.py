"""Relative attention of Transformer-XL (Dai et al., arXiv 1901.02860), as all families here use it.

    score(i, j) = ((q_i + u) . k_j + (q_i + v) . r_n(i,j)) / sqrt(d_head)

`Geometry` is the one place that says which key a query may see and how far away it is. With queries
and keys counted in rows of their own scale,

    n(i, j) = query_step * i - key_step * j + offset      visible: 0 <= n < window
    r_n     = W_r sinusoid(scale * min(n - offset, clamp))

which covers attention within one scale (steps 1, 1), shortening (a coarse query over fine keys) and
upsampling (a fine query over coarse keys): causality is `n >= 0` in each.

Axes: B batch, T query rows, S key rows, H heads, D distances in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """Where keys lie as seen from queries; see the module's text for the formula."""

    query_step: int = 1
    key_step: int = 1
    offset: int = 0
    scale: int = 1  # tokens per row, negative for the key-minus-query sign of Hourglass
    clamp: int | None = None  # distances beyond this are treated as this one (`clamp_len`)
    window: int | None = None  # number of visible keys, the query's own included (`same_length`)

    def index(self, query: Tensor, key: Tensor) -> Tensor:
        """n(i, j) for broadcastable row numbers."""
        return self.query_step * query - self.key_step * key + self.offset

    def visible(self, index: Tensor) -> Tensor:
        causal = index >= 0
        return causal if self.window is None else causal & (index < self.window)

    def distances(self, count: int, device: torch.device | None = None) -> Tensor:
        """Signed distances of table entries n = 0 .. count-1, in tokens, shape (D,)."""
        rows = torch.arange(count, device=device) - self.offset
        if self.clamp is not None:
            rows = rows.clamp(max=self.clamp)
        return self.scale * rows

    def table_size(self, last_query: int) -> int:
        """Table entries that queries up to row `last_query` can look at."""
        reach = self.query_step * last_query + self.offset + 1
        return reach if self.window is None else min(reach, self.window)


def sinusoid(distance: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`[sin | cos]` encoding of signed distances (D,) -> (D, width), halves concatenated as published."""
    frequency = 1.0 / 10000 ** (torch.arange(0, width, 2, device=distance.device, dtype=dtype) / width)
    angle = distance.to(dtype)[:, None] * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


@dataclass(frozen=True)
class Biases:
    """The two global biases, shared by every layer: u (content) and v (position), each (H, d_head)."""

    content: Tensor
    position: Tensor


@dataclass(frozen=True)
class Sight:
    """How queries see a run of keys: table entries and what is hidden, (1 or B, 1, T, S) each.

    `index` (S,) holds for every query; None says that the table already has one entry a key, in the order of
    the keys; of several indices the entries are summed. `hidden` None says that every key is seen.
    """

    index: Tensor | tuple[Tensor, ...] | None
    hidden: Tensor | None

    @classmethod
    def of(cls, index: Tensor, visible: Tensor, table_size: int) -> Sight:
        """From n(i, j) and visibility, (1 or B, T, S); entries outside the table belong to hidden keys."""
        return cls(index.clamp(0, table_size - 1)[:, None], ~visible[:, None])


@dataclass(frozen=True)
class Keys:
    """A run of keys: k, v (B, H, S, d_head), and how they are seen."""

    key: Tensor
    value: Tensor
    sight: Sight


def attend(
    query: Tensor,
    runs: Sequence[Keys],
    table: Tensor,
    biases: Biases | None,
    widen: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One softmax over several runs of keys.

    `query` is (B, H, T, d_head), `table` the position keys (H, d_head, D); None stands for biases of 0.
    Returns (B, H, T, d_head). `widen` adds entries to the position scores (B, H, T, D), for pairs that no distance
    describes.
    """
    scale = 1.0 / math.sqrt(query.shape[-1])
    by_content = by_position = query
    if biases is not None:
        by_content, by_position = query + biases.content[None, :, None, :], query + biases.position[None, :, None, :]
    by_content, by_position = by_content * scale, by_position * scale @ table  # the second (B, H, T, D)
    by_position = by_position if widen is None else widen(by_position)
    scores = [_scores(by_content, by_position, run) for run in runs]
    if len(runs) == 1:
        return scores[0].softmax(dim=-1) @ runs[0].value
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).split([run.key.shape[2] for run in runs], dim=-1)
    first, *others = (weight @ run.value for weight, run in zip(weights, runs, strict=True))
    return reduce(torch.add, others, first)


def _scores(by_content: Tensor, by_position: Tensor, run: Keys) -> Tensor:
    index, hidden = run.sight.index, run.sight.hidden
    if index is not None:
        parts = index if isinstance(index, tuple) else (index,)
        by_position = reduce(torch.add, (_entries(by_position, part) for part in parts))
    scores = by_content @ run.key.transpose(-1, -2) + by_position
    return scores if hidden is None else scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def _entries(by_position: Tensor, index: Tensor) -> Tensor:
    """Of the scores of all table entries (B, H, T, D) those of the keys, (B, H, T, S)."""
    if index.dim() == 1:
        return by_position.index_select(3, index)
    return by_position.gather(3, index.expand(*by_position.shape[:2], -1, -1))


class RelativeAttention(nn.Module):
    """Multi-head attention with relative positions; biases u and v come with each call.

    `forward(x, context, biases, query_start)`: x (B, T, d), context (B, S, d) -> (B, T, d).
    `query_start` is the row number of the first query, where the first key is row 0.
    """

    def __init__(self, d_model: int, n_head: int, d_head: int, bias: bool, geometry: Geometry) -> None:
        super().__init__()
        self.n_head, self.d_head, self.geometry = n_head, d_head, geometry
        width = n_head * d_head
        self.query = nn.Linear(d_model, width, bias=bias)
        self.key = nn.Linear(d_model, width, bias=bias)
        self.value = nn.Linear(d_model, width, bias=bias)
        self.position = nn.Linear(d_model, width, bias=bias)
        self.output = nn.Linear(width, d_model, bias=bias)

    def heads(self, rows: Tensor) -> Tensor:
        """(B, S, H * d_head) -> (B, H, S, d_head)."""
        return rows.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)

    def merge(self, mixed: Tensor) -> Tensor:
        """(B, H, T, d_head) -> (B, T, d_model)."""
        return self.output(mixed.transpose(1, 2).flatten(-2))

    def encode(self, distance: Tensor) -> Tensor:
        """Signed distances (D,) -> sinusoids (D, d_model), the same for every layer."""
        return sinusoid(distance, self.position.in_features, self.position.weight.dtype)

    def table(self, encoded: Tensor) -> Tensor:
        """Position keys W_r R, ready for a product with queries: sinusoids (D, d_model) -> (H, d_head, D)."""
        return self.heads(self.position(encoded)[None])[0].transpose(-1, -2)

    def forward(self, x: Tensor, context: Tensor, biases: Biases, query_start: int = 0) -> Tensor:
        rows, columns, geometry = x.shape[1], context.shape[1], self.geometry
        query_rows = torch.arange(query_start, query_start + rows, device=x.device)
        index = geometry.index(query_rows[:, None], torch.arange(columns, device=x.device)[None, :])[None]
        table_size = geometry.table_size(query_start + rows - 1)
        sight = Sight.of(index, geometry.visible(index), table_size)
        return self.mix(x, context, sight, geometry.distances(table_size, x.device), biases)

    def mix(self, x: Tensor, context: Tensor, sight: Sight, distances: Tensor, biases: Biases) -> Tensor:
        """x (B, T, d) attends to context (B, S, d) as `sight` says; `distances` (D,) are those of the table."""
        keys = Keys(self.heads(self.key(context)), self.heads(self.value(context)), sight)
        table = self.table(self.encode(distances))
        return self.merge(attend(self.heads(self.query(x)), [keys], table, biases))
