"""Segatron-XL (Bai et al., arXiv 2004.14996): Transformer-XL that also tells sentences and paragraphs apart.

Token i stands in sentence s_i and paragraph p_i, counted from the beginning of the stream. The position key of a pair
is made of three sinusoids side by side, of widths d_t = d_s = d / 3 rounded up to even, and d_p, the rest:

    r_ij = W_r [ sinusoid(i - j) | sinusoid(s_i - s_j) | sinusoid(p_i - p_j) ]      each at most `clamp_len`

W_r is linear, so the position score is a sum over three tables: one entry for each kind of distance.

The authors' preprocessing splits text into sentences and lines. Here the indices follow from the tokens: one that is
in `sentence_end` or `paragraph_end` ends a sentence, one in `paragraph_end` ends a paragraph, and belongs to it. Ends
in a row end only one, so that ". <eos>" counts once, as there.

`exact_relative`: the authors' code encodes `max - x_j` over the segment and then shifts whole rows, as if distances
were linear in j. They are for tokens; for sentences and paragraphs a query then sees the index of another key,
measured from the last token of its segment: logits depend on later tokens. Only exact distances are causal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mscompile.models.family import Family, require, require_switch
from mscompile.models.relative import RelativeAttention, Sight, sinusoid
from mscompile.models.transformer_xl import TransformerXL, TransformerXLConfig, TransformerXLLayer


@dataclass(frozen=True)
class SegatronConfig(TransformerXLConfig):
    sentence_end: Sequence[int] = ()  # ids of the tokens that end a sentence
    paragraph_end: Sequence[int] = ()  # and of those that end a paragraph
    exact_relative: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.d_model >= 6, f"d_model must be at least 6 for three sinusoids, not {self.d_model}")
        require_switch(self, "exact_relative")
        require(
            self.exact_relative,
            "exact_relative=False, the distances of the released code, cannot be streamed: within a segment, sentence "
            "and paragraph distances are measured from its last token, so that logits depend on later tokens; "
            "use exact_relative=True",
        )
        for name in ("sentence_end", "paragraph_end"):
            self._require_tokens(name, getattr(self, name))

    def _require_tokens(self, name: str, ids: Any) -> None:
        known = isinstance(ids, list | tuple) and all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < self.vocab_size for i in ids
        )
        require(known, f"{name} must be a list of token ids from 0 to {self.vocab_size - 1}, not {ids!r}")

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of the sinusoids of token, sentence and paragraph distances."""
        third = self.d_model // 3 + self.d_model // 3 % 2
        return third, third, self.d_model - 2 * third


class Boundaries:
    """Which sentence and paragraph a token stands in."""

    def __init__(self, config: SegatronConfig) -> None:
        ends = ({*config.sentence_end, *config.paragraph_end}, {*config.paragraph_end})
        self.ends = tuple(sorted(ids) or [-1] for ids in ends)  # of sentences, and of paragraphs

    def __call__(self, tokens: Tensor, place: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) after a token in `place` (B, 2), which `ended` it or not (B, 2): their (B, T, 2) of both.

        All are int64; sentences first, then paragraphs.
        """
        sets = (torch.tensor(ids, device=tokens.device) for ids in self.ends)
        ends = torch.stack([(tokens[:, :, None] == ids).any(dim=-1) for ids in sets], dim=-1).long()
        before = torch.cat([ended[:, None], ends[:, :-1]], dim=1)
        begun = (before * (1 - ends)).float().cumsum(dim=1).long()  # runtimes sum floats; exact up to 2^24 tokens
        return place[:, None] + begun, ends


def sight(index: Tensor, visible: Tensor, queries: Tensor, keys: Tensor, size: int) -> Sight:
    """How queries in places (B, T, 2) see keys in places (B, S, 2), with n(i, j) and visibility (1 or B, T, S).

    Entries of the three tables, which lie one after the other and have `size` entries each.
    """
    sentences, paragraphs = (queries[:, :, None] - keys[:, None]).unbind(-1)
    parts = (index, sentences, paragraphs)
    entries = tuple((part.clamp(0, size - 1) + number * size)[:, None] for number, part in enumerate(parts))
    return Sight(entries, ~visible[:, None])


class SegatronAttention(RelativeAttention):
    def __init__(self, config: SegatronConfig) -> None:
        super().__init__(config.d_model, config.n_head, config.d_head, bias=False, geometry=config.geometry)
        self.widths = config.widths

    def encode(self, distance: Tensor) -> Tensor:
        """Distances (D,) -> (3 D, d_model): as distances of tokens, of sentences and of paragraphs."""
        blocks = [sinusoid(distance, width, self.position.weight.dtype) for width in self.widths]
        return torch.block_diag(*blocks)


class SegatronLayer(TransformerXLLayer):
    def __init__(self, config: SegatronConfig) -> None:
        super().__init__(config)
        self.config = config
        self.attention = SegatronAttention(config)


class Segatron(TransformerXL):
    """Its memory is that of every layer, the places (B, M, 2) of the remembered rows, and `place`, `ended` (B, 2)."""

    layer_type = SegatronLayer

    def __init__(self, config: SegatronConfig) -> None:
        super().__init__(config)
        self.boundaries = Boundaries(config)

    def empty_mems(self, batch: int) -> list[Tensor]:
        mems = super().empty_mems(batch)
        places, start = (mems[0].new_zeros(*shape, dtype=torch.int64) for shape in ((batch, 0, 2), (batch, 2)))
        return [*mems, places, start, start]

    def forward(self, tokens: Tensor, mems: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One segment: tokens (B, T) and the memory -> logits (B, T, V) and the new memory."""
        *remembered, places, place, ended = mems
        new, ends = self.boundaries(tokens, place, ended)
        old, geometry = places.shape[1], self.config.geometry
        places = torch.cat([places, new], dim=1)
        rows = torch.arange(places.shape[1], device=tokens.device)
        index = geometry.index(rows[old:, None], rows[None])[None]
        size = geometry.table_size(places.shape[1] - 1)
        seen = sight(index, geometry.visible(index), new, places, size)
        distances = geometry.distances(size, tokens.device)
        h, new_mems = self.embed(tokens), []
        for layer, mem in zip(cast(Iterable[SegatronLayer], self.layers), remembered, strict=True):
            new_mems.append(torch.cat([mem, h], dim=1)[:, -self.config.mem_len :].detach())
            context = layer.context(mem, h)
            biases = layer.biases or self.biases
            assert biases is not None, "layers that share no biases have their own"
            h = layer.combine(h, layer.attention.mix(context[:, old:], context, seen, distances, biases))
        return self.head(h), [*new_mems, places[:, -self.config.mem_len :], new[:, -1], ends[:, -1]]


FAMILY = Family(
    name="segatron-xl",
    title="Segatron-XL",
    source="Bai et al., arXiv 2004.14996; rsvp-ai/segatron_aaai",
    config=SegatronConfig,
    model=Segatron,
)
