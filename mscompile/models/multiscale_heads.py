"""Multi-scale attention (Guo et al., arXiv 1912.00544) as a causal language model: a window for every head.

    head h of layer l, at position t, sees the positions  t - windows[l][h] < j <= t;  all j <= t where it is 0

The paper's scale omega reaches as far to both sides, |t - j| <= omega, in an encoder: its causal half is a window of
omega + 1. The rest is a reconstruction: pre-norm blocks, and rotary positions, which do not end where a text does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mscompile.models.attention import Block, Run, Stack, attend, later, row_numbers
from mscompile.models.family import Family, ReferenceModel, require, require_positive, require_switch


@dataclass(frozen=True)
class HeadsConfig:
    vocab_size: int
    d_model: int = 512
    d_ff: int = 2048
    # positions that each head of each layer sees, its own included; 0 is all
    windows: tuple[tuple[int, ...], ...] = ((2, 2, 4, 4, 8, 8, 64, 0), (2, 4, 8, 16, 64, 64, 0, 0))
    rotary: bool = True
    context: int = 2048  # longest stream, in tokens, where a head sees all

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", _windows(self.windows))  # lists are as good as tuples
        require_positive(self, "vocab_size", "d_model", "d_ff", "context")
        require_switch(self, "rotary")
        require(self.d_model % self.n_head == 0, f"d_model {self.d_model} must be divisible by {self.n_head} heads")
        d_head = self.d_model // self.n_head
        require(not self.rotary or d_head % 2 == 0, f"rotary positions need heads of even width, not {d_head}")

    @property
    def n_head(self) -> int:
        return len(self.windows[0])


def _windows(given: Any) -> tuple[tuple[int, ...], ...]:
    sequence = (list, tuple)
    require(
        isinstance(given, sequence) and bool(given) and all(isinstance(layer, sequence) and layer for layer in given),
        f"windows must hold one row of windows for each layer, such as ((2, 8, 0), (4, 0, 0)), not {given!r}",
    )
    windows = tuple(tuple(layer) for layer in given)
    require(
        len({len(layer) for layer in windows}) == 1,
        f"windows must name as many heads in every layer, not {[len(layer) for layer in windows]}",
    )
    for layer, row in enumerate(windows):
        for window in row:
            require(
                isinstance(window, int) and not isinstance(window, bool) and window >= 0,
                f"windows of layer {layer} must be whole numbers of at least 0, not {window!r}",
            )
    return windows


class HeadsBlock(Block):
    """A pre-norm block whose heads see windows of their own."""

    def __init__(self, config: HeadsConfig, windows: tuple[int, ...]) -> None:
        super().__init__(config.d_model, config.n_head, config.d_ff, rotary=config.rotary)
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        rows = self.attention_norm(x)
        numbers = row_numbers(rows)
        hidden = torch.cat([later(rows.shape[1], window or None, rows.device) for window in self.windows], dim=1)
        runs = [Run(*self.attention.keys(rows, numbers), hidden)]
        return self.finish(x, self.attention.merge(attend(self.attention.queries(rows, numbers), runs)))


class MultiscaleHeads(ReferenceModel):
    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.stack = Stack([HeadsBlock(config, windows) for windows in config.windows])
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size)

    def full(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.stack(self.embedding(tokens))))


FAMILY = Family(
    name="multiscale-heads",
    title="Multi-scale attention heads (causal form, reconstruction)",
    source="after Guo et al., arXiv 1912.00544; no public code",
    config=HeadsConfig,
    model=MultiscaleHeads,
)
