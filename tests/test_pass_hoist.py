"""hoist: what it does, what it refuses and why, and that streams stay what they were."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cases
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings

from engines.ort import CPU, OrtPlan
from exporters import check, derived, export, program, weights
from exporters.passes import fold, hoist, sizes
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
    names = {f"{state}_{way}": f"{state}.{way}" for state in "ms" for way in ("in", "out")}
    for plain, dotted in names.items():
        text = text.replace(f'"{dotted}"', plain)
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(W[0], "b"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    model.graph.name = "step"
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = names.get(value.name or "", value.name)
    for node in model.graph:
        node.metadata_props["module"] = "layer.key"
    return model


def hoisted(text: str, spec: StreamSpec = SPEC) -> tuple[ir.Model, Outcome]:
    model = parsed(text)
    return model, hoist.apply({"step": model}, spec)


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
    assert (state.name, state.shape, state.time_axis, state.update) == ("m.key", ("batch", 3, 4), 1, "replace")
    assert outcome.spec.graphs[0].reads == outcome.spec.graphs[0].writes == ("m.key",)
    assert [(hit.place, hit.applied) for hit in outcome.hits] == [("m", True)]
    check.check_interface(model, outcome.spec.graphs[0], "hoist")
    assert all(node.outputs[0].shape is not None for node in model.graph)  # costs are counted from shapes


def test_rows_lie_together_though_the_keys_are_read_transposed() -> None:
    model, _ = hoisted(GIVEN)
    (joined,) = (node for node in model.graph if node.op_type == "Concat")
    assert joined.attributes["axis"].as_int() == 1
    (turned,) = (usage.node for usage in joined.outputs[0].uses() if usage.node.op_type == "Transpose")
    assert [usage.node.op_type for usage in turned.outputs[0].uses()] == ["MatMul"]


def test_it_computes_what_it_did() -> None:
    random = np.random.default_rng(1)
    before, (after, outcome) = parsed(GIVEN), hoisted(GIVEN)
    remembered = random.standard_normal((2, 3, 4), np.float32)
    function = outcome.derived["m.key"].function
    carried = derived.evaluate(function, remembered)
    assert np.allclose(carried, remembered @ W, atol=1e-6)
    for count in (1, 2, 5):
        x = random.standard_normal((2, count, 4), np.float32)
        wanted = run(before, x=x, m_in=remembered)
        found = run(after, x=x, m_key_in=carried)
        assert np.abs(found["logits"] - wanted["logits"]).max() < 1e-5
        remembered, carried = wanted["m.out"], found["m.key.out"]
        assert np.abs(carried - derived.evaluate(function, remembered)).max() < 1e-5


def test_the_function_is_a_valid_graph_of_its_own() -> None:
    model = parsed(GIVEN.replace("k = MatMul (c, w)", "n = Relu (c) p = MatMul (n, w) k = Relu (p)"))
    model.graph.initializers["w"].name = "val_1"  # a name as new nodes get it
    function = hoist.apply({"step": model}, SPEC).derived["m.key"].function
    onnx.checker.check_model(ir.to_proto(function), full_check=True)


def test_the_initial_value_is_the_projection_of_the_old_one() -> None:
    _, outcome = hoisted(GIVEN)
    initial = outcome.spec.states[0].initial_value(2)
    assert np.allclose(initial, np.broadcast_to(0.5 * W.sum(0), (2, 3, 4)), atol=1e-6)


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


BRANCH = """flag = Constant <value = bool {1}> ()
    logits = If (flag) <
        then_branch = yes () => (float[batch, S, S] a) { r = MatMul (k, turned) a = Identity (r) },
        else_branch = no () => (float[batch, S, S] b) { b = Identity (scores) }
    >"""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("c = Concat", 'n = Shape ("m.in") c = Concat'), "reads it by Concat, Shape, not by one Concat"),
        (("k = MatMul (c, w)", "k = Softmax <axis = 1> (c)"), "Softmax reads its rows, and is not row-wise"),
        (
            ("k = MatMul (c, w)", "turn = Transpose <perm = [0, 2, 1]> (c) k = MatMul (c, turn)"),
            "MatMul reads its rows",
        ),
        (('c = Concat <axis = 1> ("m.in", x)', 'c = Concat <axis = 1> (x, "m.in")'), "Slice reads its rows"),
        (('("m.in", x)', '("m.in", x, x)'), "Slice reads its rows"),
        (('c = Concat <axis = 1> ("m.in", x)', 'c = Concat <axis = 0> ("m.in", x)'), "along its batch axis"),
        (('c = Concat <axis = 1> ("m.in", x)', 'y = Relu ("m.in") c = Concat <axis = 1> (y, x)'), "reads it by Relu"),
        (("k = MatMul (c, w)", "k = Identity (x)"), "nothing reads its rows through a row-wise function"),
        (("q = Slice (c, three, end, one)", "q = Slice (c, one, end, one)"), "Slice reads its rows"),
        (("MatMul (c, w)", "Transpose <perm = [0, 1, 2]> (c)"), "its rows are only arranged on the way"),
        (("logits = Identity (scores)", BRANCH), "a branch or loop of graph step reads its rows"),
        (('"m.out" = Slice (c,', '"m.out" = Slice (x,'), "graph step writes m, but not as the newest"),
        (
            ('"m.out" = Slice (c, from', 'z = Slice (c, one, three, one) "m.out" = Slice (c, from'),
            "Slice reads its rows",
        ),
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


def test_an_unknown_size_is_refused() -> None:
    model = parsed(GIVEN)
    projected = next(node for node in model.graph if node.op_type == "MatMul").outputs[0]
    next(usage.node for usage in projected.uses() if usage.node.op_type == "Transpose").outputs[0].shape = None
    (hit,) = hoist.apply({"step": model}, SPEC).hits
    assert hit.reason == "the size of turned, which would be remembered, is not fixed"


# ---- What is row-wise -------------------------------------------------------------------------------------

# The same with two new rows, so that every size is known: k is (batch, 5, 4).
TWO = GIVEN.replace("T, 4] x", "2, 4] x").replace("S, S", "2, 5")
CONSTANTS = """, int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}, int64[1] last = {-1},
 int64[4] heads = {0, 0, 2, 2}, int64[3] merged = {0, 0, 4}, int64[3] mixed = {0, 4, 5},
 int64[4] swapped = {3, 2, 1, 0}, int64[2] flat = {-1, 4}, int64[3] back = {-1, 5, 4},
 float[4, 2, 2] w3 = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2}, float[5, 1] steps = {1, 2, 3, 4, 5},
 float[5, 5] left = {1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5}>"""
ROW_WISE = {
    "split": "p = MatMul (c, w) s, t = Split <axis = 2, num_outputs = 2> (p) k = Concat <axis = 2> (t, s)",
    "slice": "p = MatMul (c, w) s = Slice (p, two, end, two) k = Concat <axis = 2> (s, s)",
    "gather": "p = MatMul (c, w) k = Gather <axis = -1> (p, swapped)",
    "einsum": 'k = Einsum <equation = "bth,hd->btd"> (c, w)',
    "einsum-heads": 'h = Einsum <equation = "bth,hnd->btnd"> (c, w3) k = Reshape (h, merged)',
    "einsum-turned": 'h = Einsum <equation = "bth,hd->tdb"> (c, w) k = Transpose <perm = [2, 0, 1]> (h)',
    "split-heads": "p = MatMul (c, w) h = Reshape (p, heads) g = Softmax <axis = -1> (h) k = Reshape (g, merged)",
    "transpose": "u = Transpose <perm = [1, 0, 2]> (c) p = MatMul (u, w) k = Transpose <perm = [1, 0, 2]> (p)",
    "unsqueeze": "u = Unsqueeze (c, one) p = MatMul (u, w) k = Squeeze (p, one)",
    "gate": "g = Sigmoid (c) m = Mul (g, c) k = MatMul (m, w)",
    "rms-norm": "s = Mul (c, c) m = ReduceMean (s, last) r = Sqrt (m) n = Div (c, r) k = MatMul (n, w)",
    "power": "a = Abs (c) p = Pow (a, b) m = Max (p, b) k = MatMul (m, w)",
}
NOT_ROW_WISE = {
    "mean over time": ("m = ReduceMean (c, one) k = Sub (c, m)", "ReduceMean"),
    "constant along time": ("k = Mul (c, steps)", "Mul"),
    "product along time": ("k = MatMul (left, c)", "MatMul"),
    "einsum over time": ('k = Einsum <equation = "bth,st->bsh"> (c, left)', "Einsum"),
    "norm over time": ("u = Transpose <perm = [0, 2, 1]> (c) s = Softmax (u) k = Transpose <perm = [0, 2, 1]> (s)", ""),
    "reshape that mixes rows": ("m = Reshape (c, mixed) k = Transpose <perm = [0, 2, 1]> (m)", "Reshape"),
    "rows merged with the batch": ("m = Reshape (c, flat) p = Gemm (m, w) k = Reshape (p, back)", "Reshape"),
    "gather of rows": ("g = Gather <axis = 1> (c, swapped) k = Concat <axis = 1> (g, x)", "Gather"),
    "concat of rows": ("k = Concat <axis = 1> (c, x)", "Concat"),
    "split of rows": ("s, t = Split <axis = 1, num_outputs = 2> (c) k = Concat <axis = 1> (s, t)", "Split"),
}  # fmt: skip


TWO_SPEC = replace(
    SPEC,
    graphs=(
        replace(
            SPEC.graphs[0],
            inputs=(TensorSpec("x", "float32", ("batch", 2, 4)), STATE.as_input()),
            outputs=(TensorSpec("logits", "float32", ("batch", 2, 5)), STATE.as_output()),
        ),
    ),
)


def two(body: str) -> str:
    """The graph with another k."""
    text = TWO.replace("k = MatMul (c, w)", body).replace("one = {1}>", "one = {1}" + CONSTANTS)
    assert body in text
    return text


@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise_operators(name: str) -> None:
    random = np.random.default_rng(3)
    before, (after, outcome) = parsed(two(ROW_WISE[name])), hoisted(two(ROW_WISE[name]), TWO_SPEC)
    assert outcome.hits[0].applied, outcome.hits
    check.check_interface(after, outcome.spec.graphs[0], "hoist")
    (state,) = outcome.spec.states
    remembered = STATE.initial_value(2)
    carried = state.initial_value(2)
    for _ in range(3):
        x = random.standard_normal((2, 2, 4), np.float32)
        wanted = run(before, x=x, m_in=remembered)
        found = run(after, **{"x": x, state.input_name.replace(".", "_"): carried})
        assert np.abs(found["logits"] - wanted["logits"]).max() < 1e-4 * np.abs(wanted["logits"]).max()
        remembered, carried = wanted["m.out"], found[state.output_name]
        function = outcome.derived[state.name].function
        assert np.allclose(carried, derived.evaluate(function, remembered), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NOT_ROW_WISE)
def test_operators_that_mix_rows(name: str) -> None:
    body, reader = NOT_ROW_WISE[name]
    (hit,) = hoisted(two(body), TWO_SPEC)[1].hits
    assert not hit.applied
    arranged = "its rows are only arranged on the way to what reads them"
    assert hit.reason == (f"{reader} reads its rows, and is not row-wise" if reader else arranged)


def test_sizes_are_compared_as_expressions() -> None:
    chunk, unknown = ir.SymbolicDim("chunk"), ir.SymbolicDim(None)
    assert sizes.same(sizes.total([5, chunk]), ir.SymbolicDim("chunk + 5"))
    assert sizes.same(sizes.combined(operator.sub, sizes.total([chunk, 5]), 5), chunk)
    assert not sizes.same(sizes.total([5, chunk]), chunk)
    assert not sizes.same(unknown, unknown)
    assert sizes.total([unknown, 3]) is sizes.product([unknown, 3]) is None
    assert sizes.product([2, chunk, 3]) == sizes.product([chunk, 6]) == (6, ["chunk"])


# ---- Where time, batch and other memories are -------------------------------------------------------------

# Time first and batch second, as in most published code: sizes are computed from the inputs.
TIME_FIRST = """
<ir_version: 10, opset_import: ["": 20]>
step (float[T, batch, 4] x, float[3, batch, 4] "m.in") => (float[T, batch, 2] logits, float[3, batch, 4] "m.out")
<int64[1] three = {3}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] none = {-1},
 int64[1] end = {9223372036854775807}>
{
    t = Shape <start = 0, end = 1> (x)
    n = Shape <start = 1, end = 2> ("m.in")
    c = Concat <axis = 0> ("m.in", x)
    p = MatMul (c, w)
    q, k = Split <axis = 2, num_outputs = 2> (p)
    minus = Neg (t)
    latest = Slice (q, minus, end, zero)
    mixed = ReduceSum <keepdims = 1> (k, zero)
    sums = Add (latest, mixed)
    sizes = Concat <axis = 0> (t, n, two)
    logits = Reshape (sums, sizes)
    total = Add (t, three)
    "m.out" = Slice (c, t, total, zero)
}
"""


def time_first() -> tuple[ir.Model, StreamSpec]:
    state = StateSpec("m", "float32", (3, "batch", 4), batch_axis=1, initial=0.5)
    interface = (TensorSpec("x", "float32", ("T", "batch", 4)), TensorSpec("logits", "float32", ("T", "batch", 2)))
    graph = GraphSpec("step", (interface[0], state.as_input()), (interface[1], state.as_output()), ("m",), ("m",), 1)
    model = parsed(TIME_FIRST)
    for node in model.graph:  # what onnx does not infer: the joined rows are 3 more than the new ones
        for out in node.outputs:
            if node.op_type in ("Concat", "MatMul", "Split") and out.name in ("c", "p", "q", "k"):
                out.shape = ir.Shape(["T + 3", *list(out.shape or ())[1:]])
    return model, replace(SPEC, states=(state,), graphs=(graph,))


def test_time_may_come_first_and_sizes_may_be_computed() -> None:
    random = np.random.default_rng(4)
    (before, spec), (after, _) = time_first(), time_first()
    outcome = hoist.apply({"step": after}, spec)
    assert outcome.hits[0].applied, outcome.hits
    (state,) = outcome.spec.states
    assert (state.shape, state.time_axis, state.batch_axis) == ((3, "batch", 2), 0, 1)
    assert np.allclose(state.initial_value(2), (0.5 * W.sum(0))[None, None, 2:], atol=1e-6)
    products = [node for node in after.graph if node.op_type == "MatMul"]
    assert [node.inputs[0] for node in products] == [after.graph.inputs[0]]  # one product, of the new rows
    remembered, carried = spec.states[0].initial_value(2), state.initial_value(2)
    for count in (1, 4, 2):
        x = random.standard_normal((count, 2, 4), np.float32)
        wanted, found = run(before, x=x, m_in=remembered), run(after, x=x, m_key_in=carried)
        assert np.abs(found["logits"] - wanted["logits"]).max() < 1e-5
        remembered, carried = wanted["m.out"], found["m.key.out"]


# A second memory, which only gains rows, behind the first; `close` moves its rows to the first.
SEGMENT = """
<ir_version: 10, opset_import: ["": 20]>
step (float[batch, 1, 4] x, float[batch, 3, 4] "m.in", float[batch, 2, 4] "s.in")
  => (float[batch, 1, 6] logits, float[batch, 1, 4] "s.out")
{
    c = Concat <axis = 1> ("m.in", "s.in", x)
    k = MatMul (c, w)
    turned = Transpose <perm = [0, 2, 1]> (k)
    logits = MatMul (x, turned)
    "s.out" = Identity (x)
}
"""
CLOSE = """
<ir_version: 10, opset_import: ["": 20]>
close (float[batch, 3, 4] "m.in", float[batch, 2, 4] "s.in") => (float[batch, 3, 4] "m.out")
<int64[1] from = {2}, int64[1] end = {5}, int64[1] one = {1}>
{
    c = Concat <axis = 1> ("m.in", "s.in")
    "m.out" = Slice (c, from, end, one)
}
"""


def segment(step: str = SEGMENT, close: str = CLOSE) -> tuple[dict[str, ir.Model], StreamSpec]:
    memory = StateSpec("m", "float32", ("batch", 3, 4), initial=0.5)
    appended = StateSpec("s", "float32", ("batch", 2, 4), update="append", time_axis=1)
    logits = TensorSpec("logits", "float32", ("batch", 1, 6))
    given = (memory.as_input(), appended.as_input())
    inputs = (TensorSpec("x", "float32", ("batch", 1, 4)), *given)
    graphs = (
        GraphSpec("step", inputs, (logits, appended.as_output(1)), ("m", "s"), ("s",), 1),
        GraphSpec("close", given, (memory.as_output(),), ("m", "s"), ("m",), 0),
    )
    models = {"step": parsed(step), "close": parsed(close)}
    models["close"].graph.name = "close"
    return models, replace(SPEC, states=(memory, appended), graphs=graphs)


def test_memories_that_are_joined_are_hoisted_together() -> None:
    random = np.random.default_rng(5)
    (before, spec), (after, _) = segment(), segment()
    outcome = hoist.apply(after, spec)
    assert [(hit.place, hit.applied) for hit in outcome.hits] == [("m", True), ("s", True)]
    assert [(s.name, s.update, s.time_axis) for s in outcome.spec.states] == [
        ("m.key", "replace", 1), ("s.key", "append", 1),
    ]  # fmt: skip
    for graph in outcome.spec.graphs:
        check.check_interface(after[graph.name], graph, "hoist")
    assert all(node.op_type != "MatMul" for node in after["close"].graph)
    m, s, x = (random.standard_normal((2, rows, 4), np.float32) for rows in (3, 2, 1))
    m_key, s_key = (derived.evaluate(outcome.derived[f"{n}.key"].function, v) for n, v in (("m", m), ("s", s)))
    wanted, found = run(before["step"], x=x, m_in=m, s_in=s), run(after["step"], x=x, m_key_in=m_key, s_key_in=s_key)
    assert np.abs(found["logits"] - wanted["logits"]).max() < 1e-5
    assert np.allclose(found["s.key.out"], x @ W, atol=1e-5)
    closed = run(after["close"], m_key_in=m_key, s_key_in=s_key)["m.key.out"]
    moved = run(before["close"], m_in=m, s_in=s)["m.out"]
    assert np.allclose(closed, moved @ W, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "close", "reason"),
    [
        (
            ('"s.out" = Identity (x)', '"s.out" = Relu (x)'),
            ("", ""),
            "graph step appends other rows to s than it joins",
        ),
        (("", ""), ("{2}", "{1}"), "Slice reads its rows, and is not row-wise"),
        (("", ""), ("{5}", "{4}"), "Slice reads its rows, and is not row-wise"),
        (("", ""), ("Concat <axis = 1>", "Concat <axis = 2>"), "graph close joins it along its 4 axis"),
        (("", ""), ("c = Concat", 'y = Relu ("s.in") c = Concat'), "graph close reads it by Concat, Relu"),
    ],
)
def test_joined_memories_are_refused_together(step: tuple[str, str], close: tuple[str, str], reason: str) -> None:
    models, spec = segment(SEGMENT.replace(*step), CLOSE.replace(*close))
    before = {name: ir.to_proto(model).SerializeToString(deterministic=True) for name, model in models.items()}
    hits = hoist.apply(models, spec).hits
    assert [(hit.place, hit.applied) for hit in hits] == [("m", False), ("s", False)]
    assert all(reason in hit.reason for hit in hits)
    assert {n: ir.to_proto(model).SerializeToString(deterministic=True) for n, model in models.items()} == before


# ---- Transformer-XL ---------------------------------------------------------------------------------------


@cache
def exported(name: str) -> tuple[dict[str, ir.Model], Outcome]:
    """The graphs of a model, folded and hoisted."""
    stream = program.build(cases.model(name, torch.float32), Profile(1, 3, 8))
    graphs = {graph.name: export.export_graph(stream, graph.name) for graph in stream.spec.graphs}
    fold.apply(graphs, stream.spec)
    outcome = hoist.apply(graphs, stream.spec)
    for graph in outcome.spec.graphs:
        check.check_interface(graphs[graph.name], graph, "hoist")
    return graphs, outcome


def saved(name: str, directory: Path) -> OrtPlan:
    graphs, outcome = exported(name)
    everything = {**graphs, **derived.models(outcome.derived)}
    weights.save({name: model.clone() for name, model in everything.items()}, directory)
    return OrtPlan(outcome.spec, directory, CPU)


MEMORIES = {
    "post-norm-same-length": ("mems",),
    "pre-norm-same-length-clamp": ("mems",),
    "post-norm": ("mems", "segment"),
    "pre-norm-clamp": ("mems", "segment"),
    "segment-longer-than-memory": ("mems", "segment"),
}


@pytest.mark.parametrize(
    "name", [name if n < 3 else pytest.param(name, marks=pytest.mark.slow) for n, name in enumerate(MEMORIES)]
)
def test_transformer_xl_remembers_keys_and_values(name: str, tmp_path: Path) -> None:
    plan = saved(name, tmp_path)
    wanted = [
        f"layer{n:02}.{memory}.{what}" for n in range(2) for memory in MEMORIES[name] for what in ("key", "value")
    ]
    assert [state.name for state in plan.spec.states] == wanted
    session, model = plan.session(2), cases.model(name, torch.float32)
    states_of = derived.DerivedStates(tmp_path, plan.spec).of
    eager = cases.eager_session(model, 2)
    tokens = cases.tokens(2, 30)
    for chunks in ([1] * 30, [30], [3, 8, 1, 1, 9, 8]):
        session.reset()
        eager.reset()
        assert cases.worst(cases.stream(session, tokens, chunks), cases.full(model, tokens)) < 1e-4
        cases.stream(eager, tokens, chunks)
        found, expected = session.state(), states_of(eager.state())
        assert found.states.keys() == expected.states.keys()
        assert {n: c.tolist() for n, c in found.cursors.items()} == {n: c.tolist() for n, c in expected.cursors.items()}
        for state, value in found.states.items():
            assert cases.worst(value, expected.states[state]) < 1e-4, state


@pytest.mark.parametrize("name", ["post-norm-same-length", "post-norm"])
def test_any_chunking_and_resets_give_the_same_stream(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    plan, model = saved(name, tmp_path_factory.mktemp(name)), cases.model(name, torch.float32)

    @settings(max_examples=10)
    @given(cases.plans())
    def check_plan(drawn: tuple[int, int, list[tuple[Any, ...]]]) -> None:
        batch, _, actions = drawn
        assert cases.Rollout(model, plan.session(batch)).run(actions) < 1e-4

    check_plan()


def test_closing_a_segment_projects_nothing() -> None:
    graphs, outcome = exported("post-norm")
    assert {node.op_type for node in graphs["close"].graph} == {"Concat", "Slice"}
    assert [state.update for state in outcome.spec.states[:4]] == ["replace", "replace", "append", "append"]
