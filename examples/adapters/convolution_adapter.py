# convolution_adapter.py
from pathlib import Path

import torch
from convolution import ConvolutionalLanguageModel


def build(weights: Path) -> ConvolutionalLanguageModel:
    model = ConvolutionalLanguageModel(vocab_size=28, width=16, layers=3)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model
