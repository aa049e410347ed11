"""What tests run in processes of their own, where a function is found by the name of its module."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from mscompile.errors import UsageError

Progress = Callable[[str, int, int], None]


def answers(value: int, progress: Progress) -> int:
    print("what a library says")  # which must not reach the caller's stdout
    progress("half", 1, 2)
    return value


def refuses(*_: Any) -> None:
    raise UsageError("not like this")


def crashes(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def ends(*_: Any) -> None:
    os._exit(7)
