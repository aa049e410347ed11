"""Checkpoints: what is written can be read back, and everything else is refused in one sentence."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from cases import full, hourglass, tokens, transformer_xl

from mscompile import checkpoint
from mscompile.conversion.table import SOURCES
from mscompile.errors import CheckpointError, ConfigError, MsCompileError
from mscompile.models.families import FAMILIES
from mscompile.models.family import ReferenceModel

VOCAB = tuple("abcdefghijk")
SUFFIXES = (".pt", ".safetensors")
MODELS: dict[str, Callable[..., ReferenceModel]] = {"transformer-xl": transformer_xl, "hourglass": hourglass}


def saved(path: Path, family: str = "transformer-xl", **settings: Any) -> Path:
    checkpoint.save(path, family, MODELS[family](torch.float32, **settings), VOCAB)
    return path


def fields_of(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = torch.load(saved(path), weights_only=True)
    return fields


def changed(path: Path, **values: Any) -> Path:
    """A .pt checkpoint with some of its fields replaced; None leaves a field out."""
    fields = fields_of(path) | values
    torch.save({name: value for name, value in fields.items() if value is not None}, path)
    return path


def refusal(path: Path, family: str = "auto", error: type[MsCompileError] = CheckpointError) -> str:
    """The sentence with which `load` refuses a file, without the file's name."""
    with pytest.raises(error) as caught:
        checkpoint.load(path, family)
    assert caught.value.exit_code == 2
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.replace(f"{path}: ", "")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("family", MODELS)
def test_a_checkpoint_gives_back_its_model(tmp_path: Path, family: str, suffix: str) -> None:
    original = MODELS[family](torch.float32)
    path = tmp_path / f"model{suffix}"
    checkpoint.save(path, family, original, VOCAB)
    for named in ("auto", family):
        loaded = checkpoint.load(path, named)
        assert (loaded.family.name, loaded.vocab, loaded.model.config) == (family, VOCAB, original.config)
        assert not loaded.model.training
        assert not any(weight.requires_grad for weight in loaded.model.parameters())
        assert (full(loaded.model, tokens(2, 9)) == full(original, tokens(2, 9))).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_types_are_read_as_single_precision(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    checkpoint.save(path, "transformer-xl", transformer_xl(torch.float32).to(dtype), VOCAB)
    assert {weight.dtype for weight in checkpoint.load(path).model.parameters()} == {torch.float32}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saving_replaces_an_older_file_and_leaves_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("old")
    saved(path)
    saved(path, "hourglass")
    assert checkpoint.load(path).family.name == "hourglass"
    assert list(tmp_path.iterdir()) == [path]


def _breaking_off(path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError("No space left on device")


BREAKING_OFF = {
    ".pt": ("torch.save", lambda _, path: _breaking_off(Path(path))),
    ".safetensors": ("safetensors.torch.save_file", lambda _, path, **__: _breaking_off(Path(path))),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_save_that_breaks_off_leaves_the_older_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / f"model{suffix}")
    before = path.read_bytes()
    monkeypatch.setattr(*BREAKING_OFF[suffix])
    with pytest.raises(OSError, match="No space left on device"):
        saved(path, "hourglass")
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_save_that_breaks_off_leaves_nothing_half_written(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*BREAKING_OFF[suffix])
    with pytest.raises(OSError, match="No space left on device"):
        saved(tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []


# Files that are no checkpoints


def test_a_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pt") == "no such file"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_directory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.mkdir()
    assert refusal(path) == (
        "this directory holds no checkpoint: wanted config.json with "
        "model.safetensors[.index.json] or pytorch_model.bin[.index.json]"
    )


@pytest.mark.parametrize("content", [b"", b"P", b"The quick brown fox\n", b"\x80\x02}q\x00.", b"\x7fELF" + bytes(200)])
def test_a_file_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert refusal(path) == "not a checkpoint: neither a torch.save archive nor a .safetensors file"


def test_the_legacy_format_of_torch_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(fields_of(path), path, _use_new_zipfile_serialization=False)
    assert checkpoint.load(path).family.name == "transformer-xl"


@pytest.mark.parametrize("kept", [20, 40, 100, 0.5, 0.99])
def test_a_truncated_file_of_the_legacy_format(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "model.pt"
    torch.save(fields_of(path), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    assert refusal(path).startswith(("the file is damaged or truncated (", "this pickle needs code to load"))


OTHERS = f"({', '.join(source.name for source in SOURCES)})"
SAVE_IT = "convert it with mscompile.checkpoint.save(path, family, model, vocab)"


def unknown(found: str) -> str:
    return f"neither an mscompile checkpoint nor one of a known project {OTHERS}: it holds {found}; {SAVE_IT}"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"weight": torch.zeros(2)}, "1 tensors (weight (2,)) and no settings"),
        ({"format": "other"}, "a dict without tensors by name"),
        ([1, 2], "a list without tensors by name"),
        (torch.zeros(2), "a Tensor without tensors by name"),
        ({"state_dict": {}, "family": "hourglass"}, "a dict without tensors by name"),
        (
            {"model": {name: torch.zeros(1, 2) for name in "abcd"}, "args": argparse.Namespace(width=2, depth=1)},
            "4 tensors (a (1, 2), b (1, 2), c (1, 2), ...) and the settings depth, width",
        ),
    ],
    ids=["tensors", "another format", "a list", "a tensor", "no format", "settings"],
)
def test_another_torch_file(tmp_path: Path, content: Any, found: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    assert refusal(path) == unknown(found)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_safetensors_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata)
    assert refusal(path) == unknown("1 tensors (weight (2,)) and no settings")


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert refusal(path).startswith("the file is damaged or truncated (")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, suffix: str, kept: float) -> None:
    path = saved(tmp_path / f"model{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    sentence = refusal(path)
    if suffix == ".pt":
        assert sentence == "the file is truncated; copy or download it again"
    else:
        assert sentence.startswith("the file is damaged or truncated (")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("cut", [1, 2, 3, 7, 8, 9])
def test_a_file_cut_within_its_first_or_last_bytes(tmp_path: Path, suffix: str, cut: int) -> None:
    path = saved(tmp_path / f"model{suffix}")
    content = path.read_bytes()
    for part in (content[:cut], content[:-cut]):
        path.write_bytes(part)
        assert "truncated" in (sentence := refusal(path)) or sentence.startswith("not a checkpoint: neither")


def test_an_empty_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    assert refusal(path).startswith("the file is damaged or truncated (")


@pytest.mark.parametrize("field", ["family", "config", "vocab"])
def test_safetensors_metadata_that_is_no_json(tmp_path: Path, field: str) -> None:
    path = saved(tmp_path / "model.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {field: "{"}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
    assert refusal(path).startswith("the file is damaged or truncated (")


# Code


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "model.pt"
    torch.save(fields_of(path) | {"extra": Payload(f"touch {victim}")}, path)
    assert refusal(path) == (
        f"this pickle needs code to load ({os.system.__module__}.system), which is refused because code in a "
        "checkpoint can do anything; load it where you trust it and save only tensors and settings: "
        'torch.save({"state_dict": model.state_dict(), "config": vars(args)}, "weights.pt"), '
        "or mscompile.checkpoint.save(path, family, model, vocab)"
    )
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists(), "the payload of this test must be able to run"


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(fields_of(path) | {"state_dict": torch.nn.Linear(2, 2)}, path)
    assert refusal(path).startswith("this pickle needs code to load (torch.nn.modules.linear.Linear), which is refused")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_bare_pickle_with_code_does_not_run_either(tmp_path: Path, legacy: bool) -> None:
    victim, path = tmp_path / "victim", tmp_path / "model.pt"
    if legacy:
        torch.save(Payload(f"touch {victim}"), path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Payload(f"touch {victim}")))
    wanted = "this pickle needs code to load" if legacy else "not a checkpoint: neither a torch.save archive"
    assert refusal(path).startswith(wanted)
    assert not victim.exists()


def _with_pickle(path: Path, program: bytes) -> Path:
    """A checkpoint archive whose pickle is replaced."""
    saved(path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, program if name.endswith("/data.pkl") else content)
    return path


def _pickle_of(path: Path) -> bytes:
    saved(path)
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


@pytest.mark.parametrize("kept", [0, 1, 2, 10, 100, 400])
def test_a_pickle_that_ends_early(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.pt"
    sentence = refusal(_with_pickle(path, _pickle_of(path)[:kept]))
    assert sentence.startswith(("the file is damaged or truncated (", "this pickle needs code to load"))


NONSENSE = {
    "a number for a mapping": b"\x80\x02K\x01.",
    "a value that was not kept": b"\x80\x02h\x05.",
    "an item of a number": b"\x80\x02K\x01K\x02K\x03s.",
    "a number called": b"\x80\x02K\x01)R.",
    "text that is not UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
}


@pytest.mark.parametrize("program", NONSENSE.values(), ids=NONSENSE)
def test_a_pickle_that_makes_no_sense(tmp_path: Path, program: bytes) -> None:
    sentence = refusal(_with_pickle(tmp_path / "model.pt", program))
    assert sentence.startswith(
        ("the file is damaged or truncated (", "this pickle needs code to load", "neither an mscompile checkpoint")
    )


@pytest.mark.parametrize("program", [b"\x80\x02.", b"\x80\x02u."], ids=["nothing on the stack", "no mark"])
def test_a_pickle_that_takes_what_is_not_there(tmp_path: Path, program: bytes) -> None:
    assert refusal(_with_pickle(tmp_path / "model.pt", program)).startswith("the file is damaged or truncated (")


def test_flipped_bits_give_a_model_or_a_refusal_and_nothing_else(tmp_path: Path) -> None:
    path, random = tmp_path / "model.pt", np.random.default_rng(0)
    program = _pickle_of(path)
    for _ in range(100):
        damaged = bytearray(program)
        damaged[random.integers(len(program))] ^= 1 << int(random.integers(8))
        with suppress(MsCompileError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            checkpoint.load(_with_pickle(path, bytes(damaged)))


# Contents that do not fit


@pytest.mark.parametrize("field", ["family", "config", "vocab", "state_dict"])
def test_a_missing_field(tmp_path: Path, field: str) -> None:
    assert refusal(changed(tmp_path / "model.pt", **{field: None})) == f"the checkpoint lacks {field}"


def test_several_missing_fields_are_named_together(tmp_path: Path) -> None:
    assert refusal(changed(tmp_path / "model.pt", family=None, vocab=None)) == "the checkpoint lacks family, vocab"


def test_a_safetensors_file_without_its_metadata_fields(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"format": "mscompile", "config": "{}"})
    assert refusal(path) == "the checkpoint lacks family, vocab"


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("transformerxl", "unknown family 'transformerxl'; did you mean transformer-xl?"),
        ("hourglas", "unknown family 'hourglas'; did you mean hourglass?"),
        ("qwerty", f"unknown family 'qwerty'; known families: {', '.join(row.name for row in FAMILIES)}"),
        (7, f"unknown family '7'; known families: {', '.join(row.name for row in FAMILIES)}"),
    ],
)
def test_an_unknown_family(tmp_path: Path, family: Any, sentence: str) -> None:
    assert refusal(changed(tmp_path / "model.pt", family=family)) == sentence


def test_an_unknown_family_that_was_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt")
    assert refusal(path, "hour-glass") == "unknown family 'hour-glass'; did you mean hourglass?"


def test_another_family_than_the_checkpoint_has(tmp_path: Path) -> None:
    sentence = refusal(saved(tmp_path / "model.pt"), "hourglass", ConfigError)
    assert sentence.startswith("hourglass has no setting clamp_len, cutoffs, d_embed, d_head")


@pytest.mark.parametrize("config", [[1, 2], "d_model=8", 5])
def test_a_config_that_is_no_mapping(tmp_path: Path, config: Any) -> None:
    sentence = refusal(changed(tmp_path / "model.pt", config=config))
    assert sentence == f"config must be a mapping of settings, not {type(config).__name__}"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1, not 0"),
        ({"n_layer": "2"}, "n_layer must be a whole number of at least 1, not '2'"),
        ({"d_model": 7}, "d_model must be even for sinusoid positions, not 7"),
        ({"clamp_len": -1}, "clamp_len must be a whole number of at least 1, not -1"),
    ],
)
def test_a_wrong_setting(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "model.pt"
    assert refusal(changed(path, config=fields_of(path)["config"] | settings), error=ConfigError) == sentence


def test_an_unknown_setting(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    sentence = refusal(changed(path, config=fields_of(path)["config"] | {"ext_len": 0}), error=ConfigError)
    assert sentence.startswith("transformer-xl has no setting ext_len; it has clamp_len, cutoffs")


def test_a_setting_that_is_no_text(tmp_path: Path) -> None:
    assert "has no setting 5" in refusal(changed(tmp_path / "model.pt", config={5: 6}), error=ConfigError)


def test_a_vocab_of_another_size(tmp_path: Path) -> None:
    sentence = refusal(changed(tmp_path / "model.pt", vocab=["a", "b"]))
    assert sentence == "vocab has 2 tokens but the configuration says 11"


@pytest.mark.parametrize("vocab", ["abcdefghijk", {"a": 0}, [*range(11)], [b"a"] * 11])
def test_a_vocab_that_is_no_list_of_texts(tmp_path: Path, vocab: Any) -> None:
    assert refusal(changed(tmp_path / "model.pt", vocab=vocab)) == "vocab must be a list of token texts"


def test_all_tensors_that_do_not_fit_are_listed_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    weights = fields_of(path)["state_dict"]
    weights["content_bias"] = torch.zeros(2, 4)
    weights["extra"] = torch.zeros(1)
    weights["layers.1.attention.key.weight"] = torch.zeros(6, 8, dtype=torch.int64)
    del weights["head_bias"]
    assert refusal(changed(path, state_dict=weights)) == (
        "tensors do not fit transformer-xl: missing head_bias; unexpected extra; "
        "content_bias has shape (2, 4), wanted (2, 3); "
        "layers.1.attention.key.weight is torch.int64, wanted a floating dtype"
    )


def test_tensors_of_safetensors_are_checked_as_well(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = safetensors.torch.load_file(path)
    weights["head_bias"] = torch.zeros(12)
    safetensors.torch.save_file(weights, path, metadata)
    assert refusal(path) == "tensors do not fit transformer-xl: head_bias has shape (12,), wanted (11,)"


def test_a_long_list_of_tensors_is_cut_with_its_count(tmp_path: Path) -> None:
    sentence = refusal(changed(tmp_path / "model.pt", state_dict={}))
    names = list(transformer_xl().state_dict())
    shown = "; ".join(f"missing {name}" for name in names[:8])
    assert sentence == f"tensors do not fit transformer-xl: {shown}; and {len(names) - 8} more"


@pytest.mark.parametrize("weights", [[1], {"head_bias": 3}, {"head_bias": [0.0] * 11}])
def test_a_state_dict_of_something_else(tmp_path: Path, weights: Any) -> None:
    assert refusal(changed(tmp_path / "model.pt", state_dict=weights)) == "state_dict must map names to tensors"


def test_the_metadata_of_safetensors_is_plain_json(tmp_path: Path) -> None:
    """So that any tool can read which model a file holds."""
    path = saved(tmp_path / "model.safetensors", "hourglass")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "mscompile"
    assert json.loads(metadata["family"]) == "hourglass"
    assert json.loads(metadata["vocab"]) == list(VOCAB)
    assert json.loads(metadata["config"])["hierarchy"] == "1@1 1@3 1@1"
