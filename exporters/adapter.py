"""Any PyTorch module with its memory in arguments -> stream program and graphs.

Given                                                        Becomes
  forward(tokens, *states) -> (logits, *new states)            graph `decode`   one token
  tokens (B, T), a StateSpec for each state                    graph `prefill`  many tokens, where it is exact

The module may take `position` behind the tokens. What a stream equals is the module called token by token, each
call with the states that the last one returned; for an appended state the host does what the StateSpec says.
A prefill graph is added where a call of many tokens equals as many calls of one.

Refused, with what to change: memory that is not in the arguments, results that are not what the StateSpecs say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters import check, export
from exporters.program import DECODE, PREFILL
from mscompile.contracts import (
    BATCH,
    CHUNK,
    LOGITS,
    POSITION,
    TOKENS,
    Dim,
    GraphSpec,
    Hit,
    Profile,
    Schedule,
    StateSpec,
    StreamSpec,
    TensorSpec,
    Tick,
)
from mscompile.errors import ExportError, Refusal

NAME = "adapter"
TRIAL = 5  # tokens that are fed at once and one by one, to compare
TOLERANCE = 1e-3  # of the largest logit, for that


@dataclass(frozen=True)
class AdaptedProgram:
    """The stream program of a user's module, which runs in eager mode, and its ONNX graphs."""

    graphs: dict[str, nn.Module]
    spec: StreamSpec
    hits: tuple[Hit, ...]
    models: dict[str, ir.Model]


class AdaptedModule(nn.Module):
    """A user's module as a graph: forward(tokens, position, *states by name) -> (logits, *new states by name)."""

    def __init__(self, module: nn.Module, states: Sequence[StateSpec], position: bool) -> None:
        super().__init__()
        self.module, self.takes_position = module, position
        self.declared = tuple(state.name for state in states)  # in the order of the module's own arguments
        self.names = tuple(sorted(self.declared))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tokens, position, *states = inputs
        given = dict(zip(self.names, states, strict=True))
        head = (tokens, position) if self.takes_position else (tokens,)
        logits, *new = self.module(*head, *(given[name] for name in self.declared))
        if len(new) != len(self.declared):
            declared = ", ".join(self.declared)
            raise Refusal(f"forward returned {len(new)} tensors behind the logits, wanted the new {declared}")
        written = dict(zip(self.declared, new, strict=True))
        return (logits, *(written[name] for name in self.names))


def adapt(
    module: nn.Module,
    states: Sequence[StateSpec],
    profile: Profile,
    *,
    position: bool = False,
    context: int | None = None,
) -> AdaptedProgram:
    """The stream program of a module, and its graphs. The module is put in eval mode, its parameters frozen.

    `states` stand in the order of the module's arguments and results; `position` says whether it takes the
    position, (B,), behind the tokens; `context` is after how many tokens a stream must be reset, None if never.
    Raises Refusal with what to change.
    """
    if not states:
        raise Refusal("a module without states remembers nothing: declare a StateSpec for each tensor it remembers")
    adapted = AdaptedModule(module, states, position).eval().requires_grad_(False)
    states = sorted(states, key=lambda state: state.name)
    with torch.inference_mode():
        logits = _check_results(adapted, states)
        _check_memory(adapted, states)
        reason = _unlike_single_calls(adapted, states) if profile.max_chunk > 1 else "the longest chunk is one token"
    decode, prefill = (_graph_spec(name, states, logits) for name in (DECODE, PREFILL))
    models = {DECODE: _export(adapted, decode)}
    if not reason:
        try:
            models[PREFILL] = _export(adapted, prefill)
        except Refusal as error:
            reason = str(error)
    hit = Hit(NAME, PREFILL, not reason, reason or "a call of many tokens equals as many calls of one")
    schedule = Schedule((Tick((DECODE,)),), None if reason else PREFILL, 1, 1 if reason else profile.max_chunk)
    specs = (decode,) if reason else (decode, prefill)
    spec = StreamSpec(tuple(states), specs, schedule, logits.shape[-1], profile.max_batch, context)
    return AdaptedProgram(dict.fromkeys(models, adapted), spec, (hit,), models)


def _graph_spec(name: str, states: Sequence[StateSpec], logits: Tensor) -> GraphSpec:
    consumed: Dim = CHUNK if name == PREFILL else 1
    names = tuple(state.name for state in states)
    head = (TensorSpec(TOKENS, "int64", (BATCH, consumed)), TensorSpec(POSITION, "int64", (BATCH,)))
    result = TensorSpec(LOGITS, _dtype(logits), (BATCH, consumed, logits.shape[-1]))
    inputs = (*head, *(state.as_input() for state in states))
    outputs = (result, *(state.as_output(consumed) for state in states))
    return GraphSpec(name, inputs, outputs, names, names, consumed)


def _export(module: AdaptedModule, spec: GraphSpec) -> ir.Model:
    """One graph, held against its spec. Raises Refusal, for a size that the trace has frozen too."""
    try:
        model = export.export_module(module, spec)
        check.check_interface(model, spec, "export")
    except ExportError as error:
        raise Refusal(
            f"{error}; forward must take any batch and any number of tokens: "
            "no int(), len(), .item(), branch or loop over a size"
        ) from error
    return model


