"""Published memory models, traced from their own code: hoisted, and streamed as their own forward.

The code is not part of this repository. MSCOMPILE_PUBLIC_CODE names a directory with clones of
github.com/kimiyoung/transformer-xl and github.com/NVIDIA/DeepLearningExamples; XLNet comes from `transformers`.
docs/foreign-models.md explains each workaround below.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engines.ort import CPU, OrtPlan
from exporters import adapter, derived, weights
from exporters.passes import table
from mscompile.contracts import Array, Profile, Snapshot, StateSpec

VARIABLE = "MSCOMPILE_PUBLIC_CODE"
PUBLISHED = {
    "kimiyoung": Path("transformer-xl/pytorch"),
    "nvidia": Path("DeepLearningExamples/PyTorch/LanguageModeling/Transformer-XL/pytorch"),
}
LAYERS, WIDTH, MEMORY = 2, 8, 5
PROFILE = Profile(1, 3, 8)
SIZES = {"n_layer": LAYERS, "n_head": 2, "d_model": WIDTH, "d_inner": 12, "mem_len": MEMORY}


def published(owner: str) -> Any:
    """Their module `mem_transformer`, imported from where it lies."""
    directory = os.environ.get(VARIABLE)
    root = Path(directory or "", PUBLISHED[owner])
    if directory is None or not (root / "mem_transformer.py").is_file():
        pytest.skip(f"no published code: set {VARIABLE} to a directory that holds {PUBLISHED[owner]}")
    absent = {name: mock.MagicMock() for name in ("dllogger", "pynvml")}  # NVIDIA's logging, which no model uses
    before = dict(sys.modules)
    sys.path[:0] = [str(root), str(root / "utils")]
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(torch.version, "cuda", "12.0"),
            mock.patch.dict(sys.modules, absent),
        ):
            warnings.simplefilter("ignore")
            return importlib.import_module("mem_transformer")
    finally:
        del sys.path[:2]
        for name in set(sys.modules) - set(before):
            if str(root) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]  # both publish modules of the same names


class TransformerXL(nn.Module):
    """Their hidden states and memories, ours to call: (B, T) tokens, one memory (M, B, d) a layer."""

    def __init__(self, owner: str, **settings: Any) -> None:
        super().__init__()
        extra = {"n_token": cases.VOCAB, "d_head": 3, "dropout": 0.0, "dropatt": 0.0, "tgt_len": 4, "ext_len": 0}
        if owner == "nvidia":
            extra["dtype"] = torch.float32  # type: ignore[assignment]
        self.model = published(owner).MemTransformerLM(**SIZES, **extra, **settings)
        if owner == "nvidia":
            self.model._update_mems = self._by_layer
        self.memories = LAYERS + (owner == "kimiyoung")  # theirs also remembers the last layer's output

    def _by_layer(self, hidden: list[Tensor], mems: list[Tensor], *_: int) -> list[Tensor]:
        """Theirs keeps the memories of all layers in one tensor; here each is a state of its own."""
        return [torch.cat([old, new])[-MEMORY:] for old, new in zip(mems, hidden, strict=True)]

    def forward(self, tokens: Tensor, *mems: Tensor) -> tuple[Tensor, ...]:
        with mock.patch.object(Tensor, "byte", Tensor.bool):  # masks of bytes are an error in PyTorch today
            hidden, new = self.model._forward(tokens.t(), mems=list(mems))
        head = self.model.crit  # its forward computes the loss of given targets, from these logits
        weight, bias = self.model.word_emb.emb_layers[0].weight, _bias(head)
        return (head._compute_logit(hidden, weight, bias, None).transpose(0, 1), *new)


def _bias(head: Any) -> Tensor:
    return head.out_layers[0].bias if hasattr(head, "out_layers") else head.out_layers_biases[0]


class XLNet(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers = pytest.importorskip("transformers")
        config = transformers.XLNetConfig(vocab_size=cases.VOCAB, dropout=0.0, **SIZES, **settings)
        self.model = transformers.XLNetLMHeadModel(config)
        self.memories = LAYERS

    def forward(self, tokens: Tensor, *mems: Tensor) -> tuple[Tensor, ...]:
        out = self.model(tokens, mems=list(mems), use_mems=True)
        return (out.logits, *out.mems)


@contextmanager
def masks_are_used() -> Iterator[None]:
    """`attn_mask.any().item()` asks a value while tracing. The answer True is exact: an empty mask masks nothing."""
    with mock.patch.object(Tensor, "any", return_value=torch.tensor(True)):
        yield


MODELS = {  # the model, and whether a call of many tokens equals calls of one
    "kimiyoung-same-length": (lambda: TransformerXL("kimiyoung", same_length=True), True),
    "kimiyoung-pre-norm": (lambda: TransformerXL("kimiyoung", pre_lnorm=True), False),
    "nvidia-same-length-pre-norm": (lambda: TransformerXL("nvidia", same_length=True, pre_lnorm=True), True),
    "nvidia-clamp": (lambda: TransformerXL("nvidia", clamp_len=3), False),
    "xlnet-same-length": (lambda: XLNet(attn_type="uni", same_length=True), True),
    "xlnet-uni": (lambda: XLNet(attn_type="uni"), False),
    "xlnet-bi": (lambda: XLNet(attn_type="bi", clamp_len=4), False),
}


def chained(
    model: nn.Module, tokens: Array, states: Sequence[StateSpec], chunks: Sequence[int]
) -> tuple[Array, Snapshot]:
    """The model's own forward, call after call, and what it remembers at the end."""
    mems = [torch.from_numpy(state.initial_value(len(tokens))) for state in states]
    logits = []
    with torch.inference_mode():
        for part in torch.from_numpy(tokens).split(list(chunks), dim=1):
            out, *mems = model(part, *mems)
            logits.append(out)
    remembered = {state.name: memory.numpy() for state, memory in zip(states, mems, strict=True)}
    return torch.cat(logits, dim=1).numpy(), Snapshot(np.full(len(tokens), tokens.shape[1]), remembered, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_streams_as_its_own_forward(name: str, tmp_path: Path) -> None:
    build, in_chunks = MODELS[name]
    model = cases.seeded(build(), torch.float32)  # type: ignore[type-var]
    states = [StateSpec(f"mems{n}", "float32", (MEMORY, "batch", WIDTH), batch_axis=1) for n in range(model.memories)]
    with masks_are_used():
        adapted = adapter.adapt(model, states, PROFILE)
    assert {hit.applied for hit in adapted.hits if hit.place == adapter.PREFILL} == {in_chunks}
    outcome = table.run(adapted.models, adapted.spec)
    hoisted = {hit.place for hit in outcome.hits if hit.name == "hoist" and hit.applied}
    assert hoisted == {f"mems{n}" for n in range(LAYERS)}  # all that any layer reads
    weights.save({**adapted.models, **derived.models(outcome.derived)}, tmp_path)
    session = OrtPlan(outcome.spec, tmp_path, CPU).session(2)
    tokens = cases.tokens(2, 4 * MEMORY + 3)
    length = tokens.shape[1]
    for chunks in ([1] * length, *([[length], [3, 8, 1, 1, 10]] if in_chunks else [])):
        wanted, snapshot = chained(model, tokens, states, chunks)
        session.reset()
        assert cases.worst(cases.stream(session, tokens, chunks), wanted) < 1e-4
        expected = derived.DerivedStates(tmp_path, outcome.spec).of(snapshot).states
        found = session.state().states
        assert all(cases.worst(found[state], expected[state]) < 1e-4 for state in found)
    session.reset([1])
    again = session.step(tokens[:, :1])
    assert cases.worst(again[1], wanted[1, :1]) < 1e-4
