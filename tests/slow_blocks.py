"""Transformer blocks in numpy, one row and one head at a time: what models are compared with that share no code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from mscompile.contracts import Array

erf = np.vectorize(math.erf)
Rows = Sequence[Array]
Turn = Callable[[Array, int], Array]  # a head's query or key (d_head,) with its row number -> the same, turned


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by name, and what is made of them."""

    tensors: dict[str, Array]

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        return cls({name: tensor.numpy() for name, tensor in model.state_dict().items()})

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name]

    def linear(self, name: str, row: Array) -> Array:
        return self[f"{name}.weight"] @ row + self[f"{name}.bias"]

    def norm(self, name: str, row: Array) -> Array:
        centred = row - row.mean()
        return centred / np.sqrt((centred**2).mean() + 1e-5) * self[f"{name}.weight"] + self[f"{name}.bias"]

    def feed_forward(self, name: str, row: Array) -> Array:
        inner = self.linear(f"{name}.0", row)
        return self.linear(f"{name}.2", inner * (1 + erf(inner / math.sqrt(2))) / 2)

    def attention(self, name: str, query: Array, rows: Sequence[Rows], turn: Turn | None = None) -> Array:
        """A row attends, with head h, to `rows[h]`, which follow one another up to the query's own place."""
        heads, width = len(rows), len(query) // len(rows)
        mixed = []
        for h in range(heads):
            head = slice(h * width, (h + 1) * width)
            q = self.linear(f"{name}.query", query)[head]
            keys = [self.linear(f"{name}.key", row)[head] for row in rows[h]]
            if turn is not None:
                q, keys = turn(q, len(keys) - 1), [turn(key, i) for i, key in enumerate(keys)]
            scores = np.exp([q @ key / math.sqrt(width) for key in keys])
            values = [self.linear(f"{name}.value", row)[head] for row in rows[h]]
            mixed.append(sum(score * value for score, value in zip(scores / scores.sum(), values, strict=True)))
        return self.linear(f"{name}.output", np.concatenate(mixed))

    def finish(self, name: str, x: Array, attended: Array) -> Array:
        x = x + attended
        return x + self.feed_forward(f"{name}.feed_forward", self.norm(f"{name}.feed_forward_norm", x))

    def stack(self, name: str, rows: Rows, layers: int, heads: int) -> list[Array]:
        """Pre-norm blocks in which each row sees those up to itself."""
        rows = list(rows)
        for layer in range(layers):
            block = f"{name}.blocks.{layer}"
            normed = [self.norm(f"{block}.attention_norm", row) for row in rows]
            seen = [[normed[: i + 1]] * heads for i in range(len(rows))]
            rows = [
                self.finish(block, row, self.attention(f"{block}.attention", normed[i], seen[i]))
                for i, row in enumerate(rows)
            ]
        return list(rows)

    def logits(self, rows: Rows) -> Array:
        return np.array([self.linear("head", self.norm("norm", row)) for row in rows])
