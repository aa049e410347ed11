"""One cell, from checkpoint to figures, in a process of its own: `python -m mscompile.sweep.cell`.

The first line of stdin is the job; stdin stays open while whoever wants the result lives, and this process ends when
that does. Each line of stdout says what is done now. The result is a file of the store. Needs torch.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engines import registry
from mscompile import bench, codec, gate
from mscompile.contracts import Profile
from mscompile.errors import EngineUnavailable, GateFailed, MsCompileError, Refusal, UsageError
from mscompile.runtime import Bundle
from mscompile.sweep.plan import GRAPHS_ONLY, Cell, key_of, versions
from mscompile.sweep.result import Figures, Result, Status, Store
from validation.evidence import Validation
from validation.parity import ParityReport

Progress = Callable[[str, int, int], None]  # as of exports and benchmarks


@dataclass(frozen=True)
class Job:
    """What a cell's process is told."""

    cell: Cell
    store: str
    attempt: int
    cores: tuple[int, ...] = ()  # that it may use; all where none is named


class _Run:
    """A cell on its way; `stage` says how far it has come."""

    def __init__(self, job: Job, say: Callable[[str, str, int, int], None]) -> None:
        self.cell, self.store, self.stage, self._say = job.cell, Store(Path(job.store)), "export", say
        self.result = Result(job.cell.key, "passed", "done", final=True, attempts=job.attempt)

    def whole(self) -> Result:
        """Export, validate and measure; raises what those raise."""
        bundle = self._export()
        size = sum(entry.size_bytes for entry in bundle.manifest.files.values())
        self.result = replace(self.result, size_bytes=size, machine=bench.machine())
        if (reason := self._cannot_run()) is not None:
            return replace(self.result, status="built", reason=reason)
        self.stage = "validate"
        self._validate(bundle).raise_if_failed()
        self.stage = "bench"
        return replace(self.result, bench=self._bench(bundle))

    def _progress(self, what: str, done: int, total: int) -> None:
        self._say(self.stage, what, done, total)

    def _export(self) -> Bundle:
        from mscompile.pipeline import Options, compile_checkpoint

        cell, one, shape = self.cell, self.cell.checkpoint, self.cell.shape
        options = Options(
            family=one.family,
            precision=cell.precision,
            profile=Profile(shape.min_batch, shape.max_batch, shape.max_chunk),
            context=shape.context,
            text=Path(one.tokens) if one.tokens else None,
            steps=cell.steps,
            force=True,
            memory=shape.memory,
            adapter=one.adapter,
        )
        return compile_checkpoint(one.path, [cell.target], self.store.bundle(cell), options, self._progress)

    def _cannot_run(self) -> str | None:
        if self.cell.target == GRAPHS_ONLY:
            return "graphs only, without an engine"
        return registry.find(self.cell.target).cannot_run()

    def _validate(self, bundle: Bundle) -> Validation:
        """The golden rollouts of the finished bundle, and those of its export, by the limits of the plan."""
        limits = Path(self.cell.thresholds) if self.cell.thresholds else None
        found = gate.validate(bundle, limits=limits, progress=self._progress)
        exported = [codec.decode(ParityReport, report) for report in (bundle.manifest.parity or {}).values()]
        self.result = replace(self.result, parity=Figures.of(exported[0]))
        return replace(found, reports=(*found.reports, *(found.limits.gate(report) for report in exported)))

    def _bench(self, bundle: Bundle) -> dict[str, object] | None:
        asked = self.cell.bench
        if not asked.workloads:
            return None
        original = Path(self.cell.checkpoint.path) if asked.original and not self.cell.checkpoint.adapter else None
        report = bench.run(
            bundle.path, (), asked.workloads, original, asked.rounds, asked.samples, asked.batch, self._progress
        )
        encoded: dict[str, object] = codec.encode(report)
        return encoded


def run(job: Job, say: Callable[[str, str, int, int], None]) -> Result:
    """What came of the cell, whatever that is."""
    begun, one = time.monotonic(), _Run(job, say)
    try:
        _same_cell(job.cell)
        result = one.whole()
    except MsCompileError as error:
        status: Status = "unavailable" if isinstance(error, EngineUnavailable) else "failed"
        final = isinstance(error, GateFailed | Refusal)
        result = replace(one.result, status=status, stage=one.stage, reason=str(error), final=final)
    except Exception as error:  # noqa: BLE001 (a fault of one cell must not cost the others)
        said = (str(error).strip() or "no reason given").splitlines()[0]
        result = replace(
            one.result, status="failed", stage=one.stage, reason=f"{type(error).__name__}: {said}", final=False
        )
    return replace(result, seconds=time.monotonic() - begun)


def _same_cell(cell: Cell) -> None:
    """UsageError where this machine would compute another cell than the one that was planned."""
    here = socket.gethostname()
    if differing := _differences(dict(cell.versions), versions(cell.target)):
        raise UsageError(
            f"{here} has other versions than the machine that read the plan: {differing}; install the same"
        )
    if not Path(cell.checkpoint.path).exists():
        raise UsageError(f"{here} does not see {cell.checkpoint.path}; keep it where every machine does")
    if key_of(cell) != cell.key:
        raise UsageError(
            f"a file of the cell has changed since the plan was read, or is another one on {here}; run again"
        )


def _differences(planned: Mapping[str, str], here: Mapping[str, str]) -> str:
    names = sorted(planned.keys() | here.keys())
    pairs = {name: (here.get(name, "none"), planned.get(name, "none")) for name in names}
    return ", ".join(f"{name} {found}, not {wanted}" for name, (found, wanted) in pairs.items() if found != wanted)


def _end_with_the_parent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock a process forked by the export would find held for ever
    os._exit(1)


def main() -> None:
    job = codec.decode(Job, json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)  # runtimes take a thread for each core that they may use
    events, sys.stdout = sys.stdout, sys.stderr

    def say(stage: str, what: str, done: int, total: int) -> None:
        print(json.dumps({"stage": stage, "what": what, "done": done, "total": total}), file=events, flush=True)

    Store(Path(job.store)).save(job.cell, run(job, say))
    events.flush()
    os._exit(0)  # the thread that waits for the parent holds stdin


if __name__ == "__main__":
    main()
