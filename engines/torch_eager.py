"""The original model as a session: the reference of every parity check and the baseline of every benchmark.

It goes on as the model's own code does (`ReferenceModel.advance`): Transformer-XL carries its memories,
Hourglass recomputes the whole prefix, since its authors' code has no incremental decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mscompile.contracts import Array, Snapshot, check_tokens
from mscompile.errors import InputError
from mscompile.models.family import ReferenceModel


@dataclass
class _Group:
    """Rows that were last reset together, and what the model carries for them."""

    rows: list[int]
    carry: Any = None
    position: int = 0


class TorchSession:
    """A `Session` over the reference model; it has no state tensors to snapshot."""

    def __init__(self, model: ReferenceModel, batch: int = 1) -> None:
        self.model, self._batch = model, batch
        self._groups = [_Group(list(range(batch)))]

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def position(self) -> Array:
        position = np.zeros(self._batch, dtype=np.int64)
        for group in self._groups:
            position[group.rows] = group.position
        return position

    def step(self, tokens: Any) -> Array:
        array = check_tokens(tokens, self._batch, self.model.config.vocab_size)
        logits = np.empty((*array.shape, self.model.config.vocab_size), dtype=np.float32)
        with torch.inference_mode():
            for group in self._groups:
                new, group.carry = self.model.advance(torch.from_numpy(array[group.rows]), group.carry)
                logits[group.rows] = new.numpy()
                group.position += array.shape[1]
        return logits

    def reset(self, rows: Sequence[int] | None = None) -> None:
        chosen = sorted(set(range(self._batch) if rows is None else rows))
        for group in self._groups:
            kept = [i for i, row in enumerate(group.rows) if row not in chosen]
            if len(kept) < len(group.rows):
                group.carry = self.model.select(group.carry, kept) if kept else None
                group.rows = [group.rows[i] for i in kept]
        self._groups = [group for group in self._groups if group.rows] + [_Group(chosen)]

    def state(self) -> Snapshot:
        raise InputError("the original model keeps no named states; use an exported engine for snapshots")

    def restore(self, snapshot: Snapshot) -> None:
        raise InputError("the original model keeps no named states; use an exported engine for snapshots")


def original(model: ReferenceModel) -> Callable[[Array], Array]:
    """Logits (B, N, V) of whole streams (B, N) by the model's own forward: what every stream must equal."""

    def full(tokens: Array) -> Array:
        with torch.inference_mode():
            logits: Array = model.full(torch.from_numpy(np.ascontiguousarray(tokens))).numpy()
        return logits

    return full
