"""Checkpoints as people have them: read from every form of file, recognised, or refused in one sentence."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import bundles
import cases
import numpy as np
import pytest
import safetensors.torch
import torch
from test_conversion_transformer_xl import laid_out, settings_of
from torch import Tensor

from mscompile import checkpoint
from mscompile.conversion import table
from mscompile.conversion.base import Converted, Foreign, Source
from mscompile.errors import BundleError, CheckpointError, MsCompileError, UsageError
from mscompile.inspection import inspect
from mscompile.pipeline import compile_checkpoint, read_text
from mscompile.runtime import open_bundle
from mscompile.verification import verify_against

MODEL = cases.transformer_xl(torch.float32)
IDS = cases.tokens(2, 9)
State = dict[str, Tensor]
Settings = dict[str, Any]


def state() -> State:
    return laid_out(MODEL, "kimiyoung")


def settings() -> Settings:
    return settings_of(MODEL)


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.replace(f"{path}: ", "")


def check(path: Path, *files: str) -> None:
    """The checkpoint is `MODEL`, read from `files`."""
    trained = checkpoint.load(path)
    assert trained.source == "kimiyoung/transformer-xl"
    assert cases.worst(cases.full(trained.model, IDS), cases.full(MODEL, IDS)) == 0.0
    assert {file.name for file in trained.files} == set(files or (path.name,))


# Forms of files


def contents() -> dict[str, Any]:
    space, wrapped = argparse.Namespace(**settings()), {f"module.{name}": tensor for name, tensor in state().items()}
    compiled = {f"module._orig_mod.{name}": tensor for name, tensor in state().items()}
    held = {
        f"{states}-{told}": {states: state(), told: settings(), "optimizer": {"lr": 0.1}, "epoch": 3}
        for states, told in zip(
            ("state_dict", "model_state_dict", "model_state", "model", "state_dict", "state_dict"),
            ("config", "args", "model_config", "hparams", "kwargs", "hyper_parameters"),
            strict=True,
        )
    }
    return {
        **held,
        "namespace": {"state_dict": state(), "args": space},
        "parallel": {"state_dict": wrapped, "args": space},
        "compiled": {"model": compiled, "args": space},
        "later settings win": {"model": state(), "args": {**settings(), "mem_len": 77}, "model_config": settings()},
        "flat": {**state(), "config": settings()},
    }


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("form", contents())
def test_a_state_dict_is_found_wherever_it_lies(form: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(contents()[form], path)
    check(path)


def test_the_legacy_format_with_a_namespace(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(contents()["namespace"], path, _use_new_zipfile_serialization=False)
    check(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("beside", ["weights.json", "config.json"])
def test_settings_may_lie_beside_the_tensors(beside: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    save_tensors(path)
    write_json(tmp_path / beside, settings())
    check(path, path.name, beside)


def save_tensors(path: Path, metadata: dict[str, str] | None = None) -> None:
    distinct = {name: tensor.clone() for name, tensor in state().items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(distinct, path, metadata)
    else:
        torch.save(distinct, path)


def test_settings_in_the_metadata_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"format": "pt", "config": json.dumps(settings())})
    check(path)


def test_a_file_of_the_same_name_changes_what_a_checkpoint_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": state(), "args": settings()}, path)
    alone = checkpoint.load(path)
    write_json(tmp_path / "config.json", {"mem_len": 9})  # somebody else's: the checkpoint has settings
    assert checkpoint.load(path).model.config.mem_len == MODEL.config.mem_len
    write_json(tmp_path / "weights.json", {"mem_len": 9})
    changed = checkpoint.load(path)
    assert changed.model.config.mem_len == 9
    assert changed.sha256() != alone.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def directory(path: Path, form: str) -> Path:
    path.mkdir()
    write_json(path / "config.json", settings())
    distinct = {name: tensor.clone() for name, tensor in state().items()}
    names = sorted(distinct)
    shards = {"one": names[::2], "two": names[1::2]}
    if form == "pytorch_model.bin":
        torch.save(distinct, path / form)
    elif form == "model.safetensors":
        safetensors.torch.save_file(distinct, path / form, {"format": "pt"})
    elif form == "model.safetensors.index.json":
        for shard, part in shards.items():
            safetensors.torch.save_file({name: distinct[name] for name in part}, path / f"{shard}.safetensors")
        write_json(path / form, {"weight_map": {n: f"{s}.safetensors" for s, part in shards.items() for n in part}})
    else:
        for shard, part in shards.items():
            torch.save({name: distinct[name] for name in part}, path / f"{shard}.bin")
        write_json(path / form, {"weight_map": {n: f"{s}.bin" for s, part in shards.items() for n in part}})
    (path / "README.md").write_text("about this model")
    return path


DIRECTORIES = {
    "pytorch_model.bin": ("pytorch_model.bin",),
    "model.safetensors": ("model.safetensors",),
    "model.safetensors.index.json": ("model.safetensors.index.json", "one.safetensors", "two.safetensors"),
    "pytorch_model.bin.index.json": ("pytorch_model.bin.index.json", "one.bin", "two.bin"),
}


@pytest.mark.parametrize("form", DIRECTORIES)
def test_a_directory_as_hugging_face_writes_it(form: str, tmp_path: Path) -> None:
    check(directory(tmp_path / "model", form), "config.json", *DIRECTORIES[form])


def test_the_digest_of_a_directory_is_of_the_files_that_are_read(tmp_path: Path) -> None:
    path = directory(tmp_path / "model.v1", "model.safetensors")
    first = checkpoint.load(path).sha256()
    lines = "".join(
        f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert first == hashlib.sha256(lines.encode()).hexdigest()
    (path / "README.md").write_text("changed")
    moved = shutil.copytree(path, tmp_path / "elsewhere")
    assert checkpoint.load(moved).sha256() == first
    write_json(path / "config.json", {**settings(), "mem_len": 9})
    assert checkpoint.load(path).sha256() != first


@pytest.fixture
def their_vocabulary() -> Any:
    """The class that NVIDIA's checkpoints pickle their vocabulary with."""
    module = types.ModuleType("utils.vocabulary")

    class Vocab:
        def __init__(self) -> None:
            self.idx2sym = list("abcdefghijk")
            self.sym2idx = {text: index for index, text in enumerate(self.idx2sym)}

    Vocab.__module__, Vocab.__qualname__ = "utils.vocabulary", "Vocab"
    module.Vocab = Vocab  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in ("utils", "utils.vocabulary")}
    sys.modules |= {"utils": types.ModuleType("utils"), "utils.vocabulary": module}
    yield Vocab()
    for name, old in before.items():
        sys.modules.pop(name)
        if old is not None:
            sys.modules[name] = old


