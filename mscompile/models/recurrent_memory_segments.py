"""What models share that run segment by segment and hand memory from one to the next.

    logits, memory = cell(tokens of one segment, memory)          memory: any number of tensors, batch first

A last segment that is shorter is the beginning of a whole one: its logits are, its memory is not handed on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mscompile.models.family import ReferenceModel

Memory = tuple[Tensor, ...]


class SegmentModel(ReferenceModel):
    @property
    def segment(self) -> int:
        """Tokens of a segment."""
        raise NotImplementedError

    def begin(self, batch: int) -> Memory:
        """The memory of new streams."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One segment: tokens (B, T <= segment) -> logits (B, T, V), and the memory of the next segment."""
        raise NotImplementedError

    def full(self, tokens: Tensor) -> Tensor:
        logits, _ = self.advance(tokens)
        return logits

    def advance(self, tokens: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        """Segment by segment, as the published loops do; a segment begun before is run again from its start."""
        memory, begun = carry or (self.begin(tokens.shape[0]), tokens[:, :0])
        logits, rest = [], begun
        for segment in torch.cat([begun, tokens], dim=1).split(self.segment, dim=1):
            segment_logits, next_memory = self(segment, memory)
            logits.append(segment_logits)
            whole = segment.shape[1] == self.segment
            memory, rest = (next_memory, segment[:, :0]) if whole else (memory, segment)
        return torch.cat(logits, dim=1)[:, -tokens.shape[1] :], (memory, rest)

    def select(self, carry: Any, rows: list[int]) -> Any:
        memory, begun = carry
        return tuple(tensor[rows] for tensor in memory), begun[rows]


def repeated(rows: Tensor, batch: int) -> Tensor:
    """Learned rows (n, d) for every stream, (batch, n, d)."""
    return rows[None].expand(batch, -1, -1)


def split_rows(rows: Tensor, counts: Iterable[int]) -> list[Tensor]:
    """(B, S, d) -> parts of these many rows."""
    return list(rows.split(list(counts), dim=1))
