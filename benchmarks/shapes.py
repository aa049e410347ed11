"""The shapes that are measured, as models with fresh weights. Needs torch only, for machines where nothing else is."""

from __future__ import annotations

from mscompile.models.hourglass import Hourglass, HourglassConfig
from mscompile.models.multiscale import ScalesConfig
from mscompile.models.multiscale_top_down import TopDown
from mscompile.models.transformer_xl import TransformerXL, TransformerXLConfig

VOCAB = 204  # of the published enwik8 models
CONTEXT = 1536  # tokens, of the models whose memory grows


def transformer_xl() -> TransformerXL:
    """The base model for enwik8 of Dai et al., arXiv 1901.02860: 12 layers, d 512, 8 heads, memory 512; 41 M."""
    shape = TransformerXLConfig(
        vocab_size=VOCAB, n_layer=12, d_model=512, n_head=8, d_head=64, d_inner=2048,
        mem_len=512, tgt_len=512, same_length=True,
    )  # fmt: skip
    return TransformerXL(shape)


def hourglass() -> Hourglass:
    """`2@1 8@3 2@1` of Nawrot et al., arXiv 2110.13711, at the width of the Transformer-XL above."""
    return Hourglass(HourglassConfig(vocab_size=VOCAB, hierarchy="2@1 8@3 2@1", context=CONTEXT))


def vanilla(layers: int = 12) -> Hourglass:
    """So many layers of the same width, all of them at every token."""
    return Hourglass(HourglassConfig(vocab_size=VOCAB, hierarchy=f"{layers}@1", context=CONTEXT))


def multiscale() -> TopDown:
    """30 layers, ten at each scale, of Subramanian et al., arXiv 2005.00581 (their split is not known to us)."""
    return TopDown(ScalesConfig(vocab_size=VOCAB, scales="10@1 10@4 10@16", context=CONTEXT))
