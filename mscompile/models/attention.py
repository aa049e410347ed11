"""Plain softmax attention, and the ordinary transformer blocks that many families are made of.

    scores(i, j) = q_i . k_j / sqrt(d_head)      over the keys j that query i may see

Positions are not of its concern, but for `rotary` (Su et al., arXiv 2104.09864): queries and keys are then turned
by their row numbers before they meet, so that a key, once made, never changes.

Axes: B batch, T query rows, S key rows, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Run:
    """A run of keys: k, v (B, H, S, d_head); `hidden` (1 or B, 1 or H, T or 1, S) are not seen, None if all are."""

    key: Tensor
    value: Tensor
    hidden: Tensor | None = None


def attend(query: Tensor, runs: Sequence[Run], scale: float | None = None) -> Tensor:
    """One softmax over several runs of keys; (B, H, T, d_head) -> (B, H, T, d_head).

    A query that sees nothing gets the mean of all values: callers that allow this must not use it.
    Fewer heads of keys than of queries: each serves as many neighbouring query heads, as rows of one product.
    """
    heads, group = query.shape[1], query.shape[1] // runs[0].key.shape[1]
    query = query * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if group > 1:
        query = query.unflatten(1, (heads // group, group)).flatten(2, 3)
    mixed = _mix(query, runs, group)
    return mixed if group == 1 else mixed.unflatten(2, (group, -1)).flatten(1, 2)


def _mix(query: Tensor, runs: Sequence[Run], group: int) -> Tensor:
    scores = [_hide(query @ run.key.transpose(-1, -2), run.hidden, group) for run in runs]
    if len(runs) == 1:
        return scores[0].softmax(dim=-1) @ runs[0].value
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).split([run.key.shape[2] for run in runs], dim=-1)
    first, *others = (weight @ run.value for weight, run in zip(weights, runs, strict=True))
    return reduce(torch.add, others, first)


def _hide(scores: Tensor, hidden: Tensor | None, group: int) -> Tensor:
    if hidden is None:
        return scores
    lowest = torch.finfo(scores.dtype).min
    if group == 1:
        return scores.masked_fill(hidden, lowest)
    return scores.unflatten(2, (group, -1)).masked_fill(hidden[:, :, None], lowest).flatten(2, 3)


def rotated(rows: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding: rows (B, H, S, d_head) turned by `positions` (1 or B, S), halves as pairs."""
    half = rows.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=rows.device, dtype=rows.dtype) / half)
    angle = (positions.to(rows.dtype)[:, :, None] * frequency)[:, None]  # (1 or B, 1, S, half)
    first, second = rows[..., :half], rows[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def row_numbers(rows: Tensor) -> Tensor:
    """0 .. S - 1 for rows (B, S, ...), as (1, S)."""
    return torch.arange(rows.shape[1], device=rows.device)[None]


def later(rows: int, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """What causal attention hides within one run: (1, 1, T, T), the future and what is `window` rows back or more."""
    age = torch.arange(rows, device=device)[:, None] - torch.arange(rows, device=device)[None, :]
    hidden = age < 0
    return (hidden if window is None else hidden | (age >= window))[None, None]


class Attention(nn.Module):
    """Multi-head attention of rows to rows; causal self-attention where it is called with one argument.

    `window` is how many rows a query sees, its own included; None is all. `rotary` turns queries and keys by their
    row numbers, with `rotary_base`. `d_context` is the width of the rows that are attended to, where it is another
    one. With `n_kv_head` below `n_head` neighbouring query heads share keys and values (arXiv 2305.13245).
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        bias: bool = True,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        window: int | None = None,
        d_context: int | None = None,
        n_kv_head: int | None = None,
        d_head: int | None = None,
    ) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = n_head, n_kv_head or n_head, d_head or d_model // n_head
        self.rotary, self.rotary_base, self.window = rotary, rotary_base, window
        self.query = nn.Linear(d_model, n_head * self.d_head, bias=bias)
        self.key = nn.Linear(d_context or d_model, self.n_kv_head * self.d_head, bias=bias)
        self.value = nn.Linear(d_context or d_model, self.n_kv_head * self.d_head, bias=bias)
        self.output = nn.Linear(n_head * self.d_head, d_model, bias=bias)

    def heads(self, rows: Tensor) -> Tensor:
        """(B, S, heads * d_head) -> (B, heads, S, d_head)."""
        return rows.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def merge(self, mixed: Tensor) -> Tensor:
        """(B, H, T, d_head) -> (B, T, d_model), projected."""
        return self.output(mixed.transpose(1, 2).flatten(-2))

    def queries(self, rows: Tensor, positions: Tensor) -> Tensor:
        """(B, T, d_model) with row numbers (1 or B, T) -> (B, H, T, d_head)."""
        query = self.heads(self.query(rows))
        return rotated(query, positions, self.rotary_base) if self.rotary else query

    def keys(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, n_kv_head, S, d_head) each, of rows (B, S, d) with row numbers (1 or B, S)."""
        key = self.heads(self.key(rows))
        return (rotated(key, positions, self.rotary_base) if self.rotary else key), self.heads(self.value(rows))

    def forward(self, rows: Tensor, context: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """(B, T, d_model) -> (B, T, d_model). With `context` (B, S, d), `hidden` says what is not seen."""
        if context is None:
            context, hidden = rows, later(rows.shape[1], self.window, rows.device)
        run = Run(*self.keys(context, row_numbers(context)), hidden)
        return self.merge(attend(self.queries(rows, row_numbers(rows)), [run]))


def feed_forward(d_model: int, d_ff: int, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_model, d_ff), activation(), nn.Linear(d_ff, d_model))


class Block(nn.Module):
    """Pre-norm: `x = x + attention(norm(x)); x + feed_forward(norm(x))`."""

    def __init__(self, d_model: int, n_head: int, d_ff: int, **attention: bool | int | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_head, **attention)  # type: ignore[arg-type]
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward: nn.Module = feed_forward(d_model, d_ff)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residuals and the feed-forward: (B, T, d) each."""
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d), causal."""
        return self.finish(x, self.attention(self.attention_norm(x)))


class Stack(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
