"""Transformer-XL checkpoints of its authors and of NVIDIA: converted, and equal to what their own code computes.

The code is not part of this repository; `test_public_models.py` says where it is looked for. State dicts that are
laid out as theirs are always read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import bundles
import cases
import numpy as np
import pytest
import torch
from cases import eager_session, full, stream, tokens, transformer_xl, worst
from test_public_models import published
from torch import Tensor

from mscompile import checkpoint
from mscompile.contracts import Array
from mscompile.errors import CheckpointError, ConfigError
from mscompile.models.adaptive import Adaptive, Clusters
from mscompile.models.transformer_xl import TransformerXL
from mscompile.pipeline import compile_checkpoint

SIZES = {"n_layer": 2, "n_head": 2, "d_model": 8, "d_head": 3, "d_inner": 12, "mem_len": 5, "tgt_len": 4}
EXTRA = {"ext_len": 0, "dropout": 0.0, "dropatt": 0.0, "attn_type": 0, "clamp_len": -1, "same_length": False}
CUTOFFS = [4, 7]
TAILS = [False, True, True]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "same-length": {"same_length": True},
    "same-length-pre-norm-clamp": {"same_length": True, "pre_lnorm": True, "clamp_len": 3},
    "untied": {"tie_weight": False, "pre_lnorm": True},
    "narrow": {"d_embed": 6, "tie_projs": [False]},
    "adaptive": {"cutoffs": CUTOFFS, "tie_projs": TAILS},
    "adaptive-narrow": {"cutoffs": CUTOFFS, "tie_projs": TAILS, "d_embed": 6, "same_length": True},
    "adaptive-narrow-untied": {"cutoffs": CUTOFFS, "tie_projs": [False] * 3, "d_embed": 6, "tie_weight": False},
    "adaptive-divided": {"cutoffs": CUTOFFS, "div_val": 2, "tie_projs": TAILS, "same_length": True},
    "adaptive-divided-unevenly": {"cutoffs": CUTOFFS, "div_val": 2, "tie_projs": [False, False, True], "d_embed": 5},
    "adaptive-divided-untied": {"cutoffs": CUTOFFS, "div_val": 2, "tie_projs": [False] * 3, "tie_weight": False},
    "adaptive-divided-all-tied": {"cutoffs": CUTOFFS, "div_val": 2, "tie_projs": [True] * 3},
}
OWNERS = ("kimiyoung", "nvidia")


def theirs(owner: str, settings: dict[str, Any]) -> Any:
    """Their model with seeded weights, in double precision."""
    given = {**SIZES, **EXTRA, "n_token": cases.VOCAB, **settings}
    model = published(owner).MemTransformerLM(**given, **({"dtype": None} if owner == "nvidia" else {}))
    return cases.seeded(model, torch.float64)


@contextmanager
def masks_of_bytes() -> Iterator[None]:
    with mock.patch.object(Tensor, "byte", Tensor.bool):
        yield


def own_forward(model: Any, ids: Array, segment: int) -> Array:
    """Log-probabilities (B, N, V) by their forward, segment after segment; their head is asked for every token."""
    mems, found = model.init_mems(), []
    with torch.inference_mode(), masks_of_bytes():
        for part in torch.from_numpy(ids).t().contiguous().split(segment):
            hidden, mems = model._forward(part, mems=mems)
            rows = hidden.flatten(0, 1)
            losses = [model.crit(rows, torch.full((len(rows),), token)) for token in range(cases.VOCAB)]
            found.append(-torch.stack(losses, dim=-1).unflatten(0, part.shape))
    return torch.cat(found).transpose(0, 1).numpy()


def saved(path: Path, owner: str, model: Any, settings: dict[str, Any]) -> Path:
    """As people save them: NVIDIA's `model_config`, the authors' arguments."""
    config = {**SIZES, **EXTRA, "pre_lnorm": False, **settings}
    if owner == "nvidia":
        args = argparse.Namespace(**config, cuda=True, work_dir="LM-TFM")
        torch.save({"args": args, "model_config": config, "model_state": model.state_dict(), "epoch": 1}, path)
    else:
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, "args": argparse.Namespace(**config)}, path)
    return path


def as_log_probabilities(logits: Array) -> Array:
    return torch.from_numpy(logits).log_softmax(dim=-1).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("owner", OWNERS)
def test_a_converted_checkpoint_streams_as_their_own_forward(owner: str, variant: str, tmp_path: Path) -> None:
    settings = VARIANTS[variant]
    model = theirs(owner, settings)
    trained = checkpoint.load(saved(tmp_path / "model.pt", owner, model, settings))
    assert trained.source.startswith({"kimiyoung": "kimiyoung/", "nvidia": "NVIDIA/"}[owner])
    ours = trained.model.to(torch.float64)
    ids = tokens(2, 19)
    wanted = own_forward(model, ids, SIZES["tgt_len"])
    logits = full(ours, ids)
    if settings.get("cutoffs"):
        assert np.abs(np.exp(logits).sum(axis=-1) - 1).max() < 1e-6
    assert worst(as_log_probabilities(logits), wanted) < 1e-5  # weights were stored in single precision
    session = eager_session(ours, batch=2)
    for chunks in ([1] * 19, [7, 1, 11], [19]):
        session.reset()
        assert worst(as_log_probabilities(stream(session, ids, chunks)), wanted) < 1e-5


def test_a_token_in_every_cluster_is_in_the_tests() -> None:
    assert {np.searchsorted(CUTOFFS, token, side="right") for token in tokens(2, 19).flatten()} == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("owner", OWNERS)
def test_an_engine_of_a_converted_checkpoint_equals_their_own_forward(owner: str, tmp_path: Path) -> None:
    settings = VARIANTS["adaptive-divided"]
    model = theirs(owner, settings)
    path = saved(tmp_path / "model.pt", owner, model, settings)
    bundle = compile_checkpoint(path, ["ort"], tmp_path / "model.msc", bundles.options())
    assert bundle.manifest.verified
    ids = tokens(2, 41)
    wanted = own_forward(model, ids, SIZES["tgt_len"])
    for chunks in ([1] * 41, [41], [13, 3, 1, 24]):
        assert worst(as_log_probabilities(stream(bundle.session("ort", 2), ids, chunks)), wanted) < 1e-4


# Laid out as theirs, without their code


def laid_out(model: TransformerXL, owner: str) -> dict[str, Tensor]:
    """The state dict of one of our models under their names."""
    ours = model.state_dict()
    tied = model.config.tie_embedding
    heads = ("crit.out_layers.{}.weight", "crit.out_layers.{}.bias")
    if owner == "nvidia":
        heads = ("crit.out_layers_weights.{}", "crit.out_layers_biases.{}")
    found = {"pos_emb.inv_freq": torch.ones(4)}
    if not model.config.untie_biases:
        found |= {"r_w_bias": ours["content_bias"], "r_r_bias": ours["position_bias"]}
    for number in range(model.config.n_layer):
        layer = f"layers.{number}"
        attention = {name: ours[f"{layer}.attention.{name}.weight"] for name in ("query", "key", "value")}
        found[f"{layer}.dec_attn.qkv_net.weight"] = torch.cat([*attention.values()])
        found[f"{layer}.dec_attn.r_net.weight"] = ours[f"{layer}.attention.position.weight"]
        found[f"{layer}.dec_attn.o_net.weight"] = ours[f"{layer}.attention.output.weight"]
        for kind in ("weight", "bias"):
            found[f"{layer}.dec_attn.layer_norm.{kind}"] = ours[f"{layer}.attention_norm.{kind}"]
            found[f"{layer}.pos_ff.layer_norm.{kind}"] = ours[f"{layer}.feed_forward_norm.{kind}"]
            found[f"{layer}.pos_ff.CoreNet.0.{kind}"] = ours[f"{layer}.feed_forward.0.{kind}"]
            found[f"{layer}.pos_ff.CoreNet.3.{kind}"] = ours[f"{layer}.feed_forward.3.{kind}"]
    if model.adaptive is None:
        found["word_emb.emb_layers.0.weight"] = ours["embedding.weight"]
        found[heads[1].format(0)] = ours["head_bias"]
        if owner == "kimiyoung" or not tied:
            found[heads[0].format(0)] = ours["embedding.weight" if tied else "head_weight"]
        return found
    found["crit.cluster_weight"], found["crit.cluster_bias"] = (
        ours[f"adaptive.{name}"].flip(0) for name in ("cluster_weight", "cluster_bias")
    )
    for number in range(len(model.config.cutoffs) + 1):
        found[f"word_emb.emb_layers.{number}.weight"] = ours[f"adaptive.tables.{number}"]
        found[f"word_emb.emb_projs.{number}"] = ours[f"adaptive.projections.{number}"]
        found[heads[1].format(number)] = ours[f"adaptive.head_biases.{number}"]
        own = f"adaptive.head_projections.{number}" in ours
        if owner == "kimiyoung" or own:
            kind = "head_projections" if own else "projections"
            found[f"crit.out_projs.{number}"] = ours[f"adaptive.{kind}.{number}"]
        if owner == "kimiyoung" or not tied:
            found[heads[0].format(number)] = ours[f"adaptive.{'tables' if tied else 'head_tables'}.{number}"]
    return found


def settings_of(model: TransformerXL) -> dict[str, Any]:
    config = model.config
    kept = {name: getattr(config, name) for name in ("mem_len", "tgt_len", "same_length")}
    return {**kept, "pre_lnorm": config.pre_norm, "clamp_len": config.clamp_len or -1}


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embedding": False, "pre_norm": True, "clamp_len": 3},
    "adaptive": {"cutoffs": (4, 7), "div_val": 2, "tie_projections": True},
    "adaptive-untied": {"cutoffs": (4, 7), "div_val": 2, "tie_embedding": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("owner", OWNERS)
def test_a_state_dict_laid_out_as_theirs_is_converted(owner: str, layout: str, tmp_path: Path) -> None:
    model = transformer_xl(torch.float32, **LAYOUTS[layout])
    path = tmp_path / "model.pt"
    torch.save({"state_dict": laid_out(model, owner), "config": settings_of(model)}, path)
    trained = checkpoint.load(path)
    if layout == "plain":
        assert trained.model.config == model.config
    assert trained.vocab == ()
    assert worst(full(trained.model, tokens(2, 9)), full(model, tokens(2, 9))) == 0.0


def test_same_length_is_one_key_more_with_nvidia(tmp_path: Path) -> None:
    model = transformer_xl(torch.float32, same_length=True)
    for owner, wanted in (("kimiyoung", 5), ("nvidia", 6)):
        torch.save({"state_dict": laid_out(model, owner), "config": settings_of(model)}, tmp_path / "model.pt")
        assert checkpoint.load(tmp_path / "model.pt").model.config.mem_len == wanted


@pytest.mark.parametrize("both_names", [True, False])
def test_a_directory_of_hugging_faces_transfo_xl(both_names: bool, tmp_path: Path) -> None:
    """Biases of each layer, clusters in their order, and tied tensors under one name or both."""
    settings = {"cutoffs": (4, 7), "div_val": 2, "tie_projections": True, "same_length": True, "untie_biases": True}
    model = transformer_xl(torch.float32, **settings)
    state = laid_out(model, "kimiyoung")
    for number, layer in enumerate(model.layers):
        state[f"layers.{number}.dec_attn.r_w_bias"] = layer.content_bias
        state[f"layers.{number}.dec_attn.r_r_bias"] = layer.position_bias
    state |= {f"crit.{name}": getattr(model.adaptive, name) for name in ("cluster_weight", "cluster_bias")}
    if not both_names:
        state = {name: tensor for name, tensor in state.items() if not ("out_layers" in name and "weight" in name)}
    renamed = {name if name.startswith("crit.") else f"transformer.{name}": tensor for name, tensor in state.items()}
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    config = {**settings_of(model), "model_type": "transfo-xl", "untie_r": True}
    del config["tgt_len"]  # of no consequence with same_length
    (tmp_path / "config.json").write_text(json.dumps(config))
    trained = checkpoint.load(tmp_path)
    assert trained.source == "huggingface/transformers Transfo-XL"
    assert (trained.model.config.tie_embedding, trained.model.config.tie_projections) == (True, True)
    assert worst(full(trained.model, tokens(2, 9)), full(model, tokens(2, 9))) < 1e-6


def refusal(path: Path, changed: dict[str, Tensor | None], **settings: Any) -> str:
    """The sentence that refuses the authors' plain checkpoint with some tensors or settings replaced."""
    model = transformer_xl(torch.float32)
    state = {name: tensor for name, tensor in {**laid_out(model, "kimiyoung"), **changed}.items() if tensor is not None}
    config = {name: value for name, value in {**settings_of(model), **settings}.items() if value is not None}
    torch.save({"state_dict": state, "config": config}, path)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        checkpoint.load(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("changed", "settings", "sentence"),
    [
        ({}, {"attn_type": 2}, "attn_type 2 is not supported, only 0, the attention of the Transformer-XL paper"),
        ({"r_emb": torch.zeros(2, 9, 2, 3)}, {}, "attn_type with r_emb is not supported"),
        ({}, {"ext_len": 4}, "ext_len must be 0, not 4"),
        ({"out_layer.weight": torch.zeros(11, 8)}, {}, "sample_softmax has a head for training only"),
        ({}, {"mem_len": None}, "the setting 'mem_len' cannot be told from the tensors"),
        ({}, {"pre_lnorm": None}, "the setting 'pre_lnorm' cannot be told from the tensors"),
        ({}, {"mem_len": 0}, "mem_len must be a whole number of at least 1, not 0"),
        ({}, {"tgt_len": "4"}, "tgt_len must be a whole number of at least 1, not '4'"),
        ({}, {"clamp_len": "far"}, "a damaged checkpoint of kimiyoung/transformer-xl ("),
        ({"extra.weight": torch.zeros(1)}, {}, "no place is known for the tensors extra.weight"),
        ({"layers.1.dec_attn.r_net.weight": None}, {}, "tensors do not fit transformer-xl: missing layers.1.attention"),
        ({"layers.0.dec_attn.qkv_net.weight": torch.zeros(17, 8)}, {}, "a tensor of shape (17, 8) cannot be cut"),
        ({"r_w_bias": torch.zeros(6)}, {}, "a damaged checkpoint of kimiyoung/transformer-xl ("),
        ({"r_w_bias": None}, {}, "a damaged checkpoint of kimiyoung/transformer-xl ("),
        ({"crit.cluster_bias": torch.zeros(2)}, {}, "the setting 'cutoffs' cannot be told from the tensors"),
        ({"crit.cluster_bias": torch.zeros(2)}, {"dataset": "wt103"}, "3 clusters of tokens need 2 cutoffs, not"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(
    changed: dict[str, Tensor | None], settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    said = refusal(tmp_path / "model.pt", changed, **settings)
    assert said.startswith(sentence)
    assert "\n" not in said


# Adaptive embedding and softmax


@pytest.mark.parametrize("div_val", [1, 2])
def test_the_adaptive_softmax_is_that_of_torch(div_val: int) -> None:
    """`torch.nn.AdaptiveLogSoftmaxWithLoss` is the same but for biases of the tails, and projections of the head."""
    clusters = Clusters(cases.VOCAB, 8, 8, (4, 7), div_val)
    model = cases.seeded(Adaptive(clusters, tie_embedding=False, tie_projections=False))  # type: ignore[type-var]
    known = torch.nn.AdaptiveLogSoftmaxWithLoss(8, cases.VOCAB, [4, 7], div_value=div_val, head_bias=True).double()
    assert model.head_tables is not None
    h = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 8)))
    with torch.no_grad():
        narrow = h if div_val == 1 else h @ model.head_projections[0]
        known.head.weight.copy_(torch.cat([model.head_tables[0], model.cluster_weight]))
        known.head.bias.copy_(torch.cat([model.head_biases[0], model.cluster_bias]))
        for number in (1, 2):
            model.head_biases[number].zero_()
            down, up = known.tail[number - 1]
            width = clusters.widths[number]
            down.weight.copy_(model.head_projections[number].t() if div_val > 1 else torch.eye(width, 8))
            up.weight.copy_(model.head_tables[number])
        found = model.head(h[None])[0]
        if div_val == 1:
            assert (found - known.log_prob(h)).abs().max() < 1e-12
        tails = [known.tail[number - 1](h).log_softmax(dim=-1) for number in (1, 2)]
        head = known.head(narrow).log_softmax(dim=-1)
        wanted = torch.cat([head[:, :4], tails[0] + head[:, 4:5], tails[1] + head[:, 5:6]], dim=-1)
        assert (found - wanted).abs().max() < 1e-12


def test_an_adaptive_embedding_looks_up_each_token_in_its_cluster() -> None:
    model = cases.seeded(Adaptive(Clusters(11, 8, 6, (4, 7), 2), True, True))  # type: ignore[type-var]
    found = model.embed(torch.arange(11)[None])[0]
    for token in range(11):
        cluster = 0 if token < 4 else 1 if token < 7 else 2
        row = model.tables[cluster][token - (0, 4, 7)[cluster]]
        assert torch.allclose(found[token], model.projections[cluster] @ row, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cutoffs": [7, 4]}, "cutoffs must rise between 0 and vocab_size 11, not (0, 7, 4, 11)"),
        ({"cutoffs": [11]}, "cutoffs must rise between 0 and vocab_size 11, not (0, 11, 11)"),
        ({"cutoffs": "4 7"}, "cutoffs must be a list of token ids, not '4 7'"),
        ({"cutoffs": [4, 7], "div_val": 4}, "d_embed 8 cannot be divided by div_val 4 in 3 clusters"),
        ({"div_val": 0}, "div_val must be a whole number of at least 1, not 0"),
        ({"d_embed": 0}, "d_embed must be a whole number of at least 1, not 0"),
    ],
)
def test_impossible_clusters(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        transformer_xl(**settings)
    assert str(caught.value) == sentence
