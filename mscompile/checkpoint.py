"""Trained checkpoints: writing them, and reading them without running anything they contain.

A checkpoint is `{"format": "mscompile", "family", "config", "vocab", "state_dict"}`, written by torch.save
(`.pt`) or as safetensors with the same fields as JSON metadata (`.safetensors`).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from mscompile.errors import CheckpointError, MsCompileError
from mscompile.models import families
from mscompile.models.family import Family, ReferenceModel

FORMAT = "mscompile"
FIELDS = ("family", "config", "vocab", "state_dict")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and fits its family."""

    family: Family
    model: ReferenceModel  # eval mode, float32
    vocab: tuple[str, ...]  # the text of every token, by id


def save(path: Path, family: str, model: ReferenceModel, vocab: tuple[str, ...]) -> None:
    """Write `model` as a checkpoint; the suffix chooses the format, `.pt` or `.safetensors`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    fields = {"family": family, "config": asdict(model.config), "vocab": list(vocab)}
    partial = path.with_name(path.name + ".partial")
    try:
        if path.suffix == ".safetensors":
            metadata = {"format": FORMAT, **{name: json.dumps(value) for name, value in fields.items()}}
            safetensors.torch.save_file(state, partial, metadata=metadata)
        else:
            torch.save({"format": FORMAT, **fields, "state_dict": state}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, family: str = "auto") -> Checkpoint:
    """Read a checkpoint and build its model in eval mode.

    The weights stay in the file, mapped into memory: pages are read when they are used, and nothing is copied
    where the file holds float32. A file that is overwritten in place while its model is in use changes the model;
    `save` never does that.

    Raises CheckpointError, in one sentence, for a file that is missing, damaged, unsafe, of an unknown
    family, or whose tensors do not fit; ConfigError for impossible settings.
    """
    fields = read_fields(path)
    row = families.find(str(fields["family"]) if family == "auto" else family)
    if not isinstance(fields["config"], dict):
        raise CheckpointError(f"{path}: config must be a mapping of settings, not {type(fields['config']).__name__}")
    config = row.parse_config(fields["config"])
    vocab = _vocab(path, fields["vocab"], config.vocab_size)
    with torch.device("meta"):  # shapes only: the weights are those of the file
        model = row.model(config).eval()
    wanted = model.state_dict()
    _check_tensors(path, row.name, fields["state_dict"], wanted)
    with _reading(path):
        given = {name: fields["state_dict"][name].to(tensor.dtype).contiguous() for name, tensor in wanted.items()}
    model.load_state_dict(given, assign=True)
    return Checkpoint(row, model.requires_grad_(False), vocab)


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a checkpoint file, format checked, contents not yet."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: a checkpoint is a file, this is a directory")
    with _reading(path):
        fields = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(
            f'{path}: not an mscompile checkpoint: it lacks "format": "{FORMAT}"; '
            "save it with mscompile.checkpoint.save(path, family, model, vocab)"
        )
    if missing := [name for name in FIELDS if name not in fields]:
        raise CheckpointError(f"{path}: the checkpoint lacks {', '.join(missing)}")
    return fields


def _read_torch(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        if path.read_bytes()[:2] == b"PK":
            raise CheckpointError(f"{path}: the file is truncated; copy or download it again")
        raise CheckpointError(f"{path}: not a checkpoint: neither a torch.save archive nor a .safetensors file")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    fields = {name: json.loads(metadata[name]) for name in ("family", "config", "vocab") if name in metadata}
    return {"format": metadata.get("format"), **fields, "state_dict": tensors}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: this pickle needs code to load, which is refused because code in a checkpoint can do anything; "
            "load it where you trust it and save only its tensors: "
            "mscompile.checkpoint.save(path, family, model, vocab) or safetensors"
        ) from error
    except MsCompileError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: the file is damaged or truncated ({reason})") from error


def _vocab(path: Path, vocab: Any, size: int) -> tuple[str, ...]:
    if not isinstance(vocab, list) or not all(isinstance(token, str) for token in vocab):
        raise CheckpointError(f"{path}: vocab must be a list of token texts")
    if len(vocab) != size:
        raise CheckpointError(f"{path}: vocab has {len(vocab)} tokens but the configuration says {size}")
    return tuple(vocab)


def _check_tensors(path: Path, family: str, given: Any, wanted: Mapping[str, Tensor]) -> None:
    if not isinstance(given, dict) or not all(isinstance(tensor, Tensor) for tensor in given.values()):
        raise CheckpointError(f"{path}: state_dict must map names to tensors")
    faults = [f"missing {name}" for name in wanted if name not in given]
    faults += [f"unexpected {name}" for name in given if name not in wanted]
    faults += [
        f"{name} has shape {tuple(given[name].shape)}, wanted {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    faults += [
        f"{name} is {given[name].dtype}, wanted a floating dtype"
        for name in wanted
        if name in given and not given[name].is_floating_point()
    ]
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CheckpointError(f"{path}: tensors do not fit {family}: {shown}")