def test_the_vocabulary_of_nvidias_checkpoints_is_read_without_its_class(
    their_vocabulary: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint_best.pt"
    content = {"model_state": laid_out(MODEL, "nvidia"), "model_config": settings(), "vocab": their_vocabulary}
    torch.save(content, path)
    monkeypatch.delitem(sys.modules, "utils.vocabulary")
    trained = checkpoint.load(path)
    assert trained.vocab == tuple("abcdefghijk")
    assert trained.source == "NVIDIA/DeepLearningExamples Transformer-XL"


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": state(), "config": settings(), "vocab": ["a", "b"]}, path)
    assert refusal(path) == "vocab has 2 tokens but the configuration says 11"


# What it becomes


def test_inspect_says_whose_checkpoint_it_is(tmp_path: Path) -> None:
    facts = inspect(directory(tmp_path / "model", "model.safetensors"))
    assert (facts["kind"], facts["source"], facts["family"]) == (
        "checkpoint", "kimiyoung/transformer-xl", "transformer-xl",
    )  # fmt: skip
    checkpoint.save(tmp_path / "own.pt", "transformer-xl", MODEL, tuple("abcdefghijk"))
    assert inspect(tmp_path / "own.pt")["source"] == "mscompile"


def test_a_family_that_was_asked_for_must_be_what_it_becomes(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", "model.safetensors")
    assert checkpoint.load(path, "transformer-xl").family.name == "transformer-xl"
    with pytest.raises(CheckpointError, match="this is a transformer-xl of kimiyoung/transformer-xl, not a hourglass"):
        checkpoint.load(path, "hourglass")


@pytest.mark.slow
def test_a_directory_becomes_a_verified_bundle_without_a_tokenizer(tmp_path: Path) -> None:
    path = directory(tmp_path / "model.v1", "model.safetensors")
    bundle = compile_checkpoint(path, ["ort"], options=bundles.options())
    assert bundle.path == tmp_path / "model.v1.msc"
    assert (bundle.manifest.name, bundle.manifest.verified) == ("model.v1", True)
    assert bundle.manifest.source["format"] == "kimiyoung/transformer-xl"
    assert bundle.manifest.source["sha256"] == checkpoint.load(path).sha256()
    with pytest.raises(BundleError, match="has no tokenizer: its vocabulary was not known at export; use token ids"):
        _ = bundle.tokenizer
    write_json(path / "config.json", {**settings(), "clamp_len": 2})
    with pytest.raises(UsageError, match="its sha256 differs"):
        verify_against(open_bundle(bundle.path), "ort", path)


def test_text_needs_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc")
    with pytest.raises(UsageError, match="--tokens needs a model whose vocabulary is one character a token"):
        read_text(tmp_path / "text", checkpoint.load(directory(tmp_path / "model", "model.safetensors")).vocab)


# Refusals


def test_a_whole_pickled_module_is_refused_with_how_to_save_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert refusal(path) == (
        "this pickle needs code to load (torch.nn.modules.linear.Linear), which is refused because code in a "
        "checkpoint can do anything; load it where you trust it and save only tensors and settings: "
        'torch.save({"state_dict": model.state_dict(), "config": vars(args)}, "weights.pt"), '
        "or mscompile.checkpoint.save(path, family, model, vocab)"
    )


def test_a_namespace_does_not_open_the_door_to_other_classes(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": state(), "args": argparse.Namespace(path=Path("x"))}, path)
    assert refusal(path).startswith("this pickle needs code to load (pathlib.")


def test_the_known_projects_are_named_in_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"conv.weight": torch.zeros(3, 2)}, path)
    sentence = refusal(path)
    assert all(source.name in sentence for source in table.SOURCES)
    assert sentence.endswith(
        "it holds 1 tensors (conv.weight (3, 2)) and no settings; "
        "convert it with mscompile.checkpoint.save(path, family, model, vocab)"
    )


def _no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


def _index(values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "model.safetensors").unlink()
        write_json(path / "model.safetensors.index.json", values)

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (_no_weights, "this directory holds no checkpoint: wanted config.json with"),
    "no config": (_no_config, "this directory holds no checkpoint: wanted config.json with"),
    "no map": (_index({}), "an index must have a weight_map from tensors to files"),
    "a map of numbers": (_index({"weight_map": {"a": 1}}), "an index must have a weight_map from tensors to files"),
    "a shard elsewhere": (_index({"weight_map": {"a": "../x.safetensors"}}), "it lists ../x.safetensors, and there"),
    "no shard": (_index({"weight_map": {"a": "x.safetensors"}}), "it lists x.safetensors, and there is no such file"),
    "config of a list": (lambda path: write_json(path / "config.json", [1]), "settings must be a JSON object, not"),
    "config no JSON": (lambda path: (path / "config.json").write_text("{") and None, "not JSON ("),
    "config without end": (lambda path: (path / "config.json").write_text("[" * 10**6) and None, "not JSON ("),
    "config of bytes": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00") and None, "not JSON ("),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_directory_with_a_fault(fault: str, tmp_path: Path) -> None:
    change, wanted = BROKEN[fault]
    path = directory(tmp_path / "model", "model.safetensors")
    change(path)
    assert wanted in refusal(path)


def _raising(error: Exception) -> Source:
    def convert(_: Foreign) -> Converted:
        raise error

    return Source("somebody/somewhere", lambda _: True, convert)


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), RecursionError("deep\nand more")])
def test_whatever_goes_wrong_in_a_conversion_is_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    torch.save(state(), path)
    monkeypatch.setattr(checkpoint, "SOURCES", (_raising(error),))
    assert refusal(path).startswith("a damaged checkpoint of somebody/somewhere (")


