"""Bundles: every way to be wrong has its own sentence, and a write is whole or nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mscompile import atomic, bundle, golden
from mscompile.atomic import writing
from mscompile.bundle import Manifest, read, seal
from mscompile.contracts import GraphSpec, Hit, Profile, Schedule, StateSpec, StreamSpec, TensorSpec, Tick
from mscompile.errors import BundleError, InputError, MsCompileError, UsageError
from mscompile.golden import Golden, Rollout
from mscompile.speccheck import spec_fault
from mscompile.tokenizer import Tokenizer

STATE = StateSpec("layer0.key", "float32", ("batch", 4, 8), "append", 1)
TOKENS = TensorSpec("tokens", "int64", ("batch", "chunk"))
LOGITS = TensorSpec("logits", "float32", ("batch", "chunk", 5))
GRAPH = GraphSpec(
    "step", (TOKENS, STATE.as_input()), (LOGITS, STATE.as_output("chunk")), (STATE.name,), (STATE.name,), "chunk"
)
SPEC = StreamSpec((STATE,), (GRAPH, replace(GRAPH, name="close")), Schedule((Tick(("step",), ("close",)),)), 5, 2)
MANIFEST = Manifest(
    name="tiny",
    title="A tiny model",
    family="transformer-xl",
    precision="fp32",
    verified=False,
    source={"sha256": "00", "parameters": 1, "config": {"layers": 2, "dropout": 0.0}},
    versions={"mscompile": "0.1", "onnx": "1"},
    profile=Profile(),
    engines={"ort": {"threads": 1}},
    costs={"step": 640},
    tolerances={"max_abs": 1e-4},
    parity=None,
    rules=(Hit("memory", "layers.0", True, "append"),),
    passes=(),
    spec=SPEC,
)
ROLLOUT = Rollout(
    "mixed",
    np.array([[0, 1, 2], [3, 4, 0]]),
    np.array([1, 2]),
    np.arange(30, dtype=np.float32).reshape(2, 3, 5),
    {"layer0.key": np.ones((2, 4, 8), np.float32), "fill": np.array(3)},
)
GOLDEN = Golden((ROLLOUT, replace(ROLLOUT, name="whole", chunks=np.array([3]))))
TOKENIZER = Tokenizer("char", ("a", "b", "\n", "é", " "))


def fill(directory: Path, content: bytes = b"graph") -> None:
    """The files of a valid bundle; a bundle does not look into its graphs."""
    (directory / "graphs").mkdir()
    for name in ("step.onnx", "close.onnx", "weights.bin"):
        (directory / "graphs" / name).write_bytes(content + name.encode())
    (directory / "engines/ort").mkdir(parents=True)
    (directory / "engines/ort/step.ort").write_bytes(content * 2)
    GOLDEN.save(directory / "golden.npz")
    TOKENIZER.save(directory / "tokenizer.json")
    seal(directory, MANIFEST)


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.msc"
    path.mkdir()
    fill(path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def enter(target: Path, force: bool = False) -> None:
    """Begin to write where it must be refused before anything is written."""
    with writing(target, force):
        pytest.fail("the block ran")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as a careless or hostile hand would."""
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))


@contextmanager
def refused(error: type[MsCompileError], *parts: str) -> Iterator[None]:
    """The block raises exactly `error`, in one line that has all `parts`."""
    with pytest.raises(MsCompileError) as caught:
        yield
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# Reading


def test_a_sealed_directory_reads_back(valid: Path) -> None:
    manifest = read(valid)
    assert replace(manifest, files={}) == MANIFEST
    assert sorted(manifest.files) == sorted(set(contents(valid)) - {"manifest.json"})


def test_missing_directory(tmp_path: Path) -> None:
    with refused(BundleError, "none.msc is not a bundle: no such directory"):
        read(tmp_path / "none.msc")


def test_a_file_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(BundleError, "file is not a bundle: it is not a directory"):
        read(tmp_path / "file")


