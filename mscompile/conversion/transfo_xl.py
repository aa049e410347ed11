"""Transformer-XL directories of HuggingFace transformers (`TransfoXLLMHeadModel`, which version 5 no longer has).

Tensors are those of the authors (`kimiyoung.py`) behind "transformer.". Every layer may have biases of its own, and
clusters are scored by the head's columns in their order, as in the authors' TensorFlow code that the published
transfo-xl-wt103 was trained with.
"""

from __future__ import annotations

from dataclasses import replace

from mscompile.conversion import kimiyoung
from mscompile.conversion.base import Converted, Foreign, Source

PREFIX = "transformer."


def recognises(foreign: Foreign) -> bool:
    return foreign.config.get("model_type") == "transfo-xl"


def convert(foreign: Foreign) -> Converted:
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in foreign.tensors.items()}
    if "layers.0.dec_attn.r_w_bias" in tensors:  # where all layers share them, they are stored with each as well
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("r_w_bias", "r_r_bias")}
    return kimiyoung.converted(replace(foreign, tensors=tensors), {}, backwards=False)


SOURCE = Source("huggingface/transformers Transfo-XL", recognises, convert)
