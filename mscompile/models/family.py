"""What every model family offers to the rest of the project."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mscompile.contracts import HostInput, Sources
from mscompile.errors import ConfigError

LARGEST = 2**31 - 1  # of a setting that is a whole number


class ReferenceModel(nn.Module):
    """A trained model as published. `full` is what every stream must equal."""

    config: Any
    inputs: tuple[HostInput, ...] = ()  # what the model takes besides tokens
    sources: Sources = MappingProxyType({})  # where `full` gets it; set by whoever runs a model with inputs

    def full(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) that predict the token after each one of `tokens` (B, T), from an empty memory.

        This is the model's own forward, segment by segment where the model defines segments.
        """
        raise NotImplementedError

    def supplied(self, given: HostInput, tokens: Tensor) -> Tensor:
        """What the source says of the whole chunks of tokens (B, T): (B, T // every, *shape)."""
        batch, count = tokens.shape[0], tokens.shape[1] // given.every
        chunks = tokens[:, : count * given.every].reshape(batch * count, given.every)
        entries = torch.from_numpy(given.ask(self.sources, chunks.cpu().numpy()))
        return entries.reshape(batch, count, *given.shape).to(tokens.device)

    def advance(self, tokens: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        """Go on as the published code does: logits of `tokens` (B, T), and what the next call needs.

        Here, for models without incremental decoding, that is everything seen so far, run again.
        """
        seen = tokens if carry is None else torch.cat([carry, tokens], dim=1)
        return self.full(seen)[:, -tokens.shape[1] :], seen

    def select(self, carry: Any, rows: list[int]) -> Any:
        """The carry of some batch rows."""
        return carry[rows]


@dataclass(frozen=True)
class Family:
    """One row of the family table."""

    name: str
    title: str
    source: str  # the paper, and the public code whose semantics are followed
    config: type
    model: type[ReferenceModel]
    status: str = "verified"  # by the tests: any chunking, ONNX Runtime rolled out, TensorRT for RTX built

    def parse_config(self, values: dict[str, Any]) -> Any:
        """The family's configuration from plain values; unknown, missing and impossible ones are refused by name."""
        known = {field.name for field in fields(self.config)}
        if unknown := sorted(str(name) for name in values if name not in known):
            raise ConfigError(f"{self.name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        for name, value in values.items():
            for number in value if isinstance(value, list | tuple) else (value,):
                if isinstance(number, int) and abs(number) > LARGEST:
                    raise ConfigError(f"{name} must be at most 2^31 - 1, not a number of {number.bit_length()} bits")
        try:
            return self.config(**values)
        except TypeError as error:
            raise ConfigError(f"{self.name} configuration is incomplete: {error}") from error


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(config: Any, *names: str) -> None:
    """Every named setting is a whole number >= 1."""
    for name in names:
        value = getattr(config, name)
        require(
            isinstance(value, int) and not isinstance(value, bool) and value >= 1,
            f"{name} must be a whole number of at least 1, not {value!r}",
        )


def require_switch(config: Any, *names: str) -> None:
    """Every named setting is true or false."""
    for name in names:
        value = getattr(config, name)
        require(isinstance(value, bool), f"{name} must be true or false, not {value!r}")


def require_dropout(value: Any) -> None:
    """A probability, below 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(is_number and 0.0 <= value < 1.0, f"dropout must lie in [0, 1), not {value!r}")


def require_layers(name: str, given: Any, n_layer: int) -> None:
    """Layer numbers from 0, one at least, in rising order."""
    known = isinstance(given, list | tuple) and all(type(layer) is int and 0 <= layer < n_layer for layer in given)
    require(
        known and len(given) > 0 and list(given) == sorted(set(given)),
        f"{name} must be numbers from 0 to {n_layer - 1} in rising order, not {given!r}",
    )
