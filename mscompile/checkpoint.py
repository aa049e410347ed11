"""Trained checkpoints: writing them, and reading them without running anything they contain.

A checkpoint is `{"format": "mscompile", "family", "config", "vocab", "state_dict"}`, written by torch.save
(`.pt`) or as safetensors with the same fields as JSON metadata (`.safetensors`). Those of other projects are
recognised by what they hold and converted (`mscompile/conversion`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from mscompile.conversion import read
from mscompile.conversion.base import Converted, Foreign, Source
from mscompile.conversion.table import SOURCES
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
    vocab: tuple[str, ...]  # the text of every token, by id; empty where another project keeps it elsewhere
    source: str  # the project whose format it has
    files: tuple[Path, ...]  # that it was read from

    def sha256(self) -> str:
        """Of the file; of several, of the list of their digests and names, as `sha256sum` prints it."""
        digests = {file.name: _sha256(file) for file in self.files}
        if len(digests) == 1:
            return next(iter(digests.values()))
        listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        return hashlib.sha256(listed.encode()).hexdigest()


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
    family or project, or whose tensors do not fit; ConfigError for impossible settings.
    """
    content, files = read.read(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        source, fields = FORMAT, _own(path, content)
    else:
        source, fields, files = _converted(path, content, files)
        if family not in ("auto", fields["family"]):
            raise CheckpointError(f"{path}: this is a {fields['family']} of {source}, not a {family}")
    if not isinstance(fields["family"], str | int):
        raise CheckpointError(f"{path}: family must be a name, not {type(fields['family']).__name__}")
    row = families.find(str(fields["family"]) if family == "auto" else family)
    if not isinstance(fields["config"], dict):
        raise CheckpointError(f"{path}: config must be a mapping of settings, not {type(fields['config']).__name__}")
    if odd := [name for name, value in fields["config"].items() if not read.is_setting(value)]:
        raise CheckpointError(f"{path}: config has {odd[0]!r}, which is no text, number, or list of them")
    config = row.parse_config(fields["config"])
    vocab = _vocab(path, fields["vocab"], config.vocab_size) if fields["vocab"] or source == FORMAT else ()
    model = _shaped(path, row, config, fields["state_dict"])
    wanted = model.state_dict()
    _check_tensors(path, row.name, fields["state_dict"], wanted)
    with read.guarded(path):
        given = {name: fields["state_dict"][name].to(tensor.dtype).contiguous() for name, tensor in wanted.items()}
    model.load_state_dict(given, assign=True)
    return Checkpoint(row, model.requires_grad_(False), vocab, source, files)


def _shaped(path: Path, row: Family, config: Any, given: Any) -> ReferenceModel:
    """The model, its tensors without contents: those are in the file.

    A file may name any number of layers, and making a module takes time and memory, so a model with far more
    parameters than the file has tensors is given up while it is being made.
    """
    count, most = 0, 2 * len(given) + 1000 if isinstance(given, dict) else 1000

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise CheckpointError(f"{path}: its settings need more than {most} tensors, and it holds {len(given)}")

    hook = register_module_parameter_registration_hook(counted)
    try:
        with torch.device("meta"), read.guarded(path):
            return row.model(config).eval()
    finally:
        hook.remove()


def _own(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    if missing := [name for name in FIELDS if name not in content]:
        raise CheckpointError(f"{path}: the checkpoint lacks {', '.join(missing)}")
    return content


def _converted(path: Path, content: Any, files: tuple[Path, ...]) -> tuple[str, dict[str, Any], tuple[Path, ...]]:
    """The project that a checkpoint is of, the fields of ours that it becomes, and all files it was read from."""
    foreign = read.foreign(path, content, files)
    if foreign is not None:
        for source in SOURCES:
            if converted := _by(source, foreign):
                vocab = list(converted.vocab or foreign.vocab)
                fields = {"family": converted.family, "config": dict(converted.config), "vocab": vocab}
                return source.name, {**fields, "state_dict": dict(converted.tensors)}, foreign.files
    known = ", ".join(source.name for source in SOURCES)
    raise CheckpointError(
        f"{path}: neither an mscompile checkpoint nor one of a known project ({known}): {_told(content, foreign)}; "
        "convert it with mscompile.checkpoint.save(path, family, model, vocab)"
    )


def _by(source: Source, foreign: Foreign) -> Converted | None:
    """What a project makes of a checkpoint, if it is one of its own. Nothing read has been checked before."""
    try:
        return source.convert(foreign) if source.recognises(foreign) else None
    except MsCompileError:
        raise
    except Exception as error:  # whatever a file holds, the answer is one sentence
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{foreign.path}: a damaged checkpoint of {source.name} ({reason})") from error


def _told(content: Any, foreign: Foreign | None) -> str:
    """What was found instead of a checkpoint that is known."""
    if foreign is None:
        return f"it holds a {type(content).__name__} without tensors by name"
    shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(foreign.tensors.items())[:3]]
    more = ", ..." if len(foreign.tensors) > len(shown) else ""
    settings = f"the settings {', '.join(sorted(foreign.config)[:8])}" if foreign.config else "no settings"
    return f"it holds {len(foreign.tensors)} tensors ({', '.join(shown)}{more}) and {settings}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    faults += [f"unexpected {_printed(name)}" for name in given if name not in wanted]
    for name, tensor in wanted.items():
        if name in given:
            faults += _tensor_faults(name, given[name], tensor)
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CheckpointError(f"{path}: tensors do not fit {family}: {shown}")


def _tensor_faults(name: str, given: Tensor, wanted: Tensor) -> Iterator[str]:
    if given.shape != wanted.shape:
        yield f"{name} has shape {tuple(given.shape)}, wanted {tuple(wanted.shape)}"
    if not given.is_floating_point():
        yield f"{name} is {given.dtype}, wanted a floating dtype"
    if not read.is_plain(given):
        yield f"{name} is {given.layout} on {given.device}, wanted a plain tensor"


def _printed(name: Any) -> str:
    """A name from a file, on one line."""
    return name if isinstance(name, str) and name.isprintable() else repr(name)[:100]
