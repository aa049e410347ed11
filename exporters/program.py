"""Reference model -> stream program: the graphs, what each reads and writes, and the schedule.

One graph consumes one token for each pattern of due scales (`decode`, or `decode_1`, `decode_3` ... named by
the coarsest scale that is due), one consumes many tokens at once (`prefill`), and `close` ends a segment
where the model has segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from exporters.language_model import Root
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
    StreamSpec,
    TensorSpec,
    Tick,
)
from mscompile.errors import Refusal
from mscompile.models.family import ReferenceModel

PREFILL, DECODE, CLOSE = "prefill", "decode", "close"


class GraphModule(nn.Module):
    """One graph as a module: forward(tokens, position, *states it reads) -> (logits, *states it writes).

    The closing graph takes and returns states only.
    """

    def __init__(self, root: Root, name: str, due: Callable[[int], bool]) -> None:
        super().__init__()
        self.root, self.name, self.due = root, name, due
        self.state_names = tuple(state.name for state in root.states())  # narrowed to what is read once known
        self.writes: tuple[str, ...] = ()

    def call(self, tokens: Tensor | None, position: Tensor, states: Mapping[str, Tensor]) -> tuple[Call, Tensor | None]:
        call = Call(position, states, self.root.biases, self.name != PREFILL, self.due)
        if tokens is None:
            self.root.close(call)
            return call, None
        return call, self.root(tokens, call)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.name == CLOSE:
            tokens, position, states = None, inputs[0].new_zeros(1), inputs
        else:
            tokens, position, *states = inputs  # type: ignore[assignment]
        call, logits = self.call(tokens, position, dict(zip(self.state_names, states, strict=True)))
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
    schedule = _schedule(root.segment, factors, profile.max_chunk)
    graphs = {_decode(coarsest, factors): _divides(coarsest) for coarsest in (1, *factors)}
    if root.segment is not None:
        graphs[CLOSE] = _divides(1)
    if schedule.prefill:
        graphs[PREFILL] = lambda _: True
    modules = {name: GraphModule(root, name, due).eval() for name, due in sorted(graphs.items())}
    vocab_size = int(model.config.vocab_size)
    specs = tuple(_graph_spec(module, dtype, schedule.chunk_multiple, vocab_size) for module in modules.values())
    limit = context if root.bounded else None
    spec = StreamSpec(root.states(), specs, schedule, vocab_size, profile.max_batch, limit)
    return StreamProgram(root, modules, spec, tuple(hits))


def _decode(coarsest: int, factors: Sequence[int]) -> str:
    """The name of the graph for a token at which rows of up to `coarsest` tokens begin."""
    return f"{DECODE}_{coarsest}" if factors else DECODE


def _divides(coarsest: int) -> Callable[[int], bool]:
    return lambda factor: coarsest % factor == 0


def _schedule(segment: int | None, factors: Sequence[int], max_chunk: int) -> Schedule:
    if segment is not None:
        if factors:
            raise Refusal("a model with both segments and coarser scales has no schedule yet")
        whole = Tick((DECODE,), repeat=segment - 1)
        last = Tick((DECODE,), closing=(CLOSE,))
        longest = min(max_chunk, segment)
        return Schedule((whole, last) if segment > 1 else (last,), PREFILL if longest > 1 else None, 1, longest)
    period = factors[-1] if factors else 1
    due = [max(factor for factor in (1, *factors) if phase % factor == 0) for phase in range(period)]
    ticks = tuple(Tick((_decode(coarsest, factors),), repeat=len(list(run))) for coarsest, run in groupby(due))
    longest = max_chunk - max_chunk % period
    return Schedule(ticks, PREFILL if longest > 1 else None, period, longest)


def _graph_spec(graph: GraphModule, dtype: torch.dtype, multiple: int, vocab_size: int) -> GraphSpec:
    """The interface of a graph, found by running it once on one stream."""
    declared = {state.name: state for state in graph.root.states()}
    length = 2 * multiple if graph.name == PREFILL else 1
    tokens = None if graph.name == CLOSE else torch.zeros(1, length, dtype=torch.int64)
    states = {name: torch.zeros(_one(state.shape), dtype=dtype) for name, state in declared.items()}
    with torch.inference_mode():
        call, _ = graph.call(tokens, torch.zeros(1, dtype=torch.int64), states)
    graph.state_names = tuple(sorted(call.reads))
    graph.writes = tuple(sorted(call.written))
    rows: dict[str, Dim] = {}  # that a call appends
    for name in graph.writes:
        state = declared[name]
        if state.update == "append" and state.time_axis is not None:
            count = call.written[name].shape[state.time_axis]
            rows[name] = _per_chunk(count, length) if graph.name == PREFILL else count
    outputs = [declared[name].as_output(rows.get(name)) for name in graph.writes]
    inputs = [declared[name].as_input(_remembered(graph, rows.get(name))) for name in graph.state_names]
    if tokens is None:
        return GraphSpec(graph.name, tuple(inputs), tuple(outputs), graph.state_names, graph.writes, 0)
    consumed: Dim = CHUNK if graph.name == PREFILL else 1
    head = (TensorSpec(TOKENS, "int64", (BATCH, consumed)), TensorSpec(POSITION, "int64", (BATCH,)))
    logits = TensorSpec(LOGITS, str(dtype).removeprefix("torch."), (BATCH, consumed, vocab_size))
    return GraphSpec(graph.name, (*head, *inputs), (logits, *outputs), graph.state_names, graph.writes, consumed)


def _remembered(graph: GraphModule, appended: Dim | None) -> Dim | None:
    """Rows that a graph takes of a state: a prefill only those that can have been written, where memory grows."""
    if graph.name == PREFILL and graph.root.bounded and isinstance(appended, str):
        return appended.replace(CHUNK, CONTEXT)
    return None


def _one(shape: tuple[Dim, ...]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else 1 for dim in shape)


def _per_chunk(rows: int, chunk: int) -> str:
    if chunk % rows:
        raise Refusal(f"{chunk} tokens append {rows} rows, which is not one row a fixed number of tokens")
    return CHUNK if rows == chunk else f"{CHUNK}/{chunk // rows}"


class EagerExecutor:
    """Runs a program's graphs in PyTorch: the reference of every built engine's states."""

    def __init__(self, program: StreamProgram) -> None:
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
