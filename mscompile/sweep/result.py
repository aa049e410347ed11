"""What came of a cell, and the directory that keeps it: cells/ID.json, bundles/ID.msc and logs/ID.log."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mscompile import codec
from mscompile.atomic import MARKER, explained, write_text
from mscompile.sweep.plan import Cell
from validation.parity import ParityReport

Status = Literal["passed", "built", "failed", "unavailable"]


@dataclass(frozen=True)
class Figures:
    """Parity over all rollouts against the original."""

    tokens: int
    logit_max_abs: float
    argmax_agreement: float
    kl: float  # nats per token, of the worst rollout
    perplexity_loss: float | None

    @classmethod
    def of(cls, report: ParityReport) -> Figures:
        logits = [tensor for tensor in report.tensors if tensor.tensor == "logits"]
        return cls(
            sum(tensor.tokens for tensor in logits),
            report.logit_max_abs,
            report.argmax_agreement,
            max((tensor.kl or 0.0 for tensor in logits), default=0.0),
            report.perplexity.loss if report.perplexity else None,
        )


@dataclass(frozen=True)
class Result:
    """What came of one cell.

    passed: within its gates, and measured. built: this machine cannot run the engine. failed: a gate, a refusal, or
    its process ended early. unavailable: the engine cannot be built here. `final` ones are not run again.
    """

    key: str
    status: Status
    stage: str  # where it ended: "export", "validate", "bench" or "done"
    reason: str | None = None
    final: bool = False
    seconds: float = 0.0
    attempts: int = 1
    size_bytes: int = 0  # of the bundle
    parity: Figures | None = None
    bench: dict[str, Any] | None = None  # as `mscompile bench --json` says it
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Store:
    """The directory of a sweep."""

    path: Path

    def bundle(self, cell: Cell) -> Path:
        return self.path / "bundles" / f"{cell.id}.msc"

    def log(self, cell: Cell) -> Path:
        return self.path / "logs" / f"{cell.id}.log"

    def open(self) -> None:
        """Make what is missing. Raises UsageError where that cannot be."""
        with explained(f"cannot write {self.path}"):
            for name in ("bundles", "cells", "logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)

    def save(self, cell: Cell, result: Result) -> None:
        """All of it or nothing, whatever happens meanwhile."""
        write_text(self._file(cell), json.dumps(codec.encode(result), indent=1))

    def load(self, cell: Cell) -> Result | None:
        """What was saved of exactly this cell; None where nothing was, or nothing that can be read."""
        try:
            result = codec.decode(Result, json.loads(self._file(cell).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        return result if result.key == cell.key else None

    def finished(self, cell: Cell) -> Result | None:
        """The result that stands, with its bundle where it has one."""
        result = self.load(cell)
        if result is None or not result.final:
            return None
        kept = result.status == "failed" or (self.bundle(cell) / MARKER).is_file()
        return result if kept else None

    def _file(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.id}.json"
