"""Skip Cross-Head Transformer-XL: streamed as a Transformer-XL, with its own view of memory.

Given                                              Becomes
  zeros as memory, attended to                       the initial value of `mems`, not masked
  rel_shift "txl", same_length, no normed_residual   mems (B, w - 1, d) roll with every call
  anything else                                      mems (B, M, d) frozen within a segment, segment (B, T, d)

Without the relative shift the position key of a slot of [mems ; segment] is its own, (H, d_head, M + T) in all, so
that a token must know its place in the segment. With `normed_residual` rows change where they become memory: they
are met as LN(h) in their segment and as h after it. Both follow from `position % tgt_len`, and memory stays exact
when frozen; rolling it would be another model.
"""

from __future__ import annotations

from exporters.families.transformer_xl import SegmentTransformerXL, StreamTransformerXL
from exporters.stream import TypeRule
from mscompile.models.skip_cross_head import SkipCrossHead

RULES = (
    TypeRule(
        "skip-cross-head",
        "a Transformer-XL whose memory may roll with every call",
        SkipCrossHead,
        StreamTransformerXL,
        lambda model: model.config.rolls,
    ),
    TypeRule(
        "skip-cross-head-segments",
        "a Transformer-XL for which it matters where segments end",
        SkipCrossHead,
        SegmentTransformerXL,
    ),
)
