"""One method of a user's module as a graph."""

from __future__ import annotations

from torch import Tensor, nn

from mscompile.errors import Refusal
from mscompile.models.own import OwnModule


class AdaptedGraph(nn.Module):
    """One method as a graph: forward(tokens, position, *states by name) -> (logits, *new states by name).

    A closing graph takes and returns states only.
    """

    def __init__(self, model: OwnModule, method: str, closing: bool = False) -> None:
        super().__init__()
        self.module, self.method, self.closing = model.stepper, method, closing
        self.takes_position = model.adapter.position
        self.declared = tuple(state.name for state in model.adapter.states)  # in the order of the module's arguments
        self.names = tuple(sorted(self.declared))
        self.writes = self.names  # without those that the method only passes on, once that is known
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        head, states = ((), inputs) if self.closing else (inputs[:2], inputs[2:])
        given = dict(zip(self.names, states, strict=True))
        results = getattr(self.module, self.method)(
            *head[: 2 if self.takes_position else 1], *(given[name] for name in self.declared)
        )
        logits, new = ((), results) if self.closing else (results[:1], results[1:])
        if len(new) != len(self.declared):
            declared = ", ".join(self.declared) or "none"
            raise Refusal(
                f"{self.method} returned {len(new)} tensors{'' if self.closing else ' behind the logits'}, "
                f"wanted the new {declared}"
            )
        made = dict(zip(self.declared, new, strict=True))
        return (*logits, *(made[name] for name in self.writes))
