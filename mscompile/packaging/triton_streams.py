"""The streams of a server: a session for each, by the id that its requests carry.

Sessions share the plan of the bundle, and a stream moves on only when it is asked to. A stream that was not asked for
longer than the idle limit is forgotten at the next beginning of another, so that clients that went away cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mscompile.contracts import Array, Session
from mscompile.errors import EngineError, InputError
from mscompile.runtime import Bundle

Id = int | str


@dataclass
class _Stream:
    session: Session
    asked_s: float  # when, by the clock


class Streams:
    """Sessions by id. Not for use by two threads at once."""

    def __init__(self, opened: Bundle, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bundle, self._idle_s, self._clock = opened, idle_s, clock
        self._streams: dict[Id, _Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def step(self, name: Id, tokens: Any, start: bool = False, end: bool = False) -> Array:
        """Consume tokens (1, T) of a stream; logits (1, T, vocab).

        `start` begins a new stream, whatever had this id; `end` forgets the stream once it has its logits. Raises
        InputError for a stream that was not begun, and for tokens that do not fit, with nothing consumed; EngineError
        if the engine fails, which ends the stream.
        """
        now = self._clock()
        if start:
            self._forget(now)
            self._streams[name] = _Stream(self._bundle.session(), now)
        if name not in self._streams:
            raise InputError(f"sequence {name!r} is not known here; begin it with the start flag")
        stream = self._streams[name]
        stream.asked_s = now
        try:
            return stream.session.step(tokens)
        except EngineError:
            end = True
            raise
        finally:
            if end:
                del self._streams[name]

    def _forget(self, now: float) -> None:
        idle = [name for name, stream in self._streams.items() if now - stream.asked_s > self._idle_s]
        for name in idle:
            del self._streams[name]
