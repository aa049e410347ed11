"""The two runtimes, TensorRT and TensorRT for RTX, as Python modules: importing one, its log and its errors."""

from __future__ import annotations

import importlib
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engines.cuda import devices
from mscompile.errors import EngineError, EngineUnavailable

Runtime = Any  # the module tensorrt or tensorrt_rtx; neither has type information
Native = Any  # an object that such a module made
Cuda = Any  # the module cuda.bindings.runtime

_INSTEAD = "the engine 'ort' runs on this machine"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """One of the two runtimes."""

    module: str  # to import
    title: str  # in messages
    extra: str  # of mscompile, which installs it

    @property
    def distribution(self) -> str:
        """What pip calls it."""
        return self.module.replace("_", "-")

    def load(self) -> Runtime:
        """The runtime's module; EngineUnavailable where it does not import."""
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as cause:
            if cause.name != self.module:
                raise EngineUnavailable(f"{self.title} is installed but does not import: {cause}") from cause
            raise EngineUnavailable(f"{self.title} is not installed: pip install 'mscompile[{self.extra}]'") from cause
        except (ImportError, OSError) as cause:
            raise EngineUnavailable(f"{self.title} is installed but does not import: {cause}") from cause

    def missing(self) -> str | None:
        """Why `load` would fail."""
        try:
            self.load()
        except EngineUnavailable as error:
            return str(error)
        return None

    def cuda(self) -> Cuda:
        """The CUDA runtime's bindings, which the executor needs; EngineUnavailable where they are not installed."""
        try:
            return importlib.import_module("cuda.bindings.runtime")
        except ImportError as cause:
            raise EngineUnavailable(f"cuda-bindings is not installed: pip install 'mscompile[{self.extra}]'") from cause

    def cannot_run(self) -> str | None:
        """What is missing here to run its engines, and what works instead."""
        try:
            devices()
        except EngineUnavailable as error:
            return f"{self.title} engines run on an NVIDIA GPU only: {error}; {_INSTEAD}"
        try:
            self.load()
            self.cuda()
        except EngineUnavailable as error:
            return f"{error}; {_INSTEAD}"
        return None


# The parser says this of every INT64 input, as advice to hosts that would bind INT32 buffers. Tokens and
# positions are int64 in the spec, and the executor binds them as that, so it is no news.
_EXPECTED = re.compile(r"Make sure (in|out)put \S+ has Int64 binding")
_LOGS: dict[str, Any] = {}
LOG_IN_USE = threading.RLock()  # the log is shared: without this, messages of two threads would mix


def messages(runtime: Runtime) -> Any:
    """The one log of a runtime module: it ignores a second one while objects of the first are alive.

    `take()` returns the errors and the unexpected warnings since the last call.
    """
    if runtime.__name__ in _LOGS:
        return _LOGS[runtime.__name__]

    class Log(runtime.ILogger):  # type: ignore[misc]  # its base has no type information
        def __init__(self) -> None:
            runtime.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity == runtime.ILogger.Severity.WARNING and not _EXPECTED.search(msg):
                _log.warning("%s: %s", runtime.__name__, msg)
                self.warnings.append(msg.strip())
            elif severity in (runtime.ILogger.Severity.ERROR, runtime.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg.strip())

        def take(self) -> tuple[list[str], list[str]]:
            taken = (self.errors, self.warnings)
            self.errors, self.warnings = [], []
            return taken

    _LOGS[runtime.__name__] = Log()
    return _LOGS[runtime.__name__]


@contextmanager
def boundary(doing: str) -> Iterator[None]:
    """What the bindings raise, as an EngineError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, OSError) as cause:
        raise EngineError(f"{doing}: {cause}") from cause


def refusal(what: str, log: Any) -> str:
    """`what` with the errors that the runtime logged about it."""
    errors = log.take()[0]
    return f"{what}: {'; '.join(errors) if errors else 'it gives no reason'}"
