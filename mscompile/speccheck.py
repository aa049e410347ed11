"""What must hold inside a StreamSpec, so that a host can follow it without looking twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod

from mscompile.contracts import (
    BATCH,
    CHUNK,
    CONTEXT,
    LOGITS,
    POSITION,
    TOKENS,
    GraphSpec,
    Schedule,
    StateSpec,
    StreamSpec,
    TensorSpec,
)

SIZE_LIMIT = 2**31 - 1  # of one dimension, and of every count: what index types of runtimes hold
RANK_LIMIT, VALUES_LIMIT = 32, 2**40  # dimensions of a tensor, values of one stream in a state
VOCAB_LIMIT = 2**24  # a call of one token returns as many logits a row; the largest vocabularies have 2**20
DTYPES = ("bool", *("int8", "int16", "int32", "int64", "uint8"), *("float16", "float32", "float64"))


def spec_fault(spec: StreamSpec) -> str | None:
    """The first contradiction in `spec`, as part of a sentence; None if there is none."""
    return next(_faults(spec), None)


def name_fault(what: str, name: str) -> str | None:
    """Why `name` cannot be part of a file name on every system; None if it can."""
    odd = name in ("", ".", "..") or any(character in '/\\:*?"<>|' or not character.isprintable() for character in name)
    return f"{what} name {name!r} cannot be used in a file name" if odd else None


def _faults(spec: StreamSpec) -> Iterator[str]:
    graphs, states = [graph.name for graph in spec.graphs], [state.name for state in spec.states]
    for what, names in (("graph", graphs), ("state", states)):
        yield from (f"two {what}s are named {name!r}" for name, count in Counter(names).items() if count > 1)
        yield from (fault for name in names if (fault := name_fault(what, name)))
    context = 1 if spec.max_context is None else spec.max_context
    if min(spec.vocab_size, spec.max_batch, context) < 1:
        yield "vocab_size, max_batch and max_context must be at least 1"
    if spec.vocab_size > VOCAB_LIMIT or max(spec.max_batch, context) > SIZE_LIMIT:
        yield f"vocab_size must be at most {VOCAB_LIMIT}, max_batch and max_context at most {SIZE_LIMIT}"
    for state in spec.states:
        yield from _state_faults(state)
    for graph in spec.graphs:
        yield from _graph_faults(graph, spec.states)
        yield from _token_faults(graph, spec.vocab_size)
    yield from _input_faults(spec)
    yield from _schedule_faults(spec.schedule, graphs)


def _state_faults(state: StateSpec) -> Iterator[str]:
    yield from _tensor_faults(f"state {state.name!r}", TensorSpec(state.name, state.dtype, state.shape))
    if (values := prod(dim for dim in state.shape if isinstance(dim, int))) > VALUES_LIMIT:
        yield f"state {state.name!r} has {values} values a stream, more than {VALUES_LIMIT}"
    if not 0 <= state.batch_axis < len(state.shape) or state.shape[state.batch_axis] != BATCH:
        yield f"state {state.name!r} has batch_axis {state.batch_axis}, where its shape {state.shape} has no {BATCH!r}"
    if [dim for dim in state.shape if isinstance(dim, str)] != [BATCH]:
        yield f"state {state.name!r} has shape {state.shape}, which must be fixed but for {BATCH!r}"
    if state.update == "append" and state.time_axis is None:
        yield f"state {state.name!r} is {state.update!r} with time_axis {state.time_axis}"
    if state.time_axis is not None and (
        not 0 <= state.time_axis < len(state.shape) or state.time_axis == state.batch_axis
    ):
        yield f"state {state.name!r} has time_axis {state.time_axis}, which its shape {state.shape} lacks"
    shared = (state.batch_axis, state.time_axis)
    row = prod(dim for axis, dim in enumerate(state.shape) if axis not in shared and isinstance(dim, int))
    if isinstance(state.initial, tuple) and len(state.initial) != row:
        yield f"state {state.name!r} has {len(state.initial)} initial values, where a row has {row}"


def _graph_faults(graph: GraphSpec, states: tuple[StateSpec, ...]) -> Iterator[str]:
    where = f"graph {graph.name!r}"
    known = {state.name: state for state in states}
    for verb, names in (("reads", graph.reads), ("writes", graph.writes)):
        yield from (f"{where} {verb} state {name!r}, which does not exist" for name in names if name not in known)
        yield from (f"{where} {verb} state {name!r} twice" for name, count in Counter(names).items() if count > 1)
    inputs, outputs = [tensor.name for tensor in graph.inputs], [tensor.name for tensor in graph.outputs]
    yield from _missing(where, "input", inputs, (known[name].input_name for name in graph.reads if name in known))
    yield from _missing(where, "output", outputs, (known[name].output_name for name in graph.writes if name in known))
    for tensor in (*graph.inputs, *graph.outputs):
        yield from _tensor_faults(f"{where}, tensor {tensor.name!r},", tensor)
    for tensors, names, what in ((graph.inputs, graph.reads, "in"), (graph.outputs, graph.writes, "out")):
        held = {f"{name}.{what}": known[name] for name in names if name in known}
        yield from (
            f"{where}, tensor {tensor.name!r}, is {tensor.dtype} {tensor.shape}, which its state is not"
            for tensor in tensors
            if tensor.name in held and not _fits(tensor, held[tensor.name], what)
        )
    if graph.tokens not in (0, 1, CHUNK):
        yield f"{where} consumes {graph.tokens!r} tokens, not 0, 1 or {CHUNK!r}"


def _token_faults(graph: GraphSpec, vocab_size: int) -> Iterator[str]:
    """Tokens, positions and logits have the shapes that a host gives and takes."""
    wanted = {
        TOKENS: (graph.inputs, (BATCH, graph.tokens)),
        POSITION: (graph.inputs, (BATCH,)),
        LOGITS: (graph.outputs, (BATCH, graph.tokens, vocab_size)),
    }
    for name, (tensors, shape) in wanted.items():
        for tensor in tensors:
            if tensor.name == name and tensor.shape != shape:
                yield f"graph {graph.name!r} has {name} of shape {tensor.shape}, not {shape}"


def _fits(tensor: TensorSpec, state: StateSpec, what: str) -> bool:
    """Has an input or output what a host keeps of the state: all of it, its leading rows, or new rows?"""
    axis = state.time_axis if state.update == "append" else None
    if axis is None or axis >= len(tensor.shape):
        return (tensor.dtype, tensor.shape) == (state.dtype, state.shape)
    rows = tensor.shape[axis]
    if what == "in" and rows != state.shape[axis] and not str(rows).startswith(CONTEXT):
        return False
    return tensor == (state.as_input(rows) if what == "in" else state.as_output(rows))


def _input_faults(spec: StreamSpec) -> Iterator[str]:
    """Every host input can be asked for with what the host has, exactly where a graph takes it."""
    names = [given.name for given in spec.inputs]
    yield from (f"two host inputs are named {name!r}" for name, count in Counter(names).items() if count > 1)
    for given in spec.inputs:
        where = f"host input {given.name!r}"
        if given.every < 1 or min(given.shape, default=1) < 1:
            yield f"{where} is {given.shape} every {given.every} tokens, which must all be at least 1"
            continue
        yield from _tensor_faults(where, TensorSpec(given.name, given.dtype, given.shape))
        if prod((given.every, *given.shape)) > VALUES_LIMIT:
            yield f"{where} is {given.shape} every {given.every} tokens, more than {VALUES_LIMIT} values"
        if ("int" in given.dtype) != (given.below is not None) or (given.below or 1) < 1:
            yield f"{where} is {given.dtype} below {given.below}: whole numbers need a bound, others have none"
        if given.recent not in spec.states:
            yield f"{where} has no state {given.recent.name!r}, int64 (batch, {given.every}), to be asked for with"
        for graph in spec.graphs:
            if graph.tokens != 0 and given.recent.name not in graph.writes:
                yield f"graph {graph.name!r} does not write state {given.recent.name!r}"
            taken = [tensor for tensor in graph.inputs if tensor.name == given.name]
            if taken and (graph.tokens == 0 or taken != [given.as_input(graph.tokens)]):
                yield f"graph {graph.name!r} takes {where} as {taken[0].dtype} {taken[0].shape}"
        takers = {graph.name for graph in spec.graphs if any(tensor.name == given.name for tensor in graph.inputs)}
        yield from _due_faults(where, given.every, takers, spec.schedule)


def _due_faults(where: str, every: int, takers: set[str], schedule: Schedule) -> Iterator[str]:
    """No call takes the input before its chunk is complete."""
    if schedule.period % every or (schedule.prefill in takers and schedule.chunk_multiple % every):
        yield f"{where} comes every {every} tokens, which must divide the period and chunk_multiple"
        return
    phase = 0
    for tick in schedule.ticks:
        early = [place for place in range(phase, phase + min(tick.repeat, 2)) if (place + 1) % every]
        if early and not takers.isdisjoint(tick.graphs):
            yield f"{where} is taken at phase {early[0]}, where no {every} tokens are complete"
        phase += tick.repeat


def _missing(where: str, what: str, names: list[str], wanted: Iterable[str]) -> Iterator[str]:
    yield from (f"{where} has {what} {name!r} twice" for name, count in Counter(names).items() if count > 1)
    yield from (f"{where} lacks {what} {name!r}" for name in wanted if name not in names)


def _tensor_faults(where: str, tensor: TensorSpec) -> Iterator[str]:
    if tensor.dtype not in DTYPES:
        yield f"{where} has dtype {tensor.dtype!r}, not one of {', '.join(DTYPES)}"
    if len(tensor.shape) > RANK_LIMIT:
        yield f"{where} has {len(tensor.shape)} dimensions, more than {RANK_LIMIT}"
    for dim in tensor.shape:
        if not (_is_named(dim) if isinstance(dim, str) else 0 <= dim <= SIZE_LIMIT):
            yield f"{where} has dimension {dim!r}, not a size, {BATCH!r}, {CHUNK!r}, {CONTEXT!r} or one of these by k"


def _is_named(dim: str) -> bool:
    return dim == BATCH or re.fullmatch(rf"({CHUNK}|{CONTEXT})(/[1-9][0-9]{{0,8}})?", dim) is not None


def _schedule_faults(schedule: Schedule, graphs: list[str]) -> Iterator[str]:
    if not schedule.ticks or min(tick.repeat for tick in schedule.ticks) < 1:
        yield "the schedule must have ticks, each repeated at least once"
    if max(schedule.period, schedule.chunk_multiple, schedule.max_chunk) > SIZE_LIMIT:
        yield f"the period, chunk_multiple and max_chunk of the schedule must be at most {SIZE_LIMIT}"
    prefill = () if schedule.prefill is None else (schedule.prefill,)
    used = (*(name for tick in schedule.ticks for name in (*tick.graphs, *tick.closing)), *prefill)
    yield from (f"the schedule runs graph {name!r}, which does not exist" for name in used if name not in graphs)
    if prefill and not 1 <= schedule.chunk_multiple <= schedule.max_chunk:
        yield f"the schedule has chunk_multiple {schedule.chunk_multiple} and max_chunk {schedule.max_chunk}"
