"""Target 6: what using the compiler costs, each figure from a process of its own.

python benchmarks/cost_of_use.py export|open|run ARGUMENTS      one measurement, its JSON on stdout
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import models
import numpy as np
from targets import TXL

from mscompile import plain, worker
from mscompile.runtime import open_bundle

REPEATS = 5
STEPS = 200
EXPORT_OF_1B = "export-scale.json"  # written by benchmarks/export_scale.py


def measure(build: Path, results: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The section: each ratio, with what it was computed from."""
    source = models.saved(TXL, build)
    bundle = models.compiled(source, build)
    say("cost of use: export")
    ours, bare = _exports(source)
    say("cost of use: opening, resident memory, overhead of a session")
    opened, ran = _alone("open", bundle), _alone("run", bundle)
    found = {
        "export_seconds": ours,
        "bare_export_seconds": bare,
        "export_ratio": min(ours) / min(bare),
        "help_seconds": median(_help_seconds() for _ in range(REPEATS)),
        "open_reads_ratio": opened["read_bytes"] / opened["bundle_bytes"],
        "resident_ratio": ran["resident_bytes"] / ran["weight_bytes"],
        **ran,
    }
    path = results / EXPORT_OF_1B
    if path.exists():
        scale = json.loads(path.read_text(encoding="utf-8"))
        found["export_peak_ratio"] = scale["peak_resident_of_weights"]
    return found


def _exports(source: Path, rounds: int = 2) -> tuple[list[float], list[float]]:
    """Seconds of our export without its gate, and of a bare `torch.onnx.export`, in turn."""
    ours, bare = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            bare.append(plain.exported(source, Path(directory)).export_seconds)
            ours.append(_alone("export", source, Path(directory) / "model.msc")["seconds"])
    return ours, bare


def _alone(what: str, *arguments: Path) -> dict[str, Any]:
    """A measurement in a fresh process."""
    command = [sys.executable, __file__, what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _help_seconds() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mscompile.cli", "--help"], capture_output=True, check=True)
    return time.perf_counter() - begun


def export(source: str, out: str) -> dict[str, Any]:
    """Seconds of an export for ONNX Runtime, the engine's build included, the gate left out."""
    from mscompile.pipeline import Options, compile_checkpoint

    begun = time.perf_counter()
    compile_checkpoint(source, ["ort"], out, Options(profile=models.PROFILE, validate=False))
    return {"seconds": time.perf_counter() - begun, "peak_bytes": worker.peak_resident_bytes()}


def open_only(bundle: str) -> dict[str, Any]:
    """Bytes read by opening a bundle, hashes included."""
    before = _read_bytes()
    opened = open_bundle(bundle)
    files = sum(entry.size_bytes for entry in opened.manifest.files.values())
    return {
        "read_bytes": _read_bytes() - before,
        "bundle_bytes": files + (opened.path / "manifest.json").stat().st_size,
    }


def _read_bytes() -> int:
    """Bytes that this process has asked the system to read."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["rchar"])


def run(bundle: str) -> dict[str, Any]:
    """Resident memory of all loaded and used graphs, and what a session adds to the bare runtime call."""
    import onnxruntime

    inside = timed_calls(onnxruntime.InferenceSession)
    opened = open_bundle(bundle, hash_files=False)
    before = process_bytes()
    session = opened.session("ort")
    states = sum(array.nbytes for array in session.state().states.values())
    random = np.random.default_rng(0)
    for count in (1, 128):  # every graph; longer chunks would add their activations
        session.step(random.integers(0, opened.spec.vocab_size, (1, count)))
    resident = process_bytes() - before - states
    session.step(random.integers(0, opened.spec.vocab_size, (1, 901)))
    added, bare = [], []
    for _ in range(STEPS):
        token = random.integers(0, opened.spec.vocab_size, (1, 1))
        inside.clear()
        begun = time.perf_counter()
        session.step(token)
        bare.append(sum(inside))
        added.append(time.perf_counter() - begun - bare[-1])
    return {
        "resident_bytes": resident,
        "weight_bytes": opened.manifest.files["graphs/weights.bin"].size_bytes,
        "bare_step_ms": 1e3 * median(bare),
        "added_step_ms": 1e3 * median(added),
        "overhead_percent": 100 * median(added) / median(bare),
    }


def timed_calls(session: Any) -> list[float]:
    """Seconds of each call into the runtime from now on; replaces the method on the runtime's class."""
    seconds: list[float] = []
    call = session.run_with_iobinding

    def timed(self: Any, *arguments: Any) -> None:
        begun = time.perf_counter()
        call(self, *arguments)
        seconds.append(time.perf_counter() - begun)

    session.run_with_iobinding = timed
    return seconds


def process_bytes() -> int:
    """Resident bytes, a page that is mapped twice counted once."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(json.dumps({"export": export, "open": open_only, "run": run}[what](*arguments)))
