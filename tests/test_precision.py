"""Precisions as graph rewrites: how weights are rounded, which operators come out, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engines import ort, ort_half, ort_numerics, trt_rtx
from exporters import check, weights
from exporters.precision import asked, half, table
from exporters.precision.base import Request
from exporters.precision.ranges import SUFFIX, probed
from exporters.precision.rounding import Rounded, Scheme, rounded
from mscompile.contracts import BATCH, GraphSpec, Hit, Profile, Schedule, StreamSpec, TensorSpec, Tick
from mscompile.errors import EngineError

RANDOM = np.random.default_rng(0)
HALVES = {"fp16": (ir.DataType.FLOAT16, 11), "bf16": (ir.DataType.BFLOAT16, 8)}  # bits of mantissa

# ---- Rounding ---------------------------------------------------------------------------------------------

MATRICES = arrays.arrays(
    np.float32, st.tuples(st.sampled_from((8, 32, 48)), st.integers(1, 5)), elements=st.floats(-100, 100, width=32)
)
SCHEMES = st.builds(Scheme, st.sampled_from((2, 3, 4, 8)), st.sampled_from((None, 16, 32, 128)), st.booleans())


def error(matrix: np.ndarray, found: Rounded) -> float:
    return float(np.square(matrix - found.restored()).sum())


@given(MATRICES, SCHEMES)
def test_numbers_stay_within_their_bits_and_half_a_step(matrix: np.ndarray, scheme: Scheme) -> None:
    found = rounded(matrix, scheme)
    low, high = scheme.levels
    assert found.integers.min() >= low
    assert found.integers.max() <= high
    assert (found.scale > 0).all()
    kept = rounded(matrix, Scheme(scheme.bits, scheme.block, clip=False))
    step = np.repeat(kept.scale, kept.block, axis=0) if kept.block else kept.scale
    assert (np.abs(matrix - kept.restored()) <= 0.501 * step).all()
    assert error(matrix, found) <= error(matrix, kept) * 1.001 + 1e-30


@pytest.mark.parametrize(("rows", "block"), [(512, 128), (448, 64), (48, 16), (128, None), (40, None), (7, None)])
def test_a_block_divides_the_rows(rows: int, block: int | None) -> None:
    assert Scheme(8, 128).block_of(rows) == block


def test_a_block_has_a_scale_of_its_own() -> None:
    matrix = RANDOM.standard_normal((64, 3)).astype(np.float32)
    matrix[:32] *= 100
    assert np.abs(matrix - rounded(matrix, Scheme(8, 32)).restored())[32:].max() < 0.02
    assert np.abs(matrix - rounded(matrix, Scheme(8, None)).restored())[32:].max() > 0.2


# ---- Graphs -----------------------------------------------------------------------------------------------

MODEL = """
<ir_version: 10, opset_import: ["": 20]>
step (int64[batch, 1] tokens, int64[batch] position) => (float[batch, 1, 6] logits)
<int64[2] flat = {-1, 32}, int64[3] rows = {-1, 1, 48}>
{
    x = Gather <axis = 0> (table, tokens)
    n = LayerNormalization <axis = -1> (x, gain)
    q = MatMul (n, fused)
    two = Reshape (n, flat)
    g = Gemm <transB = 1> (two, tall, bias)
    k = Reshape (g, rows)
    s = Add (q, k)
    w = Softmax <axis = -1> (s)
    u = Mul (w, s)
    back = Transpose <perm = [1, 0]> (head)
    logits = MatMul (u, back)
}
"""
TENSORS = {
    "table": RANDOM.standard_normal((6, 32)),
    "gain": np.ones(32),
    "fused": RANDOM.standard_normal((32, 48)) / 6,
    "tall": RANDOM.standard_normal((48, 32)) / 6,
    "bias": RANDOM.standard_normal(48),
    "head": RANDOM.standard_normal((6, 48)) / 7,
}
SPEC = StreamSpec(
    (),
    (
        GraphSpec(
            "step",
            (TensorSpec("tokens", "int64", (BATCH, 1)), TensorSpec("position", "int64", (BATCH,))),
            (TensorSpec("logits", "float32", (BATCH, 1, 6)),),
            (), (), 1,
        ),
    ),
    Schedule((Tick(("step",)),)), 6, 4,
)  # fmt: skip
TOKENS = np.arange(4).reshape(4, 1)


def model(text: str = MODEL) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in TENSORS.items()
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def ranges(made: ir.Model) -> dict[str, float]:
    """Largest magnitudes, from the probed graph on ONNX Runtime."""
    found = run(ir.to_proto(probed(made)).SerializeToString())
    return {name.removesuffix(SUFFIX): float(value) for name, value in found.items() if name.endswith(SUFFIX)}


def lowered(name: str, text: str = MODEL, **options: Any) -> tuple[ir.Model, tuple[Hit, ...]]:
    made = model(text)
    spec, hits = table.run(name, {"step": made}, Request(SPEC, {"step": ranges(made)}), **options)
    assert spec == SPEC
    return made, hits


def run(content: bytes) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"tokens": TOKENS, "position": np.zeros(4, np.int64)}), strict=True))


def operators(made: ir.Model) -> list[str]:
    return [node.op_type for node in made.graph]


@pytest.mark.parametrize(("name", "kind"), [("int8", ir.DataType.INT8), ("int4", ir.DataType.INT4)])
def test_weight_only_quantizes_every_product(name: str, kind: ir.DataType) -> None:
    made, hits = lowered(name)
    assert operators(made).count("DequantizeLinear") == 3
    assert "Gemm" not in operators(made)
    stored = [value for value in made.graph.initializers.values() if value.dtype == kind]
    assert sorted(tuple(value.shape or ()) for value in stored) == [(32, 48), (32, 48), (48, 6)]
    assert asked.products(made) == {name: 3}
    assert [hit.applied for hit in hits] == [True, False]
    assert "one row a token" in hits[1].reason
    restored = run(ir.to_proto(made).SerializeToString())["logits"]
    exact = run(ir.to_proto(model()).SerializeToString())["logits"]
    assert np.abs(restored - exact).max() < (0.01 if name == "int8" else 0.2)


def test_a_matrix_of_several_graphs_is_rounded_once_and_stored_once(tmp_path: Path) -> None:
    graphs = {"one": model(), "two": model()}
    for graph, made in graphs.items():
        made.graph.name = graph
    spec = StreamSpec((), (), SPEC.schedule, 6, 4)
    table.run("int8", graphs, Request(spec))
    weights.save(graphs, tmp_path)
    integers = 32 * 48 + 48 * 32  # the head is small enough to stay in the graph
    assert integers <= (tmp_path / weights.FILE).stat().st_size < 2 * integers + weights.PAGE
    for graph in graphs:
        check.check_file(tmp_path / f"{graph}.onnx")


def test_dynamic_quantizes_an_input_once_for_all_its_products() -> None:
    text = MODEL.replace("s = Add (q, k)", "r = MatMul (n, fused)\n    t = Add (q, r)\n    s = Add (t, k)")
    made, hits = lowered("int8-dynamic", text)
    assert operators(made).count("MatMulInteger") == 4
    assert operators(made).count("DynamicQuantizeLinear") == 3
    assert hits[0].reason == "4 products of 8-bit integers"
    exact = run(ir.to_proto(model(text)).SerializeToString())["logits"]
    assert np.abs(run(ir.to_proto(made).SerializeToString())["logits"] - exact).max() < 0.1


@pytest.mark.parametrize("name", HALVES)
def test_half_leaves_sums_and_the_interface_in_fp32(name: str) -> None:
    kind, _ = HALVES[name]
    made, hits = lowered(name)
    assert asked.products(made) == {kind.name.lower(): 3}
    types = {node.op_type: node.outputs[0].dtype for node in made.graph}
    assert types["Softmax"] == types["LayerNormalization"] == ir.DataType.FLOAT
    assert types["MatMul"] == types["Add"] == types["Gather"] == kind
    assert made.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert made.graph.outputs[0].name == "logits"
    assert any("1 Softmax" in hit.reason and not hit.applied for hit in hits)
    onnx.checker.check_model(ir.to_proto(made), full_check=True)


@pytest.mark.parametrize("name", HALVES)
def test_what_decides_is_in_fp32_back_to_its_products(name: str) -> None:
    deciding = MODEL.replace("<int64[2] flat", "<int64[1] three = {3}, int64[1] last = {-1}, int64[2] flat").replace(
        "w = Softmax <axis = -1> (s)",
        """best, number = TopK <axis = -1> (s, three)
    least = ReduceMin <keepdims = 1> (best, last)
    seen = GreaterOrEqual (s, least)
    kept = Where (seen, s, least)
    w = Softmax <axis = -1> (kept)""",
    )
    made, hits = lowered(name, deciding)
    inputs = {node.op_type: [value.dtype for value in node.inputs if value is not None] for node in made.graph}
    assert inputs["GreaterOrEqual"] == [ir.DataType.FLOAT] * 2
    assert inputs["TopK"][0] == ir.DataType.FLOAT
    assert asked.products(made) == {"float32": 2, HALVES[name][0].name.lower(): 1}
    (told,) = (hit.reason for hit in hits if half.DECIDES in hit.reason)
    assert all(operator in told for operator in ("1 MatMul", "1 Gemm", "1 TopK", "1 ReduceMin"))
    exact = run(ir.to_proto(model(deciding)).SerializeToString())["logits"]
    if name == "fp16":  # ONNX Runtime has no kernels for bfloat16 on CPUs
        assert np.abs(run(ir.to_proto(made).SerializeToString())["logits"] - exact).max() < 0.01


def test_numbers_that_half_cannot_hold_stay_in_fp32() -> None:
    large = MODEL.replace("s = Add (q, k)", "m = Mul (q, million)\n    t = Div (m, million)\n    s = Add (t, k)")
    large = large.replace("<int64[2] flat", "<float[1] million = {1e6}, int64[2] flat")
    made, hits = lowered("fp16", large)
    types = {node.op_type: node.outputs[0].dtype for node in made.graph}
    assert types["Mul"] == ir.DataType.FLOAT16  # the last one; the first is in FP32 as Div shows
    assert types["Div"] == ir.DataType.FLOAT
    assert any("near the largest of float16" in hit.reason and "1 Div" in hit.reason for hit in hits)
    assert all("near the largest" not in hit.reason for hit in lowered("bf16", large)[1])


def test_ranges_are_those_of_the_values_and_leave_masks_out() -> None:
    masked = MODEL.replace("w = Softmax <axis = -1> (s)", "h = Div (s, nothing)\n    w = Softmax <axis = -1> (s)")
    masked = masked.replace("<int64[2] flat", "<float[1] nothing = {0}, int64[2] flat")
    masked = masked.replace("=> (float[batch, 1, 6] logits)", "=> (float[batch, 1, 6] logits, float[batch, 1, 48] h)")
    seen = ranges(model(masked))
    assert seen["x"] == pytest.approx(np.abs(TENSORS["table"][:4]).max())
    assert seen["h"] == 0.0


# ---- What runtimes make of them ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"), ("int8", "int8"), ("int4", "int4"),
     ("int8-dynamic", "int8-dynamic")],
)  # fmt: skip
def test_onnx_runtime_runs_the_precision_asked_for(name: str, kind: str, tmp_path: Path) -> None:
    made, _ = lowered(name)
    graphs, built = tmp_path / "graphs", tmp_path / "ort"
    graphs.mkdir()
    built.mkdir()
    weights.save({"step": made}, graphs)
    facts = ort.ENGINE.build(graphs, built, SPEC, Profile())
    assert facts["numerics"]["step"]["products"] == {kind: 3}
    assert asked.fault({"step": made}, facts["numerics"]) is None
    logits = ort.ENGINE.load(graphs, built, SPEC).session(4).step(TOKENS)
    exact = run(ir.to_proto(model()).SerializeToString())["logits"]
    difference = float(np.abs(logits - exact).max())
    assert difference < {"fp32": 1e-5, "fp16": 5e-3, "bf16": 0.05, "int8": 0.05, "int4": 0.3, "int8-dynamic": 0.1}[name]
    if name in HALVES:  # it rounds as half does, and is not FP32 under another name
        assert difference > 2.0 ** -(HALVES[name][1] + 4)
        assert facts["numerics"]["step"]["emulated"] == kind


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_tensorrt_for_rtx_builds_the_precision_asked_for(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    made, _ = lowered(name)
    weights.save({"step": made}, tmp_path)
    facts = trt_rtx.ENGINE.build(tmp_path, tmp_path, SPEC, Profile(1, 4, 1))
    (kind,) = asked.products(made)
    assert facts["numerics"]["step"]["products"] == {kind: 3}
    assert asked.fault({"step": made}, facts["numerics"]) is None


def test_tensorrt_for_rtx_refuses_dynamic_quantization_with_the_reason(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    made, _ = lowered("int8-dynamic")
    weights.save({"step": made}, tmp_path)
    with pytest.raises(EngineError, match="DynamicQuantizeLinear"):
        trt_rtx.ENGINE.build(tmp_path, tmp_path, SPEC, Profile(1, 4, 1))


def test_an_engine_in_another_precision_is_a_fault(tmp_path: Path) -> None:
    """The FP32 graph in the place of the int4 one: what a runtime does that cannot fuse a dequantization."""
    weights.save({"step": model()}, tmp_path)
    found = {"step": ort_numerics.inspected(tmp_path / "step.onnx")}
    made, _ = lowered("int4")
    sentence = asked.fault({"step": made}, found)
    assert sentence is not None
    assert "graph step asks for 3 int4 products and the runtime has" in sentence
    assert "float32" in sentence


def test_a_dequantization_that_is_not_fused_counts_as_fp32(tmp_path: Path) -> None:
    weights.save({"step": lowered("int4")[0]}, tmp_path)
    found = ort_numerics.inspected(tmp_path / "step.onnx")  # as written, before the runtime has seen it
    assert found["products"] == {"float32": 3}
    assert len(found["float32"]) == 3


def test_only_graphs_in_half_are_rewritten(tmp_path: Path) -> None:
    for name in ("fp32", "int8"):
        weights.save({"step": lowered(name)[0]}, tmp_path)
        assert ort_half.rewrite(tmp_path, tmp_path / "own", ["step"]) == {}
