"""Latency of several engines side by side: one process each, so that their thread pools do not fight, with
rounds interleaved A B C A B C, so that a noisy machine is noisy for all.

As a script this module is one such process: it reads `{"workload", "samples"}` lines and answers each with
the (position, milliseconds) of its steps.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mscompile.contracts import Session
from mscompile.errors import EngineError, EngineUnavailable, MsCompileError, UsageError
from mscompile.runtime import open_bundle
from validation.latency import Latency, Meter, ScheduleGain, Workload, parse, schedule_gain, summarize

ORIGINAL = "torch"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchReport:
    """Latencies of every engine on every workload, measured in one run."""

    bundle: str
    machine: dict[str, Any]
    batch: int
    rounds: int
    latencies: tuple[Latency, ...]
    schedule_gains: dict[str, ScheduleGain]  # by "engine workload"
    skipped: dict[str, str]  # engines that could not run, and why


def run(
    bundle: Path,
    engines: Sequence[str],
    workloads: Sequence[str],
    reference: Path | None = None,
    rounds: int = 8,
    samples: int = 12,
    batch: int = 1,
    progress: Progress = lambda *_: None,
) -> BenchReport:
    """Measure `engines` of a bundle and, with `reference`, the original model ("torch").

    A decode round takes at least one period of the schedule. Engines that cannot run here are reported as
    skipped; EngineUnavailable if none can.
    """
    opened = open_bundle(bundle)
    parsed = [parse(text) for text in workloads]
    schedule = opened.spec.schedule
    names = [*([ORIGINAL] if reference else []), *(engines or opened.engines)]
    skipped: dict[str, str] = {}
    taken: dict[tuple[str, str], list[tuple[int, float]]] = {}
    with ExitStack() as stack:
        workers = {}
        for name in names:
            try:
                workers[name] = stack.enter_context(_worker(bundle, name, reference, batch))
            except EngineUnavailable as error:
                skipped[name] = str(error)
        if not workers:
            raise EngineUnavailable("; ".join(skipped.values()) or "no engine to measure")
        total, done = rounds * len(parsed) * len(workers), 0
        for workload in parsed:
            count = max(samples, schedule.period) if workload.kind == "decode" else max(samples // 4, 2)
            for _ in range(rounds):
                for name, ask in workers.items():
                    progress(f"{name} {workload.name}", done, total)
                    taken.setdefault((name, workload.name), []).extend(ask(workload, count))
                    done += 1
    latencies = tuple(
        summarize(name, workload, taken[name, workload.name], schedule) for workload in parsed for name in workers
    )
    gains = {
        f"{latency.engine} {latency.workload}": gain
        for latency in latencies
        if latency.engine != ORIGINAL and (gain := schedule_gain(latency, opened.manifest.costs, schedule))
    }
    return BenchReport(opened.manifest.name, machine(), batch, rounds, latencies, gains, skipped)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


Ask = Callable[[Workload, int], list[tuple[int, float]]]


@contextmanager
def _worker(bundle: Path, engine: str, reference: Path | None, batch: int) -> Iterator[Ask]:
    """A process that runs one engine, and how to ask it for samples."""
    command = [sys.executable, "-m", "mscompile.bench", str(bundle), engine, str(batch), str(reference or "")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def answer() -> Any:
        line = stdout.readline()
        if not line:
            raise EngineError(f"the process that measures {engine} ended with code {process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            kind = EngineUnavailable if reply["code"] == EngineUnavailable.exit_code else UsageError
            raise kind(reply["error"])
        return reply

    def ask(workload: Workload, samples: int) -> list[tuple[int, float]]:
        stdin.write(json.dumps({"workload": workload.name, "samples": samples}) + "\n")
        stdin.flush()
        return [(position, ms) for position, ms in answer()["samples"]]

    try:
        answer()
        yield ask
    finally:
        process.kill()
        process.wait()
        stdin.close()
        stdout.close()


def _serve(bundle: str, engine: str, batch: str, reference: str) -> None:
    """One worker: ready when its engine is, then an answer for each line."""

    def reply(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    try:
        opened = open_bundle(bundle, hash_files=False)
        if engine == ORIGINAL:
            from engines.torch_eager import reference_sessions

            new_session: Callable[[int], Session] = reference_sessions(Path(reference))
        else:
            new_session = opened.plan(engine).session
        reply(ready=True)
        meters: dict[str, Meter] = {}
        for line in sys.stdin:
            question = json.loads(line)
            name = question["workload"]
            if name not in meters:
                limit = opened.spec.max_context
                meters[name] = Meter(new_session, parse(name), opened.spec.vocab_size, limit, int(batch))
            reply(samples=meters[name].sample(question["samples"]))
    except MsCompileError as error:
        reply(error=str(error), code=error.exit_code)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
