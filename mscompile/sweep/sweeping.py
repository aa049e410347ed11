"""A whole sweep: what is finished stays, the rest is run, and one outcome says all."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mscompile import codec
from mscompile.errors import EngineUnavailable, GateFailed
from mscompile.sweep import local, ray_cluster
from mscompile.sweep.local import Event
from mscompile.sweep.plan import Cell, Plan
from mscompile.sweep.result import Result, Store


class Watcher(Protocol):
    """Whoever is told what happens."""

    def resumed(self, cell: Cell, result: Result) -> None: ...
    def show(self, event: Event) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """Every cell of a plan with what came of it, in the order of the plan."""

    plan: str
    out: str
    cells: tuple[tuple[Cell, Result], ...]
    resumed: int  # cells that were finished before

    @property
    def failed(self) -> list[tuple[Cell, Result]]:
        return [(cell, result) for cell, result in self.cells if result.status == "failed"]

    @property
    def verdict(self) -> str:
        """One sentence: `12 cells: 9 passed, 2 built only, 1 failed`."""
        words = {"passed": "passed", "built": "built only", "failed": "failed", "unavailable": "unavailable"}
        counts = {status: sum(result.status == status for _, result in self.cells) for status in words}
        found = ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])
        before = f"; {self.resumed} from before" if self.resumed else ""
        return f"{len(self.cells)} cells: {found}{before}"

    def to_json(self) -> dict[str, Any]:
        cells = [
            {"label": cell.label, "id": cell.id, "cell": codec.encode(cell), "result": codec.encode(result)}
            for cell, result in self.cells
        ]
        return {"passed": not self.failed, "verdict": self.verdict, "out": self.out, "cells": cells}

    def raise_if_failed(self) -> None:
        """GateFailed where a cell failed; EngineUnavailable where nothing could even be built."""
        if self.failed:
            cell, result = self.failed[0]
            more = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
            raise GateFailed(f"{cell.label} failed: {result.reason}{more}")
        if all(result.status == "unavailable" for _, result in self.cells):
            raise EngineUnavailable(f"nothing could run: {self.cells[0][1].reason}")


def run(plan: Plan, out: Path, watcher: Watcher, workers: int | None = None, ray: str | None = None) -> Outcome:
    """Run what is not finished, on this machine or on a Ray cluster; every result is on disk as soon as it is there."""
    store = Store(out.resolve())
    store.open()
    results = {cell: found for cell in plan.cells if (found := store.finished(cell)) is not None}
    for cell, result in results.items():
        watcher.resumed(cell, result)
    resumed, rest = len(results), [cell for cell in plan.cells if cell not in results]
    if rest:
        if ray is not None:
            events = ray_cluster.run(rest, store, ray)
        else:
            events = local.run(rest, store, min(workers or local.default_workers(), len(rest)))
        with closing(events):  # ends what runs, however this loop is left
            for event in events:
                watcher.show(event)
                if event.result is not None:
                    results[event.cell] = event.result
    return Outcome(plan.path.name, str(store.path), tuple((cell, results[cell]) for cell in plan.cells), resumed)
