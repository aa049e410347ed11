"""Tiny trained-format checkpoints and the bundles compiled from them, made once a test run."""

from __future__ import annotations

import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cases
import pytest
import torch

from mscompile import checkpoint
from mscompile.contracts import Array, Profile

if TYPE_CHECKING:
    from mscompile.pipeline import Options

VOCAB = ("\n", " ", *string.ascii_lowercase)
STEPS = 64
SHIPPED = Path(__file__).parent.parent / "examples"
ADAPTERS = SHIPPED / "adapters"
EXAMPLES = ("transformer-xl", "hourglass")
MadeOnce = Callable[[str, Callable[[Path], object]], Path]

MODELS = {
    "transformer-xl": lambda: cases.transformer_xl(
        torch.float32, vocab_size=len(VOCAB), n_layer=1, mem_len=4, same_length=True
    ),
    "hourglass": lambda: cases.hourglass(torch.float32, vocab_size=len(VOCAB), context=64),
}


def save(family: str, path: Path) -> None:
    checkpoint.save(path, family, MODELS[family](), VOCAB)


def weights_of(name: str, path: Path) -> Path:
    """Seeded weights for the module of an example of an adapter."""
    sys.path.insert(0, str(ADAPTERS))
    try:
        module = __import__(name)
    finally:
        sys.path.remove(str(ADAPTERS))
    made = {
        "gru": lambda: module.GruLanguageModel(28, 16),
        "convolution": lambda: module.ConvolutionalLanguageModel(28, 16, 3),
        "fast_weights": lambda: module.FastWeightLanguageModel(28, 16),
        "clockwork": lambda: module.ClockworkLanguageModel(28, 16),
    }
    torch.manual_seed(0)
    torch.save(made[name]().state_dict(), path)
    return path


def options(**changes: object) -> Options:
    """Small and quick, unless a test says otherwise."""
    from mscompile.pipeline import Options

    usual = {"profile": Profile(1, 3, 16), "steps": STEPS}
    return Options(**{**usual, **changes})  # type: ignore[arg-type]


def compile_to(path: Path, source: Path) -> None:
    from mscompile.pipeline import compile_checkpoint

    compile_checkpoint(source, ["ort"], path, options())


def assert_streams(source: Path, forward: Callable[[Array], Array]) -> None:
    """An engine made from `source` gives `forward`: token by token and in chunks of lengths that were never traced."""
    from mscompile.runtime import open_bundle

    path, tokens = source.with_suffix(".msc"), cases.tokens(2, 41)
    compile_to(path, source)
    opened, want = open_bundle(path), forward(tokens)
    for chunks in ([1] * 41, [3, 1, 7, 2, 2, 11, 15], [41]):
        assert cases.worst(cases.stream(opened.session("ort", batch=2), tokens, chunks), want) <= 1e-4


@pytest.fixture(scope="session", params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def trained(made_once: MadeOnce) -> Path:
    """A tiny Transformer-XL checkpoint."""
    return made_once("transformer-xl.pt", lambda path: save("transformer-xl", path))


@pytest.fixture(scope="session")
def compiled(made_once: MadeOnce, trained: Path) -> Path:
    """Its verified bundle for ONNX Runtime."""
    return made_once("transformer-xl.msc", lambda path: compile_to(path, trained))


@pytest.fixture(scope="session")
def checkpoint_of(made_once: MadeOnce, family: str) -> Path:
    return made_once(f"{family}.pt", lambda path: save(family, path))


@pytest.fixture(scope="session")
def bundle_of(made_once: MadeOnce, family: str, checkpoint_of: Path) -> Path:
    """The bundle of each family in turn."""
    return made_once(f"{family}.msc", lambda path: compile_to(path, checkpoint_of))


def example_of(name: str, made_once: MadeOnce) -> Path:
    """The bundle of a trained example, not verified."""
    from mscompile.pipeline import Options, compile_checkpoint

    source, wanted = SHIPPED / f"{name}.pt", Options(validate=False)
    return made_once(f"example-{name}.msc", lambda path: compile_checkpoint(source, ["ort"], path, wanted))


@pytest.fixture(scope="session", params=EXAMPLES)
def example(request: pytest.FixtureRequest, made_once: MadeOnce) -> Path:
    """The bundle of each trained example in turn."""
    return example_of(str(request.param), made_once)
