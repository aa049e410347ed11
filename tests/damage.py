"""Bundles that were damaged, each in one way, which every host has to refuse with the same sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any


def edit(directory: Path, name: str, change: Callable[[Any], object]) -> None:
    """Change a JSON file of a bundle, and its entry in the manifest."""
    data = json.loads((directory / name).read_text(encoding="utf-8"))
    change(data)
    (directory / name).write_text(json.dumps(data), encoding="utf-8")
    if name != "manifest.json":
        content = (directory / name).read_bytes()
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        edit(directory, "manifest.json", lambda manifest: manifest["files"].update({name: entry}))


def spec(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda path: edit(path, "manifest.json", lambda manifest: change(manifest["spec"]))


def manifest(**values: object) -> Callable[[Path], None]:
    return lambda path: edit(path, "manifest.json", lambda found: found.update(values))


def rewritten(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = (path / "manifest.json").read_bytes()
        assert old in content
        (path / "manifest.json").write_bytes(content.replace(old, new, 1))

    return change


def touched(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"deeper": found}
    return found


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "absent": shutil.rmtree,
    "a file": lambda path: (shutil.rmtree(path), path.write_text("")),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "newer schema": manifest(schema=2),
    "no schema": manifest(schema="1"),
    "unknown key": manifest(colour="green"),
    "wrong type": manifest(verified=1),
    "wrong list": manifest(rules={"a": [1, 2.5, None, True, "x" * 50, {"b": []}]}),
    "verified, unchecked": manifest(verified=True, parity=None),
    "odd name": manifest(name="a/b"),
    "repeated key": rewritten(b'"schema": 1', b'"schema": 1, "schema": 1'),
    "missing key": spec(lambda found: found.pop("vocab_size")),
    "no checksum of the source": manifest(source={}),
    "an odd checksum of the source": manifest(source={"sha256": 5}),
    "odd parameters": manifest(source={"sha256": "0", "parameters": "many"}),
    "an odd stage": manifest(source={"sha256": "0", "nodes": [{"after": "tracing"}]}),
    "odd numerics": manifest(engines={"ort": {"numerics": {"decode": 3}}}),
    "too deep": manifest(source=nested(64)),
    "lists too deep": manifest(source={"a": reduce(lambda inner, _: [inner], range(80), 0)}),
    "a number too large": manifest(source={"sha256": "0", "parameters": 2**63}),
    "integer initial": spec(lambda found: found["states"][0].update(initial=0)),
    "word in a list": spec(lambda found: found["states"][0].update(initial=[0.5, "zero"])),
    "initial of another size": spec(lambda found: found["states"][0].update(initial=[0.0])),
    "unknown update": spec(lambda found: found["states"][0].update(update="add")),
    "unknown dtype": spec(lambda found: found["states"][0].update(dtype="float128")),
    "state without batch": spec(lambda found: found["states"][0].update(shape=[1, 2, 3, 4])),
    "state of two batches": spec(lambda found: found["states"][0].update(shape=["batch", "batch", 3, 4])),
    "odd dimension": spec(lambda found: found["graphs"][0]["inputs"][0].update(shape=["batch", "chunk/0"])),
    "dimension of no type": spec(lambda found: found["graphs"][0]["inputs"][0].update(shape=["batch", 1.5])),
    "many dimensions": spec(lambda found: found["states"][0].update(shape=["batch", *[1] * 32])),
    "a dimension too large": spec(lambda found: found["states"][0].update(shape=["batch", 2**31])),
    "a state too large": spec(lambda found: found["states"][0].update(shape=["batch", 2**30, 2**11])),
    "odd divisor": spec(lambda found: found["graphs"][0]["inputs"][0].update(shape=["batch", "chunk/08"])),
    "state of another dtype": spec(lambda found: found["graphs"][0]["inputs"][-1].update(dtype="float64")),
    "state of other rows": spec(lambda found: found["graphs"][0]["inputs"][-1].update(shape=[1, "batch", 2])),
    "logits of another shape": spec(lambda found: found.update(vocab_size=5)),
    "tokens of another shape": spec(lambda found: found["graphs"][0]["inputs"][0].update(shape=["batch", 2])),
    "a period too long": spec(lambda found: found["schedule"]["ticks"][0].update(repeat=2**40)),
    "a vocabulary too large": spec(lambda found: found.update(vocab_size=2**30)),
    "a batch too large": spec(lambda found: found.update(max_batch=2**40)),
    "two states of a name": spec(lambda found: found["states"].append(found["states"][0])),
    "unknown graph": spec(lambda found: found["schedule"]["ticks"][0]["graphs"].append("none")),
    "unknown state": spec(lambda found: found["graphs"][0]["reads"].append("none")),
    "no ticks": spec(lambda found: found["schedule"].update(ticks=[])),
    "chunks": spec(lambda found: found["schedule"].update(chunk_multiple=600)),
    "vocabulary of none": spec(lambda found: found.update(vocab_size=0)),
    "source missing": spec(
        lambda found: found.update(inputs=[{"name": "n", "dtype": "int64", "shape": [2], "every": 4, "below": 9}])
    ),
    "names that differ in case": lambda path: edit(
        path, "manifest.json", lambda found: found["files"].update({"GOLDEN.npz": found["files"]["golden.npz"]})
    ),
    "file escapes": rewritten(b'"golden.npz"', b'"../golden.npz"'),
    "file absent": lambda path: (path / "golden.npz").unlink(),
    "file added": lambda path: (path / "notes.txt").write_text("notes"),
    "file cut": lambda path: (path / "golden.npz").write_bytes(b"cut"),
    "file changed": lambda path: touched(path / "golden.npz"),
    "link": lambda path: (path / "link").symlink_to("golden.npz"),
    "engine absent": manifest(engines={}),
    "other engine": manifest(engines={"trt-rtx": {}}),
    "engine.json not JSON": lambda path: edit(path, "engines/ort/engine.json", lambda facts: facts.clear()),
}
