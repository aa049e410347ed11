"""Reference model -> stream program: the graphs, what each reads and writes, and the schedule.

One graph consumes one token for each pattern of due scales (`decode`, or `decode_1`, `decode_3` ... named by
the coarsest scale that is due), one consumes many tokens at once (`prefill`), and `close` ends a segment
where the model has segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from exporters.root import Root
from exporters.rules import RULES
from exporters.stream import Call, Scope
from mscompile.contracts import (
    BATCH,
    CHUNK,
    CONTEXT,
    LOGITS,
    POSITION,
    TOKENS,
    Array,
    Dim,
    GraphSpec,
    Hit,
    Profile,
    Schedule,
    StateSpec,
    StreamSpec,
    TensorSpec,
    Tick,
    require_memory,
)
from mscompile.errors import Refusal
from mscompile.models.family import ReferenceModel

PERIOD_LIMIT = 2**20  # tokens; a schedule is laid out token by token

PREFILL, DECODE, CLOSE = "prefill", "decode", "close"


class GraphModule(nn.Module):
    """One graph as a module: forward(tokens, position, *host inputs, *states it reads) -> (logits, *states it writes).

    The closing graph has neither tokens nor logits, and takes the position only where it needs it.
    """

    def __init__(self, root: Root, name: str, due: Callable[[int], bool]) -> None:
        super().__init__()
        self.root, self.name, self.due = root, name, due
        self.given = root.inputs  # these two are narrowed to what is read once known
        self.state_names = tuple(state.name for state in root.states())
        self.writes: tuple[str, ...] = ()
        self.takes_position = True

    def call(
        self, tokens: Tensor | None, position: Tensor, supplied: Mapping[str, Tensor], states: Mapping[str, Tensor]
    ) -> tuple[Call, Tensor | None]:
        root = self.root
        call = Call(position, states, root.biases, self.name != PREFILL, self.due, root.ticks, supplied)
        if tokens is None:
            root.close(call)
            return call, None
        for given in root.inputs:
            call.write(given.recent, tokens.clone())  # an output of a graph cannot be its input
        return call, root(tokens, call)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        tokens = None if self.name == CLOSE else given.pop(0)
        position = given.pop(0) if self.takes_position else torch.zeros(1, dtype=torch.int64)
        supplied = {entry.name: given.pop(0) for entry in self.given}
        call, logits = self.call(tokens, position, supplied, dict(zip(self.state_names, given, strict=True)))
        written = tuple(call.written[name] for name in self.writes)
        return written if logits is None else (logits, *written)


class StreamProgram:
    """The streaming form of a model, still in PyTorch."""

    def __init__(self, root: Root, graphs: dict[str, GraphModule], spec: StreamSpec, hits: tuple[Hit, ...]) -> None:
        self.root, self.graphs, self.spec, self.hits = root, graphs, spec, hits


def build(model: ReferenceModel, profile: Profile, context: int | None = None) -> StreamProgram:
    """The stream program of a model in eval mode.

    `context` bounds the stream, in tokens, for models whose memory grows with it; others ignore it.
    Raises Refusal, with the reason, for models that cannot be streamed exactly.
    """
    dtype = next(model.parameters()).dtype
    hits: list[Hit] = []
    context = context or getattr(model.config, "context", None)
    root: Root = Scope("", 1, context, dtype, RULES, hits).stream(model, "")
    factors = root.all_factors()
    schedule = _schedule(root, factors, profile.max_chunk)
    graphs = {_decode(coarsest, factors): _divides(coarsest) for coarsest in (1, *factors)}
    if root.segment is not None:
        graphs[CLOSE] = _divides(1)
    if schedule.prefill:
        graphs[PREFILL] = lambda _: True
    require_memory(root.states(), 1)
    modules = {name: GraphModule(root, name, due).eval() for name, due in sorted(graphs.items())}
    vocab_size, limit = int(model.config.vocab_size), context if root.bounded else None
    specs = tuple(_graph_spec(module, dtype, schedule.chunk_multiple, vocab_size, limit) for module in modules.values())
    spec = StreamSpec(root.states(), specs, schedule, vocab_size, profile.max_batch, limit, root.inputs)
    return StreamProgram(root, modules, spec, tuple(hits))


def _decode(coarsest: int, factors: Sequence[int]) -> str:
    """The name of the graph for a token at which rows of up to `coarsest` tokens begin."""
    return f"{DECODE}_{coarsest}" if factors else DECODE


def _divides(coarsest: int) -> Callable[[int], bool]:
    return lambda factor: coarsest % factor == 0


def _schedule(root: Root, factors: Sequence[int], max_chunk: int) -> Schedule:
    coarsest = factors[-1] if factors else 1
    period = root.segment or coarsest
    if any(longer % shorter for shorter, longer in pairwise((*factors, period))):
        scales = ", ".join(str(factor) for factor in (*factors, period))
        raise Refusal(f"rows and segments of {scales} tokens: each length must divide the next, or there is no period")
    offset = 1 if root.ticks == "end" else 0
    if period > PERIOD_LIMIT:
        raise Refusal(f"segments or scales of {period} tokens; at most {PERIOD_LIMIT} can be scheduled")
    due = [max(factor for factor in (1, *factors) if (phase + offset) % factor == 0) for phase in range(period)]
    runs = [(_decode(rows, factors), len(list(run))) for rows, run in groupby(due)]
    ticks = tuple(Tick((graph,), repeat=count) for graph, count in runs)
    if root.segment is not None:
        ticks = (*_all_but_last(ticks), Tick(ticks[-1].graphs, closing=(CLOSE,)))
    longest = min(max_chunk, root.segment or max_chunk)
    longest -= longest % coarsest
    prefill = PREFILL if longest > 1 and root.parallel else None
    return Schedule(ticks, prefill, coarsest, longest if prefill else 1)


def _all_but_last(ticks: tuple[Tick, ...]) -> tuple[Tick, ...]:
    """The ticks of all phases but the last one."""
    *others, last = ticks
    return (*others, *([replace(last, repeat=last.repeat - 1)] if last.repeat > 1 else []))


def _graph_spec(graph: GraphModule, dtype: torch.dtype, multiple: int, vocab_size: int, limit: int | None) -> GraphSpec:
    """The interface of a graph, found by running it once on one stream."""
    declared = {state.name: state for state in graph.root.states()}
    length = 2 * multiple if graph.name == PREFILL else 1
    tokens = None if graph.name == CLOSE else torch.zeros(1, length, dtype=torch.int64)
    states = {
        name: torch.zeros(_one(state.shape), dtype=getattr(torch, state.dtype)) for name, state in declared.items()
    }
    consumed: Dim = 0 if tokens is None else CHUNK if graph.name == PREFILL else 1
    taken = {given: given.as_input(consumed) for given in graph.root.inputs}
    supplied = {
        given.name: torch.zeros(tensor.concrete(batch=1, chunk=length), dtype=getattr(torch, tensor.dtype))
        for given, tensor in taken.items()
    }
    with torch.inference_mode():
        call, _ = graph.call(tokens, torch.zeros(1, dtype=torch.int64), supplied, states)
    graph.given = tuple(given for given in graph.root.inputs if given.name in call.takes)
    graph.state_names, graph.writes = tuple(sorted(call.reads)), tuple(sorted(call.written))
    graph.takes_position = tokens is not None or call.reads_position
    rows: dict[str, Dim] = {}  # that a call appends
    for name in graph.writes:
        state = declared[name]
        if state.update == "append" and state.time_axis is not None:
            count = call.written[name].shape[state.time_axis]
            rows[name] = _per_chunk(count, length) if graph.name == PREFILL else count
    outputs = [declared[name].as_output(rows.get(name)) for name in graph.writes]
    inputs = [declared[name].as_input(_remembered(declared[name], rows.get(name), limit)) for name in graph.state_names]
    inputs = [*(taken[given] for given in graph.given), *inputs]
    if graph.takes_position:
        inputs.insert(0, TensorSpec(POSITION, "int64", (BATCH,)))
    if tokens is None:
        return GraphSpec(graph.name, tuple(inputs), tuple(outputs), graph.state_names, graph.writes, 0)
    inputs.insert(0, TensorSpec(TOKENS, "int64", (BATCH, consumed)))
    outputs.insert(0, TensorSpec(LOGITS, str(dtype).removeprefix("torch."), (BATCH, consumed, vocab_size)))
    return GraphSpec(graph.name, tuple(inputs), tuple(outputs), graph.state_names, graph.writes, consumed)


def _remembered(state: StateSpec, appended: Dim | None, limit: int | None) -> Dim | None:
    """Rows that a graph takes of a state: a prefill only those that can have been written, where all are kept."""
    if limit is None or not isinstance(appended, str) or state.time_axis is None:
        return None
    capacity, tokens = state.shape[state.time_axis], int(appended.partition("/")[2] or 1)
    keeps_all = isinstance(capacity, int) and capacity >= -(-limit // tokens)
    return appended.replace(CHUNK, CONTEXT) if keeps_all else None


def _one(shape: tuple[Dim, ...]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else 1 for dim in shape)


def _per_chunk(rows: int, chunk: int) -> str:
    if chunk % rows:
        raise Refusal(f"{chunk} tokens append {rows} rows, which is not one row a fixed number of tokens")
    return CHUNK if rows == chunk else f"{CHUNK}/{chunk // rows}"


class Streaming(Protocol):
    """A stream program, of whatever origin: graphs as modules, in the order of the spec's inputs and outputs."""

    @property
    def graphs(self) -> Mapping[str, nn.Module]: ...

    @property
    def spec(self) -> StreamSpec: ...

    @property
    def hits(self) -> tuple[Hit, ...]: ...


class EagerExecutor:
    """Runs a program's graphs in PyTorch: the reference of every built engine's states."""

    def __init__(self, program: Streaming) -> None:
        self.program = program

    def bind(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        module, spec = self.program.graphs[graph], self.program.spec.graph(graph)
        given = [torch.from_numpy(inputs[tensor.name]) for tensor in spec.inputs]
        wanted = [torch.from_numpy(outputs[tensor.name]) for tensor in spec.outputs]

        def run() -> None:
            with torch.inference_mode():
                for target, value in zip(wanted, module(*given), strict=True):
                    target.copy_(value)

        return run
