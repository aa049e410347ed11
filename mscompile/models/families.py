"""The family table, in the order the documentation lists it."""

from __future__ import annotations

import difflib

from mscompile.errors import CheckpointError
from mscompile.models import (
    chapters,
    compressive,
    dynamic_pooling,
    feedback,
    hm_lstm,
    hourglass,
    hourglass_pytorch,
    long_short,
    megabyte,
    megabyte_pytorch,
    memory_transformer,
    multiscale_bottom_up,
    multiscale_heads,
    multiscale_retina,
    multiscale_top_down,
    product_key_memory,
    recurrent_memory,
    recurrent_memory_pytorch,
    recurrent_memory_wrapper,
    retro,
    segatron,
    skip_cross_head,
    transformer_xl,
    xlnet,
)
from mscompile.models.family import Family

FAMILIES: tuple[Family, ...] = (
    transformer_xl.FAMILY,
    skip_cross_head.FAMILY,
    segatron.FAMILY,
    xlnet.FAMILY,
    compressive.FAMILY,
    feedback.FAMILY,
    memory_transformer.FAMILY,
    recurrent_memory.FAMILY,
    recurrent_memory_wrapper.FAMILY,
    recurrent_memory_pytorch.FAMILY,
    hourglass.FAMILY,
    hourglass_pytorch.FAMILY,
    multiscale_top_down.FAMILY,
    multiscale_bottom_up.FAMILY,
    multiscale_retina.FAMILY,
    multiscale_heads.FAMILY,
    long_short.FAMILY,
    megabyte.FAMILY,
    megabyte_pytorch.FAMILY,
    dynamic_pooling.FAMILY,
    hm_lstm.FAMILY,
    product_key_memory.FAMILY,
    chapters.FAMILY,
    retro.FAMILY,
)


def find(name: str) -> Family:
    """The family of that name; CheckpointError names the nearest one otherwise."""
    known = {family.name: family for family in FAMILIES}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known families: {', '.join(known)}"
    raise CheckpointError(f"unknown family {name!r}; {hint}")
