"""The projects whose checkpoints are known, in the order they are asked."""

from __future__ import annotations

from mscompile.conversion.base import Source

SOURCES: tuple[Source, ...] = ()
