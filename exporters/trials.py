"""Trial calls of a user's module, before anything is traced: is it what its adapter says?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from exporters.adapted_graph import AdaptedGraph
from mscompile.contracts import Schedule, StateSpec
from mscompile.errors import Refusal
from mscompile.models.own import History, OwnModule, kept

BATCH = 2
TRIAL = 5  # tokens that are fed at once and one by one, to compare
TOLERANCE = 1e-3  # of the largest logit, for that


def check_results(graph: AdaptedGraph, states: Sequence[StateSpec]) -> None:
    """Logits and new states are of the shapes declared, for one token of two streams."""
    results = _call(graph, torch.zeros(BATCH, 1, dtype=torch.int64), 0, _initial(states))
    logits, new = ((), results) if graph.closing else (results[:1], results[1:])
    for value in logits:
        if value.ndim != 3 or value.shape[:2] != (BATCH, 1):
            raise Refusal(
                f"{graph.method} returned logits of shape {tuple(value.shape)}, wanted ({BATCH}, 1, vocabulary)"
            )
        if value.dtype != torch.float32:
            raise Refusal(f"{graph.method} returned logits in {_dtype(value)}, wanted float32: convert the module")
    for state, value in zip(states, new, strict=True):
        wanted = state.as_output(1).concrete(batch=BATCH)
        if tuple(value.shape) != wanted or _dtype(value) != state.dtype:
            raise Refusal(
                f"{graph.method} returned {state.name} as {_dtype(value)} {tuple(value.shape)}, "
                f"its StateSpec ({state.update}) wants {state.dtype} {wanted}"
            )


def check_memory(graph: AdaptedGraph, states: Sequence[StateSpec]) -> None:
    """Nothing but the declared states goes from one call to the next."""
    tokens, given = torch.zeros(BATCH, 1, dtype=torch.int64), _random(states)
    before = {path: (value, value.clone()) for path, value in _held(graph)}
    first, second = (_call(graph, tokens, 0, given) for _ in range(2))
    for path, value in _held(graph):
        old, content = before.get(path, (None, value))
        if old is not value or not torch.equal(content, value):
            raise Refusal(
                f"{graph.method} changes {path}, which is no declared state: name it in the adapter's buffers, or "
                "take it as an argument, return its new value, and declare a StateSpec for it"
            )
    if any(not torch.equal(one, other) for one, other in zip(first, second, strict=True)):
        raise Refusal(
            "two calls with the same tokens and states differ: forward draws random numbers, or keeps something "
            "from call to call that is no declared state"
        )


def written(graph: AdaptedGraph, states: Sequence[StateSpec]) -> tuple[str, ...]:
    """The states that a method makes anew; the others it returns as they came."""
    given = _initial(states)
    head = () if graph.closing else (torch.zeros(BATCH, 1, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64))
    results = graph(*head, *given)
    new = results if graph.closing else results[1:]
    made = [name for name, old, value in zip(graph.names, given, new, strict=True) if value is not old]
    return tuple(made)


def check_causal(history: History) -> None:
    """A module that is given the whole stream must not let later tokens change earlier logits."""
    length = min(3 * TRIAL, history.context)
    tokens = torch.arange(BATCH * length).reshape(BATCH, length) % 2
    whole, begun = (history.module(tokens[:, :count]) for count in (length, length - length // 2))
    difference = _relative(whole[:, : begun.shape[1]], begun)
    if difference > TOLERANCE:
        raise Refusal(
            f"the module declares no memory, and its logits change by {difference:.2g} of the largest one when later "
            "tokens come: a stream needs a causal module, or one whose memory the adapter declares"
        )


def check_full(
    graphs: Mapping[str, AdaptedGraph], schedule: Schedule, states: Sequence[StateSpec], model: OwnModule
) -> None:
    """The module's own forward over whole streams is what its single calls compute."""
    length = min(2 * schedule.period + TRIAL, model.adapter.context or 2**31)
    tokens = torch.arange(BATCH * length).reshape(BATCH, length) % 2
    stepped, whole = _stepped(graphs, schedule, states, _initial(states), 0, tokens), model.full(tokens)
    if stepped.shape != whole.shape:
        raise Refusal(f"full returned logits {tuple(whole.shape)} for tokens {tuple(tokens.shape)}")
    errors = (stepped - whole).abs().amax(dim=(0, 2)) / whole.abs().max()
    if not errors.max() <= TOLERANCE:
        first = int((~(errors <= TOLERANCE)).nonzero()[0])
        raise Refusal(
            f"called token by token, the module differs from full by {float(errors[first]):.2g} of the largest logit "
            f"at token {first}: correct the module, its initial states, its ticks or full"
        )


