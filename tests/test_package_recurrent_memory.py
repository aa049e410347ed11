"""lucidrains/recurrent-memory-transformer-pytorch: its own models, converted, stream as its own forward."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bundles
import cases
import pytest
import torch
from torch import nn

from mscompile import checkpoint
from mscompile.contracts import Array
from mscompile.conversion import recurrent_memory_pytorch
from mscompile.conversion.base import Foreign
from mscompile.conversion.table import SOURCES
from mscompile.errors import CheckpointError
from mscompile.models.family import ReferenceModel

package = pytest.importorskip(
    "recurrent_memory_transformer_pytorch",
    reason="no published code: pip install recurrent-memory-transformer-pytorch==0.7.0",
)

# Arguments of its constructor.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rotary": {"rotary_pos_emb": True},
    "rotary-alone": {"rotary_pos_emb": True, "abs_pos_emb": False},
    "no-read-memories-at-first": {"always_have_read_memories": False, "rotary_pos_emb": True},
    "written-on": {"add_write_to_next_write_mem": True},
    "written-on-after-none": {"add_write_to_next_write_mem": True, "always_have_read_memories": False},
    "one-stream": {"num_residual_streams": 1},
    "two-streams-one-layer": {"num_residual_streams": 2, "depth": 1},
    "segment-of-one": {"seq_len": 1, "num_memory_tokens": 1},
    "wide-feed-forward": {"ff_mult": 7, "heads": 3},
    "without-xl-memories": {"use_xl_memories": False},
    "enhanced": {"enhanced_xl_recurrence": True, "xl_mem_len": 2},
}
USUAL = {"num_tokens": cases.VOCAB, "dim": 8, "depth": 3, "heads": 2, "dim_head": 4, "seq_len": 5,
         "num_memory_tokens": 3}  # fmt: skip


def published(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """Their wrapped model with weights large enough that mistakes show."""
    model = package.RecurrentMemoryTransformer(**{**USUAL, **settings})
    return cases.seeded(package.RecurrentMemoryTransformerWrapper(model), dtype)


def converted(model: nn.Module, **settings: Any) -> ReferenceModel:
    """Our model of their state dict and settings."""
    return cases.adopted(recurrent_memory_pytorch.convert(cases.foreign(model, {**USUAL, **settings})))


def theirs(model: nn.Module, tokens: Array) -> Array:
    """Their wrapper's forward."""
    with torch.inference_mode():
        logits, _ = model(torch.from_numpy(tokens))
    return logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_of_any_chunks_equals_the_packages_forward_over_five_segments(variant: str) -> None:
    settings = VARIANTS[variant]
    model, tokens = published(**settings), cases.tokens(2, 23)
    want, ours = theirs(model, tokens), converted(model, **settings)
    assert cases.worst(cases.full(ours, tokens), want) <= 1e-10
    for chunks in ([1] * 23, [23], [3, 1, 7, 2, 2, 8]):
        assert cases.worst(cases.stream(cases.eager_session(ours, 2), tokens, chunks), want) <= 1e-10


def test_a_stream_hands_on_the_packages_memory() -> None:
    model, tokens = published(), cases.tokens(2, 15)
    session = cases.eager_session(converted(model), 2)
    session.step(tokens)
    with torch.inference_mode():
        _, memory = model(torch.from_numpy(tokens))
    assert cases.worst(session.state().states["memory"], memory.numpy()) <= 1e-10


def test_the_model_without_its_wrapper_is_the_same() -> None:
    model = published()
    bare, wrapped = cases.foreign(model.transformer, USUAL), cases.foreign(model, USUAL)  # type: ignore[arg-type]
    assert all(name.startswith("transformer.") for name in wrapped.tensors)
    ours, same = (recurrent_memory_pytorch.convert(each) for each in (wrapped, bare))
    assert ours.config == same.config
    assert ours.tensors.keys() == same.tensors.keys()
    assert all(torch.equal(ours.tensors[name], same.tensors[name]) for name in ours.tensors)


def test_settings_follow_from_tensors_where_they_can() -> None:
    config = recurrent_memory_pytorch.convert(cases.foreign(published(rotary_pos_emb=True), {})).config
    assert config == {
        "vocab_size": 11, "d_model": 8, "n_layer": 3, "num_mem_tokens": 3, "seq_len": 5, "n_head": 2, "d_head": 4,
        "d_ff": 21, "abs_pos_emb": True, "rotary_pos_emb": True, "num_residual_streams": 4,
        "add_write_to_next_write_mem": False, "always_have_read_memories": True,
    }  # fmt: skip


def test_a_segment_length_that_no_tensor_tells_must_be_stored() -> None:
    given = cases.foreign(published(rotary_pos_emb=True, abs_pos_emb=False), {})
    with pytest.raises(CheckpointError, match="the setting 'seq_len' cannot be told from the tensors"):
        recurrent_memory_pytorch.convert(given)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("causal", "model.pt: causal=False is not supported: tokens would see those after them"),
        (
            "memory_not_causal",
            (
                "model.pt: memory_not_causal=False is not supported: its causal mask leaves out the null key: a token "
                "would not see itself"
            ),
        ),
    ],
)
def test_what_no_stream_can_do_is_refused_by_name(setting: str, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        recurrent_memory_pytorch.convert(cases.foreign(published(), {**USUAL, setting: False}))
    assert str(caught.value) == sentence


def test_their_own_forward_fails_where_memory_is_causal() -> None:
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        published(memory_not_causal=False)(torch.zeros(1, 3, dtype=torch.int64))


def test_no_other_checkpoint_is_taken_for_one() -> None:
    assert recurrent_memory_pytorch.recognises(cases.foreign(published(), {}))
    assert not recurrent_memory_pytorch.recognises(cases.foreign(cases.transformer_xl(), {}))
    assert not recurrent_memory_pytorch.recognises(Foreign(Path("model.pt"), {}, {}))


def test_a_tensor_of_another_version_is_named() -> None:
    given = cases.foreign(published(), USUAL)
    tensors = {**given.tensors, "transformer.layers.1.0.branch.gamma": torch.zeros(8)}
    with pytest.raises(CheckpointError, match=r"no place is known for the tensors layers.1.0.branch.gamma$"):
        recurrent_memory_pytorch.convert(Foreign(given.path, tensors, USUAL))


@pytest.mark.slow
def test_an_engine_of_their_checkpoint_equals_their_forward(tmp_path: Path) -> None:
    """From their file to ONNX Runtime: token by token and in chunks of lengths that were never traced."""
    assert recurrent_memory_pytorch.SOURCE in SOURCES
    settings = {**USUAL, "rotary_pos_emb": True, "add_write_to_next_write_mem": True}
    model, source = published(torch.float32, **settings), tmp_path / "theirs.pt"
    for name, parameter in model.named_parameters():  # with larger ones rounding grows from segment to segment
        parameter.copy_(parameter if name.endswith("norm.weight") else parameter / 3)
    torch.save({"state_dict": model.state_dict(), "config": settings, "vocab": list("abcdefghijk")}, source)
    assert checkpoint.load(source).source == recurrent_memory_pytorch.SOURCE.name
    bundles.assert_streams(source, partial(theirs, model))