def test_no_manifest(tmp_path: Path) -> None:
    with refused(BundleError, f"{tmp_path} is not a bundle: it has no manifest.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "manifest.json is not valid JSON: Expecting property name"),
        (b"\xff\xfe\xff", "manifest.json is not valid JSON: 'utf-16"),
        (b"[" * 100_000, "manifest.json is not valid JSON: maximum recursion depth"),
        (b'{"schema": 1, "schema": 1}', "key 'schema' occurs twice in one object"),
        (b'{"schema": NaN}', "NaN is not JSON"),
        (b"[" * 65 + b"]" * 65, "it has values 64 levels deep and more"),
        (b'{"schema": 9223372036854775808}', "it has a whole number of more than 64 bits"),
        (b'{"schema": "\\ud800"}', "surrogates not allowed"),
        (b"[]", "is not the manifest of a bundle: it has no schema number"),
        (b'{"schema": true}', "is not the manifest of a bundle: it has no schema number"),
        (b'{"schema": 2}', "this bundle has schema 2, this mscompile reads up to 1; upgrade mscompile"),
        (b'{"schema": 1}', "does not follow schema 1: manifest: missing key 'name'"),
    ],
)
def test_broken_manifests(valid: Path, content: bytes, sentence: str) -> None:
    (valid / "manifest.json").write_bytes(content)
    with refused(BundleError, sentence):
        read(valid)


def test_a_manifest_that_is_too_large_is_not_read(valid: Path) -> None:
    with (valid / "manifest.json").open("wb") as stream:
        stream.truncate(2**40)
    with refused(BundleError, "manifest.json has 1099511627776 bytes, more than 67108864"):
        read(valid)


def test_the_manifest_cannot_be_a_link(valid: Path, tmp_path: Path) -> None:
    (valid / "manifest.json").rename(tmp_path / "elsewhere.json")
    (valid / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with refused(BundleError, "its manifest.json is not a plain file"):
        read(valid)


def test_schema_faults_name_the_place(valid: Path) -> None:
    edit(valid, lambda data: data["spec"]["states"][0].update(update="swap"))
    with refused(BundleError, "manifest.spec.states[0].update: wanted 'replace' or 'append', got str 'swap'"):
        read(valid)


def test_missing_file(valid: Path) -> None:
    (valid / "graphs/weights.bin").unlink()
    with refused(BundleError, "file 'graphs/weights.bin' is listed in manifest.json and missing; export or copy"):
        read(valid)


@pytest.mark.parametrize("name", ["notes.txt", "engines/ort/.hidden", "graphs/odd\udcff"])
def test_extra_file(valid: Path, name: str) -> None:
    (valid / name).touch()
    with refused(BundleError, f"file {name!r} is not listed in manifest.json; remove it"):
        read(valid)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../escape", "which has an empty, '.' or '..' part"),
        ("graphs/../../escape", "which has an empty, '.' or '..' part"),
        ("graphs//step.onnx", "which has an empty, '.' or '..' part"),
        ("", "which has an empty, '.' or '..' part"),
        ("/etc/passwd", "which is not a relative path with forward slashes"),
        ("graphs\\step.onnx", "which is not a relative path with forward slashes"),
        ("C:step.onnx", "which is not a relative path with forward slashes"),
        ("manifest.json", "which cannot hold its own hash"),
    ],
)
def test_listed_paths_stay_inside(valid: Path, name: str, sentence: str) -> None:
    edit(valid, lambda data: data["files"].update({name: data["files"]["golden.npz"]}))
    with refused(BundleError, f"file {name!r} is listed, {sentence}"):
        read(valid)


@pytest.mark.parametrize("name", ["graphs/STEP.onnx", "Golden.npz", "GRAPHS/weights.bin"])
def test_names_that_are_one_elsewhere_are_refused(valid: Path, name: str) -> None:
    edit(valid, lambda data: data["files"].update({name: data["files"]["golden.npz"]}))
    pair = " and ".join(map(repr, (name, name.lower())))
    with refused(BundleError, f"files {pair} are one file on systems that do not tell their names apart"):
        read(valid)


@pytest.mark.parametrize("target", ["/etc/hostname", "step.onnx", "nowhere"])
def test_links_are_refused(valid: Path, target: str) -> None:
    (valid / "graphs/close.onnx").unlink()
    (valid / "graphs/close.onnx").symlink_to(target)
    with refused(BundleError, "'graphs/close.onnx' is a symbolic link, which a bundle cannot hold"):
        read(valid)


