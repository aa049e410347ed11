"""What the files of a checkpoint hold, read without running anything that they contain.

Given                                                      Read
  x.pt, x.bin      torch.save of plain data and tensors      that data; an argparse.Namespace is plain data, too
  x.safetensors    tensors, and texts as metadata            {"state_dict": tensors, name: JSON of the metadata}
  a directory      config.json and the weights, whole or     {"config": config.json, "state_dict": tensors}
                   in shards that an index lists

A checkpoint of another project is such data with a state dict in it, and settings in it or in a .json file beside it.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mscompile.conversion.base import Foreign
from mscompile.errors import CheckpointError, MsCompileError

STATES = ("state_dict", "model_state_dict", "model_state", "model")  # where a state dict lies in a checkpoint
SETTINGS = (
    "args",
    "hparams",
    "hyper_parameters",
    "kwargs",
    "config",
    "model_config",
)  # where settings lie; later ones win
WRAPPERS = ("module.", "_orig_mod.")  # what parallel and compiled models put before every name
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a directory, or the same with the suffix INDEX
INDEX = ".index.json"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save began its files like this before version 1.6
JSON_LIMIT_BYTES = 64 * 2**20
PICKLE_LIMIT_BYTES = 32 * 2**20  # of what is not tensors
VALUES_OF_A_BYTE = 16  # of a file, in its tensors: many layers may share weights, and no weight has under 8 bits
DEPTH_LIMIT, ITEMS_LIMIT = 16, 2**22  # of one setting: lists in one another, and what they hold at one depth
SAVE_TENSORS = (
    'save only tensors and settings: torch.save({"state_dict": model.state_dict(), "config": vars(args)}, '
    '"weights.pt"), or mscompile.checkpoint.save(path, family, model, vocab)'
)


class Record:
    """Stands for an object of a class that is not here: its attributes, and nothing of its code."""


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (Record, "utils.vocabulary.Vocab"),
]


class StateDict(dict[str, Tensor]):
    """Tensors by name; CheckpointError names one that is missing."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.path = path

    def __missing__(self, name: str) -> Tensor:
        raise CheckpointError(f"{self.path}: the state dict lacks {name}")


def read(path: Path) -> tuple[Any, tuple[Path, ...]]:
    """The contents of a checkpoint, and the files that they were read from."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    with guarded(path):
        if path.is_dir():
            files = _directory(path)
            tensors: dict[str, Any] = {}
            for file in files[1:]:
                tensors |= {} if file.name.endswith(INDEX) else _tensors(_file(file))
            return {"config": _json(files[0]), "state_dict": tensors}, files
        if not path.is_file():
            raise CheckpointError(f"{path}: not a plain file; a pipe or a device cannot be read as a checkpoint")
        return _file(path), (path,)


def foreign(path: Path, content: Any, files: tuple[Path, ...]) -> Foreign | None:
    """The state dict and the settings in what was read; None where there is no state dict."""
    tensors = _tensors(content)
    if not tensors:
        return None
    while prefix := next((text for text in WRAPPERS if all(name.startswith(text) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    config: dict[str, Any] = {}
    with guarded(path):
        for key in SETTINGS:
            config |= _settings(content.get(key))
        for file in _beside(path, bool(config)):
            config |= _settings(_json(file))
            files = (*files, file)
    vocab = _vocab(content.get("vocab")) or _vocab(config.get("vocab"))
    return Foreign(path, StateDict(path, tensors), config, vocab, files)


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read is a CheckpointError of one sentence."""
    try:
        yield
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        code = f" ({wanted[1]})" if wanted else ""
        raise CheckpointError(
            f"{path}: this pickle needs code to load{code}, which is refused because code in a checkpoint can do "
            f"anything; load it where you trust it and {SAVE_TENSORS}"
        ) from error
    except MsCompileError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: the file is damaged or truncated ({reason})") from error


def _file(path: Path) -> Any:
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    values, most = sum(tensor.numel() for tensor in _tensors(content).values()), VALUES_OF_A_BYTE * path.stat().st_size
    if values > most:
        raise CheckpointError(f"{path}: its tensors claim {values} values, more than the file can hold; save it again")
    return content


