"""The models that are measured: the shapes of shapes.py with random weights from a seed, and their bundles.

Latency does not depend on what a model has learned; what does (perplexity, parity on text) is measured on the
trained models of examples/.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from shapes import VOCAB, hourglass, multiscale, transformer_xl, vanilla

from mscompile import checkpoint, compile_checkpoint
from mscompile.contracts import Profile
from mscompile.models.family import ReferenceModel
from mscompile.pipeline import Options

PROFILE = Profile(1, 16, 512)
SEED = 20260101


@dataclass(frozen=True)
class Model:
    """One measured model: its family's name and how it is made."""

    name: str
    family: str
    make: Callable[[], ReferenceModel]


MODELS = {
    model.name: model
    for model in (
        Model("transformer-xl-41m", "transformer-xl", transformer_xl),
        Model("hourglass-12", "hourglass", hourglass),
        Model("vanilla-12", "hourglass", vanilla),
        Model("multiscale-30", "multiscale-top-down", multiscale),
        Model("vanilla-14", "hourglass", lambda: vanilla(14)),
    )
}


def saved(name: str, directory: Path) -> Path:
    """The checkpoint of a model, written on first use."""
    path = directory / f"{name}.pt"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        model = MODELS[name].make().eval()
        checkpoint.save(path, MODELS[name].family, model, tuple(f"token {number}" for number in range(VOCAB)))
    return path


def compiled(source: Path, directory: Path, precision: str = "fp32") -> Path:
    """The bundle of a checkpoint for ONNX Runtime, made once for each state of the compiler.

    Its parity gate is left to the tests: a rollout of these sizes takes minutes.
    """
    path = directory / f"{source.stem}-{precision}-{_compiler()}.msc"
    if not path.exists():
        compile_checkpoint(source, ["ort"], path, Options(precision=precision, profile=PROFILE, validate=False))
    return path


def _compiler() -> str:
    """A few digits that change with the sources that decide what a bundle holds."""
    packages = Path(inspect.getfile(compile_checkpoint)).parent.parent
    files = sorted(path for name in ("exporters", "engines", "mscompile") for path in (packages / name).rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]