def test_linked_directories_are_refused(valid: Path, tmp_path: Path) -> None:
    (valid / "graphs").rename(tmp_path / "graphs")
    (valid / "graphs").symlink_to(tmp_path / "graphs")
    with refused(BundleError, "'graphs' is a symbolic link"):
        read(valid)


def test_special_files_are_refused(valid: Path) -> None:
    os.mkfifo(valid / "graphs/pipe")
    with refused(BundleError, "'graphs/pipe' is not a plain file"):
        read(valid)


def test_size_mismatch_is_found_before_anything_is_hashed(valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_sha256", lambda _: pytest.fail("hashed"))
    with (valid / "graphs/weights.bin").open("ab") as stream:
        stream.write(b"x")
    with refused(
        BundleError, "file 'graphs/weights.bin' has 17 bytes, and manifest.json says 16; the bundle is damaged"
    ):
        read(valid)


def test_a_flipped_byte_in_any_file_is_caught(valid: Path) -> None:
    for name in read(valid).files:
        original = (valid / name).read_bytes()
        for offset in {0, len(original) // 2, len(original) - 1}:
            damaged = bytearray(original)
            damaged[offset] ^= 1
            (valid / name).write_bytes(damaged)
            with refused(
                BundleError, f"file {name!r} does not have the sha256", "damaged or was changed, export or copy"
            ):
                read(valid)
        (valid / name).write_bytes(original)
    read(valid)


def test_only_big_files_go_without_hash(valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (valid / "graphs/weights.bin").read_bytes()
    (valid / "graphs/weights.bin").write_bytes(content[::-1])
    with refused(BundleError, "sha256"):
        read(valid, hash_files=False)
    monkeypatch.setattr(bundle, "BIG_FILE_BYTES", len(content) - 1)
    read(valid, hash_files=False)


def test_unreadable_files_are_a_sentence(valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(bundle, "_sha256", fail)
    with refused(BundleError, "cannot read ", "Permission denied"):
        read(valid)


# What a manifest says of itself

FAULTS: list[tuple[StreamSpec, str]] = [
    (replace(SPEC, graphs=(GRAPH, GRAPH)), "two graphs are named 'step'"),
    (replace(SPEC, states=(STATE, STATE)), "two states are named 'layer0.key'"),
    (replace(SPEC, graphs=(replace(GRAPH, name="../x"),)), "graph name '../x' cannot be used in a file name"),
    (replace(SPEC, graphs=(replace(GRAPH, name="a\nb"),)), r"graph name 'a\nb' cannot be used in a file name"),
    (
        replace(SPEC, graphs=(replace(GRAPH, reads=("ghost",)),)),
        "graph 'step' reads state 'ghost', which does not exist",
    ),
    (replace(SPEC, graphs=(replace(GRAPH, writes=("ghost",)),)), "graph 'step' writes state 'ghost', which does not"),
    (replace(SPEC, graphs=(replace(GRAPH, inputs=(TOKENS,)),)), "graph 'step' lacks input 'layer0.key.in'"),
    (replace(SPEC, graphs=(replace(GRAPH, outputs=(LOGITS, LOGITS)),)), "graph 'step' has output 'logits' twice"),
    (replace(SPEC, graphs=(replace(GRAPH, tokens="all"),)), "graph 'step' consumes 'all' tokens"),
    (replace(SPEC, schedule=Schedule((Tick(("ghost",)),))), "the schedule runs graph 'ghost', which does not exist"),
    (replace(SPEC, schedule=Schedule((Tick(("step",)),), "ghost")), "the schedule runs graph 'ghost'"),
    (replace(SPEC, schedule=Schedule((Tick(("step",)),), "step", 8, 4)), "chunk_multiple 8 and max_chunk 4"),
    (replace(SPEC, schedule=Schedule(())), "the schedule must have ticks"),
    (replace(SPEC, schedule=Schedule((Tick(("step",), repeat=0),))), "each repeated at least once"),
    (replace(SPEC, states=(replace(STATE, dtype="object"),)), "state 'layer0.key' has dtype 'object'"),
    (replace(SPEC, states=(replace(STATE, shape=("batch", "time", 8)),)), "has dimension 'time'"),
    (replace(SPEC, states=(replace(STATE, shape=("batch", -1, 8)),)), "has dimension -1"),
    (replace(SPEC, states=(replace(STATE, shape=("batch", "chunk", 8)),)), "must be fixed but for 'batch'"),
    (replace(SPEC, states=(replace(STATE, batch_axis=1),)), "state 'layer0.key' has batch_axis 1"),
    (replace(SPEC, states=(replace(STATE, time_axis=None),)), "state 'layer0.key' is 'append' with time_axis None"),
    (replace(SPEC, states=(replace(STATE, time_axis=3),)), "state 'layer0.key' has time_axis 3"),
    (replace(SPEC, max_batch=0), "must be at least 1"),
    (replace(SPEC, max_batch=2**31), "max_batch and max_context at most 2147483647"),
    (replace(SPEC, vocab_size=2**24 + 1), "vocab_size must be at most 16777216"),
    (replace(SPEC, states=(replace(STATE, shape=("batch", 2**31, 8)),)), "has dimension 2147483648"),
    (
        replace(SPEC, states=(replace(STATE, shape=("batch", 2**20, 2**21)),)),
        "a stream, more than 1099511627776",
    ),
    (replace(SPEC, states=(replace(STATE, shape=("batch", *[1] * 32)),)), "has 33 dimensions, more than 32"),
    (replace(SPEC, states=(replace(STATE, shape=("batch", 4, "chunk/0")),)), "has dimension 'chunk/0'"),
    (replace(SPEC, states=(replace(STATE, shape=("batch", 4, "chunk/" + "9" * 5000)),)), "has dimension 'chunk/99"),
    (replace(SPEC, states=(replace(STATE, shape=("batch", 4, "chunk/\u0663")),)), "has dimension 'chunk/"),
    (replace(SPEC, schedule=Schedule((Tick(("step",), repeat=2**31),))), "must be at most 2147483647"),
]


def test_the_spec_of_the_fixture_has_no_fault() -> None:
    assert spec_fault(SPEC) is None


@pytest.mark.parametrize(("spec", "sentence"), FAULTS, ids=[sentence for _, sentence in FAULTS])
def test_spec_faults_are_found_when_sealing_and_when_reading(
    valid: Path, monkeypatch: pytest.MonkeyPatch, spec: StreamSpec, sentence: str
) -> None:
    with refused(BundleError, "cannot write manifest.json: ", sentence):
        seal(valid, replace(MANIFEST, spec=spec))
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "_manifest_fault", lambda _: None)
        seal(valid, replace(MANIFEST, spec=spec))
    with refused(BundleError, "manifest.json contradicts itself: ", sentence, "export or copy it again"):
        read(valid)


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        (replace(MANIFEST, name="a/b"), "bundle name 'a/b' cannot be used in a file name"),
        (replace(MANIFEST, engines={"../ort": {}}), "engine name '../ort' cannot be used in a file name"),
        (replace(MANIFEST, source={}), "source: missing key 'sha256'"),
        (replace(MANIFEST, source={"sha256": "00", "nodes": [1]}), "source.nodes[0]: wanted object, got int 1"),
        (
            replace(MANIFEST, engines={"ort": {"numerics": {"step": {}}}}),
            "engine 'ort' has numerics that are no products by graph",
        ),
        (replace(MANIFEST, verified=True), "it says that it was verified and has no parity report"),
        (replace(MANIFEST, tolerances={"max_abs": 1}), "manifest.tolerances['max_abs']: wanted float, got int 1"),
        (replace(MANIFEST, engines={"ort": {"facts": {1}}}), "manifest.engines['ort']['facts']: set {1} has no JSON"),
    ],
)
def test_manifests_that_cannot_be_sealed(valid: Path, manifest: Manifest, sentence: str) -> None:
    before = contents(valid)
    with refused(BundleError, "cannot write manifest.json: ", sentence):
        seal(valid, manifest)
    assert contents(valid) == before


def test_every_graph_has_its_file(valid: Path) -> None:
    (valid / "graphs/close.onnx").unlink()
    with refused(BundleError, "cannot write manifest.json: file 'graphs/close.onnx' of a graph is not listed"):
        seal(valid, MANIFEST)


# Writing


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with writing(tmp_path / name) as directory:
            fill(directory)
        time.sleep(0.01)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    text = (tmp_path / "one/manifest.json").read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text))[:4] == ["schema", "name", "title", "family"]
    assert list(json.loads(text)["source"]) == ["config", "parameters", "sha256"]


