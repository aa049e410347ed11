"""lucidrains/MEGABYTE-pytorch: its own models, converted, stream as its own forward over whole sequences."""

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
from mscompile.conversion import megabyte_pytorch
from mscompile.conversion.base import Foreign
from mscompile.conversion.table import SOURCES
from mscompile.errors import CheckpointError
from mscompile.models.family import ReferenceModel

package = pytest.importorskip("MEGABYTE_pytorch", reason="no published code: pip install MEGABYTE-pytorch==0.3.6")

# Arguments of its constructor.
VARIANTS: dict[str, dict[str, Any]] = {
    "two-stages": {},
    "one-width": {"dim": 6},
    "learned-positions": {"pos_emb": True},
    "rotary": {"rel_pos": True},
    "three-stages": {"dim": (8, 5, 7), "depth": (1, 2, 1), "max_seq_len": (3, 2, 5), "rel_pos": True, "pos_emb": True},
    "four-stages": {"dim": (6, 8, 4, 6), "depth": (1, 1, 2, 1), "max_seq_len": (3, 2, 3, 2), "ff_mult": 1},
}
USUAL = {"num_tokens": cases.VOCAB, "dim": (8, 6), "depth": (2, 1), "max_seq_len": (10, 3), "dim_head": 4, "heads": 2}
LENGTH = 29  # not a whole number of patches in any variant


def published(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """Their model with weights large enough that mistakes show."""
    model = cases.seeded(package.MEGABYTE(**{**USUAL, **settings}), dtype)
    for transformer in model.transformers:
        if transformer.rotary_emb is not None:  # theirs are rounded to float32, whatever the dtype
            width = 2 * len(transformer.rotary_emb.inv_freq)
            transformer.rotary_emb.inv_freq = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return model


def converted(model: nn.Module, **settings: Any) -> ReferenceModel:
    """Our model of their state dict and settings."""
    return cases.adopted(megabyte_pytorch.convert(cases.foreign(model, {**USUAL, **settings})))


def theirs(model: nn.Module, tokens: Array) -> Array:
    """Their forward over the whole sequence, which they pad themselves."""
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_of_any_chunks_equals_the_packages_forward(variant: str) -> None:
    settings = VARIANTS[variant]
    model = published(**settings)
    tokens = cases.tokens(2, LENGTH)
    want = theirs(model, tokens)
    ours = converted(model, **settings)
    assert cases.worst(cases.full(ours, tokens), want) <= 1e-10
    for chunks in ([1] * LENGTH, [LENGTH], [3, 1, 7, 2, 2, 11, 3]):
        assert cases.worst(cases.stream(cases.eager_session(ours, 2), tokens, chunks), want) <= 1e-10


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 30])
def test_sequences_of_any_length_are_those_of_the_package(length: int) -> None:
    model, tokens = published(), cases.tokens(3, length)
    assert cases.worst(cases.full(converted(model), tokens), theirs(model, tokens)) <= 1e-10


def test_settings_follow_from_the_tensors_where_they_can() -> None:
    settings = VARIANTS["three-stages"]
    config = megabyte_pytorch.convert(cases.foreign(published(**settings), {"dim_head": 4, "heads": 2})).config
    assert config == {
        "vocab_size": cases.VOCAB, "dim": [8, 5, 7], "depth": [1, 2, 1], "max_seq_len": [3, 2, 5], "dim_head": 4,
        "heads": 2, "ff_mult": 4, "rel_pos": True, "pos_emb": True,
    }  # fmt: skip


def test_heads_that_are_not_stored_are_those_of_their_constructor() -> None:
    arguments = {"num_tokens": cases.VOCAB, "dim": 8, "depth": (1, 1), "max_seq_len": (4, 3)}
    model = cases.seeded(package.MEGABYTE(**arguments))
    config = megabyte_pytorch.convert(cases.foreign(model, {"max_seq_len": (4, 3)})).config
    assert (config["heads"], config["dim_head"]) == (8, 64)


def test_no_other_checkpoint_is_taken_for_one() -> None:
    assert megabyte_pytorch.recognises(cases.foreign(published(), {}))
    assert not megabyte_pytorch.recognises(cases.foreign(cases.transformer_xl(), {}))
    assert not megabyte_pytorch.recognises(Foreign(Path("model.pt"), {}, {}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 4}, "to_q.weight has 8 rows, but heads 4 and dim_head 4 make 16"),
        (
            {"max_seq_len": (10, 4)},
            "max_seq_len [10, 4] does not fit the tensors, whose patches make [10, 3]",
        ),
    ],
)
def test_settings_that_cannot_be_those_of_the_model_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        megabyte_pytorch.convert(cases.foreign(published(), {**USUAL, **settings}))
    assert str(caught.value) == f"model.pt: {message}; store the settings that the model was built with"


def test_the_length_of_the_first_stage_must_be_stored_where_there_are_no_positions() -> None:
    with pytest.raises(CheckpointError, match="the setting 'max_seq_len' cannot be told from the tensors"):
        megabyte_pytorch.convert(cases.foreign(published(), {"heads": 2, "dim_head": 4}))


def test_a_tensor_of_another_version_is_named() -> None:
    given = cases.foreign(published(), USUAL)
    tensors = {**given.tensors, "transformers.0.layers.0.0.null_kv": torch.zeros(8)}
    with pytest.raises(CheckpointError, match=r"no place is known for the tensors transformers.0.layers.0.0.null_kv$"):
        megabyte_pytorch.convert(Foreign(given.path, tensors, USUAL))


@pytest.mark.slow
def test_an_engine_of_their_checkpoint_equals_their_forward(tmp_path: Path) -> None:
    """From their file to ONNX Runtime: token by token and in chunks of lengths that were never traced."""
    assert megabyte_pytorch.SOURCE in SOURCES
    settings = {**USUAL, "max_seq_len": (16, 3)}
    model, source = cases.seeded(package.MEGABYTE(**settings), torch.float32), tmp_path / "theirs.pt"
    torch.save({"state_dict": model.state_dict(), "config": settings, "vocab": tuple("abcdefghijk")}, source)
    assert checkpoint.load(source).source == megabyte_pytorch.SOURCE.name
    bundles.assert_streams(source, partial(theirs, model))
