"""A user's own module: what an adapter declares about it, and how it serves as a reference model.

An adapter is a Python file, or an entry point of the group `mscompile.adapters`, with a function `build(weights)`
that takes the path of the weights and returns the module, or an `Adapter` around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mscompile.contracts import BATCH, StateSpec, Tick
from mscompile.errors import Refusal
from mscompile.models.family import ReferenceModel

CONTEXT = 512  # tokens, for modules that remember nothing and so are given the whole stream


def state(
    name: str,
    *shape: int,
    dtype: str | torch.dtype = "float32",
    initial: float | tuple[float, ...] = 0.0,
    update: Literal["replace", "append"] = "replace",
    time_axis: int | None = None,
) -> StateSpec:
    """A remembered tensor (batch, *shape). `StateSpec` itself allows batch on another axis.

    An appended state holds `shape[time_axis - 1]` rows, of which a call returns the new ones only. Raises Refusal
    where an appended state names no time axis.
    """
    if update == "append" and time_axis is None:
        raise Refusal(f"state {name} is appended to and needs time_axis=, the axis of its rows; batch is axis 0")
    return StateSpec(name, str(dtype).removeprefix("torch."), (BATCH, *shape), update, time_axis, initial=initial)


@dataclass(frozen=True)
class Adapter:
    """What mscompile must know of a module.

    Where its memory is, one of:
    `states`    in the arguments: forward(tokens (B, T), *states) -> (logits (B, T, V), *new states), in this order
    `buffers`   in these buffers, (1 or B, ...) each, which forward(tokens) -> logits changes; their values when the
                adapter is built are those of a new stream
    neither     nowhere: forward(tokens) -> logits is causal and is given the whole stream so far, `context` tokens

    `position`  forward takes the position (B,), int64, behind the tokens
    `context`   the longest stream, in tokens, where there is a limit
    `ticks`     for multi-rate modules: which methods of the module consume which token. Each has the signature
                of forward; `closing` ones take and return states only
    `prefill`   the method that consumes many tokens at once, from a multiple of the period on; by default forward
                where `ticks` are not given. None: there is none
    `full`      (B, T) -> (B, T, V), the module's own forward over whole streams, which the engine must equal; by
                default the module itself, called token by token. Must be given with `ticks`
    `vocab`     the text of every token, for `generate` and for parity on real text
    """

    module: nn.Module
    states: Sequence[StateSpec] = ()
    buffers: Sequence[str] = ()
    position: bool = False
    context: int | None = None
    ticks: Sequence[Tick] = ()
    prefill: str | None = "forward"
    full: Callable[[Tensor], Tensor] | None = None
    vocab: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.states and self.buffers:
            raise Refusal("an adapter declares its memory as states or as buffers, not both")
        if self.ticks and self.full is None:
            raise Refusal("an adapter with ticks needs full=, the module's forward over whole streams, to compare with")
        if self.ticks and not self.states:
            raise Refusal("an adapter with ticks needs states, in the arguments of the methods that its ticks name")


class Buffered(nn.Module):
    """Memory in buffers -> memory in arguments: forward(tokens, [position], *values) -> (logits, *new values)."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)
        known = dict(module.named_buffers())
        if unknown := [name for name in self.names if name not in known]:
            raise Refusal(f"the module has no buffer {unknown[0]}; it has {', '.join(sorted(known)) or 'none'}")
        self.states = tuple(_of_buffer(name, known[name]) for name in self.names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        head, values = inputs[: len(inputs) - len(self.names)], inputs[len(inputs) - len(self.names) :]
        owners = [self.module.get_submodule(name.rpartition(".")[0]) for name in self.names]
        places = [(owner, name.rpartition(".")[2]) for owner, name in zip(owners, self.names, strict=True)]
        before = [getattr(owner, key) for owner, key in places]
        try:
            for (owner, key), value in zip(places, values, strict=True):
                setattr(owner, key, value.clone())  # which forward may change in place
            logits = self.module(*head)
            new = [getattr(owner, key) for owner, key in places]
        finally:
            for (owner, key), value in zip(places, before, strict=True):
                setattr(owner, key, value)
        return (logits, *new)


def _of_buffer(name: str, value: Tensor) -> StateSpec:
    if not value.ndim:
        raise Refusal(f"buffer {name} is one number; a state has a batch axis: make it (1,), or (1, ...)")
    row = value[0].detach().reshape(-1).tolist()
    initial = float(row[0]) if len(set(row)) == 1 else tuple(float(number) for number in row)
    return StateSpec(name, str(value.dtype).removeprefix("torch."), (BATCH, *value.shape[1:]), initial=initial)


class History(nn.Module):
    """A module without memory, given the whole stream: forward(tokens, position, history) -> (logits, tokens).

    `history` (B, context) holds the tokens so far. What is behind the newest token is 0, which a causal module
    does not see.
    """

    def __init__(self, module: nn.Module, context: int) -> None:
        super().__init__()
        self.module, self.context = module, context
        self.states = (StateSpec("history", "int64", (BATCH, context), "append", 1),)

    def forward(self, tokens: Tensor, position: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        slot = torch.arange(history.shape[1], device=tokens.device)[None]
        since = slot - position[:, None]  # of this call's first token
        last = tokens.new_zeros(tokens.shape) + torch.arange(tokens.shape[1], device=tokens.device)
        count = last[:, -1:] + 1
        new = tokens.gather(1, since.clamp(min=0).minimum(count - 1))
        stream = torch.where(since < 0, history, torch.where(since < count, new, 0))
        logits = self.module(stream)
        rows = (position[:, None] + last)[:, :, None].expand(-1, -1, logits.shape[2])
        return logits.gather(1, rows), tokens.clone()


@dataclass(frozen=True)
class OwnConfig:
    """What is known of a user's module: the vocabulary, found by a call, and the longest stream."""

    vocab_size: int
    context: int | None


class OwnModule(ReferenceModel):
    """A user's module as a reference model, its memory in arguments, whatever it was."""

    def __init__(self, adapter: Adapter, context: int | None = None) -> None:
        super().__init__()
        self.stepper, declared = _explicit(adapter, context or adapter.context)
        self.adapter = replace(adapter, **declared)
        self.eval().requires_grad_(False)
        self.config = OwnConfig(self._vocab_size(), self.adapter.context)

    def _vocab_size(self) -> int:
        if self.adapter.ticks:
            given = self.adapter.full(torch.zeros(1, 1, dtype=torch.int64)) if self.adapter.full else None
            return int(given.shape[-1]) if given is not None else 0
        with torch.inference_mode():
            logits, *_ = self.call(torch.zeros(1, 1, dtype=torch.int64), 0, self.initial(1))
        return int(logits.shape[-1])

    def initial(self, batch: int) -> list[Tensor]:
        """The states of new streams."""
        return [torch.from_numpy(state.initial_value(batch)) for state in self.adapter.states]

    def call(self, tokens: Tensor, position: int, states: Sequence[Tensor], method: str = "forward") -> Any:
        """One call of the module, on copies of the states. Raises Refusal where it fails."""
        head = (tokens, torch.full((len(tokens),), position)) if self.adapter.position else (tokens,)
        try:
            return getattr(self.stepper, method)(*head, *(value.clone() for value in states))
        except Refusal:
            raise
        except Exception as error:
            given = ", ".join(str(tuple(value.shape)) for value in states) or "none"
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            takes = "tokens, position, *states" if self.adapter.position else "tokens, *states"
            raise Refusal(
                f"{method} failed for tokens {tuple(tokens.shape)} and states {given}: {reason}; "
                f"{method}({takes}) must take what the adapter declares"
            ) from error

    def full(self, tokens: Tensor) -> Tensor:
        if self.adapter.full is not None:
            return self.adapter.full(tokens)
        return self.advance(tokens)[0]

    def advance(self, tokens: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        if self.adapter.full is not None:
            return super().advance(tokens, carry)
        position, states = carry or (0, self.initial(len(tokens)))
        logits = []
        for step in range(tokens.shape[1]):
            new_logits, *new = self.call(tokens[:, step : step + 1], position + step, states)
            states = [
                kept(state, old, rows, position + step)
                for state, old, rows in zip(self.adapter.states, states, new, strict=True)
            ]
            logits.append(new_logits)
        return torch.cat(logits, dim=1), (position + tokens.shape[1], states)

    def select(self, carry: Any, rows: list[int]) -> Any:
        if self.adapter.full is not None:
            return super().select(carry, rows)
        index = torch.tensor(rows)
        declared = zip(self.adapter.states, carry[1], strict=True)
        return carry[0], [value.index_select(state.batch_axis, index) for state, value in declared]


def _explicit(adapter: Adapter, context: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The module with its memory in arguments, and what of the declaration that changes."""
    if adapter.buffers:
        buffered = Buffered(adapter.module, adapter.buffers)
        return buffered, {"states": buffered.states, "buffers": (), "context": context}
    if adapter.states:
        return adapter.module, {"context": context}
    history = History(adapter.module, context or CONTEXT)
    full = adapter.full or (lambda tokens: adapter.module(tokens))
    changed = {"states": history.states, "position": True, "context": history.context, "full": full}
    return history, changed


def kept(state: StateSpec, old: Tensor, new: Tensor, position: int) -> Tensor:
    """What a host makes of a result: the new value, or the old one with its new rows in their slots."""
    if state.update != "append" or state.time_axis is None:
        return new
    rows = position + torch.arange(new.shape[state.time_axis])
    return old.index_copy(state.time_axis, rows % old.shape[state.time_axis], new)
