"""dead: a state that no logits depend on is not kept.

Given                                              Becomes
  mems.out = Concat(mems.in, h)[-M:]                 nothing
  read by nothing else, in no graph

Transformer-XL as published remembers the output of its last layer, which no layer attends to. What keeps a state
alive is a path to logits, in any graph, perhaps by way of another state that is alive.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.passes.base import Graphs, Outcome
from mscompile.contracts import LOGITS, GraphSpec, Hit, StreamSpec

NAME = "dead"
WHY = "a state that no logits depend on is not kept"


def apply(graphs: Graphs, spec: StreamSpec) -> Outcome:
    alive = _alive(graphs, spec)
    dead = [state.name for state in spec.states if state.name not in alive]
    if not dead:
        return Outcome(spec, ())
    for model in graphs.values():
        _drop(model, dead)
    hits = tuple(Hit(NAME, name, True, "nothing but its own next value is computed from it") for name in dead)
    states = tuple(state for state in spec.states if state.name in alive)
    return Outcome(replace(spec, states=states, graphs=tuple(_without(graph, dead) for graph in spec.graphs)), hits)


def _alive(graphs: Graphs, spec: StreamSpec) -> set[str]:
    alive = {given.recent.name for given in spec.inputs}  # read by the host
    while True:
        wanted = {LOGITS, *(f"{name}.out" for name in alive)}
        read = {name for model in graphs.values() for name in _inputs_of(model.graph, wanted)}
        now = {state.name for state in spec.states if state.input_name in read}
        if now <= alive:
            return alive
        alive |= now


def _inputs_of(graph: ir.Graph, outputs: set[str]) -> set[str]:
    """Names of the graph inputs that these outputs are computed from."""
    found: set[str] = set()
    seen: set[ir.Value] = set()
    todo = [value for value in graph.outputs if value.name in outputs]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_input():
            found.add(value.name or "")
        elif (node := value.producer()) is not None:
            todo += [each for each in node.inputs if each is not None]
    return found


def _drop(model: ir.Model, dead: list[str]) -> None:
    names = {f"{name}.{end}" for name in dead for end in ("in", "out")}
    for value in [value for value in model.graph.outputs if value.name in names]:
        model.graph.outputs.remove(value)
    common.RemoveUnusedNodesPass()(model)
    for value in [value for value in model.graph.inputs if value.name in names]:
        model.graph.inputs.remove(value)


def _without(graph: GraphSpec, dead: list[str]) -> GraphSpec:
    names = {f"{name}.{end}" for name in dead for end in ("in", "out")}
    return replace(
        graph,
        inputs=tuple(tensor for tensor in graph.inputs if tensor.name not in names),
        outputs=tuple(tensor for tensor in graph.outputs if tensor.name not in names),
        reads=tuple(name for name in graph.reads if name not in dead),
        writes=tuple(name for name in graph.writes if name not in dead),
    )
