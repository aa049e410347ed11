"""The bundle: one directory that holds a compiled model and all that is known about it.

    manifest.json            a Manifest: what the model is, its StreamSpec, and the hash of every other file
    graphs/<name>.onnx       one a graph of the spec; weights.bin beside them
    engines/<engine>/...     what an engine built
    golden.npz               reference rollouts (golden.py)
    tokenizer.json           where the vocabulary is known (tokenizer.py)

A bundle is closed: it holds exactly the files that its manifest lists, with those sizes and hashes. Two seals of
the same files and facts give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from mscompile import codec
from mscompile.atomic import explained, is_partial
from mscompile.contracts import Hit, Profile, StreamSpec
from mscompile.errors import BundleError
from mscompile.speccheck import name_fault, spec_fault

SCHEMA = 1
MANIFEST = "manifest.json"
GRAPHS, ENGINES = "graphs", "engines"
GOLDEN, TOKENIZER = "golden.npz", "tokenizer.json"
MANIFEST_LIMIT_BYTES = 64 * 2**20
DEPTH_LIMIT = 64  # of objects and lists in one another
BIG_FILE_BYTES = 64 * 2**20
AGAIN = "export or copy it again"


@dataclass(frozen=True)
class FileEntry:
    """What a file must be: its sha256 in hexadecimal, and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known about a bundle. In JSON the fields keep this order and the keys of dicts are sorted."""

    schema: int = SCHEMA
    name: str
    title: str
    family: str
    precision: str
    verified: bool  # every engine passed parity
    source: dict[str, Any]  # of the checkpoint: its sha256 (a text), number of parameters, config
    versions: dict[str, str]  # of what exported and built this
    profile: Profile
    engines: dict[str, dict[str, Any]]  # facts from each build
    costs: dict[str, int]  # floating-point operations of one call on one stream, for graphs of one token
    tolerances: dict[str, float]
    parity: dict[str, Any] | None  # a report for each engine; None: not checked
    rules: tuple[Hit, ...]
    passes: tuple[Hit, ...]
    spec: StreamSpec
    files: dict[str, FileEntry] = field(default_factory=dict)  # every file but the manifest; `seal` fills it


def read(path: Path, hash_files: bool = True, unfinished: bool = False) -> Manifest:
    """The manifest of the bundle at `path`, once every file has been held against it.

    Without `hash_files`, files over 64 MiB are only checked for their size. `unfinished` allows the directory of an
    export that is still under way. Raises BundleError, in one sentence, for a bundle that is missing, damaged,
    changed, or from a newer version.
    """
    path = Path(path)
    with _reading(path):
        if not path.is_dir():
            wrong = "it is not a directory" if path.exists() else "no such directory"
            raise BundleError(f"{path} is not a bundle: {wrong}")
        if is_partial(path) and not unfinished:
            raise BundleError(f"{path} is an export that is under way or was stopped; open the finished bundle")
        manifest = _parse(path, _manifest_bytes(path))
        if fault := _manifest_fault(manifest):
            raise BundleError(f"{path / MANIFEST} contradicts itself: {fault}; {AGAIN}")
        _check_files(path, manifest.files, hash_files)
    return manifest


def seal(directory: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `directory` and write manifest.json, last, with `files` filled in; may be repeated.

    Raises BundleError for a manifest that `read` would refuse, UsageError where it cannot be written.
    """
    with _reading(directory):
        sizes = {name: size for name, size in _listed(directory).items() if name != MANIFEST}
        files = {name: FileEntry(_sha256(directory / name), sizes[name]) for name in sorted(sizes)}
    manifest = replace(manifest, files=files)
    try:
        text = json.dumps(codec.encode(manifest, "manifest"), indent=2, allow_nan=False)
        codec.decode(Manifest, json.loads(text), "manifest")
    except ValueError as error:
        raise BundleError(f"cannot write {MANIFEST}: {error}") from error
    if fault := _manifest_fault(manifest):
        raise BundleError(f"cannot write {MANIFEST}: {fault}")
    with explained(f"cannot write {MANIFEST}"):
        partial = directory / f".{MANIFEST}.partial"
        try:
            partial.write_bytes((text + "\n").encode())
            partial.replace(directory / MANIFEST)
        finally:
            partial.unlink(missing_ok=True)
    return manifest


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def _manifest_bytes(path: Path) -> bytes:
    manifest = path / MANIFEST
    if not os.path.lexists(manifest):
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}")
    facts = manifest.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise BundleError(f"{path} is not a bundle: its {MANIFEST} is not a plain file")
    if facts.st_size > MANIFEST_LIMIT_BYTES:
        raise BundleError(f"{manifest} has {facts.st_size} bytes, more than {MANIFEST_LIMIT_BYTES}; {AGAIN}")
    return manifest.read_bytes()


