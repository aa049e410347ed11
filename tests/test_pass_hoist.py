"""hoist: what it does, what it refuses and why, and that streams stay what they were."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import cases
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from engines.ort import CPU, OrtPlan
from exporters import check, derived, export, program, weights
from exporters.passes import hoist, table
from exporters.passes.base import Outcome
from mscompile.contracts import GraphSpec, Profile, Schedule, StateSpec, StreamSpec, TensorSpec, Tick

# ---- Small graphs -----------------------------------------------------------------------------------------

# A memory of 3 rows of 4, read through a projection w and, as it is, by nothing else; T new rows.
GIVEN = """
<ir_version: 10, opset_import: ["": 20]>
step (float[batch, T, 4] x, float[batch, 3, 4] "m.in") => (float[batch, S, S] logits, float[batch, 3, 4] "m.out")
<int64[1] from = {-3}, int64[1] three = {3}, int64[1] end = {9223372036854775807}, int64[1] one = {1}>
{
    c = Concat <axis = 1> ("m.in", x)
    k = MatMul (c, w)
    turned = Transpose <perm = [0, 2, 1]> (k)
    q = Slice (c, three, end, one)
    scores = MatMul (q, turned)
    logits = Identity (scores)
    "m.out" = Slice (c, from, end, one)
}
"""
STATE = StateSpec("m", "float32", ("batch", 3, 4), initial=0.5)
SPEC = StreamSpec(
    (STATE,),
    (
        GraphSpec(
            "step",
            (TensorSpec("x", "float32", ("batch", "T", 4)), STATE.as_input()),
            (TensorSpec("logits", "float32", ("batch", "S", "S")), STATE.as_output()),
            ("m",), ("m",), 1,
        ),
    ),
    Schedule((Tick(("step",)),)), 2, 4,
)  # fmt: skip
W = np.random.default_rng(0).standard_normal((4, 4), np.float32)


def parsed(text: str) -> ir.Model:
    """A graph in ONNX text, with shapes, the weights w and a module name for its product."""
    proto = onnx.parser.parse_model(text.replace('"m.in"', "m_in").replace('"m.out"', "m_out"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(W[0], "b"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    model.graph.name = "step"
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = {"m_in": "m.in", "m_out": "m.out"}.get(value.name or "", value.name)
    for node in model.graph:
        node.metadata_props["module"] = "layer.key"
    return model


def hoisted(text: str) -> tuple[ir.Model, Outcome]:
    model = parsed(text)
    return model, hoist.apply({"step": model}, SPEC)


def run(model: ir.Model, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name.replace("_", "."): value for name, value in inputs.items()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_the_memory_holds_the_projection_instead_of_the_rows() -> None:
    model, outcome = hoisted(GIVEN)
    assert [node.op_type for node in model.graph].count("MatMul") == 2
    product = next(node for node in model.graph if node.op_type == "MatMul" and node.inputs[1].name == "w")  # type: ignore[union-attr]
    assert product.inputs[0] is model.graph.inputs[0]  # only the new rows are projected
    assert [value.name for value in model.graph.inputs] == ["x", "m.key.in"]
    assert [value.name for value in model.graph.outputs] == ["logits", "m.key.out"]
    (state,) = outcome.spec.states
    assert (state.name, state.shape, state.time_axis, state.update) == ("m.key", ("batch", 4, 3), 2, "replace")
    assert outcome.spec.graphs[0].reads == outcome.spec.graphs[0].writes == ("m.key",)
    assert [(hit.place, hit.applied) for hit in outcome.hits] == [("m", True)]
    check.check_interface(model, outcome.spec.graphs[0], "hoist")
    assert all(node.outputs[0].shape is not None for node in model.graph)  # costs are counted from shapes


def test_it_computes_what_it_did() -> None:
    random = np.random.default_rng(1)
    before, (after, outcome) = parsed(GIVEN), hoisted(GIVEN)
    remembered = random.standard_normal((2, 3, 4), np.float32)
    function = outcome.derived["m.key"].function
    carried = derived.evaluate(function, remembered)
    assert np.allclose(carried, (remembered @ W).transpose(0, 2, 1), atol=1e-6)
    for count in (1, 2, 5):
        x = random.standard_normal((2, count, 4), np.float32)
        wanted = run(before, x=x, m_in=remembered)
        found = run(after, x=x, m_key_in=carried)
        assert np.abs(found["logits"] - wanted["logits"]).max() < 1e-5
        remembered, carried = wanted["m.out"], found["m.key.out"]
        assert np.abs(carried - derived.evaluate(function, remembered)).max() < 1e-5


def test_the_initial_value_is_the_projection_of_the_old_one() -> None:
    _, outcome = hoisted(GIVEN)
    initial = outcome.spec.states[0].initial_value(2)
    assert np.allclose(initial, np.broadcast_to((0.5 * W.sum(0))[None, :, None], (2, 4, 3)), atol=1e-6)


def test_a_bias_and_a_norm_are_row_wise() -> None:
    text = GIVEN.replace(
        "k = MatMul (c, w)", "n = LayerNormalization <axis = -1> (c, b, b) p = MatMul (n, w) k = Add (p, b)"
    )
    model, outcome = hoisted(text)
    assert outcome.hits[0].applied
    (norm,) = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert norm.inputs[0] is model.graph.inputs[0]


def test_the_batch_size_may_be_asked_of_it() -> None:
    sized = GIVEN.replace("c = Concat", 'size = Shape <start = 0, end = 1> ("m.in") c = Concat')
    sized = sized.replace("logits = Identity (scores)", "n = Cast <to = 1> (size) logits = Div (scores, n)")
    random = np.random.default_rng(2)
    x, remembered = random.standard_normal((2, 3, 4), np.float32), random.standard_normal((2, 3, 4), np.float32)
    model, outcome = hoisted(sized)
    assert outcome.hits[0].applied
    carried = derived.evaluate(outcome.derived["m.key"].function, remembered)
    wanted = run(parsed(sized), x=x, m_in=remembered)["logits"]
    assert np.abs(run(model, x=x, m_key_in=carried)["logits"] - wanted).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("c = Concat", 'n = Shape ("m.in") c = Concat'), "reads it by Concat, Shape, not by one Concat"),
        (("k = MatMul (c, w)", "k = Softmax <axis = 1> (c)"), "Softmax reads its rows, and is not row-wise"),
        (
            ("k = MatMul (c, w)", "turn = Transpose <perm = [0, 2, 1]> (c) k = MatMul (c, turn)"),
            "MatMul reads its rows",
        ),
        (('c = Concat <axis = 1> ("m.in", x)', 'c = Concat <axis = 1> (x, "m.in")'), "graph step reads it by Concat"),
        (('("m.in", x)', '("m.in", x, x)'), "graph step joins it with 2 other tensors, not with one"),
        (('c = Concat <axis = 1> ("m.in", x)', 'y = Relu ("m.in") c = Concat <axis = 1> (y, x)'), "reads it by Relu"),
        (("k = MatMul (c, w)", "k = Identity (x)"), "nothing reads its rows through a row-wise function"),
        (("q = Slice (c, three, end, one)", "q = Slice (c, one, end, one)"), "Slice reads its rows"),
    ],
)
def test_what_it_refuses(change: tuple[str, str], reason: str) -> None:
    text = GIVEN.replace(*change)
    assert text != GIVEN
    before = ir.to_proto(parsed(text)).SerializeToString(deterministic=True)
    model, outcome = hoisted(text)
    (hit,) = outcome.hits
    assert not hit.applied
    assert reason in hit.reason
    assert outcome.spec == SPEC
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_all_graphs_must_apply_the_same_functions() -> None:
    graphs = {"step": parsed(GIVEN), "more": parsed(GIVEN.replace("MatMul (c, w)", "Add (c, b)"))}
    graphs["more"].graph.name = "more"
    spec = replace(SPEC, graphs=(SPEC.graphs[0], replace(SPEC.graphs[0], name="more")))
    (hit,) = hoist.apply(graphs, spec).hits
    assert (hit.applied, hit.reason) == (False, "graph more applies other functions to its rows")


def test_a_state_that_no_graph_has_is_refused() -> None:
    other = replace(STATE, name="other")
    hits = hoist.apply({"step": parsed(GIVEN)}, replace(SPEC, states=(STATE, other))).hits
    assert [(hit.place, hit.applied) for hit in hits] == [("m", True), ("other", False)]
    assert hits[1].reason == "no graph here has it"


def test_appended_states_are_left_alone() -> None:
    appended = replace(STATE, update="append", time_axis=1)
    assert hoist.apply({"step": parsed(GIVEN)}, replace(SPEC, states=(appended,))).hits == ()


# ---- Transformer-XL ---------------------------------------------------------------------------------------


@cache
def exported(name: str) -> tuple[program.StreamProgram, dict[str, ir.Model], Outcome]:
    stream = program.build(cases.model(name, torch.float32), Profile(1, 3, 8))
    graphs = {graph.name: export.export_graph(stream, graph.name) for graph in stream.spec.graphs}
    return stream, graphs, table.run(graphs, stream.spec)


@pytest.mark.parametrize("name", ["post-norm-same-length", "pre-norm-same-length-clamp"])
def test_transformer_xl_remembers_keys_and_values(name: str, tmp_path: Path) -> None:
    stream, graphs, outcome = exported(name)
    wanted = [f"layer{layer:02}.mems.{what}" for layer in range(2) for what in ("key", "value")]
    assert [state.name for state in outcome.spec.states] == wanted
    weights.save({**graphs, **derived.models(outcome.derived)}, tmp_path)
    model = cases.model(name, torch.float32)
    session = OrtPlan(outcome.spec, tmp_path, CPU).session(2)
    states_of = derived.DerivedStates(tmp_path, outcome.spec).of
    eager = cases.eager_session(model, 2)
    tokens = cases.tokens(2, 30)
    for chunks in ([1] * 30, [30], [3, 8, 1, 1, 9, 8]):
        session.reset()
        eager.reset()
        assert cases.worst(cases.stream(session, tokens, chunks), cases.full(model, tokens)) < 1e-4
        cases.stream(eager, tokens, chunks)
        found, expected = session.state().states, states_of(eager.state()).states
        assert found.keys() == expected.keys()
        for state, value in found.items():
            assert cases.worst(value, expected[state]) < 1e-4, state
    assert len(stream.spec.states) == 2


@pytest.mark.parametrize("name", ["post-norm-same-length", "pre-norm-same-length-clamp"])
def test_a_reset_row_begins_with_the_projected_initial_value(name: str, tmp_path: Path) -> None:
    _, graphs, outcome = exported(name)
    weights.save(graphs, tmp_path)
    rollout = cases.Rollout(cases.model(name, torch.float32), OrtPlan(outcome.spec, tmp_path, CPU).session(3))
    assert rollout.run([("step", 6), ("reset", [1]), ("step", 2), ("reset", [0, 2]), ("step", 7)]) < 1e-4


def test_a_segment_memory_is_refused_with_the_reason() -> None:
    _, _, outcome = exported("post-norm")
    refused = [hit for hit in outcome.hits if hit.name == "hoist"]
    assert {hit.place for hit in refused} == {"layer00.mems", "layer01.mems"}
    assert all("joins it with 2 other tensors" in hit.reason for hit in refused if not hit.applied)
    assert not any(hit.applied for hit in refused)
