"""NVIDIA's Transformer-XL: github.com/NVIDIA/DeepLearningExamples, `PyTorch/LanguageModeling/Transformer-XL`.

Their `checkpoint_best.pt` is read as it is: "model_state" with "model_config", "args" and the vocabulary. It differs
from the authors' (`kimiyoung.py`) in the names of the head's tensors, in that what is tied is not stored twice, and in
`same_length`: a query sees mem_len keys and itself, one key more.
"""

from __future__ import annotations

from mscompile.conversion import kimiyoung
from mscompile.conversion.base import Converted, Foreign, Source

DATASETS = {"wt103": (19997, 39997, 199997), "lm1b": (59997, 99997, 639997)}


def recognises(foreign: Foreign) -> bool:
    return {kimiyoung.SHOWN, "crit.out_layers_biases.0"} <= set(foreign.tensors)


def convert(foreign: Foreign) -> Converted:
    return kimiyoung.converted(foreign, DATASETS, own_key=True)


SOURCE = Source("NVIDIA/DeepLearningExamples Transformer-XL", recognises, convert)
