"""Inputs that are hostile by design, one for each known trick, for the readers of `fuzzing.py`: code in pickles, sizes
that are claimed and not there, archives that unpack to more than is good, and files that are not what they seem.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import mutators

CLAIMED = 2**40  # bytes, values, rows: more than any machine here has


@dataclass(frozen=True)
class Attack:
    """`make(seeds, empty directory)` writes the input; `kind` says who opens it: checkpoint, inspect, bundle, host."""

    kind: str
    make: Callable[[Path, Path], Path]
    harmless: bool = False  # it may be opened


def resealed(bundle: Path, name: str, content: bytes) -> Path:
    """The bundle with one other file, and a manifest that has its hash: what a hostile hand would make."""
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(content)
    return edited(bundle, lambda manifest: manifest["files"].update({name: entry(content)}))


def entry(content: bytes) -> dict[str, Any]:
    return {"sha256": sha256(content).hexdigest(), "size_bytes": len(content)}


def edited(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return bundle


def copied(seeds: Path, into: Path) -> Path:
    return Path(shutil.copytree(seeds / "model.msc", into / "model.msc"))


# Checkpoints


def _fields(**changed: Any) -> Callable[[Path, Path], Path]:
    def make(seeds: Path, into: Path) -> Path:
        import torch

        fields = torch.load(seeds / "model.pt", weights_only=True) | changed
        torch.save(fields, into / "model.pt")
        return into / "model.pt"

    return make


def _setting(name: str, value: Any) -> Callable[[Path, Path], Path]:
    def make(seeds: Path, into: Path) -> Path:
        import torch

        fields = torch.load(seeds / "model.pt", weights_only=True)
        fields["config"] |= {"same_length": False, name: value}
        torch.save(fields, into / "model.pt")
        return into / "model.pt"

    return make


def _code(seeds: Path, into: Path) -> Path:
    return _fields(extra=mutators.Payload(into.parent / "canary"))(seeds, into)


def _code_in_the_legacy_format(_: Path, into: Path) -> Path:
    import torch

    payload = mutators.Payload(into.parent / "canary")
    torch.save(payload, into / "legacy.pt", _use_new_zipfile_serialization=False)
    return into / "legacy.pt"


def _bare_pickle(_: Path, into: Path) -> Path:
    (into / "model.pt").write_bytes(pickle.dumps(mutators.Payload(into.parent / "canary")))
    return into / "model.pt"


def _code_in_a_directory(seeds: Path, into: Path) -> Path:
    import torch

    path = Path(shutil.copytree(seeds / "foreign", into / "foreign"))
    torch.save({"a": mutators.Payload(into.parent / "canary")}, path / "pytorch_model.bin")
    return path


def _one_value_many_times(seeds: Path, into: Path) -> Path:
    import torch

    fields = torch.load(seeds / "model.pt", weights_only=True)
    name = next(iter(fields["state_dict"]))
    fields["state_dict"][name] = torch.zeros(1).expand(CLAIMED)
    torch.save(fields, into / "model.pt")
    return into / "model.pt"


def _without_contents(seeds: Path, into: Path) -> Path:
    import torch

    fields = torch.load(seeds / "model.pt", weights_only=True)
    fields["state_dict"] = {name: tensor.to("meta") for name, tensor in fields["state_dict"].items()}
    torch.save(fields, into / "model.pt")
    return into / "model.pt"


def _itself(depth: int | None) -> Any:
    """A list that holds itself, or lists of which each holds the last one twice."""
    if depth is None:
        ring: list[Any] = []
        ring.append(ring)
        return ring
    twice: Any = 1
    for _ in range(depth):
        twice = [twice, twice]
    return twice


def _pressed(seeds: Path, into: Path) -> Path:
    """256 MiB of nothing in 256 KiB, where the pickle is."""
    with zipfile.ZipFile(seeds / "model.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(into / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content + bytes(2**28 if name.endswith("data.pkl") else 0))
    return into / "model.pt"


def _claims(field: int) -> Callable[[Path, Path], Path]:
    """The directory of the archive says that the pickle has 4 GiB, at one of its places for sizes."""

    def make(seeds: Path, into: Path) -> Path:
        content = (seeds / "model.pt").read_bytes()
        at = content.index(b"PK\x01\x02") + field
        (into / "model.pt").write_bytes(content[:at] + struct.pack("<I", 2**32 - 2) + content[at + 4 :])
        return into / "model.pt"

    return make


def _header(size: int) -> Callable[[Path, Path], Path]:
    def make(seeds: Path, into: Path) -> Path:
        content = (seeds / "model.safetensors").read_bytes()
        (into / "model.safetensors").write_bytes(struct.pack("<Q", size) + content[8:])
        return into / "model.safetensors"

    return make


def _pipe(name: str) -> Callable[[Path, Path], Path]:
    def make(_: Path, into: Path) -> Path:
        os.mkfifo(into / name)
        return into / name

    return make


def _endless(_: Path, into: Path) -> Path:
    (into / "model.pt").symlink_to("/dev/zero")
    return into / "model.pt"


def _shard_elsewhere(name: str) -> Callable[[Path, Path], Path]:
    def make(seeds: Path, into: Path) -> Path:
        path = Path(shutil.copytree(seeds / "foreign", into / "foreign"))
        (path / "pytorch_model.bin").rename(into / "secret.bin")
        index = {"weight_map": {"a": name.format(into=into)}}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
        return path

    return make


# Bundles


def _bundle(change: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    def make(seeds: Path, into: Path) -> Path:
        bundle = copied(seeds, into)
        change(bundle)
        return bundle

    return make


def _replaced(name: str, how: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    def change(bundle: Path) -> None:
        path = bundle / name
        path.rename(bundle.parent / "elsewhere")
        how(path)

    return _bundle(change)


def _listed(name: str) -> Callable[[Path, Path], Path]:
    return _bundle(lambda bundle: edited(bundle, lambda manifest: manifest["files"].update({name: entry(b"")})))


def _spec(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], Path]:
    return _bundle(lambda bundle: edited(bundle, lambda manifest: change(manifest["spec"])))


def _wide(spec: dict[str, Any]) -> None:
    """A state that is as large in every graph of the manifest as in itself."""
    for held in (*spec["states"], *(tensor for g in spec["graphs"] for tensor in (*g["inputs"], *g["outputs"]))):
        if held["name"].startswith("layer"):
            held["shape"] = [dim if dim == "batch" else 2**13 for dim in held["shape"]]


def _external(location: str) -> Callable[[Path, Path], Path]:
    """A graph whose weights lie in a file outside the bundle."""

    def change(bundle: Path) -> None:
        import onnx

        (bundle.parent / "secret").write_bytes(bytes(10_000))
        for path in sorted(bundle.glob("engines/ort/packed/*.onnx")):
            model = onnx.load(str(path), load_external_data=False)
            weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
            weight.ClearField("raw_data")
            weight.ClearField("float_data")
            weight.data_location = onnx.TensorProto.EXTERNAL
            weight.external_data.add(key="location", value=location.format(into=bundle.parent))
            resealed(bundle, str(path.relative_to(bundle)), model.SerializeToString())

    return _bundle(change)


def _deep(bundle: Path) -> None:
    folder = os.open(bundle, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d" * 20, dir_fd=folder)
        inner = os.open("d" * 20, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)


def _golden(pressed: bool) -> Callable[[Path, Path], Path]:
    def change(bundle: Path) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if pressed else zipfile.ZIP_STORED) as archive:
            header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({CLAIMED},)}}".ljust(117) + "\n"
            npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
            archive.writestr("a/tokens.npy", npy + bytes(2**28 if pressed else 0))
        resealed(bundle, "golden.npz", buffer.getvalue())

    return _bundle(change)


def _huge(bundle: Path) -> None:
    with (bundle / "manifest.json").open("wb") as stream:
        stream.truncate(CLAIMED)


ATTACKS: dict[str, Attack] = {
    "code in a pickle": Attack("checkpoint", _code),
    "code in a pickle of the legacy format": Attack("checkpoint", _code_in_the_legacy_format),
    "code in a bare pickle": Attack("checkpoint", _bare_pickle),
    "code in the weights of a directory": Attack("checkpoint", _code_in_a_directory),
    "a tensor of 2^40 values that are one": Attack("checkpoint", _one_value_many_times),
    "tensors without contents": Attack("checkpoint", _without_contents),
    "100 GB asked for by the pickle": Attack("checkpoint", _fields(vocab=mutators.Sized(10**11))),
    "settings that hold themselves": Attack("checkpoint", _fields(config={"n_layer": _itself(None)})),
    "settings that hold 2^60 items": Attack("checkpoint", _fields(config={"n_layer": _itself(60)})),
    "a family that holds 2^60 items": Attack("checkpoint", _fields(family=_itself(60))),
    "another project's settings that hold themselves": Attack("checkpoint", _fields(format="x", args=_itself(None))),
    "a billion layers": Attack("checkpoint", _setting("n_layer", 10**9)),
    "a segment of 10^12 tokens": Attack("inspect", _setting("tgt_len", 10**12)),
    "a memory of 10^12 rows": Attack("inspect", _setting("mem_len", 10**12)),
    "a pickle that unpacks to 256 MiB": Attack("checkpoint", _pressed),
    "a pickle said to have 4 GiB": Attack("checkpoint", _claims(20)),
    "a pickle said to unpack to 4 GiB": Attack("checkpoint", _claims(24)),
    "a safetensors header of 2^63 bytes": Attack("checkpoint", _header(2**63)),
    "a safetensors header of 2^26 bytes": Attack("checkpoint", _header(2**26)),
    "a pipe as checkpoint": Attack("checkpoint", _pipe("model.pt")),
    "a pipe as safetensors": Attack("checkpoint", _pipe("model.safetensors")),
    "an endless device as checkpoint": Attack("checkpoint", _endless),
    "a shard outside the directory": Attack("checkpoint", _shard_elsewhere("../secret.bin")),
    "a shard by its absolute path": Attack("checkpoint", _shard_elsewhere("{into}/secret.bin")),
    "a link to a file outside": Attack("bundle", _replaced("golden.npz", lambda p: p.symlink_to("../elsewhere"))),
    "a link to a directory outside": Attack("bundle", _replaced("graphs", lambda p: p.symlink_to("../elsewhere"))),
    "a link to itself": Attack("bundle", _replaced("golden.npz", lambda p: p.symlink_to("golden.npz"))),
    "the manifest a link": Attack("bundle", _replaced("manifest.json", lambda p: p.symlink_to("../elsewhere"))),
    "the manifest a pipe": Attack("bundle", _replaced("manifest.json", os.mkfifo)),
    "the manifest a directory": Attack("bundle", _replaced("manifest.json", Path.mkdir)),
    "a manifest of 2^40 bytes": Attack("bundle", _bundle(_huge)),
    "a pipe among the graphs": Attack("bundle", _replaced("graphs/weights.bin", os.mkfifo)),
    "300 directories in one another": Attack("bundle", _bundle(_deep)),
    "a listed path outside": Attack("bundle", _listed("../secret")),
    "a listed path outside, by a detour": Attack("bundle", _listed("graphs/../../secret")),
    "a listed path from the root": Attack("bundle", _listed("/etc/passwd")),
    "a listed path of another system": Attack("bundle", _listed("C:\\secret")),
    "two names that differ in case": Attack("bundle", _bundle(lambda b: resealed(b, "GOLDEN.npz", b"x"))),
    "two names that differ in composition": Attack(
        "bundle", _bundle(lambda b: resealed(resealed(b, "caf\u00e9", b"x"), "cafe\u0301", b"x"))
    ),
    "hard links": Attack("host", _replaced("golden.npz", lambda p: os.link(p.parent.parent / "elsewhere", p)), True),
    "a state larger than the machine": Attack("host", _spec(_wide)),
    "a vocabulary of 2^40 tokens": Attack("host", _spec(lambda spec: spec.update(vocab_size=CLAIMED))),
    "a tick of 2^40 tokens": Attack("host", _spec(lambda spec: spec["schedule"]["ticks"][0].update(repeat=CLAIMED))),
    "golden arrays that unpack to 256 MiB": Attack("validate", _golden(pressed=True)),
    "golden arrays said to have 2^40 values": Attack("validate", _golden(pressed=False)),
    "weights outside the bundle": Attack("host", _external("../../../../secret")),
    "weights by their absolute path": Attack("host", _external("{into}/secret")),
    "weights in a device": Attack("host", _external("/dev/zero")),
}
