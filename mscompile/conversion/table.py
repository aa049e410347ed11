"""The projects whose checkpoints are known, in the order they are asked."""

from __future__ import annotations

from mscompile.conversion import (
    compressive_pytorch,
    hourglass_pytorch,
    kimiyoung,
    megabyte_pytorch,
    nvidia,
    recurrent_memory_pytorch,
    transfo_xl,
    xlnet,
)
from mscompile.conversion.base import Source

SOURCES: tuple[Source, ...] = (
    kimiyoung.SOURCE,
    nvidia.SOURCE,
    transfo_xl.SOURCE,
    xlnet.SOURCE,
    hourglass_pytorch.SOURCE,
    compressive_pytorch.SOURCE,
    megabyte_pytorch.SOURCE,
    recurrent_memory_pytorch.SOURCE,
)
