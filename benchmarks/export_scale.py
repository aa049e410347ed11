"""What the export of a large model takes: time by stage, and the memory of all its processes together.

    python benchmarks/export_scale.py [--parameters 1e9] [--out benchmarks/results/export-scale.json]

A Transformer-XL of about that many random parameters is written to disk tensor by tensor, exported by a process of
its own, and checked there against the original on a short rollout. Memory is the sum of the proportional set sizes
of the export and its children (Pss in /proc/<pid>/smaps_rollup, Linux): resident memory, mapped files included,
where a page that several processes share counts once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from mscompile import Profile, compile_checkpoint
from mscompile.checkpoint import FORMAT
from mscompile.models.transformer_xl import TransformerXL, TransformerXLConfig
from mscompile.pipeline import Options

HERE = Path(__file__).parent
SEED = 20260101
VOCAB = 204
LAYERS = 12  # at least, where that many parameters allow it
MEMORY = 64  # rows; the original projects all of them at every step, which would be most of the time
POLL_S = 0.2
OPTIONS = Options(profile=Profile(1, 1, 64), steps=32)


def shape(parameters: float) -> TransformerXLConfig:
    """A model of about that many parameters: 13 d^2 a layer, d a power of two."""
    width = 32
    while 13 * (2 * width) ** 2 * LAYERS <= parameters:
        width *= 2
    return TransformerXLConfig(
        vocab_size=VOCAB, n_layer=max(1, round(parameters / (13 * width**2))), d_model=width, n_head=width // 32,
        d_head=32, d_inner=4 * width, mem_len=MEMORY, tgt_len=MEMORY, same_length=True,
    )  # fmt: skip


def write_checkpoint(path: Path, config: TransformerXLConfig) -> int:
    """A safetensors checkpoint of random weights, one tensor in memory at a time; how many bytes they have."""
    with torch.device("meta"):
        sizes = {name: tuple(tensor.shape) for name, tensor in TransformerXL(config).state_dict().items()}
    fields = {"family": "transformer-xl", "config": asdict(config), "vocab": [chr(0x100 + i) for i in range(VOCAB)]}
    header: dict[str, object] = {
        "__metadata__": {"format": FORMAT, **{name: json.dumps(value) for name, value in fields.items()}}
    }
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + 4 * prod(size)
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, size) in enumerate(sizes.items()):
            file.write(_random(name, size, number).data)
    return end


def _random(name: str, size: tuple[int, ...], number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if name.endswith("norm.weight"):
        return np.ones(size, np.float32)
    tensor = np.random.default_rng((SEED, number)).standard_normal(size, np.float32)
    tensor *= 0.02
    return tensor


@dataclass
class Usage:
    """Of an export and its children together."""

    resident_bytes: int = 0  # pages of files that are mapped included
    anonymous_bytes: int = 0  # what the system cannot drop and read again


class Watch(threading.Thread):
    """Polls the memory of a process and its children, and remembers the peaks of every stage."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.stage = "starting"
        self.peaks: dict[str, Usage] = {}
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(POLL_S):
            peak, now = self.peaks.setdefault(self.stage, Usage()), usage(self._pid)
            peak.resident_bytes = max(peak.resident_bytes, now.resident_bytes)
            peak.anonymous_bytes = max(peak.anonymous_bytes, now.anonymous_bytes)


def usage(pid: int) -> Usage:
    """Of a process and all below it, now."""
    total = Usage()
    for process in _family(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has ended
            continue
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        total.resident_bytes += kib["Pss"] * 1024
        total.anonymous_bytes += kib["Pss_Anon"] * 1024
    return total


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))
    except OSError:
        return


def measure(checkpoint: Path, out: Path) -> dict[str, object]:
    """Export in a process of its own: seconds and peaks of each stage."""
    begun, stages = time.perf_counter(), dict[str, float]()
    command = [sys.executable, __file__, "--inside", str(checkpoint), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        watch = Watch(child.pid)
        watch.start()
        assert child.stdout is not None
        since = begun
        for line in child.stdout:
            now = time.perf_counter()
            stages[watch.stage] = stages.get(watch.stage, 0.0) + now - since
            watch.stage, since = line.strip(), now
        watch.over.set()
        watch.join()
    if child.returncode:
        raise SystemExit(child.returncode)
    peaks = {stage: {**asdict(peak), "seconds": stages.get(stage, 0.0)} for stage, peak in watch.peaks.items()}
    return {
        "seconds": time.perf_counter() - begun,
        "peak_resident_bytes": max(peak.resident_bytes for peak in watch.peaks.values()),
        "peak_anonymous_bytes": max(peak.anonymous_bytes for peak in watch.peaks.values()),
        "bundle_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "stages": peaks,
    }


def main(
    parameters: Annotated[float, typer.Option(help="About how many parameters.")] = 1e9,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = HERE / "results" / "export-scale.json",
    scratch: Annotated[Path | None, typer.Option(help="Where the files go, three times the weights.")] = None,
) -> None:
    config = shape(parameters)
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        checkpoint = Path(directory) / "random.safetensors"
        weights_bytes = write_checkpoint(checkpoint, config)
        result = {"config": asdict(config), "weights_bytes": weights_bytes}
        result |= measure(checkpoint, Path(directory) / "random.msc")
    for name in ("peak_resident", "peak_anonymous", "bundle"):
        result[f"{name}_of_weights"] = round(result[f"{name}_bytes"] / weights_bytes, 3)  # type: ignore[operator]
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result, indent=2))


def inside(checkpoint: str, out: str) -> None:
    """The export that is measured; says each stage when it begins."""
    compile_checkpoint(checkpoint, ["ort"], out, OPTIONS, lambda what, *_: print(what, flush=True))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(*sys.argv[2:])
    else:
        typer.run(main)
