"""Cells in processes of this machine, some at a time, each on cores of its own.

A process that is killed costs its own cell only: the cell is tried once more, then marked as failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Queue

from mscompile import codec
from mscompile.sweep.plan import Cell
from mscompile.sweep.result import Result, Store

ATTEMPTS = 2
CORES_A_WORKER = 4  # of which an export makes good use


@dataclass(frozen=True)
class Event:
    """What a cell is at; with its result, the last of that cell."""

    cell: Cell
    what: str
    done: int = 0
    total: int = 0
    result: Result | None = None


class Running:
    """The cells' processes that run now, so that all of them can be ended."""

    def __init__(self) -> None:
        self._lock, self._children, self.ended = threading.Lock(), set[int](), False

    def start(self, command: Sequence[str], log: int) -> subprocess.Popen[str]:
        """In a session of its own: an interrupt from the terminal reaches the sweep, which then ends them in order."""
        with self._lock:
            if self.ended:
                raise InterruptedError
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
            self._children.add(child.pid)
            return child

    def forget(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self._children.discard(child.pid)

    def end(self) -> None:
        with self._lock:
            self.ended = True
            for pid in self._children:
                kill(pid)


def kill(pid: int) -> None:
    """A cell's process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def default_workers() -> int:
    return max(len(_cores()) // CORES_A_WORKER, 1)


def run(cells: Sequence[Cell], store: Store, workers: int) -> Generator[Event, None, None]:
    """Run the cells, `workers` at a time. When the iteration is left, whatever still runs is ended."""
    events: Queue[Event | Exception] = Queue()
    shares: Queue[tuple[int, ...]] = Queue()
    for share in _shares(workers):
        shares.put(share)
    running = Running()

    def work(cell: Cell) -> None:
        share = shares.get()
        try:
            told = lambda what, done, total: events.put(Event(cell, what, done, total))  # noqa: E731
            events.put(Event(cell, "done", result=attempt(cell, store, running, share, told)))
        except InterruptedError:
            pass
        except Exception as error:  # noqa: BLE001 (raised again where the events are read)
            events.put(error)
        finally:
            shares.put(share)

    pool = ThreadPoolExecutor(workers)
    try:
        for cell in cells:
            pool.submit(work, cell)
        left = len(cells)
        while left:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            left -= event.result is not None
            yield event
    finally:
        running.end()
        pool.shutdown(cancel_futures=True)


def attempt(
    cell: Cell,
    store: Store,
    running: Running,
    cores: Sequence[int] = (),
    told: Callable[[str, int, int], None] = lambda *_: None,
    first: int = 1,
) -> Result:
    """Run a cell in a process, again where that is killed; its result is in the store.

    `first` is the number of this attempt, where others were lost with what made them.

    Raises InterruptedError where `running` was ended.
    """
    reason = ""
    for number in range(first, ATTEMPTS + 1):
        told("starting" if number == 1 else "starting again", 0, 0)
        code, timed_out = _process(cell, store, running, number, cores, told)
        if running.ended:
            raise InterruptedError
        if code == 0 and (result := store.load(cell)) is not None:
            return result
        log = store.log(cell)
        if timed_out:
            reason = f"not done after {cell.timeout_s} s; raise timeout_s in the plan, or see {log}"
            break
        reason = f"its process {_ended(code)}, after {number} attempts; see {log}"
    result = Result(cell.key, "failed", "process", reason, attempts=number)
    store.save(cell, result)
    return result


def _process(
    cell: Cell,
    store: Store,
    running: Running,
    number: int,
    cores: Sequence[int],
    told: Callable[[str, int, int], None],
) -> tuple[int, bool]:
    """Exit code of one process for the cell, and whether its time was up."""
    job = {"cell": codec.encode(cell), "store": str(store.path), "attempt": number, "cores": list(cores)}
    with store.log(cell).open("w") as log:
        child = running.start([sys.executable, "-m", "mscompile.sweep.cell"], log.fileno())
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        kill(child.pid)

    clock = threading.Timer(cell.timeout_s, stop)
    clock.daemon = True
    clock.start()
    stdin, stdout = child.stdin, child.stdout
    assert stdin is not None
    assert stdout is not None
    try:
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
        for said in stdout:
            with suppress(ValueError, KeyError, TypeError):  # what native libraries print is for no one
                event = json.loads(said)
                told(f"{event['stage']}: {event['what']}", event["done"], event["total"])
        return child.wait(), timed_out.is_set()
    finally:
        clock.cancel()
        if child.poll() is None:
            kill(child.pid)
            child.wait()
        running.forget(child)
        with suppress(BrokenPipeError):
            stdin.close()
        stdout.close()


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (", as it is where memory runs out" if name == "SIGKILL" else "")


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _shares(workers: int) -> list[tuple[int, ...]]:
    """The cores of each worker; more workers than cores share some."""
    cores = _cores()
    size = max(len(cores) // workers, 1)
    return [tuple(cores[(number * size + i) % len(cores)] for i in range(size)) for number in range(workers)]
