"""What was done to break mscompile: python benchmarks/reliability.py [--short] [--only readers,attacks,...]

    readers     spoiled inputs to every reader of untrusted files              fuzzing.py
    attacks     inputs that are hostile by design                              attacks.py
    writers     kill -9, full disks, read-only directories, two at once        stress.py
    sessions    8 threads on one plan, against one thread; memory over 10^5 steps
    bytes       two exports of one checkpoint, byte by byte

Writes benchmarks/results/reliability.json, from which the tables of docs/reliability.md are made; a short run prints
only. Exits with 1 if anything was found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import fuzzing
import numpy as np
import stress
import typer

from mscompile.contracts import Array, Plan
from mscompile.runtime import open_bundle

HERE = Path(__file__).parent
RESULT = HERE / "results" / "reliability.json"
THREADS = 8
SWEEP_CALLS = 60  # of one process of a sweep that change files; fewer are made where a point is not reached
GROWTH_LIMIT_BYTES = 64 * 1024  # from the first half of the soak to the second
Section = dict[str, Any]  # "rows", and "findings": a sentence for each


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    inputs: int  # of each reader
    points: int  # at which each writing command is ended, in each way
    shares: tuple[float, ...]  # of the new output, that a full disk has room for
    rounds: int  # of two exports at once
    tokens: int  # of each thread's stream
    soak_steps: int


FULL = Effort(1000, 24, (0.0, 0.3, 0.6, 0.9), 6, 4000, 100_000)
SHORT = Effort(20, 2, (0.5,), 2, 300, 3000)


def readers(seeds: Path, effort: Effort, directory: Path) -> Section:
    del directory
    found = [_said(fuzzing.fuzz(name, seeds, effort.inputs)) for name in fuzzing.READERS]
    told = [f"{each.reader}: {finding}" for each in found for finding in each.findings]
    return {"rows": [each.row() for each in found], "findings": told}


def attacks(seeds: Path, effort: Effort, directory: Path) -> Section:
    del effort, directory
    found = _said(fuzzing.attack(seeds))
    rows = [
        {"attack": name, "outcome": told["outcome"], "harmless": attack.harmless}
        for (name, attack), told in zip(fuzzing.ATTACKS.items(), found.told, strict=True)
    ]
    return {**found.row(), "rows": rows, "findings": list(map(str, found.findings))}


def _said(found: fuzzing.Found) -> fuzzing.Found:
    print(found.row(), *found.findings, sep="\n    ", flush=True)
    return found


def writers(seeds: Path, effort: Effort, directory: Path) -> Section:
    library, found = stress.crash_library(directory), []
    commands = stress.commands(seeds / "model.pt", seeds / "model.msc")
    for name, command in commands.items():
        trials = stress.Trials(command, directory / name, library)
        found += [trials.crashes(how, effort.points) for how in ("kill", "full")]
        found.append(trials.read_only())
        if stress.can_mount():
            found.append(trials.full_disks(effort.shares))
    found.append(stress.at_once(commands["export"], directory / "both", effort.rounds))
    points = sorted(Random("sweep").sample(range(1, SWEEP_CALLS + 1), effort.points // 2))  # noqa: S311
    found.append(stress.sweeps(seeds / "model.pt", directory / "sweeps", library, points))
    for each in found:
        print(each.row(), *each.findings, sep="\n    ", flush=True)
    told = [f"{each.command}, {each.what}: {finding}" for each in found for finding in each.findings]
    return {"rows": [each.row() for each in found], "findings": told}


# Sessions


def streamed(plan: Plan, seed: int, tokens: int) -> Array:
    """The logits of a stream in random chunks, with a reset and a return to a snapshot on its way."""
    random = np.random.default_rng(seed)
    session, logits, done = plan.session(batch=1), [], 0
    while done < tokens:
        chunk = random.integers(0, plan.spec.vocab_size, (1, int(random.integers(1, 20))))
        logits.append(session.step(chunk)[0])
        done += chunk.shape[1]
        if random.random() < 0.05:
            session.reset()
        if random.random() < 0.05:
            saved = session.state()
            session.step(chunk)
            session.restore(saved)
    return np.concatenate(logits)


def at_once(plan: Plan, tokens: int, count: int = THREADS) -> Section:
    """As many threads on one plan, each with a stream of its own, against one thread after the other."""
    found: dict[int, Array] = {}
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        found[number] = streamed(plan, number, tokens)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = {number: streamed(plan, number, tokens) for number in range(count)}
    equal = [number in found and np.array_equal(found[number], alone[number]) for number in alone]
    findings = [f"stream {number} is not the one of a single thread" for number, same in enumerate(equal) if not same]
    return {"threads": count, "tokens": sum(map(len, alone.values())), "equal": sum(equal), "findings": findings}


def grown(bundle: Path, checkpoint: Path, steps: int) -> Section:
    """How much more memory a process has in the second half of many steps than in the first."""
    script = (
        "import json, sys; sys.path.append(sys.argv[1]); import soak; from pathlib import Path; "
        "from mscompile.runtime import open_bundle; "
        "print(json.dumps(soak.soak(open_bundle(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), 10)))"
    )
    line = [sys.executable, "-c", script, str(HERE), str(bundle), str(checkpoint), str(steps)]
    told = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    resident: list[int] = told["block_resident_bytes"]
    growth = max(resident[5:]) - max(resident[:5])
    findings = [f"memory grew by {growth} bytes over {steps} steps"] if growth > GROWTH_LIMIT_BYTES else []
    facts = {"steps": steps, "growth_bytes": growth, "resident_bytes": resident, "last_error": told["final_error"]}
    return {**facts, "findings": findings}


def sessions(seeds: Path, effort: Effort, directory: Path) -> Section:
    del directory
    threads = at_once(open_bundle(seeds / "model.msc").plan("ort"), effort.tokens)
    memory = grown(seeds / "model.msc", seeds / "model.pt", effort.soak_steps)
    print(threads, memory, sep="\n", flush=True)
    return {"threads": threads, "memory": memory, "findings": [*threads["findings"], *memory["findings"]]}


def same_bytes(seeds: Path, effort: Effort, directory: Path) -> Section:
    del effort
    command = stress.commands(seeds / "model.pt", seeds / "model.msc")["export"]
    found = stress.same_bytes(command, directory)
    print(found, flush=True)
    return {**found, "findings": [f"{name} differs between two exports" for name in found["differing"]]}


SECTIONS: Mapping[str, Callable[[Path, Effort, Path], Section]] = {
    "readers": readers,
    "attacks": attacks,
    "writers": writers,
    "sessions": sessions,
    "bytes": same_bytes,
}


def main(
    short: Annotated[bool, typer.Option("--short", help="Little of each, and no result file.")] = False,
    only: Annotated[str, typer.Option(help="Sections, comma-separated; the others keep their results.")] = "",
) -> None:
    """Try to break mscompile, and write what came of it."""
    chosen = [name for name in SECTIONS if not only or name in only.split(",")]
    found: dict[str, Section] = {}
    with tempfile.TemporaryDirectory() as directory:
        seeds = fuzzing.seed(Path(directory, "seeds"))
        for name in chosen:
            own = Path(directory, name)
            own.mkdir()
            found[name] = SECTIONS[name](seeds, SHORT if short else FULL, own)
    if not short:
        kept = json.loads(RESULT.read_text(encoding="utf-8")) if only and RESULT.exists() else {}
        result = {name: {**kept, **found}[name] for name in SECTIONS if name in {**kept, **found}}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    findings = [finding for section in found.values() for finding in section["findings"]]
    print(f"{len(findings)} findings", *findings, sep="\n")
    sys.exit(bool(findings))


if __name__ == "__main__":
    typer.run(main)
