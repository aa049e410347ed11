"""Weights in the layout that ONNX Runtime's kernels want, packed once, in one file that all graphs map.

A session packs the weights of its products into copies of its own when it opens: as many copies as a bundle has
graphs. ONNX Runtime can write such a session out, packed weights included, and maps them when it reads it back
(its pull request 23069). Here every graph is written so, and contents that are equal, as those of a weight that
two graphs multiply by, are kept once:

    <engine>/packed/<graph>.onnx     as the runtime has optimised it
    <engine>/packed/weights.bin      the weights, unpacked and packed; only the packed ones stay in memory

Optimised graphs belong to one release of the runtime and one kind of processor, which `environment` names. Elsewhere
the bundle's own graphs are used, and packed when they are opened.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

FOLDER, FILE = "packed", "weights.bin"
PAGE, LINE = 4096, 64


def environment() -> str:
    """What packed weights depend on: the runtime's release, and the instructions that its kernels may use."""
    import onnxruntime

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "".join(lines[:1]))
    digest = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()
    return f"onnxruntime {onnxruntime.__version__}, {platform.machine()}, {digest[:16]}"


def write_optimized(options: Any, path: Path) -> None:
    """Let a session of these options write what it has made of its graph, packed weights in a file beside it."""
    options.optimized_model_filepath = str(path)
    entry = options.add_session_config_entry
    entry("session.optimized_model_external_initializers_file_name", f"{path.stem}.bin")
    entry("session.save_external_prepacked_constant_initializers", "1")


class PackedGraphs:
    """A directory `packed` that graphs are added to, one after the other."""

    def __init__(self, engine: Path) -> None:
        self._directory = engine / FOLDER
        self._directory.mkdir()
        self._file: BinaryIO = (self._directory / FILE).open("wb")
        self._places: dict[str, int] = {}  # by sha256

    def __enter__(self) -> PackedGraphs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, optimized: Path) -> None:
        """The graph that a session has written, its weights moved into the common file."""
        import onnx

        model = onnx.load(str(optimized), load_external_data=False)
        weights = [tensor for graph in _graphs(model.graph) for tensor in graph.initializer if tensor.external_data]
        if weights:
            with optimized.with_suffix(".bin").open("rb") as source:
                for tensor in weights:
                    self._move(tensor, source)
        onnx.save(model, str(self._directory / optimized.name))

    def _move(self, tensor: Any, source: BinaryIO) -> None:
        """Point one initializer into the common file, its packed forms included.

        The runtime packs it again when it opens the graph, and takes the packed form from the file if both are
        equal by hash: that is why the unpacked one has to stay.
        """
        entries = {entry.key: entry for entry in tensor.external_data}

        def moved(offset: str, size: str) -> str:
            source.seek(int(offset))
            return str(self._place(source.read(int(size))))

        for key in entries:
            if key.startswith("prepacked"):
                label, *blobs = entries[key].value.split("|")  # "<kernel>+<hash>|offset;length;padding|..."
                for at, size, rest in [blob.split(";", 2) for blob in blobs]:
                    label += f"|{moved(at, size)};{size};{rest}"
                entries[key].value = label
        entries["offset"].value = moved(entries["offset"].value, entries["length"].value)
        entries["location"].value = FILE

    def _place(self, content: bytes) -> int:
        """The offset of this content, which is written unless it is there."""
        key = hashlib.sha256(content).hexdigest()
        if key not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % (PAGE if len(content) >= PAGE else LINE)))
            self._places[key] = self._file.tell()
            self._file.write(content)
        return self._places[key]


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those of its branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(inner)