def test_sealing_again_replaces_the_manifest(valid: Path) -> None:
    seal(valid, replace(MANIFEST, verified=True, parity={"ort": {"passed": True, "cosine": float("nan")}}))
    assert read(valid).parity == {"ort": {"passed": True, "cosine": "NaN"}}


def test_parents_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    with writing(tmp_path / "a/b/tiny.msc") as directory:
        assert directory.parent == tmp_path / "a/b"
        fill(directory)
    read(tmp_path / "a/b/tiny.msc")
    assert names(tmp_path / "a/b") == ["tiny.msc"]


def test_existing_targets_need_force(valid: Path) -> None:
    with refused(UsageError, "tiny.msc exists; use --force to replace it"):
        enter(valid)


def test_force_replaces_a_bundle(valid: Path) -> None:
    with writing(valid, force=True) as directory:
        fill(directory, b"new")
    read(valid)
    assert (valid / "graphs/step.onnx").read_bytes() == b"newstep.onnx"
    assert names(valid.parent) == ["tiny.msc"]


def test_force_through_a_link_replaces_what_it_points_to(valid: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(valid)
    with writing(tmp_path / "latest", force=True) as directory:
        fill(directory, b"new")
    assert (tmp_path / "latest").is_symlink()
    assert (valid / "graphs/step.onnx").read_bytes() == b"newstep.onnx"


def test_force_does_not_replace_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "file").touch()
    with refused(UsageError, "home exists and has no manifest.json, so it will not be replaced; choose another place"):
        enter(tmp_path / "home", force=True)
    with refused(UsageError, "file exists and is not a directory; choose another place"):
        enter(tmp_path / "file", force=True)
    with refused(UsageError, "file is not a directory; choose another place"):
        enter(tmp_path / "file/tiny.msc")
    with refused(UsageError, "it is the root of the file system"):
        enter(Path("/"), force=True)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_exception_keeps_the_old_bundle(valid: Path, error: BaseException) -> None:
    before = contents(valid)

    def write() -> None:
        with writing(valid, force=True) as directory:
            fill(directory, b"new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert contents(valid) == before
    assert names(valid.parent) == ["tiny.msc"]


def test_an_unfinished_export_is_only_read_on_request(tmp_path: Path) -> None:
    with writing(tmp_path / "tiny.msc") as directory:
        fill(directory)
        with refused(BundleError, "is an export that is under way or was stopped; open the finished bundle"):
            read(directory)
        assert read(directory, unfinished=True) == read(directory, hash_files=False, unfinished=True)


def test_an_unsealed_directory_is_not_published(tmp_path: Path) -> None:
    with refused(BundleError, "nothing was sealed, manifest.json is missing"), writing(tmp_path / "tiny.msc"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "tiny.msc"
    if force:
        target.mkdir()
        fill(target)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        sentence = "tiny.msc: File too large; choose another place"
        with refused(UsageError, "cannot write ", sentence), writing(target, force) as directory:
            fill(directory, b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("save", [TOKENIZER.save, GOLDEN.save])
def test_no_space_says_what_was_being_written(save: Callable[[Path], None]) -> None:
    with refused(UsageError, "cannot write full: No space left on device; free some space or choose another place"):
        save(Path("/dev/full"))


def test_a_short_write_of_numpy_is_a_full_disk(tmp_path: Path) -> None:
    with refused(UsageError, "No space left on device; free some"), writing(tmp_path / "tiny.msc"):
        np.ones(100_000).tofile("/dev/full")


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(valid)

    def fail(path: Path, _: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "replace", fail)
    with refused(UsageError, "cannot write manifest.json: No space left on device"):
        seal(valid, MANIFEST)
    assert contents(valid) == before


def test_errors_of_other_files_are_not_explained_away(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), writing(tmp_path / "tiny.msc"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "checkpoint.pt"))
    with pytest.raises(OSError, match="libcuda"), writing(tmp_path / "tiny.msc"):
        raise OSError("libcuda.so: cannot open shared object file")


def test_names_that_are_too_long_are_a_sentence(tmp_path: Path) -> None:
    with refused(UsageError, "File name too long; choose another place"):
        enter(tmp_path / ("x" * 250))


# Several writers


def test_the_second_writer_is_refused_without_force(tmp_path: Path) -> None:
    target = tmp_path / "tiny.msc"
    with refused(UsageError, "tiny.msc exists; use --force"), writing(target) as first:
        fill(first, b"first")
        with writing(target) as second:
            fill(second, b"second")
    assert (target / "graphs/step.onnx").read_bytes() == b"secondstep.onnx"
    assert names(tmp_path) == ["tiny.msc"]


def test_the_last_writer_wins_with_force(tmp_path: Path) -> None:
    target = tmp_path / "tiny.msc"
    with writing(target, force=True) as first:
        fill(first, b"first")
        with writing(target, force=True) as second:
            fill(second, b"second")
    read(target)
    assert (target / "graphs/step.onnx").read_bytes() == b"firststep.onnx"
    assert names(tmp_path) == ["tiny.msc"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "rename-aside"])
def test_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    target = tmp_path / "tiny.msc"
    if not exchange:
        monkeypatch.setattr(atomic, "_rename", lambda *_: False)
    failures: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(10):
                with writing(target, force=True) as directory:
                    fill(directory, content)
        except BaseException as error:  # noqa: BLE001 - a thread's error would be lost
            failures.append(error)

    threads = [threading.Thread(target=write, args=(bytes([65 + index]) * 100,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    read(target)
    assert names(tmp_path) == ["tiny.msc"]


# Killed writers


def abandoned(target: Path, suffix: str = ".partial") -> Path:
    path = target.with_name(f".{target.name}.0123abcd{suffix}")
    path.mkdir()
    fill(path, b"old")
    return path


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    mine, other = abandoned(tmp_path / "tiny.msc"), abandoned(tmp_path / "other.msc")
    with writing(tmp_path / "tiny.msc") as directory:
        fill(directory)
    assert not mine.exists()
    assert other.exists()


def test_an_old_bundle_left_aside_is_put_back(tmp_path: Path) -> None:
    abandoned(tmp_path / "tiny.msc", ".aside")
    with pytest.raises(RuntimeError, match="boom"), writing(tmp_path / "tiny.msc"):
        raise RuntimeError("boom")
    read(tmp_path / "tiny.msc")
    assert names(tmp_path) == ["tiny.msc"]


def test_without_an_atomic_exchange_the_old_bundle_comes_back(valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = contents(valid), os.rename
    monkeypatch.setattr(atomic, "_rename", lambda *_: False)

    def fail(source: Path, target: Path) -> None:
        if source.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with refused(UsageError, "Input/output error"), writing(valid, force=True) as directory:
        fill(directory, b"new")
    assert contents(valid) == before
    assert names(valid.parent) == ["tiny.msc"]


KILLING = """
import os, random, signal, sys, time
from pathlib import Path
from mscompile.atomic import writing
from mscompile.bundle import read
from test_bundle import fill

target, choice = Path(sys.argv[1]), random.Random(0)
for number in range(20):
    child = os.fork()
    while not child:
        with writing(target, force=True) as directory:
            fill(directory, str(number).encode() * 20_000)
    while not target.exists():
        time.sleep(0.001)
    time.sleep(choice.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    read(target)
"""


def test_a_killed_writer_leaves_a_whole_bundle(tmp_path: Path) -> None:
    target = tmp_path / "tiny.msc"
    roots = os.pathsep.join(str(path) for path in (Path(__file__).parent, Path(bundle.__file__).parents[1]))
    run = subprocess.run(
        [sys.executable, "-c", KILLING, str(target)],
        env=os.environ | {"PYTHONPATH": roots},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    with writing(target, force=True) as directory:
        fill(directory)
    read(target)
    assert names(tmp_path) == ["tiny.msc"]


# Golden rollouts


def same(one: Golden, two: Golden) -> bool:
    return [
        [(key, array.dtype, array.shape, array.tobytes()) for key, array in rollout.members().items()]
        for rollout in one.rollouts
    ] == [
        [(key, array.dtype, array.shape, array.tobytes()) for key, array in rollout.members().items()]
        for rollout in two.rollouts
    ]


def test_golden_round_trip(tmp_path: Path) -> None:
    GOLDEN.save(tmp_path / "golden.npz")
    loaded = Golden.load(tmp_path / "golden.npz")
    assert same(loaded, GOLDEN)
    assert loaded.rollouts[0].logits.flags.writeable
    with np.load(tmp_path / "golden.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["mixed/state/layer0.key"], ROLLOUT.states["layer0.key"])


@pytest.mark.parametrize(
    ("rollout", "sentence"),
    [
        (replace(ROLLOUT, name="a/b"), "'a/b': a name must be distinct, not empty, and without a slash"),
        (
            replace(ROLLOUT, tokens=ROLLOUT.tokens.astype(np.int32)),
            "tokens must be int64 with 2 axes, not int32 (2, 3)",
        ),
        (replace(ROLLOUT, tokens=ROLLOUT.tokens + 1), "tokens must be ids 0 to 4"),
        (replace(ROLLOUT, tokens=ROLLOUT.tokens[:, :2]), "logits (2, 3, 5) do not fit tokens (2, 2)"),
        (replace(ROLLOUT, logits=ROLLOUT.logits.astype(np.float64)), "logits must be float32 with 3 axes, not float64"),
        (replace(ROLLOUT, chunks=np.array([1, 1])), "chunks [1, 1] do not add up to 3 tokens"),
        (replace(ROLLOUT, chunks=np.array([4, -1])), "chunks [4, -1] do not add up to 3 tokens"),
        (replace(ROLLOUT, chunks=np.zeros(0, np.int64)), "chunks must be int64 with 1 axes, not int64 (0,)"),
        (replace(ROLLOUT, states={"a": np.array(["x"], dtype=object)}), "state a has dtype object"),
    ],
)
def test_golden_rollouts_that_cannot_be_saved(tmp_path: Path, rollout: Rollout, sentence: str) -> None:
    with refused(BundleError, "golden rollout ", sentence):
        Golden((rollout,)).save(tmp_path / "golden.npz")
    assert names(tmp_path) == []


def test_two_rollouts_need_two_names(tmp_path: Path) -> None:
    with refused(BundleError, "golden rollout 'mixed': a name must be distinct"):
        Golden((ROLLOUT, ROLLOUT)).save(tmp_path / "golden.npz")


MEMBERS: dict[str, Any] = dict(ROLLOUT.members())


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({key: array for key, array in MEMBERS.items() if "logits" not in key}, "'mixed': logits is missing"),
        (MEMBERS | {"mixed/note": np.zeros(1)}, "'mixed': 'note' is neither tokens, chunks, logits nor state/<name>"),
        (MEMBERS | {"stray": np.zeros(1)}, "'stray': tokens is missing"),
        (MEMBERS | {"mixed/tokens": ROLLOUT.tokens.astype(">i8")}, "must be a plain array in C order, not >i8 (2, 3)"),
        (MEMBERS | {"mixed/tokens": np.asfortranarray(ROLLOUT.tokens)}, "must be a plain array in C order"),
        (MEMBERS | {"mixed/tokens": np.array([{}])}, "must be a plain array in C order, not object (1,)"),
        (MEMBERS | {"mixed/tokens": ROLLOUT.tokens[0]}, "tokens must be int64 with 2 axes, not int64 (3,)"),
    ],
)
def test_wrong_golden_files(tmp_path: Path, members: dict[str, Any], sentence: str) -> None:
    np.savez(tmp_path / "golden.npz", **members)
    with refused(BundleError, sentence):
        Golden.load(tmp_path / "golden.npz")


def test_compressed_golden_files_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "golden.npz", **MEMBERS)
    with refused(BundleError, "member 'mixed/tokens.npy' is compressed, which golden files are not"):
        Golden.load(tmp_path / "golden.npz")


def test_golden_sizes_are_checked_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GOLDEN.save(tmp_path / "golden.npz")
    monkeypatch.setattr(golden, "SIZE_LIMIT_BYTES", 100)
    monkeypatch.setattr(golden, "_read_array", lambda *_: pytest.fail("read"))
    with refused(BundleError, "bytes of arrays, more than the limit of 100; export the bundle again"):
        Golden.load(tmp_path / "golden.npz")
    with refused(BundleError, "golden rollouts have ", "over 100; use fewer tokens"):
        GOLDEN.save(tmp_path / "golden.npz")


def test_a_golden_header_cannot_claim_more_than_its_member_has(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "golden.npz", "w") as archive:
        header = "{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776, 8)}".ljust(117) + "\n"
        archive.writestr("a/tokens.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with refused(BundleError, "member 'a/tokens.npy' has 0 bytes, which do not fit int64 (1099511627776, 8)"):
        Golden.load(tmp_path / "golden.npz")


def test_members_cannot_occur_twice(tmp_path: Path) -> None:
    GOLDEN.save(tmp_path / "golden.npz")
    with zipfile.ZipFile(tmp_path / "golden.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("mixed/tokens.npy", b"")
    with refused(BundleError, "member 'mixed/tokens.npy' is not an array or occurs twice"):
        Golden.load(tmp_path / "golden.npz")


def test_missing_and_foreign_golden_files(tmp_path: Path) -> None:
    with refused(BundleError, "cannot read ", "golden.npz: No such file or directory"):
        Golden.load(tmp_path / "golden.npz")
    (tmp_path / "golden.npz").write_bytes(b"not a zip")
    with refused(BundleError, "golden.npz is damaged: File is not a zip file; export the bundle again"):
        Golden.load(tmp_path / "golden.npz")


def test_damaged_golden_files_never_end_in_another_error(tmp_path: Path) -> None:
    path, random = tmp_path / "golden.npz", np.random.default_rng(0)
    GOLDEN.save(path)
    original = np.frombuffer(path.read_bytes(), np.uint8)
    sentences = []
    for _ in range(400):
        damaged = original[: random.integers(1, 2 * len(original))].copy()
        places = random.integers(0, len(damaged), random.choice([1, 3, 30]))
        damaged[places] = random.integers(0, 256, len(places))
        path.write_bytes(damaged.tobytes())
        try:
            Golden.load(path)
        except BundleError as error:
            sentences.append(str(error))
    assert len(sentences) > 100
    assert not any("\n" in sentence for sentence in sentences)


# Tokenizers


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded == TOKENIZER
    ids = loaded.encode("ab é\n")
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 1, 4, 3, 2]
    assert loaded.decode(ids) == "ab é\n"
    assert loaded.encode("").shape == (0,)


def test_unknown_characters_are_named_with_their_place() -> None:
    with refused(InputError, "the vocabulary has no 'X' (position 2 of the text)"):
        TOKENIZER.encode("abXbY")


@pytest.mark.parametrize("index", [5, -1])
def test_unknown_ids_are_named(index: int) -> None:
    with refused(InputError, f"token id {index} is out of range: the vocabulary has ids 0 to 4"):
        TOKENIZER.decode([0, index])


@pytest.mark.parametrize("token", ["<pad>", ""])
def test_tokens_that_are_no_characters_only_decode(token: str) -> None:
    tokenizer = Tokenizer("char", ("a", token))
    assert tokenizer.decode([1, 0]) == token + "a"
    with refused(InputError, f"this vocabulary is not of single characters: token 1 is {token!r}"):
        tokenizer.encode("a")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not a tokenizer of this format: Expecting"),
        ('{"kind": "bpe", "tokens": []}', "tokenizer.kind: wanted 'char', got str 'bpe'; export the bundle again"),
        ('{"kind": "char", "tokens": [1]}', "tokenizer.tokens[0]: wanted str, got int 1"),
        ('{"kind": "char", "tokens": ["a", "a"]}', "the vocabulary has 'a' twice"),
        ("[" * 100_000, "maximum recursion depth"),
    ],
)
def test_wrong_tokenizer_files(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with refused(BundleError, sentence):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with refused(BundleError, "cannot read ", "tokenizer.json: No such file or directory"):
        Tokenizer.load(tmp_path / "tokenizer.json")
