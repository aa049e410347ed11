"""Independent pieces of work in forked processes, one a processor.

A forked process shares its parent's memory until one of them writes, so weights are not copied, and what it runs
need not be picklable. It ends when its parent does, however that ends. Where a process cannot do its work, the
caller is told and does the work itself, which shows the error where it belongs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Running = dict[Connection[bytes, bytes], tuple[str, ForkProcess]]


def run(names: Sequence[str], work: Callable[[str], bytes], begins: Callable[[str], None]) -> dict[str, bytes]:
    """`work(name)` of every name whose process ended well; no name at all where processes gain nothing.

    `begins` is told each name when its process starts.
    """
    jobs = min(len(names), processors())
    if jobs < 2 or sys.platform != "linux" or multiprocessing.current_process().daemon:
        return {}  # elsewhere system libraries do not survive a fork, and daemons may have no children
    waiting, running, done = list(names), _Children(work), dict[str, bytes]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                begins(waiting[0])
                running.start(waiting.pop(0))
            done |= running.ended()
    finally:
        running.stop()
    return done


def processors() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Children:
    """Forked processes at work. Each watches a pipe that ends with this process."""

    def __init__(self, work: Callable[[str], bytes]) -> None:
        self._work = work
        self._running: Running = {}
        self._watched, self._held = os.pipe()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, name: str) -> None:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=self._child, args=(name, sender), daemon=True)
        with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads: no lock is shared with them here
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        sender.close()
        self._running[receiver] = (name, process)

    def ended(self) -> dict[str, bytes]:
        """Results of processes that have ended since; waits for one."""
        results = {}
        for receiver in wait(list(self._running)):
            assert isinstance(receiver, Connection)
            name, process = self._running.pop(receiver)
            with receiver, suppress(EOFError):  # it failed
                results[name] = receiver.recv_bytes()
            process.join()
        return results

    def stop(self) -> None:
        for receiver, (_, process) in self._running.items():
            process.kill()
            process.join()
            receiver.close()
        os.close(self._watched)
        os.close(self._held)

    def _child(self, name: str, sender: Connection[bytes, bytes]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends this process
        os.close(self._held)
        threading.Thread(target=self._end_with_the_parent, daemon=True).start()
        try:
            result = self._work(name)
        except Exception:  # noqa: BLE001 (the parent does the work again, and raises this)
            os._exit(1)
        sender.send_bytes(result)

    def _end_with_the_parent(self) -> None:
        os.read(self._watched, 1)
        os._exit(1)
