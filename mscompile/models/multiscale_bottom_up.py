"""Bottom-up multi-scale language model (Subramanian et al., arXiv 2005.00581): fine scales first. Reconstruction.

C^1     = Stack_1(embedding of the tokens, with positions)                       (B, T, d)
C^(s+1) = Stack_(s+1)(means of C^s over whole groups, with the scale's positions)
A       = attention from LN(C^1) to all rows LN(C^s) + e_s that have ended: g < (t + 1) // k_s
Y       = C^1 + A;  Y = Y + FFN(LN(Y))
logits  = W LN(PostStack(Y))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mscompile.models.attention import Block, Run, attend, row_numbers
from mscompile.models.family import Family, require_positive
from mscompile.models.multiscale import SOURCE, MultiscaleModel, ScalesConfig, groups, pool, stack


@dataclass(frozen=True)
class BottomUpConfig(ScalesConfig):
    post_layers: int = 2  # blocks on the tokens' rows after the aggregation

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "post_layers")


def unfinished(tokens: int, rows: int, factor: int, device: torch.device | None = None) -> Tensor:
    """Which of the rows of `factor` tokens have not ended at each token, both counted from 0: (1, 1, T, G)."""
    ended = (torch.arange(tokens, device=device) + 1) // factor
    return (torch.arange(rows, device=device)[None, :] >= ended[:, None])[None, None]


class Aggregation(Block):
    """A pre-norm block whose tokens attend to the rows of all scales at once."""

    def __init__(self, config: BottomUpConfig) -> None:
        super().__init__(config.d_model, config.n_head, config.d_ff)
        self.factors = config.factors
        self.scale_embedding = nn.Parameter(torch.zeros(len(self.factors), config.d_model))

    def query(self, tokens: Tensor) -> Tensor:
        """(B, T, d) -> (B, H, T, d_head)."""
        return self.attention.queries(self.attention_norm(tokens), row_numbers(tokens))

    def keys(self, rows: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, H, G, d_head) each, of the rows (B, G, d) of a scale."""
        return self.attention.keys(self.attention_norm(rows) + self.scale_embedding[scale], row_numbers(rows))

    def mix(self, tokens: Tensor, runs: Sequence[Run]) -> Tensor:
        """Tokens' rows (B, T, d), one softmax over runs of keys, feed-forward: (B, T, d)."""
        return self.finish(tokens, self.attention.merge(attend(self.query(tokens), runs)))

    def aggregate(self, scales: Sequence[Tensor]) -> Tensor:
        """All rows of all scales, (B, T // factor, d) each, finest first -> (B, T, d)."""
        tokens = scales[0]
        runs = [
            Run(*self.keys(rows, scale), unfinished(tokens.shape[1], rows.shape[1], factor, rows.device))
            for scale, (rows, factor) in enumerate(zip(scales, self.factors, strict=True))
        ]
        return self.mix(tokens, runs)


class BottomUp(MultiscaleModel):
    def __init__(self, config: BottomUpConfig) -> None:
        super().__init__(config, config.factors)
        self.groups = groups(config.factors)
        self.stacks = nn.ModuleList(stack(config, scale.layers) for scale in config.parsed)
        self.aggregation = Aggregation(config)
        self.post = stack(config, config.post_layers)

    def body(self, rows: Tensor) -> Tensor:
        scales = [self.stacks[0](rows)]
        for coarser, place, group in zip(self.stacks[1:], self.positions[1:], self.groups, strict=True):
            scales.append(coarser(place(pool(scales[-1], group))))
        return self.post(self.aggregation.aggregate(scales))


FAMILY = Family(
    name="multiscale-bottom-up",
    title="Multi-scale, bottom-up (reconstruction)",
    source=SOURCE,
    config=BottomUpConfig,
    model=BottomUp,
)
