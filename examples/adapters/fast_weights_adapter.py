# fast_weights_adapter.py
from pathlib import Path

import torch
from fast_weights import FastWeightLanguageModel

from mscompile import Adapter


def build(weights: Path) -> Adapter:
    model = FastWeightLanguageModel(vocab_size=28, width=16)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return Adapter(model, buffers=["memory"])
