"""Checkpoints of other projects: what was read, what is made of it, and who knows how.

Each file beside this one knows one project. `table.py` lists them; `mscompile.checkpoint` asks each in turn whether
it recognises what was read, and takes the answer of the first that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mscompile.errors import CheckpointError


@dataclass(frozen=True)
class Foreign:
    """A checkpoint as it lies in its file. Nothing of it is trusted yet."""

    path: Path
    tensors: Mapping[str, Tensor]  # the state dict, without a "module." that a parallel wrapper left
    config: Mapping[str, Any]  # settings stored beside the tensors, or in a .json file beside the checkpoint
    vocab: tuple[str, ...] = ()  # the text of every token, where one is stored
    files: tuple[Path, ...] = ()  # that all this was read from

    def setting(self, *names: str) -> Any:
        """The first of these settings that there is. CheckpointError says where it is looked for."""
        for name in names:
            if name in self.config:
                return self.config[name]
        raise CheckpointError(
            f"{self.path}: the setting {names[0]!r} cannot be told from the tensors; save it with them, as "
            f'{{"config": {{{names[0]!r}: ...}}, "state_dict": ...}}, or beside them in {self.path.stem}.json'
        )

    def layers(self, pattern: str) -> int:
        """How many layers there are: names that start with `pattern`, whose {} stands for 0, 1, 2 and so on."""
        count = 0
        while any(name.startswith(pattern.format(count)) for name in self.tensors):
            count += 1
        return count


@dataclass(frozen=True)
class Converted:
    """The same model as a checkpoint of one of our families."""

    family: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    vocab: Sequence[str] = ()  # the text of every token, where that is known


@dataclass(frozen=True)
class Source:
    """A project whose checkpoints are known."""

    name: str
    recognises: Callable[[Foreign], bool]
    convert: Callable[[Foreign], Converted]
