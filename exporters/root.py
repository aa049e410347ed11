"""The streaming form of a whole model, from which graphs and the schedule are made."""

from __future__ import annotations

from torch import Tensor

from exporters.stream import Call, StreamModule, Ticks
from mscompile.contracts import HostInput, StateSpec
from mscompile.models.relative import Biases


class Root(StreamModule):
    """Embedding, streaming body, head.

    A root with a segment length has a graph `close` that ends each segment of that many tokens.
    """

    biases: Biases | None = None  # that all layers share
    segment: int | None = None
    ticks: Ticks = "begin"  # is a coarse row due at its first token, or at its last?
    parallel = True  # can many tokens be consumed in one call?
    bounded = False  # does memory grow with the stream, so that a context length bounds it?
    inputs: tuple[HostInput, ...] = ()  # what the host supplies: `call.given` of them

    def states(self) -> tuple[StateSpec, ...]:
        """Those of the modules, and the recent tokens that host inputs are asked for with."""
        found = (*super().states(), *(given.recent for given in self.inputs))
        return tuple(sorted(found, key=lambda state: state.name))

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V)."""
        raise NotImplementedError

    def close(self, call: Call) -> None:
        """End a segment. `call.position` is that of the last call in it, before its tokens."""
