"""A function in a process of its own, so that a runtime that crashes takes nothing else with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from mscompile.errors import EngineError

T = TypeVar("T")
Progress = Callable[[str, int, int], None]


class ProcessEnded(EngineError):
    """The process ended before it gave an answer."""


def call(function: Callable[..., T], *arguments: Any, progress: Progress = lambda *_: None) -> T:
    """`function(*arguments, progress)` in a fresh interpreter; what it raises is raised here.

    The function is one of a module, and arguments and results are what pickle takes. What the process writes to stdout
    goes to stderr. Raises ProcessEnded where it crashes.
    """
    context = multiprocessing.get_context("spawn")
    answers, out = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(out, function, arguments), daemon=True)
    process.start()
    out.close()  # so that the end of the process is the end of the pipe
    try:
        while True:
            kind, value = answers.recv()
            if kind == "progress":
                progress(*value)
            elif kind == "raised":
                raise value
            else:
                result: T = value
                return result
    except EOFError:
        process.join()
        raise ProcessEnded(f"the process that ran it ended with {_how(process.exitcode)}, without an answer") from None
    finally:
        answers.close()
        process.terminate()
        process.join()


def _serve(out: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        out.send(("returned", function(*arguments, lambda *told: out.send(("progress", told)))))
    except Exception as error:  # noqa: BLE001 (the caller raises it)
        out.send(("raised", error))


def _how(code: int | None) -> str:
    return f"code {code}" if code is None or code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