def test_a_missing_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(foreign: Foreign) -> Converted:
        return Converted("transformer-xl", {}, {"x": foreign.tensors["nothing.weight"]})

    path = tmp_path / "model.pt"
    torch.save(state(), path)
    monkeypatch.setattr(checkpoint, "SOURCES", (Source("somebody/somewhere", lambda _: True, convert),))
    assert refusal(path) == "the state dict lacks nothing.weight"


# Damage


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_truncated_file(legacy: bool, kept: float, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(contents()["namespace"], path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refusal(path)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.99])
def test_a_truncated_shard(kept: float, tmp_path: Path) -> None:
    path = directory(tmp_path / "model", "model.safetensors.index.json")
    content = (path / "two.safetensors").read_bytes()
    (path / "two.safetensors").write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    assert refusal(path).startswith("the file is damaged or truncated (")


HOSTILE = [
    torch.zeros(0), torch.zeros(()), torch.zeros(3), torch.zeros(2, 2, 2), torch.ones(12, 8, dtype=torch.int64),
    torch.zeros(1).expand(8, 8), torch.zeros(8, 8).to_sparse(), torch.zeros(8, 8, dtype=torch.complex64),
    None, "text", [torch.zeros(8)], {}, torch.full((8, 8), float("nan")), 10**30, -1, 0.5, True,
]  # fmt: skip


def test_any_tensor_or_setting_of_another_kind_gives_a_model_or_a_refusal(tmp_path: Path) -> None:
    path, random = tmp_path / "model.pt", np.random.default_rng(0)
    names, said = [*state(), *settings()], []
    for _ in range(80):
        weights, config = dict(state()), dict(settings())
        for name in random.choice(names, size=int(random.integers(1, 4))):
            value = HOSTILE[int(random.integers(len(HOSTILE)))]
            (weights if name in weights else config)[str(name)] = value  # type: ignore[assignment]
        torch.save({"state_dict": weights, "config": config}, path)
        try:
            checkpoint.load(path)
        except MsCompileError as error:
            said.append(str(error))
    assert len(said) > 50
    assert not any("\n" in sentence for sentence in said)


def test_flipped_bits_of_the_legacy_format_give_a_model_or_a_refusal(tmp_path: Path) -> None:
    path, random = tmp_path / "model.pt", np.random.default_rng(0)
    torch.save(contents()["namespace"], path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for _ in range(80):
        damaged = bytearray(content)
        damaged[random.integers(3000)] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(damaged))
        with suppress(MsCompileError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            checkpoint.load(path)