def unlike_single_calls(
    graphs: Mapping[str, AdaptedGraph], prefill: AdaptedGraph, schedule: Schedule, states: Sequence[StateSpec]
) -> str:
    """Why a call of many tokens is not as many calls of one; empty if it is."""
    rings = [dim for state in states if (dim := _ring(state)) is not None]
    longest = max((dim for state in states for dim in state.shape if isinstance(dim, int)), default=0)
    multiple = schedule.chunk_multiple
    length = min([TRIAL, *rings, schedule.max_chunk]) if multiple == 1 else multiple
    filled = min(rings) - length if rings else longest
    starts = [(0, _initial(states)), (filled - filled % multiple, _random(states))]
    try:
        logits = _call(prefill, torch.zeros(BATCH, length, dtype=torch.int64), 0, _initial(states))[0]
    except Refusal as error:
        return str(error)
    if logits.shape[1] != length:
        return f"a call of {length} tokens does not return logits for each of them"
    worst = max(_difference(graphs, prefill, schedule, states, start, at, length) for at, start in starts)
    if worst <= TOLERANCE:
        return ""
    return f"a call of {length} tokens differs from {length} calls of one by {worst:.2g} of the largest logit"


def _difference(
    graphs: Mapping[str, AdaptedGraph],
    prefill: AdaptedGraph,
    schedule: Schedule,
    states: Sequence[StateSpec],
    current: list[Tensor],
    position: int,
    length: int,
) -> float:
    """Between one call and calls of one token, in units of the largest logit; infinite where one is no number."""
    tokens = torch.arange(BATCH * length).reshape(BATCH, length) % 2
    together = _call(prefill, tokens, position, current)[0]
    return _relative(together, _stepped(graphs, schedule, states, current, position, tokens))


def _stepped(
    graphs: Mapping[str, AdaptedGraph],
    schedule: Schedule,
    states: Sequence[StateSpec],
    current: list[Tensor],
    position: int,
    tokens: Tensor,
) -> Tensor:
    """Logits (B, T, V) of tokens (B, T), one call of one token after the other."""
    apart = []
    for step in range(tokens.shape[1]):
        tick = schedule.tick(position + step)
        for name in (*tick.graphs, *tick.closing):
            results = _call(graphs[name], tokens[:, step : step + 1], position + step, current)
            if not graphs[name].closing:
                apart.append(results[0])
            new = dict(zip(graphs[name].writes, results if graphs[name].closing else results[1:], strict=True))
            current = [
                kept(state, old, new[state.name], position + step) if state.name in new else old
                for state, old in zip(states, current, strict=True)
            ]
    return torch.cat(apart, dim=1)


def _relative(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    found = float((one - other).abs().max() / other.abs().max())
    return found if math.isfinite(found) else math.inf


def _initial(states: Sequence[StateSpec]) -> list[Tensor]:
    return [torch.from_numpy(state.initial_value(BATCH)) for state in states]


def _random(states: Sequence[StateSpec]) -> list[Tensor]:
    """States that no initial value hides anything of; whole numbers stay what they are."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(value.shape, generator=generator, dtype=value.dtype) if value.is_floating_point() else value
        for value in _initial(states)
    ]


def _call(graph: AdaptedGraph, tokens: Tensor, position: int, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    head = () if graph.closing else (tokens, torch.full((len(tokens),), position))
    try:
        return graph(*head, *(state.clone() for state in states))
    except Refusal:
        raise
    except Exception as error:
        given = ", ".join(str(tuple(state.shape)) for state in states) or "none"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Refusal(f"{graph.method} failed for tokens {tuple(tokens.shape)} and states {given}: {reason}") from error


def _held(graph: AdaptedGraph) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the module holds, registered or not, but for its parameters."""
    for name, part in graph.named_modules():
        for attribute, value in chain(part.named_buffers(recurse=False), vars(part).items()):
            values = (
                value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
            )
            if attribute not in ("_parameters", "_buffers", "_modules"):
                path = f"{name}.{attribute}".removeprefix("module.").removeprefix("module.").lstrip(".")
                yield from ((path, found) for found in values if isinstance(found, Tensor))


def _ring(state: StateSpec) -> int | None:
    """How many rows an appended state holds."""
    rows = state.shape[state.time_axis] if state.update == "append" and state.time_axis is not None else None
    return rows if isinstance(rows, int) else None


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
