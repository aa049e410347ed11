"""scale, merge, mask and layout: what each makes of a small graph, what it leaves alone, and that results stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import operators, parsed, run

from exporters.passes import layout, mask, merge, scale
from exporters.passes.base import Outcome
from mscompile.contracts import Array, GraphSpec, Schedule, StreamSpec, TensorSpec, Tick

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape, np.float32)


def spec(tokens: int | str) -> StreamSpec:
    graph = GraphSpec("step", (TensorSpec("x", "float32", ("batch", 1, 8)),), (), (), (), tokens)
    return StreamSpec((), (graph,), Schedule((Tick(("step",)),)), 2, 4)


def initializers(model: ir.Model) -> dict[str, Array]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


# ---- scale ------------------------------------------------------------------------------------------------

QUERY = """(float[batch, T, 8] x) => (float[batch, 2, T, 4] a, float[batch, 2, T, 4] b)
{
    q = MatMul (x, w)
    split = Reshape (q, heads)
    turned = Transpose <perm = [0, 2, 1, 3]> (split)
    with_u = Add (turned, u)
    a0 = Mul (with_u, half)
    with_v = Add (v, turned)
    b0 = Mul (half, with_v)
    a = Identity (a0)
    b = Identity (b0)
}"""
QUERY_WEIGHTS = {
    "w": normal(8, 8), "u": normal(1, 2, 1, 4), "v": normal(1, 2, 1, 4),
    "half": np.float32(0.5), "third": np.float32(1 / 3), "heads": np.array([0, 0, 2, 4]),
}  # fmt: skip


def test_a_factor_of_all_uses_goes_into_the_weights() -> None:
    model = parsed("step", QUERY, QUERY_WEIGHTS)
    outcome = scale.apply({"step": model}, spec(1))
    assert "Mul" not in operators(model)
    assert [(hit.place, hit.reason) for hit in outcome.hits] == [
        ("step", "the factor 0.5 of 1 products is part of their weights")
    ]
    made = initializers(model)
    assert np.array_equal(made["w.times_0.5"], QUERY_WEIGHTS["w"] * np.float32(0.5))
    assert np.array_equal(made["w"], QUERY_WEIGHTS["w"])  # other users of it keep theirs
    x = normal(2, 3, 8)
    found, wanted = run(model, x=x), run(parsed("step", QUERY, QUERY_WEIGHTS), x=x)
    assert all(np.array_equal(found[name], wanted[name]) for name in "ab")  # a power of two is exact


@pytest.mark.parametrize(
    "change",
    [
        ("b0 = Mul (half, with_v)", "b0 = Mul (third, with_v)"),  # another factor
        ("b0 = Mul (half, with_v)", "b0 = Identity (with_v)"),  # none
        ("with_v = Add (v, turned)", "with_v = Add (turned, turned)"),  # what is added depends on the input
        ("a0 = Mul (with_u, half)", "a0 = Mul (with_u, u)"),  # not one number
        ("q = MatMul (x, w)", "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t) q = MatMul (y, x)"),
    ],
)
def test_scale_leaves_other_products_alone(change: tuple[str, str]) -> None:
    assert QUERY.replace(*change) != QUERY
    model = parsed("step", QUERY.replace(*change), QUERY_WEIGHTS)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert scale.apply({"step": model}, spec(1)) == Outcome(spec(1), ())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# ---- mask -------------------------------------------------------------------------------------------------

MASKED = """(float[batch, 2, T, S] s, bool[batch, 1, T, S] hidden) => (float[batch, 2, T, S] w, float[batch, 2, T, S] z)
{
    first = Where (hidden, lowest, s)
    w = Softmax <axis = -1> (first)
    other = Relu (s)
    second = Where (hidden, lowest, other)
    joined = Concat <axis = -1> (second, s)
    both = Softmax <axis = -1> (joined)
    z, rest = Split <axis = -1, num_outputs = 2> (both)
}"""
LOWEST = {"lowest": np.float32(np.finfo(np.float32).min), "small": np.float32(-5)}


def test_a_mask_is_added_once() -> None:
    model = parsed("step", MASKED, LOWEST)
    outcome = mask.apply({"step": model}, spec(1))
    assert operators(model).count("Where") == 1
    assert operators(model).count("Add") == 2
    assert [hit.reason for hit in outcome.hits] == ["2 selections are additions of 1 masks"]
    s, hidden = 30 * normal(2, 2, 3, 5), RANDOM.random((2, 1, 3, 5)) < 0.5
    hidden[..., 0] = False
    found, wanted = run(model, s=s, hidden=hidden), run(parsed("step", MASKED, LOWEST), s=s, hidden=hidden)
    for name in ("w", "z"):
        assert np.array_equal(found[name], wanted[name])
    assert not found["w"][np.broadcast_to(hidden, s.shape)].any()


@pytest.mark.parametrize(
    "change",
    [
        ("Where (hidden, lowest, s)", "Where (hidden, small, s)"),  # could be a score
        ("Where (hidden, lowest, s)", "Where (hidden, s, lowest)"),
        ("w = Softmax <axis = -1> (first)", "w = Relu (first)"),  # the number itself is used
        ("bool[batch, 1, T, S] hidden", "bool[batch, 2, T, S] hidden"),  # as large as the scores: nothing to gain
    ],
)
def test_mask_leaves_other_selections_alone(change: tuple[str, str]) -> None:
    text = MASKED.replace(*change)
    assert text != MASKED
    model = parsed("step", text, LOWEST)
    mask.apply({"step": model}, spec(1))
    assert any(node.op_type == "Where" and node.outputs[0].name == "first" for node in model.graph)


# ---- layout -----------------------------------------------------------------------------------------------

HEADS = """(float[batch, 1, 8] x) => (float[batch, 1, 8] y, float[batch, 2, 1, 6] p)
{
    split = Reshape (x, heads)
    turned = Transpose <perm = [0, 2, 1, 3]> (split)
    with_v = Add (turned, v)
    p = MatMul (with_v, table)
    with_u = Add (turned, u)
    back = Transpose <perm = [0, 2, 1, 3]> (with_u)
    y = Reshape (back, whole)
}"""
HEADS_WEIGHTS = {
    "heads": np.array([0, 0, 2, 4]), "whole": np.array([0, 0, 8]), "table": normal(2, 4, 6),
    "u": normal(1, 2, 1, 4), "v": normal(1, 2, 1, 4),
}  # fmt: skip


def test_one_token_moves_nothing_and_reads_constants_in_order() -> None:
    model = parsed("step", HEADS, HEADS_WEIGHTS)
    outcome = layout.apply({"step": model}, spec(1))
    assert operators(model).count("Transpose") == 0
    assert operators(model).count("Reshape") <= 4
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert next(value.name for value in product.inputs if value is not None) == "table.rows"
    assert np.array_equal(initializers(model)["table.rows"], HEADS_WEIGHTS["table"].transpose(0, 2, 1))
    assert [hit.reason for hit in outcome.hits] == [
        "2 transpositions are reshapes", "1 constants are read row by row",
    ]  # fmt: skip
    x = normal(3, 1, 8)
    found, wanted = run(model, x=x), run(parsed("step", HEADS, HEADS_WEIGHTS), x=x)
    assert [output.name for output in model.graph.outputs] == ["y", "p"]
    for name in ("y", "p"):
        assert np.abs(found[name] - wanted[name]).max() < 1e-5


def test_graphs_of_many_tokens_are_left_alone() -> None:
    model = parsed("step", HEADS, HEADS_WEIGHTS)
    assert layout.apply({"step": model}, spec("chunk")).hits == ()
    assert operators(model).count("Transpose") == 2


def test_a_transposition_that_moves_rows_stays() -> None:
    text = HEADS.replace("[batch, 1, 8] x", "[batch, 3, 8] x").replace("[batch, 1, 8] y", "[batch, 3, 8] y")
    model = parsed("step", text.replace("[batch, 2, 1, 6] p", "[batch, 2, 3, 6] p"), HEADS_WEIGHTS)
    assert layout.apply({"step": model}, spec(1)).hits == ()
    assert operators(model).count("Transpose") == 2


# ---- merge ------------------------------------------------------------------------------------------------

PRODUCTS = """(float[batch, T, 4] x) => (float[batch, T, 4] q, float[batch, T, 2] k, float[batch, T, 4] o)
{
    q0 = MatMul (x, wq)
    q = Add (q0, bq)
    k0 = MatMul (x, wk)
    k = Add (bk, k0)
    r = Relu (q)
    o = MatMul (r, wo)
}"""
PRODUCT_WEIGHTS = {"wq": normal(4, 4), "wk": normal(4, 2), "wo": normal(4, 4), "bq": normal(4), "bk": normal(2)}


@pytest.mark.parametrize(
    ("change", "products", "additions"),
    [
        (("", ""), 2, 1),
        (("k = Add (bk, k0)", "k = Identity (k0)"), 2, 1),  # one without a bias: they are added as before
        (("k = Add (bk, k0)", "y = Relu (k0) z = Sub (y, y) k1 = Add (bk, k0) k = Add (k1, z)"), 2, 3),
        (("k0 = MatMul (x, wk)", "n = Neg (x) k0 = MatMul (n, wk)"), 3, 2),  # other rows
    ],
)
def test_products_of_the_same_rows_are_one(change: tuple[str, str], products: int, additions: int) -> None:
    text = PRODUCTS.replace(*change)
    model, before = parsed("step", text, PRODUCT_WEIGHTS), parsed("step", text, PRODUCT_WEIGHTS)
    outcome = merge.apply({"step": model}, spec("chunk"))
    assert (operators(model).count("MatMul"), operators(model).count("Add")) == (products, additions)
    assert [hit.reason for hit in outcome.hits] == (["2 products are 1"] if products == 2 else [])
    assert [output.name for output in model.graph.outputs] == ["q", "k", "o"]
    x = normal(2, 3, 4)
    found, wanted = run(model, x=x), run(before, x=x)
    assert all(np.abs(found[name] - wanted[name]).max() < 1e-6 for name in wanted)
    if products == 2:
        together = np.concatenate([PRODUCT_WEIGHTS["wq"], PRODUCT_WEIGHTS["wk"]], 1)
        assert np.array_equal(initializers(model)["wq+wk"], together)
