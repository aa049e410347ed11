"""A state dict under our names, from a table of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from mscompile.conversion.base import Foreign
from mscompile.errors import CheckpointError

Target = str | tuple[str, ...] | None
NAMES_SHOWN = 4


def renamed(foreign: Foreign, table: Mapping[str, Target]) -> dict[str, Tensor]:
    """The tensors under new names. `{}` in a name stands for a number.

    One name for several makes as many tensors of it, cut along the first axis; None leaves the tensor out.
    CheckpointError names the tensors that are in no row of the table.
    """
    rows = [(re.compile(re.escape(name).replace(r"\{\}", r"(\d+)")), target) for name, target in table.items()]
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in foreign.tensors.items():
        match = next(((hit, target) for row, target in rows if (hit := row.fullmatch(name))), None)
        if match is None:
            unknown.append(name)
        else:
            found.update(_cut(tensor, match[1], match[0].groups()))
    if unknown:
        more = f" and {len(unknown) - NAMES_SHOWN} more" if len(unknown) > NAMES_SHOWN else ""
        raise CheckpointError(
            f"{foreign.path}: no place is known for the tensors {', '.join(unknown[:NAMES_SHOWN])}{more}"
        )
    return found


def _cut(tensor: Tensor, target: Target, numbers: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(target, str):
        yield target.format(*numbers), tensor
    elif target is not None:
        if tensor.dim() == 0 or tensor.shape[0] % len(target):
            raise CheckpointError(f"a tensor of shape {tuple(tensor.shape)} cannot be cut into {len(target)}")
        parts = tensor.chunk(len(target))
        yield from ((name.format(*numbers), part) for name, part in zip(target, parts, strict=True))
