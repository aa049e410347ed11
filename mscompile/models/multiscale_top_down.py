"""Top-down multi-scale language model (Subramanian et al., arXiv 2005.00581): coarse scales first. Reconstruction.

    E    = embedding of the tokens, with positions                                   (B, T, d)
    Z^s  = means of E over k_s tokens, with the scale's positions; Z^1 = E           (B, T // k_s, d)
    U^s  = for each row of scale s the newest row of C^(s+1), null_s before any      (B, T // k_s, d)
    C^s  = Stack_s(W_s [Z^s ; U^s]);  C^S = Stack_S(Z^S)
    logits = W LN(C^1)

Row g of scale s ends with token (g + 1) k_s - 1, and a coarser row that ends with the same token counts as there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mscompile.models.family import Family
from mscompile.models.multiscale import SOURCE, MultiscaleModel, ScalesConfig, groups, pool, stack


def hold(newest: Tensor, coarse: Tensor, group: int, count: int) -> Tensor:
    """The newest coarser row for each of `count` rows: row i of `coarse` (B, G, d) from fine row (i + 1) group - 1 on.

    `newest` (B, d) is the coarser row before them. (B, count, d).
    """
    rows = torch.cat([newest[:, None], coarse], dim=1)
    return rows[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)[:, 1 : 1 + count]


class TopDownScale(nn.Module):
    """One scale: its rows meet the newest coarser row, `group` times as long, and pass a stack of their own."""

    def __init__(self, config: ScalesConfig, layers: int, group: int | None) -> None:
        super().__init__()
        self.group = group
        if group is not None:
            self.null = nn.Parameter(torch.zeros(config.d_model))
            self.merge = nn.Linear(2 * config.d_model, config.d_model)
        self.stack = stack(config, layers)

    def enter(self, rows: Tensor, held: Tensor) -> Tensor:
        """Rows and what is held beside each, (B, T, d) both -> (B, T, d)."""
        return self.merge(torch.cat([rows, held], dim=-1))

    def forward(self, rows: Tensor, coarse: Tensor | None) -> Tensor:
        """rows (B, T, d) and all coarser rows (B, T // group, d) -> (B, T, d)."""
        if self.group is not None and coarse is not None:
            null = self.null.expand(rows.shape[0], -1)
            rows = self.enter(rows, hold(null, coarse, self.group, rows.shape[1]))
        return self.stack(rows)


class TopDown(MultiscaleModel):
    def __init__(self, config: ScalesConfig) -> None:
        super().__init__(config, config.factors)
        self.groups = groups(config.factors)
        self.scales = nn.ModuleList(
            TopDownScale(config, scale.layers, group)
            for scale, group in zip(config.parsed, [*self.groups, None], strict=True)
        )

    def body(self, rows: Tensor) -> Tensor:
        means = [rows]
        for group in self.groups:
            means.append(pool(means[-1], group))
        placed = [rows, *(place(mean) for place, mean in zip(self.positions[1:], means[1:], strict=True))]
        coarse = None
        for scale, entering in reversed(list(zip(self.scales, placed, strict=True))):
            coarse = scale(entering, coarse)
        assert coarse is not None, "there is a finest scale"
        return coarse


FAMILY = Family(
    name="multiscale-top-down",
    title="Multi-scale, top-down (reconstruction)",
    source=SOURCE,
    config=ScalesConfig,
    model=TopDown,
)