def _torch(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    if not mapped:
        with path.open("rb") as file:
            begin = file.read(len(LEGACY))
        if begin[:2] == b"PK":
            raise CheckpointError(f"{path}: the file is truncated; copy or download it again")
        if begin != LEGACY:
            raise CheckpointError(f"{path}: not a checkpoint: neither a torch.save archive nor a .safetensors file")
    if mapped:
        _check_archive(path)
    with torch.serialization.safe_globals(STAND_INS):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _check_archive(path: Path) -> None:
    """CheckpointError for what torch.save never writes, and what would be unpacked before it is looked at."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise CheckpointError(
                    f"{path}: {member.filename} in it is compressed, which torch.save never does; "
                    "unpack the archive and pack it again without compression (zip -0)"
                )
            if member.filename.endswith(".pkl") and member.file_size > PICKLE_LIMIT_BYTES:
                raise CheckpointError(
                    f"{path}: {member.file_size} bytes beside the tensors, more than the limit of "
                    f"{PICKLE_LIMIT_BYTES}; {SAVE_TENSORS}"
                )


def _safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    told = {name: json.loads(metadata[name]) for name in ("family", "vocab", *SETTINGS) if name in metadata}
    return {"format": metadata.get("format"), **told, "state_dict": tensors}


def _directory(path: Path) -> tuple[Path, ...]:
    """config.json and the files of weights, with the index that lists them where there is one."""
    config = path / CONFIG
    for name in WEIGHTS:
        if config.is_file() and (path / name).is_file():
            return config, path / name
        index = path / (name + INDEX)
        if config.is_file() and index.is_file():
            return config, index, *_shards(index)
    wanted = " or ".join(f"{name}[{INDEX}]" for name in WEIGHTS)
    raise CheckpointError(f"{path}: this directory holds no checkpoint: wanted {CONFIG} with {wanted}")


def _shards(index: Path) -> Iterator[Path]:
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise CheckpointError(f"{index}: an index must have a weight_map from tensors to files")
    for name in sorted(set(names.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise CheckpointError(f"{index}: it lists {name}, and there is no such file beside it")
        yield shard


def _json(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > JSON_LIMIT_BYTES:
        raise CheckpointError(f"{path}: {size} bytes of settings, more than the limit of {JSON_LIMIT_BYTES}")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: settings must be a JSON object, not {type(values).__name__}")
    return values


def _beside(path: Path, settled: bool) -> tuple[Path, ...]:
    """The file beside a checkpoint that adds settings to it: one of its own name, or config.json where it has none."""
    own, shared = path.with_suffix(".json"), path.parent / CONFIG
    if path.is_dir():
        return ()
    if own.is_file():
        return (own,)
    return (shared,) if shared.is_file() and not settled else ()


def _tensors(content: Any) -> dict[str, Tensor]:
    """The state dict, wherever it lies; empty where there is none."""
    if not isinstance(content, Mapping):
        return {}
    for holder in (*(content.get(key) for key in STATES), content):
        if isinstance(holder, Mapping):
            found = {name: value for name, value in holder.items() if isinstance(name, str) and is_plain(value)}
            if found:
                return found
    return {}


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _settings(values: Any) -> dict[str, Any]:
    """Settings by name: texts, numbers, and lists of them. Whatever else lies beside them is nothing that is known."""
    if isinstance(values, argparse.Namespace):
        values = vars(values)
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if isinstance(name, str) and is_setting(value)}


def is_setting(value: Any) -> bool:
    """A pickle can put a list into itself, or one list into another many times: no deeper or longer than is meant."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        if not all(item is None or isinstance(item, str | int | float | dict | list | tuple) for item in level):
            return False
        holders = [item.values() if isinstance(item, dict) else item for item in level if _holds(item)]
        if sum(map(len, holders)) > ITEMS_LIMIT:
            return False
        level = [item for holder in holders for item in holder]
    return not level


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def _vocab(values: Any) -> tuple[str, ...]:
    """The text of every token: a list of them, or an object that has one."""
    texts = getattr(values, "idx2sym", values)
    return tuple(texts) if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else ()
