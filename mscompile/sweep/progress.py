"""What a sweep is at, on stderr: a bar and a line a running cell where that is a terminal, a line a finished cell
everywhere.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mscompile.sweep.local import Event
from mscompile.sweep.plan import Cell
from mscompile.sweep.result import Result

COLOURS = {"passed": "green", "built": "cyan", "failed": "red", "unavailable": "yellow"}


class Board:
    """Shows events as they come."""

    def __init__(self, total: int) -> None:
        self._console, self._done, self._total = Console(stderr=True), 0, total
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._all = self._bars.add_task("cells", total=total)
        self._cells: dict[Cell, TaskID] = {}

    def __enter__(self) -> Board:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if kind is KeyboardInterrupt:
            self._console.print(
                f"stopped with {self._done} of {self._total} cells done; the same command goes on from there",
                highlight=False,
            )

    def resumed(self, cell: Cell, result: Result) -> None:
        self._finish(cell, result, "as before")

    def show(self, event: Event) -> None:
        if event.result is not None:
            again = f", attempt {event.result.attempts}" if event.result.attempts > 1 else ""
            self._finish(event.cell, event.result, f"{event.result.seconds:.0f} s{again}")
            return
        if event.cell not in self._cells:
            self._cells[event.cell] = self._bars.add_task("", total=None)
        words = f"{escape(event.cell.label)}: {escape(event.what)}"
        self._bars.update(self._cells[event.cell], description=words, completed=event.done, total=event.total or None)

    def _finish(self, cell: Cell, result: Result, beside: str) -> None:
        if (bar := self._cells.pop(cell, None)) is not None:
            self._bars.remove_task(bar)
        self._bars.advance(self._all)
        self._done += 1
        word = f"[{COLOURS[result.status]}]{result.status}[/]"
        reason = f": {escape(result.reason)}" if result.reason else ""
        self._console.print(f"{word} {escape(cell.label)} ({beside}){reason}", soft_wrap=True, highlight=False)
