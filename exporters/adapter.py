"""A user's own module -> stream program and graphs.

Given                                                        Becomes
  forward(tokens, *states) -> (logits, *new states)            graph `decode`   one token
  tokens (B, T), a StateSpec for each state                    graph `prefill`  many tokens, where it is exact
  methods named by ticks                                       a graph each; closing ones without tokens

`mscompile.models.own` says how memory in buffers, and no memory at all, become memory in arguments. What a stream
equals is the module's own forward over whole streams where the adapter gives one, and else the module called token
by token, each call with the states that the last one returned; for an appended state the host does what the
StateSpec says. A prefill graph is added where a call of many tokens equals as many calls of one.

Refused, with what to change: memory that is not declared, results that are not what the StateSpecs say, a module
without memory that is not causal, sizes that a trace has frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import nn

from exporters import check, export, trials
from exporters.adapted_graph import AdaptedGraph
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
from mscompile.models.own import Adapter, History, OwnModule

NAME = "adapter"
DECODE, PREFILL = "decode", "prefill"


@dataclass(frozen=True)
class AdaptedProgram:
    """The stream program of a user's module, which runs in eager mode, and its ONNX graphs once they are traced."""

    graphs: Mapping[str, nn.Module]
    spec: StreamSpec
    hits: tuple[Hit, ...]
    models: dict[str, ir.Model] = field(default_factory=dict)


def adapt(
    module: nn.Module,
    states: Sequence[StateSpec],
    profile: Profile,
    *,
    position: bool = False,
    context: int | None = None,
) -> AdaptedProgram:
    """The stream program of a module with its memory in arguments, and its graphs.

    Like `build`, but a prefill graph whose trace freezes a size is left out with a `Hit` that says why.
    """
    if not states:
        raise Refusal("a module without states remembers nothing: declare a StateSpec for each tensor it remembers")
    program = build(OwnModule(Adapter(module, states, position=position, context=context)), profile)
    models = {}
    for graph in program.spec.graphs:
        try:
            models[graph.name] = trace(program, graph)
        except Refusal as error:
            if graph.name != PREFILL:
                raise
            program = _without_prefill(program, str(error))
    return AdaptedProgram(program.graphs, program.spec, program.hits, models)


def build(model: OwnModule, profile: Profile) -> AdaptedProgram:
    """The stream program of a user's module. Raises Refusal with what to change."""
    adapter = model.adapter
    declared = sorted(adapter.states, key=lambda state: state.name)
    ticks = tuple(adapter.ticks) or (Tick((DECODE,)),)
    multiple = Schedule(ticks).period if adapter.ticks else 1
    graphs = _graphs(model, ticks)
    longest = profile.max_chunk - profile.max_chunk % multiple
    with torch.inference_mode():
        for graph in graphs.values():
            trials.check_results(graph, declared)
            trials.check_memory(graph, declared)
            graph.writes = trials.written(graph, declared)
        if isinstance(model.stepper, History):
            trials.check_causal(model.stepper)
        elif adapter.full is not None:
            trials.check_full(graphs, Schedule(ticks), declared, model)
        graphs[PREFILL] = AdaptedGraph(model, adapter.prefill or "")
        if not adapter.ticks:
            graphs[PREFILL].writes = graphs[DECODE].writes
        reason = _no_prefill(model, graphs, Schedule(ticks, None, multiple, longest), declared)
    if reason:
        del graphs[PREFILL]
    schedule = Schedule(ticks, None if reason else PREFILL, multiple, 1 if reason else longest)
    specs = tuple(_graph_spec(name, graph, declared, model.config.vocab_size) for name, graph in graphs.items())
    hit = Hit(NAME, PREFILL, not reason, reason or "a call of many tokens equals as many calls of one")
    vocab_size = model.config.vocab_size
    spec = StreamSpec(tuple(declared), specs, schedule, vocab_size, profile.max_batch, adapter.context)
    return AdaptedProgram(graphs, spec, (_memory_hit(model), hit))


def trace(program: AdaptedProgram, spec: GraphSpec) -> ir.Model:
    """One graph, held against its spec. Raises Refusal, for a size that the trace has frozen too."""
    with advising():
        model = export.export_module(program.graphs[spec.name], spec)
        check.check_interface(model, spec, "export")
    return model


@contextmanager
def advising() -> Iterator[None]:
    """What a trace of a user's module fails with, as a Refusal that says what to change."""
    try:
        yield
    except ExportError as error:
        raise Refusal(
            f"{error}; forward must take any batch and any number of tokens: "
            "no int(), len(), .item(), branch or loop over a size"
        ) from error


def _graphs(model: OwnModule, ticks: Sequence[Tick]) -> dict[str, AdaptedGraph]:
    """A graph for every method that ticks name; `decode` is forward."""
    closing = {name for tick in ticks for name in tick.closing}
    names = dict.fromkeys(name for tick in ticks for name in (*tick.graphs, *tick.closing))
    if not model.adapter.ticks:
        return {DECODE: AdaptedGraph(model, "forward")}
    for name in names:
        if not callable(getattr(model.stepper, name, None)):
            raise Refusal(f"a tick names {name!r}, which is no method of the module")
    return {name: AdaptedGraph(model, name, name in closing) for name in names}


def _no_prefill(
    model: OwnModule, graphs: Mapping[str, AdaptedGraph], schedule: Schedule, states: Sequence[StateSpec]
) -> str:
    """Why there is no graph for many tokens; empty if there is one."""
    if model.adapter.prefill is None:
        return "the adapter declares no prefill"
    if schedule.max_chunk < 2:
        return "the longest chunk is one token"
    if model.adapter.ticks and model.adapter.prefill == "forward":
        return "the adapter has ticks and names no method for many tokens"
    return trials.unlike_single_calls(graphs, graphs[PREFILL], schedule, states)


def _without_prefill(program: AdaptedProgram, reason: str) -> AdaptedProgram:
    spec = program.spec
    graphs = tuple(graph for graph in spec.graphs if graph.name != PREFILL)
    schedule = Schedule(spec.schedule.ticks, None, 1, 1)
    spec = StreamSpec(spec.states, graphs, schedule, spec.vocab_size, spec.max_batch, spec.max_context)
    modules = {name: graph for name, graph in program.graphs.items() if name != PREFILL}
    kept = tuple(hit for hit in program.hits if hit.place != PREFILL)
    return AdaptedProgram(modules, spec, (*kept, Hit(NAME, PREFILL, False, reason)))


def _memory_hit(model: OwnModule) -> Hit:
    names = ", ".join(state.name for state in model.adapter.states)
    if isinstance(model.stepper, History):
        why = "the module declares no memory: the stream so far is its state, and every call runs all of it"
    else:
        why = f"the module takes and returns {names}"
    return Hit(NAME, "memory", True, why)


def _graph_spec(name: str, graph: AdaptedGraph, states: Sequence[StateSpec], vocab_size: int) -> GraphSpec:
    names, written = graph.names, [state for state in states if state.name in graph.writes]
    inputs = tuple(state.as_input() for state in states)
    if graph.closing:
        return GraphSpec(name, inputs, tuple(state.as_output() for state in written), names, graph.writes, 0)
    consumed: Dim = CHUNK if name == PREFILL else 1
    head = (TensorSpec(TOKENS, "int64", (BATCH, consumed)), TensorSpec(POSITION, "int64", (BATCH,)))
    logits = TensorSpec(LOGITS, "float32", (BATCH, consumed, vocab_size))
    outputs = (logits, *(state.as_output(consumed) for state in written))
    return GraphSpec(name, (*head, *inputs), outputs, names, graph.writes, consumed)
