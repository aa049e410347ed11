"""dead: which states are dropped, and which only look unread."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from small_graphs import operators, parsed, run

from exporters import check
from exporters.passes import dead
from exporters.passes.base import Outcome
from mscompile.contracts import GraphSpec, Schedule, StateSpec, StreamSpec, TensorSpec, Tick

STEP = """(float[batch, 2] logits__in, float[batch, 2] a__in, float[batch, 2] b__in, float[batch, 2] c__in)
=> (float[batch, 2] logits, float[batch, 2] a__out, float[batch, 2] b__out, float[batch, 2] c__out)
{
    logits = Add (logits__in, a__in)
    a__out = Mul (a__in, b__in)
    b__out = Relu (b__in)
    rolled = Tanh (c__in)
    c__out = Add (rolled, a__in)
}"""
X = TensorSpec("logits.in", "float32", ("batch", 2))
STATES = tuple(StateSpec(name, "float32", ("batch", 2)) for name in "abc")


def graph_spec(name: str, reads: str, states: tuple[StateSpec, ...] = STATES) -> GraphSpec:
    chosen = [state for state in states if state.name in reads]
    names = tuple(state.name for state in chosen)
    return GraphSpec(
        name,
        (X, *(state.as_input() for state in chosen)),
        (TensorSpec("logits", "float32", ("batch", 2)), *(state.as_output() for state in chosen)),
        names, names, 1,
    )  # fmt: skip


SPEC = StreamSpec(STATES, (graph_spec("step", "abc"),), Schedule((Tick(("step",)),)), 2, 4)


def test_a_state_that_only_feeds_itself_is_dropped() -> None:
    model = parsed("step", STEP)
    outcome = dead.apply({"step": model}, SPEC)
    assert [(hit.place, hit.applied) for hit in outcome.hits] == [("c", True)]
    assert [state.name for state in outcome.spec.states] == ["a", "b"]  # b is read by way of a
    assert outcome.spec.graphs == (graph_spec("step", "ab"),)
    check.check_interface(model, outcome.spec.graphs[0], "dead")
    assert "Tanh" not in operators(model)
    given = {name: np.ones((1, 2), np.float32) for name in ("logits__in", "a__in", "b__in")}
    wanted = run(parsed("step", STEP), **given, c__in=np.ones((1, 2), np.float32))
    assert all(np.array_equal(value, wanted[name]) for name, value in run(model, **given).items())


def test_a_state_is_alive_if_any_graph_reads_it() -> None:
    other = STEP.replace("logits = Add (logits__in, a__in)", "logits = Add (logits__in, c__in)")
    graphs = {"step": parsed("step", STEP), "other": parsed("other", other)}
    spec = replace(SPEC, graphs=(graph_spec("step", "abc"), graph_spec("other", "abc")))
    assert dead.apply(graphs, spec) == Outcome(spec, ())
    assert all("Tanh" in operators(model) for model in graphs.values())
