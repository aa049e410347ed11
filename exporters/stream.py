"""The vocabulary of streaming modules: Scope, Call, StreamModule, Rule.

A rule turns a module of a reference model into a StreamModule: the same weights and arithmetic, but rows seen
earlier come from declared states instead of from the same call. Streaming modules run in eager PyTorch, where
the chunking properties are tested in FP64, and are traced into ONNX graphs as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mscompile.contracts import BATCH, Hit, HostInput, StateSpec
from mscompile.errors import Refusal
from mscompile.models.relative import Biases

T = TypeVar("T")
Update = Literal["replace", "append"]
Ticks = Literal["begin", "end"]


@dataclass(frozen=True)
class Scope:
    """Where in the model a module stands."""

    name: str
    factor: int  # tokens per row at this scale
    context: int | None  # longest stream in tokens, where memory grows with the stream
    dtype: torch.dtype
    rules: tuple[Rule, ...]
    hits: list[Hit]

    def child(self, name: str, factor: int | None = None) -> Scope:
        joined = f"{self.name}.{name}" if self.name else name
        return replace(self, name=joined, factor=factor or self.factor)

    def state(
        self,
        name: str,
        *shape: int,
        update: Update = "replace",
        time_axis: int = 1,
        dtype: torch.dtype | None = None,
        initial: float | tuple[float, ...] = 0.0,
    ) -> StateSpec:
        """A state of this module: `shape` without the batch axis, which comes first; the model's dtype by default."""
        kind = str(dtype or self.dtype).removeprefix("torch.")
        axis = time_axis if update == "append" else None
        return StateSpec(f"{self.name}.{name}".lstrip("."), kind, (BATCH, *shape), update, axis, initial=initial)

    def rows(self, factor: int) -> int:
        """Rows of `factor` tokens that the longest stream has."""
        if self.context is None:
            raise Refusal(f"{self.name}: this memory grows with the stream, so a context length must be given")
        return -(-self.context // factor)

    def stream(self, module: nn.Module, name: str, factor: int | None = None) -> Any:
        """The streaming form of `module`, by the first rule that matches."""
        scope = self.child(name, factor)
        for rule in self.rules:
            if rule.matches(module):
                streaming = rule.stream(module, scope)
                self.hits.append(Hit(rule.name, scope.name or "model", True, rule.why))
                return streaming
        raise Refusal(
            f"{scope.name or 'model'}: no rule streams a {type(module).__name__}; `mscompile rules` lists what is "
            "streamed, and an adapter takes modules of your own"
        )


class Rule(Protocol):
    """One way to stream one kind of module."""

    @property
    def name(self) -> str: ...

    @property
    def why(self) -> str: ...

    def matches(self, module: nn.Module) -> bool: ...

    def stream(self, module: Any, scope: Scope) -> StreamModule: ...


class Call:
    """One call of one graph: the position, the states read and written, and which scales are due.

    `single` is true for a graph that consumes one token; `due(factor)` says whether a row of `factor` tokens
    begins in this call, or ends in it where the model's `ticks` say "end". Multi-token calls start at a multiple
    of the period, so there everything is due.
    """

    def __init__(
        self,
        position: Tensor,
        states: Mapping[str, Tensor],
        biases: Biases | None = None,
        single: bool = True,
        due: Callable[[int], bool] = lambda _: True,
        ticks: Ticks = "begin",
        supplied: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.single = single
        self.due = due
        self._supplied = supplied or {}
        self._position, self._states, self._biases, self._ticks = position, states, biases, ticks
        self._shared: dict[Hashable, Any] = {}
        self.takes: set[str] = set()  # host inputs
        self.reads: set[str] = set()
        self.reads_position = False
        self.written: dict[str, Tensor] = {}

    @property
    def position(self) -> Tensor:
        """Tokens consumed before this call, (B,)."""
        self.reads_position = True
        return self._position

    @property
    def biases(self) -> Biases:
        assert self._biases is not None, "this model has no biases that all layers share"
        return self._biases

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What several modules of one call need, computed by the first of them."""
        if key not in self._shared:
            self._shared[key] = compute()
        value: T = self._shared[key]
        return value

    def rows_before(self, factor: int) -> Tensor:
        """Rows of `factor` tokens that began before this call, or ended where `ticks` say "end", (B,)."""
        if factor == 1:
            return self.position
        begun = 0 if self._ticks == "end" else factor - 1
        return self.once(("rows before", factor), lambda: (self.position + begun) // factor)

    def given(self, entry: HostInput) -> Tensor:
        """What the host supplies for the chunks that this call completes, (B, chunks, *shape)."""
        self.takes.add(entry.name)
        return self._supplied[entry.name]

    def read(self, state: StateSpec) -> Tensor:
        self.reads.add(state.name)
        return self._states[state.name]

    def write(self, state: StateSpec, value: Tensor) -> None:
        """The new value of a replaced state, or the new rows of an appended one."""
        self.written[state.name] = value


class StreamModule(nn.Module):
    """A module whose memory is declared: `own_states` are its states, children declare theirs."""

    own_states: tuple[StateSpec, ...] = ()
    factors: tuple[int, ...] = ()  # scales coarser than the caller's at which this module ticks

    def declared(self) -> Iterable[StreamModule]:
        return (module for module in self.modules() if isinstance(module, StreamModule))

    def states(self) -> tuple[StateSpec, ...]:
        """All states below here, in order of their names."""
        found = (state for module in self.declared() for state in module.own_states)
        return tuple(sorted(found, key=lambda state: state.name))

    def all_factors(self) -> tuple[int, ...]:
        return tuple(sorted({factor for module in self.declared() for factor in module.factors}))


@dataclass(frozen=True)
class TypeRule:
    """A rule that matches modules of one type, optionally under a condition."""

    name: str
    why: str
    type: type[nn.Module]
    build: Callable[[Any, Scope], StreamModule]
    condition: Callable[[Any], bool] = lambda _: True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.type) and self.condition(module)

    def stream(self, module: Any, scope: Scope) -> StreamModule:
        return self.build(module, scope)
