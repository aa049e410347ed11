"""append: rolled memories become rings, and the stream stays what it was over many turns of the ring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cases
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import operators, parsed

from engines.ort import CPU, OrtPlan
from engines.session import StreamSession
from exporters import check, derived, export, program, weights
from exporters.passes import append, fold, table
from exporters.passes.base import Outcome
from mscompile.contracts import GraphSpec, Profile, Schedule, StateSpec, StreamSpec, TensorSpec, Tick

# ---- A small model: one head over a memory of M rolled rows, with position terms and a mask ------------------

M, D = 3, 4
VOCAB = D

HEADER = (
    "(int64[batch, {T}] tokens, int64[batch] position, float[batch, 3, 4] k__in, float[batch, 3, 4] v__in)"
    " => (float[batch, {T}, 4] logits, float[batch, 3, 4] k__out, float[batch, 3, 4] v__out)"
)
BODY = """
{
    x = Gather <axis = 0> (table, tokens)
    kn = MatMul (x, wk)
    vn = MatMul (x, wv)
    kj = Concat <axis = 1> (k__in, kn)
    vj = Concat <axis = 1> (v__in, vn)
    size = Shape <start = 1, end = 2> (tokens)
    count = Squeeze (size)
    total = Add (count, three)
    rows = Range (zero, count, one)
    columns = Range (zero, total, one)
    query = Unsqueeze (rows, last)
    before = Sub (query, columns)
    n = Add (before, three)
    index = Clip (n, zero, three)
    index3 = Unsqueeze (index, first)
    shape = Shape (scores)
    expanded = Expand (index3, shape)
    distances = MatMul (x, wp)
    p = GatherElements <axis = 2> (distances, expanded)
    causal0 = GreaterOrEqual (n, zero)
    near = Less (n, four)
    causal1 = And (causal0, near)
    causal = Unsqueeze (causal1, first)
    start = Sub (three, position)
    start2 = Unsqueeze (start, last)
    filled2 = GreaterOrEqual (columns, start2)
    filled = Unsqueeze (filled2, middle)
    seen = And (causal, filled)
    hidden = Not (seen)
    turned = Transpose <perm = [0, 2, 1]> (kj)
    scores = MatMul (x, turned)
    s = Add (scores, p)
    masked = Where (hidden, lowest, s)
    w = Softmax <axis = -1> (masked)
    logits = MatMul (w, vj)
    k__out = Slice (kj, from, end, middle)
    v__out = Slice (vj, from, end, middle)
}
"""
RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "table": RANDOM.standard_normal((VOCAB, D), np.float32),
    **{name: RANDOM.standard_normal((D, D), np.float32) for name in ("wk", "wv", "wp")},
    "lowest": np.float32(-3e38),
    **{name: np.int64(value) for name, value in (("zero", 0), ("one", 1), ("three", 3), ("four", 4))},
    **{name: np.array([value]) for name, value in (("first", 0), ("middle", 1), ("last", -1), ("from", -3))},
    "end": np.array([2**63 - 1]),
}
STATES = tuple(StateSpec(name, "float32", ("batch", M, D), time_axis=1) for name in ("k", "v"))


def graph_spec(name: str, tokens: int | str) -> GraphSpec:
    head = (TensorSpec("tokens", "int64", ("batch", tokens)), TensorSpec("position", "int64", ("batch",)))
    return GraphSpec(
        name,
        (*head, *(state.as_input() for state in STATES)),
        (TensorSpec("logits", "float32", ("batch", tokens, D)), *(state.as_output() for state in STATES)),
        ("k", "v"), ("k", "v"), tokens,
    )  # fmt: skip


SPEC = StreamSpec(
    STATES,
    (graph_spec("decode", 1), graph_spec("prefill", "chunk")),
    Schedule((Tick(("decode",)),), "prefill", 1, 7), VOCAB, 4,
)  # fmt: skip


def models(*changes: tuple[str, str]) -> dict[str, ir.Model]:
    """Both graphs, folded as they are when `append` runs."""
    body = BODY
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    made = {}
    for spec, tokens in zip(SPEC.graphs, ("1", "chunk"), strict=True):
        model = parsed(spec.name, HEADER.replace("{T}", tokens) + body, WEIGHTS)
        made[spec.name] = model
    fold.apply(made, SPEC)
    return made


def plan(graphs: dict[str, ir.Model], spec: StreamSpec, directory: Path) -> OrtPlan:
    directory.mkdir()
    weights.save(graphs, directory)
    return OrtPlan(spec, directory, CPU)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[OrtPlan, OrtPlan]:
    """The model with rolled memories, and with rings."""
    directory = tmp_path_factory.mktemp("append")
    rolled = plan(models(), SPEC, directory / "rolled")
    graphs = models()
    outcome = append.apply(graphs, SPEC)
    return rolled, plan(graphs, outcome.spec, directory / "ring")


def test_the_memory_is_a_ring_that_the_graph_returns_new_rows_of() -> None:
    graphs = models()
    outcome = append.apply(graphs, SPEC)
    assert [(hit.place, hit.applied) for hit in outcome.hits] == [("k", True), ("v", True)]
    assert {(state.update, state.time_axis) for state in outcome.spec.states} == {("append", 1)}
    for spec, rows in zip(outcome.spec.graphs, (1, "chunk"), strict=True):
        assert [tensor.shape for tensor in spec.outputs[1:]] == [("batch", rows, D)] * 2
        check.check_interface(graphs[spec.name], spec, "append")
        assert "Slice" not in operators(graphs[spec.name])


def test_one_token_reads_the_memory_where_it_lies() -> None:
    graphs = models()
    append.apply(graphs, SPEC)
    given = [value for value in graphs["decode"].graph.inputs if (value.name or "").endswith(".in")]
    readers = [usage.node.op_type for value in given for usage in value.uses()]
    assert readers == ["Transpose", "MatMul"]  # which runtimes fuse into the product: no copy
    (softmax,) = (node for node in graphs["decode"].graph if node.op_type == "Softmax")
    assert softmax.inputs[0] is not None


def test_a_permutation_moves_to_the_index_of_shifted_position_terms() -> None:
    graphs = models()
    append.apply(graphs, SPEC)
    (scores,) = (node for node in graphs["prefill"].graph if node.outputs[0].name == "s")
    (term,) = (value for value in scores.inputs if value is not None and value.producer().op_type == "GatherElements")  # type: ignore[union-attr]
    shifted = term.producer()
    assert shifted is not None
    assert shifted.inputs[0] is not None
    assert shifted.inputs[0].name == "distances"  # as before: only the index has changed


def compare(plans: tuple[OrtPlan, OrtPlan], batch: int, actions: list[tuple[str, int]]) -> float:
    """The largest difference of logits between the two plans, and of states in the order of the ring."""
    rolled, ring = (StreamSession(plan.spec, plan.session(batch)._executor, batch) for plan in plans)
    random, worst = np.random.default_rng(len(actions)), 0.0
    for kind, count in actions:
        if kind == "reset":
            for session in (rolled, ring):
                session.reset([count % batch])
            continue
        tokens = random.integers(0, VOCAB, (batch, count))
        worst = max(worst, float(np.abs(rolled.step(tokens) - ring.step(tokens)).max()))
        before, after = rolled.state(), ring.state()
        assert before.position.tolist() == after.cursors["k"].tolist() == after.cursors["v"].tolist()
        for name in ("k", "v"):
            for row, position in enumerate(before.position.tolist()):
                turned = np.roll(before.states[name][row], position, axis=0)
                worst = max(worst, float(np.abs(turned - after.states[name][row]).max()))
    return worst


ACTIONS = st.lists(
    st.one_of(st.tuples(st.just("step"), st.integers(1, 9)), st.tuples(st.just("reset"), st.integers(0, 3))),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(deadline=None)
@given(batch=st.integers(1, 3), actions=ACTIONS)
def test_any_chunks_and_resets_give_the_same_stream(
    plans: tuple[OrtPlan, OrtPlan], batch: int, actions: list[tuple[str, int]]
) -> None:
    assert compare(plans, batch, actions) < 1e-5


def test_many_turns_of_the_ring(plans: tuple[OrtPlan, OrtPlan]) -> None:
    assert compare(plans, 2, [("step", 1 + step % 2) for step in range(400)]) < 1e-5


def test_a_chunk_longer_than_the_ring_leaves_its_newest_rows(plans: tuple[OrtPlan, OrtPlan]) -> None:
    assert compare(plans, 2, [("step", 2), ("step", 7), ("step", 1), ("step", 7), ("step", 5)]) < 1e-5


OUT = "k__out = Slice (kj, from, end, middle)"
REFUSED = {
    "ReduceMax depends on the order of its rows": (
        "logits = MatMul (w, vj)",
        "r = ReduceMax <keepdims = 1> (vj, middle) b = MatMul (w, vj) logits = Add (b, r)",
    ),
    "CumSum depends on the order of its rows": (
        "scores = MatMul (x, turned)", "sums = CumSum (turned, two) scores = MatMul (x, sums)",
    ),
    "TopK depends on the order of its rows": (
        "w = Softmax <axis = -1> (masked)",
        "w = Softmax <axis = -1> (masked) top, best = TopK <axis = -1> (w, single)",
    ),
    "graph decode reads it by Concat, Identity, not by one Concat with new rows behind it": (
        OUT, "oldest = Identity (k__in) k__out = Identity (oldest)",
    ),
    "graph decode does not keep the newest 3 rows": (
        OUT, "double = Add (kj, kj) k__out = Slice (double, from, end, middle)",
    ),
    "not by one Concat": ("kj = Concat <axis = 1> (k__in, kn)", "kj = Concat <axis = 1> (kn, k__in)"),
    "does not join it with one new row a token": (
        "kn = MatMul (x, wk)", "kn0 = MatMul (x, wk) kn = Concat <axis = 1> (kn0, kn0)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("reason", "change"), REFUSED.items())
def test_what_it_refuses(reason: str, change: tuple[str, str]) -> None:
    extra = {"two": np.int64(2), "single": np.array([1])}
    body = HEADER.replace("{T}", "1") + BODY.replace(*change)
    assert BODY.replace(*change) != BODY
    model = parsed("decode", body, {**WEIGHTS, **extra})
    spec = replace(SPEC, graphs=SPEC.graphs[:1], schedule=Schedule((Tick(("decode",)),)))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    outcome = append.apply({"decode": model}, spec)
    assert not any(hit.applied for hit in outcome.hits if hit.place == "k")
    assert any(reason in hit.reason for hit in outcome.hits), outcome.hits
    if not any(hit.applied for hit in outcome.hits):
        assert outcome.spec == spec
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_memories_that_are_summed_up_together_are_refused_together() -> None:
    """A ring of keys with a rolled memory of values would pair the wrong rows."""
    body = BODY.replace(
        "v__out = Slice (vj, from, end, middle)", "d = Add (vj, vj) v__out = Slice (d, from, end, middle)"
    )
    model = parsed("decode", HEADER.replace("{T}", "1") + body, WEIGHTS)
    spec = replace(SPEC, graphs=SPEC.graphs[:1], schedule=Schedule((Tick(("decode",)),)))
    outcome = append.apply({"decode": model}, spec)
    assert [(hit.place, hit.applied) for hit in outcome.hits] == [("k", False), ("v", False)]


def test_appended_states_are_left_alone() -> None:
    spec = replace(SPEC, states=tuple(replace(state, update="append") for state in STATES), graphs=())
    assert append.apply({}, spec) == Outcome(spec, ())


# ---- Transformer-XL ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pre-norm-same-length-clamp", "window-of-two"])
def transformer_xl(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, OrtPlan]:
    name = str(request.param)
    stream = program.build(cases.model(name, torch.float32), Profile(1, 3, 8))
    graphs = {graph.name: export.export_graph(stream, graph.name) for graph in stream.spec.graphs}
    outcome = table.run(graphs, stream.spec)
    directory = tmp_path_factory.mktemp("exported")
    weights.save({**graphs, **derived.models(outcome.derived)}, directory)
    return name, OrtPlan(outcome.spec, directory, CPU)


def test_transformer_xl_appends_keys_and_values(transformer_xl: tuple[str, OrtPlan]) -> None:
    _, plan = transformer_xl
    assert {state.update for state in plan.spec.states} == {"append"}


@settings(deadline=None, max_examples=20)
@given(rollout=cases.plans())
def test_any_stream_equals_the_full_forward(transformer_xl: tuple[str, OrtPlan], rollout: tuple) -> None:  # type: ignore[type-arg]
    name, plan = transformer_xl
    batch, _, actions = rollout
    assert cases.Rollout(cases.model(name, torch.float32), plan.session(batch)).run(actions) < 1e-4


def test_a_long_stream_equals_the_full_forward(transformer_xl: tuple[str, OrtPlan]) -> None:
    name, plan = transformer_xl
    model, ids = cases.model(name, torch.float32), cases.tokens(2, 260)
    found = cases.stream(plan.session(2), ids, [1] * 120 + [8] * 10 + [1] * 60)
    assert cases.worst(found, cases.full(model, ids)) < 1e-4
