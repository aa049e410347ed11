"""Skip Cross-Head Transformer-XL (Vishnu and Sekhar, arXiv 2311.08123) as it runs at inference.

What the paper adds, cross-head attention and skip-retain, happens in training only: `examples/skip_cross_head.py`.
What is left is a Transformer-XL with the peculiarities of the authors' code, each behind a setting:

    `rel_shift` "none"    no relative shift: key slot j of [mems ; segment] has the position key of its distance to
                          the end of the segment, mem_len + tgt_len - 1 - j, whichever query looks at it
    `attend_empty`        memory starts as `mem_len` rows of zeros, and they are attended to
    `normed_residual`     with `pre_norm`, LN(h) replaces h: residuals start from the normed rows. Keys and values are
                          made of normed rows within a segment, and of plain ones once they are memory:

        x = LayerNorm(h);  y = LayerNorm(x + W_o attention(x, [mems ; x]));  out = y + W_2 relu(W_1 y + b_1) + b_2
        new mems = [mems ; h][-mem_len:]

With "txl", false and false this is Transformer-XL, but for the scale of the embedding: sqrt(d_model) where it is
adaptive, and 1 where it is not. `tgt_len` is the whole length of a segment in every distance:
a last, shorter segment is run as the beginning of a whole one, since its tokens cannot know where it will end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mscompile.models.family import Family, require, require_switch
from mscompile.models.relative import Biases, Sight
from mscompile.models.transformer_xl import TransformerXL, TransformerXLConfig, TransformerXLLayer

SHIFTS = ("txl", "none")


@dataclass(frozen=True)
class SkipCrossHeadConfig(TransformerXLConfig):
    same_length: bool = True
    tie_embedding: bool = False
    rel_shift: str = "none"
    attend_empty: bool = True
    normed_residual: bool = True  # of consequence with pre_norm only

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rel_shift in SHIFTS, f"rel_shift must be one of {SHIFTS}, not {self.rel_shift!r}")
        require_switch(self, "attend_empty", "normed_residual")

    @property
    def overwrites(self) -> bool:
        """Does a block replace its input by the normed one?"""
        return self.pre_norm and self.normed_residual

    @property
    def rolls(self) -> bool:
        return self.same_length and self.rel_shift == "txl" and not self.overwrites


class SkipCrossHeadLayer(TransformerXLLayer):
    def __init__(self, config: SkipCrossHeadConfig) -> None:
        super().__init__(config)
        self.attends_empty, self.overwrites = config.attend_empty, config.overwrites
        self.shifts = config.rel_shift == "txl"

    def context(self, mems: Tensor, *rows: Tensor) -> Tensor:
        if not self.overwrites:
            return super().context(mems, *rows)
        return torch.cat([mems, self.attention_norm(torch.cat(rows, dim=1))], dim=1)

    def entries(self, index: Tensor, keys: Tensor) -> Tensor:
        return index if self.shifts else (self.mem_len + self.tgt_len - 1 - keys).expand_as(index)

    def combine(self, h: Tensor, attended: Tensor) -> Tensor:
        if not self.overwrites:
            return super().combine(h, attended)
        h = self.feed_forward_norm(self.attention_norm(h) + self.dropout(attended))
        return h + self.feed_forward(h)

    def forward(self, h: Tensor, mems: Tensor, biases: Biases, gap: int = 0) -> Tensor:
        """h (B, T, d_model), mems (B, M, d_model) -> (B, T, d_model).

        `gap` tokens lie between the memory and this segment: none, but in training that skips layers.
        """
        geometry, remembered, device = self.attention.geometry, mems.shape[1], h.device
        queries = torch.arange(self.mem_len, self.mem_len + h.shape[1], device=device)[:, None]
        slots = torch.arange(self.mem_len - remembered, self.mem_len + h.shape[1], device=device)[None]
        visible = geometry.visible(geometry.index(queries, slots))[None]
        places = slots - gap * (slots < self.mem_len)
        reach = self.mem_len + self.tgt_len + gap
        entries = self.entries(geometry.index(queries, places), places)[None]
        context = self.context(mems, h)
        sight = Sight.of(entries, visible, reach)
        attended = self.attention.mix(
            context[:, remembered:], context, sight, geometry.distances(reach, device), biases
        )
        return self.combine(h, attended)


class SkipCrossHead(TransformerXL):
    layer_type = SkipCrossHeadLayer

    def embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.look_up(tokens)) if self.adaptive is None else super().embed(tokens)

    def empty_mems(self, batch: int) -> list[Tensor]:
        empty = super().empty_mems(batch)
        if not self.config.attend_empty:
            return empty
        return [mem.new_zeros(batch, self.config.mem_len, self.config.d_model) for mem in empty]


FAMILY = Family(
    name="skip-cross-head",
    title="Skip Cross-Head Transformer-XL",
    source="Vishnu and Sekhar, arXiv 2311.08123; "
    "vishwajit-vishnu/Memory-efficient-Stochastic-methods-for-Memory-based-Transformers",
    config=SkipCrossHeadConfig,
    model=SkipCrossHead,
)
