"""The passes, in the order they run."""

from __future__ import annotations

from exporters.passes import fold
from exporters.passes.base import Pass

PASSES: tuple[Pass, ...] = (Pass(fold.NAME, fold.WHY, fold.apply),)