def _parse(path: Path, content: bytes) -> Manifest:
    try:
        data = json.loads(content, object_pairs_hook=_distinct, parse_constant=_refuse_constant)
        _check_values(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST} is not valid JSON: {error}; {AGAIN}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{path / MANIFEST} is not the manifest of a bundle: it has no schema number; {AGAIN}")
    if schema > SCHEMA:
        raise BundleError(
            f"{path}: this bundle has schema {schema}, this mscompile reads up to {SCHEMA}; upgrade mscompile"
        )
    try:
        return codec.decode(Manifest, data, "manifest")
    except ValueError as error:
        raise BundleError(f"{path / MANIFEST} does not follow schema {schema}: {error}; {AGAIN}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {key!r} occurs twice in one object")
    return value


def _check_values(data: Any) -> None:
    """ValueError for what JSON can say and nobody can use: half of a character, a number or a depth without bound."""
    level = [data]
    for _ in range(DEPTH_LIMIT):
        texts = [key for value in level if isinstance(value, dict) for key in value]
        for value in (*level, *texts):
            if isinstance(value, str):
                value.encode()
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError("it has a whole number of more than 64 bits")
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(f"it has values {DEPTH_LIMIT} levels deep and more")


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _manifest_fault(manifest: Manifest) -> str | None:
    """The first contradiction in `manifest`, as part of a sentence; None if there is none."""
    if fault := name_fault("bundle", manifest.name) or _engine_fault(manifest.engines):
        return fault
    if fault := _source_fault(manifest.source):
        return fault
    if manifest.verified and manifest.parity is None:
        return "it says that it was verified and has no parity report"
    for name in manifest.files:
        if fault := _path_fault(name):
            return f"file {name!r} is listed, {fault}"
    if same := _one_file_elsewhere(manifest.files):
        return f"files {' and '.join(map(repr, same))} are one file on systems that do not tell their names apart"
    if fault := spec_fault(manifest.spec):
        return fault
    wanted = (f"{GRAPHS}/{graph.name}.onnx" for graph in manifest.spec.graphs)
    return next((f"file {name!r} of a graph is not listed" for name in wanted if name not in manifest.files), None)


@dataclass(frozen=True)
class Stage:
    """How many nodes the graphs had after a stage of the export."""

    after: str
    graphs: dict[str, int]


@dataclass(frozen=True)
class Source:
    """What is read of the facts about the checkpoint, which are free otherwise."""

    sha256: str
    parameters: int | None = None
    nodes: tuple[Stage, ...] = ()


def _source_fault(source: dict[str, Any]) -> str | None:
    try:
        codec.decode(Source, {key: source[key] for key in Source.__dataclass_fields__ if key in source}, "source")
    except ValueError as error:
        return str(error)
    return None


def _engine_fault(engines: dict[str, dict[str, Any]]) -> str | None:
    """Engines lie in directories of their names; `numerics` are the number of `products` by type for each graph."""
    for name, facts in engines.items():
        numerics = facts.get("numerics", {})
        rows = numerics.values() if isinstance(numerics, dict) else (None,)
        if not all(isinstance(row, dict) and isinstance(row.get("products"), dict) for row in rows):
            return f"engine {name!r} has numerics that are no products by graph"
    return next((fault for name in engines if (fault := name_fault("engine", name))), None)


def _path_fault(name: str) -> str | None:
    if name == MANIFEST:
        return "which cannot hold its own hash"
    if name.startswith("/") or "\\" in name or ":" in name.partition("/")[0]:
        return "which is not a relative path with forward slashes"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "which has an empty, '.' or '..' part"
    return None


def _one_file_elsewhere(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that differ only in case, or in how their characters are composed."""
    known: dict[str, str] = {}
    for name in sorted(names):
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            return other, name
    return None


def _check_files(path: Path, files: dict[str, FileEntry], hash_files: bool) -> None:
    """BundleError unless the directory holds exactly `files`. Sizes are compared before any file is read."""
    found = _listed(path)
    for name in sorted(files.keys() - found.keys()):
        raise BundleError(f"{path}: file {name!r} is listed in {MANIFEST} and missing; {AGAIN}")
    for name in sorted(found.keys() - files.keys() - {MANIFEST}):
        raise BundleError(f"{path}: file {name!r} is not listed in {MANIFEST}; remove it, or {AGAIN}")
    for name, entry in files.items():
        if found[name] != entry.size_bytes:
            raise BundleError(
                f"{path}: file {name!r} has {found[name]} bytes, and {MANIFEST} says {entry.size_bytes}; "
                f"the bundle is damaged or was changed, {AGAIN}"
            )
    for name, entry in files.items():
        if (hash_files or entry.size_bytes <= BIG_FILE_BYTES) and _sha256(path / name) != entry.sha256:
            raise BundleError(
                f"{path}: file {name!r} does not have the sha256 that {MANIFEST} says; "
                f"the bundle is damaged or was changed, {AGAIN}"
            )


def _listed(path: Path) -> dict[str, int]:
    """The size of every file below `path`, by relative path; BundleError for anything but files and directories."""
    sizes: dict[str, int] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(path / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_symlink():
                    raise BundleError(f"{path}: {name!r} is a symbolic link, which a bundle cannot hold; {AGAIN}")
                if entry.is_dir():
                    folders.append(name)
                elif entry.is_file():
                    sizes[name] = entry.stat().st_size
                else:
                    raise BundleError(f"{path}: {name!r} is not a plain file; remove it, or {AGAIN}")
    return sizes


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
