"""The package hourglass-transformer-pytorch: its state dicts, and streams that equal its own forward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bundles
import cases
import pytest
import torch
from cases import eager_session, full, stream, tokens, worst

from mscompile import checkpoint
from mscompile.contracts import Array
from mscompile.errors import CheckpointError, ConfigError, MsCompileError, Refusal
from mscompile.pipeline import compile_checkpoint

CONTEXT = 48
SIZES = {"num_tokens": cases.VOCAB, "dim": 8, "max_seq_len": CONTEXT, "heads": 2, "dim_head": 3, "causal": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "naive": {"depth": (1, 2, 1), "shorten_factor": 3, "attn_resampling": False},
    "naive-attention": {"depth": (2, 1, 1), "shorten_factor": 2},
    "linear": {"depth": (1, 1, 2), "shorten_factor": 3, "updown_sample_type": "linear", "attn_resampling": False},
    "linear-attention": {"depth": (1, 1, 1), "shorten_factor": 4, "updown_sample_type": "linear"},
    "nested": {"depth": (1, (1, 1, 2), 1), "shorten_factor": (2, 3)},
    "nested-one-factor": {"depth": (1, (2, 1, 0), 1), "shorten_factor": 2, "updown_sample_type": "linear"},
    "one-scale": {"depth": 2},
}


def theirs(settings: dict[str, Any]) -> Any:
    package = pytest.importorskip("hourglass_transformer_pytorch.hourglass_transformer_pytorch")
    package.math = math  # version 0.0.6 pads with math.ceil and does not import math
    return cases.seeded(package.HourglassTransformerLM(**SIZES, **settings), torch.float32)


def saved(path: Path, model: torch.nn.Module, settings: dict[str, Any]) -> Path:
    torch.save({"state_dict": model.state_dict(), "kwargs": {**SIZES, **settings}}, path)
    return path


def own_forward(model: Any, ids: Array) -> Array:
    with torch.inference_mode():
        logits: Array = model(torch.from_numpy(ids)).numpy()
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_is_read_without_flags_and_streams_as_its_own_forward(variant: str, tmp_path: Path) -> None:
    settings = VARIANTS[variant]
    model = theirs(settings)
    trained = checkpoint.load(saved(tmp_path / "model.pt", model, settings))
    assert trained.source == "lucidrains/hourglass-transformer-pytorch"
    assert trained.family.name == "hourglass-pytorch"
    ids = tokens(2, 29)
    wanted = own_forward(model, ids)
    assert worst(full(trained.model, ids), wanted) < 1e-5
    session = eager_session(trained.model, batch=2)
    for chunks in ([1] * 29, [29], [7, 1, 12, 9]):
        session.reset()
        assert worst(stream(session, ids, chunks), wanted) < 1e-5


def test_every_length_of_theirs_begins_as_the_stream_does(tmp_path: Path) -> None:
    settings = VARIANTS["nested"]
    model, ids = theirs(settings), tokens(1, 17)
    session = eager_session(checkpoint.load(saved(tmp_path / "model.pt", model, settings)).model)
    logits = stream(session, ids, [1] * 17)
    for length in range(1, 18):
        assert worst(logits[:, :length], own_forward(model, ids[:, :length])) < 1e-5


def test_the_model_in_their_wrapper(tmp_path: Path) -> None:
    wrapper = pytest.importorskip("hourglass_transformer_pytorch.autoregressive_wrapper")
    settings = VARIANTS["naive"]
    model, ids = theirs(settings), tokens(1, 9)
    trained = checkpoint.load(saved(tmp_path / "model.pt", wrapper.AutoregressiveWrapper(model), settings))
    assert worst(full(trained.model, ids), own_forward(model, ids)) < 1e-5


def test_the_coarse_scales_run_where_their_rows_are_due(tmp_path: Path) -> None:
    settings = VARIANTS["nested"]
    trained = checkpoint.load(saved(tmp_path / "model.pt", theirs(settings), settings))
    spec = eager_session(trained.model).spec
    ticks = [(tick.graphs, tick.repeat) for tick in spec.schedule.ticks]
    assert ticks == [(("decode_6",), 1), (("decode_1",), 1), (("decode_2",), 1), (("decode_1",), 1),
                     (("decode_2",), 1), (("decode_1",), 1)]  # fmt: skip
    assert spec.max_context == CONTEXT
    shapes = {state.name: state.shape for state in spec.states}
    assert shapes["scale1.valley.shortening.rows"] == ("batch", 1, 8)
    assert shapes["scale1.valley.upsampling.expansion"] == ("batch", 1, 8)
    assert shapes["scale1.pre.block00.attention.key"] == ("batch", 2, CONTEXT, 3)
    assert shapes["scale1.valley.scale2.valley.scale6.pre.block00.attention.key"] == ("batch", 2, CONTEXT // 6, 3)


def refusal(path: Path, settings: dict[str, Any], **changed: Any) -> str:
    model = theirs(settings)
    kwargs = {name: value for name, value in {**SIZES, **settings, **changed}.items() if value is not None}
    torch.save({"state_dict": model.state_dict(), "kwargs": kwargs}, path)
    with pytest.raises(MsCompileError) as caught:
        checkpoint.load(path)
    assert isinstance(caught.value, CheckpointError | ConfigError)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("variant", "changed", "sentence"),
    [
        ("naive", {"shorten_factor": None}, "the setting 'shorten_factor' cannot be told from the tensors"),
        ("naive", {"shorten_factor": 1}, "shorten_factors must be a list of whole numbers of at least 2, not [1]"),
        ("nested", {"shorten_factor": (2,)}, "pre_layers (1, 1), post_layers (1, 2) and shorten_factors (2,) must be"),
        ("naive", {"causal": False}, "causal must be true: without it every token sees those after it"),
        ("naive", {"heads": None}, "queries of width 6 are not 8 heads of 3; give the arguments heads and dim_head"),
        ("naive", {"dim_head": 4}, "queries of width 6 are not 2 heads of 4; give the arguments heads and dim_head"),
        ("naive", {"heads": 0}, "a damaged checkpoint of lucidrains/hourglass-transformer-pytorch ("),
    ],
)
def test_arguments_that_do_not_fit(variant: str, changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "model.pt", VARIANTS[variant], **changed).startswith(sentence)


def test_linear_resampling_needs_no_factor(tmp_path: Path) -> None:
    model = theirs(VARIANTS["linear"])
    torch.save({"model": model.state_dict(), "config": {"heads": 2}}, tmp_path / "model.pt")
    assert checkpoint.load(tmp_path / "model.pt").model.config.shorten_factors == (3,)


def test_a_state_dict_alone_cannot_tell_its_heads(tmp_path: Path) -> None:
    torch.save(theirs(VARIANTS["linear"]).state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="the setting 'heads' cannot be told from the tensors"):
        checkpoint.load(tmp_path / "model.pt")


def test_a_stream_longer_than_there_are_positions_is_refused(tmp_path: Path) -> None:
    trained = checkpoint.load(saved(tmp_path / "model.pt", theirs(VARIANTS["naive"]), VARIANTS["naive"]))
    with pytest.raises(Refusal, match="this model has positions for 48 tokens, not for 49"):
        eager_session(trained.model, context=CONTEXT + 1)


@pytest.mark.slow
def test_an_engine_equals_its_own_forward_at_lengths_not_traced(tmp_path: Path) -> None:
    settings = VARIANTS["nested"]
    model = theirs(settings)
    path = saved(tmp_path / "model.pt", model, settings)
    bundle = compile_checkpoint(path, ["ort"], tmp_path / "model.msc", bundles.options())
    ids = tokens(3, 37)
    wanted = own_forward(model, ids)
    for chunks in ([1] * 37, [37], [11, 3, 1, 22]):
        assert worst(stream(bundle.session("ort", 3), ids, chunks), wanted) < 1e-4
