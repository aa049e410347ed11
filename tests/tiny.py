"""One tiny model, or several, of every family: what every family is tested with."""

from __future__ import annotations

from functools import cache
from typing import Any

import cases
import torch

from mscompile.models import families
from mscompile.models.family import ReferenceModel

Settings = dict[str, Any]

VOCAB = cases.VOCAB
CONTEXT = cases.CONTEXT  # tokens after which a stream of a model whose memory grows must be reset

# family -> name of a variant -> settings. The first variant of each family is the one that engines are built of.
TINY: dict[str, dict[str, Settings]] = {
    "transformer-xl": {
        "rolling": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 5, "tgt_len": 4,
                    "same_length": True},
        "segments": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 5, "tgt_len": 4},
    },
    "hourglass": {
        "attention": {"d_model": 8, "d_ff": 12, "n_head": 2, "hierarchy": "1@1 1@3 1@1", "context": CONTEXT},
    },
}  # fmt: skip

VARIANTS = [(family, variant) for family, variants in TINY.items() for variant in variants]


@cache
def model(family: str, variant: str, dtype: torch.dtype = torch.float64, vocab_size: int = VOCAB) -> ReferenceModel:
    """The tiny model in eval mode with seeded weights; shared, so leave it unchanged."""
    row = families.find(family)
    config = row.parse_config({"vocab_size": vocab_size, **TINY[family][variant]})
    return cases.seeded(row.model(config), dtype)
