"""XLNet of HuggingFace transformers: its own directories, and streams that equal its own forward with `mems`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import bundles
import cases
import numpy as np
import pytest
import torch
from cases import eager_session, full, stream, tokens, worst

from mscompile import checkpoint
from mscompile.contracts import Array
from mscompile.errors import CheckpointError, ConfigError
from mscompile.models.xlnet import XLNetConfig
from mscompile.pipeline import compile_checkpoint

MEMORY = 5
SIZES = {"n_layer": 2, "n_head": 2, "d_model": 8, "d_inner": 12, "mem_len": MEMORY, "attn_type": "uni", "dropout": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "uni": {},
    "same-length": {"same_length": True},
    "clamp": {"clamp_len": 3, "ff_activation": "relu"},
    "gelu-new": {"ff_activation": "gelu_new", "layer_norm_eps": 1e-5},
    "silu-untied": {"ff_activation": "silu", "tie_word_embeddings": False},
}


def package() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def theirs(settings: dict[str, Any]) -> Any:
    transformers = package()
    config = transformers.XLNetConfig(vocab_size=cases.VOCAB, **{**SIZES, **settings})
    return cases.seeded(transformers.XLNetLMHeadModel(config), torch.float32)


def own_forward(model: Any, ids: Array, chunks: list[int]) -> Array:
    """Their logits (B, N, V), call after call with their memories."""
    mems, found = None, []
    with torch.inference_mode():
        for part in torch.from_numpy(ids).split(chunks, dim=1):
            out = model(part, mems=mems, use_mems=True)
            mems = out.mems
            found.append(out.logits)
    return torch.cat(found, dim=1).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_directory_is_read_without_flags_and_streams_as_its_own_forward(variant: str, tmp_path: Path) -> None:
    model = theirs(VARIANTS[variant])
    model.save_pretrained(tmp_path / "model")
    trained = checkpoint.load(tmp_path / "model")
    assert (trained.source, trained.family.name) == ("huggingface/transformers XLNet", "xlnet")
    ids = tokens(2, 4 * MEMORY + 3)
    length = ids.shape[1]
    wanted = own_forward(model, ids, [1] * length)
    assert worst(full(trained.model, ids), wanted) < 1e-5
    session = eager_session(trained.model, batch=2)
    for chunks in ([1] * length, [length], [7, 1, 12, 3]):
        session.reset()
        assert worst(stream(session, ids, chunks), wanted) < 1e-5


def test_with_same_length_longer_calls_of_theirs_agree_once_memory_is_full(tmp_path: Path) -> None:
    model = theirs({"same_length": True})
    model.save_pretrained(tmp_path / "model")
    ids = tokens(2, 4 * MEMORY)
    wanted = own_forward(model, ids, [1] * MEMORY + [MEMORY, 2 * MEMORY])
    assert worst(full(checkpoint.load(tmp_path / "model").model, ids), wanted) < 1e-5


def test_without_it_longer_calls_of_theirs_are_another_model(tmp_path: Path) -> None:
    model, ids = theirs({}), tokens(2, 4 * MEMORY)
    model.save_pretrained(tmp_path / "model")
    calls = own_forward(model, ids, [MEMORY] * 4)
    assert worst(full(checkpoint.load(tmp_path / "model").model, ids), calls) > 1e-3


def test_shards_are_read_as_well(tmp_path: Path) -> None:
    model, ids = theirs({}), tokens(1, 7)
    model.save_pretrained(tmp_path / "model", max_shard_size="2KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    trained = checkpoint.load(tmp_path / "model")
    assert len(trained.files) > 3
    assert worst(full(trained.model, ids), own_forward(model, ids, [1] * 7)) < 1e-5


def refusal(path: Path, **settings: Any) -> str:
    theirs({}).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        checkpoint.load(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"attn_type": "bi"}, "attn_type must be 'uni', not 'bi': with 'bi' every token sees those after it"),
        ({"mem_len": None}, "mem_len is None, a memory without bound; set mem_len in config.json"),
        ({"bi_data": True}, "bi_data reads half of the batch backwards, which is no stream"),
        ({"ff_activation": "tanh"}, "activation must be one of ('gelu', 'gelu_new', 'relu', 'silu'), not 'tanh'"),
        ({"layer_norm_eps": "small"}, "norm_eps must lie between 0 and 1, not 'small'"),
        ({"clamp_len": None}, "a damaged checkpoint of huggingface/transformers XLNet ("),
    ],
)
def test_what_cannot_stream_is_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "model", **settings).startswith(sentence)


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    theirs({}).transformer.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="this XLNet has no lm_loss, so it is no language model"):
        checkpoint.load(tmp_path / "model")


def test_states_hold_what_it_remembers(tmp_path: Path) -> None:
    theirs({}).save_pretrained(tmp_path / "model")
    spec = eager_session(checkpoint.load(tmp_path / "model").model).spec
    assert {state.name: state.shape for state in spec.states} == {
        f"layer{n:02}.mems": ("batch", MEMORY, 8) for n in range(2)
    }
    assert spec.max_context is None


def test_a_config_of_odd_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="d_model must be even for sinusoid positions, not 7"):
        XLNetConfig(vocab_size=5, n_layer=1, d_model=7, n_head=1, d_head=7, d_inner=4, mem_len=2)


@pytest.mark.slow
def test_an_engine_equals_its_own_forward_at_lengths_not_traced(tmp_path: Path) -> None:
    model = theirs({})
    model.save_pretrained(tmp_path / "model")
    bundle = compile_checkpoint(tmp_path / "model", ["ort"], tmp_path / "model.msc", bundles.options())
    ids = tokens(3, 37)
    wanted = own_forward(model, ids, [1] * 37)
    for chunks in ([1] * 37, [37], [11, 3, 1, 22]):
        found = stream(bundle.session("ort", 3), ids, chunks)
        assert worst(found, wanted) < 1e-4
        assert (np.argmax(found, axis=-1) == np.argmax(wanted, axis=-1)).all()
