"""lucidrains/compressive-transformer-pytorch: its own models, converted, stream as its own forward over segments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bundles
import cases
import pytest
import torch
from torch import Tensor, nn

from mscompile import checkpoint
from mscompile.contracts import Array
from mscompile.conversion import compressive_pytorch
from mscompile.conversion.base import Foreign
from mscompile.conversion.table import SOURCES
from mscompile.errors import CheckpointError
from mscompile.models.family import ReferenceModel

package = pytest.importorskip(
    "compressive_transformer_pytorch", reason="no published code: pip install compressive-transformer-pytorch==0.4.0"
)

# Arguments of its constructor. Lengths are odd on purpose where nothing is said: 5 rows of memory for segments of 4.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "even-lengths": {"seq_len": 4, "mem_len": 8, "cmem_len": 4, "cmem_ratio": 2},
    "uneven-lengths": {"seq_len": 5, "mem_len": 7, "cmem_len": 3, "cmem_ratio": 3},
    "more-compressed-than-kept": {"seq_len": 4, "mem_len": 4, "cmem_len": 1, "cmem_ratio": 4},
    "no-enhanced-recurrence": {"enhanced_recurrence": False},
    "some-layers-remember": {"memory_layers": [1, 3]},
    "only-the-last-remembers": {"memory_layers": [3], "mem_len": 6},
    "sum": {"gru_gated_residual": False},
    "mogrified": {"mogrify_gru": True},
    "glu": {"ff_glu": True},
    "narrow-embedding": {"emb_dim": 6},
}
USUAL = {"num_tokens": cases.VOCAB, "dim": 8, "depth": 3, "heads": 2, "seq_len": 4, "mem_len": 5, "cmem_len": 3,
         "cmem_ratio": 2}  # fmt: skip


def published(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """Their model with weights large enough that mistakes show."""
    return cases.seeded(package.CompressiveTransformer(**{**USUAL, **settings}), dtype)


def converted(model: nn.Module, **settings: Any) -> ReferenceModel:
    """Our model of their state dict and settings."""
    return cases.adopted(compressive_pytorch.convert(cases.foreign(model, {**USUAL, **settings})))


def theirs(model: Any, tokens: Array) -> Array:
    """Their forward, segment by segment, with the memories that it returned."""
    logits: list[Tensor] = []
    memories = None
    with torch.inference_mode():
        for segment in torch.from_numpy(tokens).split(model.seq_len, dim=1):
            out, memories, _ = model(segment, memories=memories)
            logits.append(out)
    return torch.cat(logits, dim=1).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_of_any_chunks_equals_the_packages_forward_over_seven_segments(variant: str) -> None:
    settings = VARIANTS[variant]
    model = published(**settings)
    tokens = cases.tokens(2, 30)
    want = theirs(model, tokens)
    ours = converted(model, **settings)
    assert cases.worst(cases.full(ours, tokens), want) <= 1e-10
    for chunks in ([1] * 30, [30], [3, 1, 7, 2, 2, 11, 4]):
        assert cases.worst(cases.stream(cases.eager_session(ours, 2), tokens, chunks), want) <= 1e-10


def test_lengths_that_are_not_stored_are_those_of_their_constructor() -> None:
    arguments = {"seq_len": 8}
    model = cases.seeded(package.CompressiveTransformer(num_tokens=cases.VOCAB, dim=8, depth=2, **arguments))
    config = compressive_pytorch.convert(cases.foreign(model, arguments)).config
    want = {"tgt_len": 8, "mem_len": 8, "cmem_len": 2, "compression_rate": 4, "n_head": 8, "d_ff": 32,
            "residual": "gru", "feed_forward": "gelu", "enhanced_recurrence": True, "memory_layers": None}  # fmt: skip
    assert {name: config[name] for name in want} == want


def test_the_packages_wrapper_is_taken_off() -> None:
    model = published()
    wrapped = cases.foreign(package.AutoregressiveWrapper(model), USUAL)
    assert all(name.startswith("net.") for name in wrapped.tensors)
    assert compressive_pytorch.recognises(wrapped)
    ours, bare = (compressive_pytorch.convert(each).tensors for each in (wrapped, cases.foreign(model, USUAL)))
    assert ours.keys() == bare.keys()
    assert all(torch.equal(ours[name], bare[name]) for name in ours)


def test_no_other_checkpoint_is_taken_for_one() -> None:
    ours = cases.foreign(cases.transformer_xl(), {})
    assert not compressive_pytorch.recognises(ours)
    assert compressive_pytorch.recognises(cases.foreign(published(), {}))
    assert not compressive_pytorch.recognises(Foreign(Path("model.pt"), {}, {}))


def test_lengths_that_cannot_be_those_of_the_model_are_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        compressive_pytorch.convert(cases.foreign(published(), {**USUAL, "mem_len": 6}))
    assert str(caught.value) == (
        "model.pt: pos_emb has 12 positions, but seq_len 4, mem_len 6 and cmem_len 3 make 13; "
        "store the settings that the model was built with"
    )
    with pytest.raises(CheckpointError, match="the setting 'seq_len' cannot be told from the tensors"):
        compressive_pytorch.convert(cases.foreign(published(), {}))


def test_a_tensor_of_another_version_is_named() -> None:
    given = cases.foreign(published(), USUAL)
    with pytest.raises(CheckpointError, match=r"no place is known for the tensors attn_layers.1.fn.fn.gamma$"):
        compressive_pytorch.convert(
            Foreign(given.path, {**given.tensors, "attn_layers.1.fn.fn.gamma": torch.zeros(8)}, USUAL)
        )


@pytest.mark.slow
def test_an_engine_of_their_checkpoint_equals_their_forward(tmp_path: Path) -> None:
    """From their file to ONNX Runtime: token by token and in chunks of lengths that were never traced."""
    assert compressive_pytorch.SOURCE in SOURCES
    model, source = published(torch.float32), tmp_path / "theirs.pt"
    vocab = tuple("abcdefghijk")
    torch.save({"state_dict": model.state_dict(), "config": USUAL, "vocab": vocab}, source)
    assert checkpoint.load(source).source == compressive_pytorch.SOURCE.name
    bundles.assert_streams(source, partial(theirs, model))
