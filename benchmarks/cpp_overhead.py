"""What a C++ session adds to the bare runtime call, and a Python session beside it, at the 41 M shape:

    make cpp
    python benchmarks/cpp_overhead.py [--rounds 24]

One process a side, in interleaved rounds: single-token steps of the C++ session, of the Python session, and the
runtime's calls of such steps alone, with the same tensors bound. Within a session's process, the time outside those
calls is measured as well: it does not depend on how two processes happen to lie in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import models
import numpy as np
import onnxruntime
import typer
from cost_of_use import timed_calls
from targets import TXL

from mscompile import bench
from mscompile.errors import EngineUnavailable
from mscompile.runtime import open_bundle
from validation.latency import Ratio

HERE = Path(__file__).parent
PROGRAM = HERE.parent / "build" / "cpp" / "release" / "tests" / "latency"
LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"))
POSITION = 1024  # beyond the memory: every step costs the same
LIMIT = 5.0  # percent that the C++ session may add
SERVE = "serve"

Samples = list[tuple[float, float]]  # of each step: milliseconds, and those of them inside the runtime


class Side:
    """A running process that takes steps when it is asked."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self._name, self._process = name, process

    def steps(self, count: int) -> Samples:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        numbers = [int(word) / 1e6 for word in self._process.stdout.readline().split()]
        if len(numbers) != 2 * count:
            raise SystemExit(f"the process of {self._name} ended with {self._process.wait()}")
        return list(zip(numbers[::2], numbers[1::2], strict=True))


@contextmanager
def sides(bundle: Path) -> Iterator[dict[str, Side]]:
    """The three processes, each with its stream at POSITION."""
    if not PROGRAM.exists():
        raise EngineUnavailable(f"{PROGRAM} is missing: run make cpp")
    words = {
        "bare": [PROGRAM, bundle, "bare", POSITION],
        "cpp": [PROGRAM, bundle, "session", POSITION],
        "python": [sys.executable, __file__, SERVE, bundle],
    }
    with ExitStack() as stack:
        found = {}
        for name, command in words.items():
            process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "MSCOMPILE_ONNXRUNTIME": str(LIBRARY), "PYTHONPATH": str(HERE.parent)},
            )  # fmt: skip
            stack.enter_context(process)
            found[name] = Side(name, process)
        for side in found.values():
            side.steps(10)  # ready, and warm
        yield found


def serve(bundle: str) -> None:
    """The Python side; the C++ ones are cpp/tests/latency.cpp."""
    inside = timed_calls(onnxruntime.InferenceSession)
    opened = open_bundle(bundle, hash_files=False)
    session, vocab = opened.session("ort"), opened.spec.vocab_size
    session.step(np.ones((1, POSITION), np.int64))
    for line in sys.stdin:
        numbers = []
        for step in range(int(line)):
            inside.clear()
            begun = time.perf_counter_ns()
            session.step([[step % vocab]])
            numbers += [time.perf_counter_ns() - begun, int(1e9 * sum(inside))]
        print(*numbers, flush=True)


def measure(bundle: Path, rounds: int, samples: int) -> dict[str, Any]:
    """The result: milliseconds of a step, what a session adds inside its process, and ratios of the sides by round."""
    taken: dict[str, list[Samples]] = {"bare": [], "cpp": [], "python": []}
    with sides(bundle) as running:
        for _ in range(rounds):
            for name, side in running.items():
                taken[name].append(side.steps(samples))
    rounds_ms = {name: [median(step for step, _ in steps) for steps in each] for name, each in taken.items()}
    return {
        "model": TXL,
        "position": POSITION,
        "rounds": rounds,
        "steps_a_round": samples,
        "step_ms": {name: median(times) for name, times in rounds_ms.items()},
        "added": {name: added([step for steps in taken[name] for step in steps]) for name in ("cpp", "python")},
        "cpp_to_bare": asdict(Ratio.of(rounds_ms["cpp"], rounds_ms["bare"])),
        "python_to_cpp": asdict(Ratio.of(rounds_ms["python"], rounds_ms["cpp"])),
        "limit_percent": LIMIT,
    }


def added(samples: Samples) -> Mapping[str, float]:
    """What a session adds to its own calls of the runtime."""
    outside = median(step - inside for step, inside in samples)
    return {"ms": outside, "percent": 100 * outside / median(inside for _, inside in samples)}


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of all sides in turn.")] = 24,
    samples: Annotated[int, typer.Option(help="Steps of a side in a round.")] = 50,
    bundle: Annotated[Path | None, typer.Option(help="What to measure; made if not given.")] = None,
    build: Annotated[Path, typer.Option(help="Where the bundle is, or is put.")] = Path("build/bench"),
    out: Annotated[Path, typer.Option(help="The result.")] = HERE / "results" / "cpp-overhead.json",
) -> None:
    path = bundle or models.compiled(models.saved(TXL, build), build)
    result = {**measure(path, rounds, samples), "machine": bench.machine()}
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve(sys.argv[2])
    else:
        typer.run(main)