# ---- Trial calls ------------------------------------------------------------------------------------------


def _initial(states: Sequence[StateSpec], batch: int) -> list[Tensor]:
    return [torch.from_numpy(state.initial_value(batch)) for state in states]


def _random(states: Sequence[StateSpec], batch: int) -> list[Tensor]:
    """States that no initial value hides anything of; whole numbers stay what they are."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(value.shape, generator=generator, dtype=value.dtype) if value.is_floating_point() else value
        for value in _initial(states, batch)
    ]


def _call(module: AdaptedModule, tokens: Tensor, position: int, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    try:
        return module(tokens, torch.full((len(tokens),), position), *(state.clone() for state in states))
    except Refusal:
        raise
    except Exception as error:
        given = ", ".join(str(tuple(state.shape)) for state in states)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Refusal(f"forward failed for tokens {tuple(tokens.shape)} and states {given}: {reason}") from error


def _check_results(module: AdaptedModule, states: Sequence[StateSpec]) -> Tensor:
    """Logits and states are of the shapes declared; the logits of one token of two streams."""
    batch = 2
    logits, *new = _call(module, torch.zeros(batch, 1, dtype=torch.int64), 0, _initial(states, batch))
    if logits.ndim != 3 or logits.shape[:2] != (batch, 1):
        raise Refusal(f"forward returned logits of shape {tuple(logits.shape)}, wanted ({batch}, 1, vocabulary)")
    for state, value in zip(states, new, strict=True):
        wanted = state.as_output(1).concrete(batch=batch)
        if tuple(value.shape) != wanted or _dtype(value) != state.dtype:
            raise Refusal(
                f"forward returned {state.name} as {_dtype(value)} {tuple(value.shape)}, "
                f"its StateSpec ({state.update}) wants {state.dtype} {wanted}"
            )
    return logits


def _check_memory(module: AdaptedModule, states: Sequence[StateSpec]) -> None:
    """Nothing but the declared states goes from one call to the next."""
    tokens, given = torch.zeros(2, 1, dtype=torch.int64), _random(states, 2)
    before = {path: (value, value.clone()) for path, value in _held(module)}
    first, second = (_call(module, tokens, 0, given) for _ in range(2))
    for path, value in _held(module):
        old, content = before.get(path, (None, value))
        if old is not value or not torch.equal(content, value):
            raise Refusal(
                f"forward changes {path}, which is no declared state: take it as an argument, "
                "return its new value, and declare a StateSpec for it"
            )
    if any(not torch.equal(one, other) for one, other in zip(first, second, strict=True)):
        raise Refusal(
            "two calls with the same tokens and states differ: forward draws random numbers, or keeps something "
            "from call to call that is no declared state"
        )


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the module holds, registered or not, but for its parameters."""
    for name, part in module.named_modules():
        for attribute, value in chain(part.named_buffers(recurse=False), vars(part).items()):
            values = (
                value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
            )
            if attribute not in ("_parameters", "_buffers", "_modules"):
                path = f"{name}.{attribute}".removeprefix("module.").lstrip(".")
                yield from ((path, found) for found in values if isinstance(found, Tensor))


def _unlike_single_calls(module: AdaptedModule, states: Sequence[StateSpec]) -> str:
    """Why a call of many tokens is not as many calls of one; empty if it is."""
    rings = [dim for state in states if (dim := _ring(state)) is not None]
    longest = max((dim for state in states for dim in state.shape if isinstance(dim, int)), default=0)
    length = min([TRIAL, *rings])
    filled = min(rings) - length if rings else longest
    worst = max(
        _difference(module, states, start, position, length)
        for position, start in ((0, _initial(states, 2)), (filled, _random(states, 2)))
    )
    if worst <= TOLERANCE:
        return ""
    return f"a call of {length} tokens differs from {length} calls of one by {worst:.2g} of the largest logit"


def _difference(
    module: AdaptedModule, states: Sequence[StateSpec], current: list[Tensor], position: int, length: int
) -> float:
    """Between one call and calls of one token, in units of the largest logit; infinite where one is no number."""
    tokens = torch.arange(2 * length).reshape(2, length) % 2
    together = _call(module, tokens, position, current)[0]
    apart = []
    for step in range(length):
        logits, *new = _call(module, tokens[:, step : step + 1], position + step, current)
        changes = zip(states, current, new, strict=True)
        current = [_written(state, old, rows, position + step) for state, old, rows in changes]
        apart.append(logits)
    single = torch.cat(apart, dim=1)
    if together.shape != single.shape:
        return math.inf
    found = float((together - single).abs().max() / single.abs().max())
    return found if math.isfinite(found) else math.inf


def _ring(state: StateSpec) -> int | None:
    """How many rows an appended state holds."""
    rows = state.shape[state.time_axis] if state.update == "append" and state.time_axis is not None else None
    return rows if isinstance(rows, int) else None


def _written(state: StateSpec, old: Tensor, new: Tensor, position: int) -> Tensor:
    """What a host makes of a result: the new value, or the old one with one row more."""
    rows = _ring(state)
    if rows is None or state.time_axis is None:
        return new
    slot = torch.tensor([position % rows])
    return old.index_copy(state.time_axis, slot, new)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
