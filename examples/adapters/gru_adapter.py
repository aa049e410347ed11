# gru_adapter.py
from pathlib import Path

import torch
from gru import GruLanguageModel

from mscompile import Adapter, state


def build(weights: Path) -> Adapter:
    tensors = torch.load(weights, weights_only=True)
    vocab_size, width = tensors["embedding.weight"].shape
    model = GruLanguageModel(vocab_size, width)
    model.load_state_dict(tensors)
    return Adapter(model, states=[state("hidden", width)], full=model.over)
