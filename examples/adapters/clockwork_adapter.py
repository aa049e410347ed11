# clockwork_adapter.py
from pathlib import Path

import torch
from clockwork import PERIOD, ClockworkLanguageModel

from mscompile import Adapter, Tick, state


def build(weights: Path) -> Adapter:
    tensors = torch.load(weights, weights_only=True)
    vocab_size, width = tensors["embedding.weight"].shape
    model = ClockworkLanguageModel(vocab_size, width)
    model.load_state_dict(tensors)
    return Adapter(
        model,
        states=[state("fast", width), state("slow", width)],
        ticks=[Tick(("both",)), Tick(("only_fast",), repeat=PERIOD - 1)],
        full=model.over,
    )
