"""Stages between the stream program and the files: lowerings, the fold pass, interface checks, weights, cost."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from exporters import check, cost, export, weights
from exporters.lowerings import TRANSLATIONS
from exporters.passes import fold
from mscompile.contracts import BATCH, GraphSpec, Schedule, StreamSpec, TensorSpec, Tick
from mscompile.errors import ExportError

# ---- Lowerings --------------------------------------------------------------------------------------------


class Halves(nn.Module):
    def forward(self, n: Tensor) -> tuple[Tensor, Tensor]:
        return (n + 2) // 3, n % 3


class Picked(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index)


def lowered(module: nn.Module, *inputs: Tensor) -> tuple[list[str], list[np.ndarray]]:
    """Operators of the module's graph with our lowerings, and what ONNX Runtime computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            module.eval(), inputs, dynamo=True, verbose=False, opset_version=export.OPSET,
            custom_translation_table=dict(TRANSLATIONS),
        )  # fmt: skip
    assert made is not None
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
    return [node.op_type for node in made.model.graph], session.run(None, feeds)


def test_division_of_positions_is_one_division() -> None:
    n = torch.arange(20)
    operators, (quotient, remainder) = lowered(Halves(), n)
    assert operators.count("Div") == 1
    assert operators.count("Mod") == 1
    assert not {"Floor", "Where", "Sign", "Xor", "Less"} & set(operators)
    assert quotient.tolist() == ((n + 2) // 3).tolist()
    assert remainder.tolist() == (n % 3).tolist()


def test_gather_is_one_node_with_narrow_indices() -> None:
    x, index = torch.randn(2, 5, 3), torch.randint(0, 5, (2, 4, 3))
    operators, (picked,) = lowered(Picked(), x, index)
    assert operators == ["Cast", "GatherElements"]
    assert (picked == x.gather(1, index).numpy()).all()


# ---- fold -------------------------------------------------------------------------------------------------


KEYS = """
<ir_version: 10, opset_import: ["": 20]>
keys (float[batch, 4] x) => (float[batch, 6] out) {
    start = Constant <value_int = 0> ()
    limit = Constant <value_int = 6> ()
    step = Constant <value_int = 1> ()
    rows = Range (start, limit, step)
    number = Cast <to = 1> (rows)
    axes = Constant <value_ints = [1]> ()
    angle = Unsqueeze (number, axes)
    sine = Sin (angle)
    cosine = Cos (angle)
    encoded = Concat <axis = 1> (sine, cosine, sine, cosine)
    keys = MatMul (encoded, w)
    turned = Transpose <perm = [1, 0]> (keys)
    out = MatMul (x, turned)
}
"""


NO_STATES = StreamSpec((), (), Schedule((Tick(("keys",)),)), 2, 1)


def _model(w: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(KEYS)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    return ir.from_proto(proto)


def _run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": x})
    return np.asarray(out)


def test_what_depends_on_weights_only_is_computed_at_export() -> None:
    random = np.random.default_rng(0)
    w, x = random.standard_normal((4, 4), np.float32), random.standard_normal((3, 4), np.float32)
    before = _run(_model(w), x)
    model = _model(w)
    (hit,) = fold.apply({"keys": model}, NO_STATES).hits
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert hit.applied
    assert hit.place == "keys"
    assert "folded" in hit.reason
    assert np.abs(_run(model, x) - before).max() < 1e-6


def test_a_table_over_the_budget_stays_a_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "BUDGET", 8)  # the keys have 24 numbers
    model = _model(np.ones((4, 4), np.float32))
    fold.apply({"keys": model}, NO_STATES)
    assert "MatMul" in [node.op_type for node in model.graph]
    assert model.graph.num_nodes() > 1


# ---- check ------------------------------------------------------------------------------------------------


def _graph(
    *, tokens: str = "tokens", dtype: ir.DataType = ir.DataType.INT64, shape: tuple[str | int, ...] = (BATCH, 1)
) -> ir.Model:
    given = ir.Value(name=tokens, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    node = ir.node("Identity", [given])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "logits", given.type, given.shape
    return ir.Model(ir.Graph([given], node.outputs, nodes=[node], opset_imports={"": 20}, name="g"), ir_version=10)


SPEC = GraphSpec(
    "g", (TensorSpec("tokens", "int64", (BATCH, 1)),), (TensorSpec("logits", "int64", (BATCH, 1)),), (), (), 1
)


def test_a_graph_that_keeps_its_contract_passes() -> None:
    check.check_interface(_graph(), SPEC, "export")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda: _graph(tokens="ids"), r"graph g after fold does not keep its contract: inputs are \['ids'\]"),
        (lambda: _graph(dtype=ir.DataType.INT32), "input tokens is int32, wanted int64"),
        (lambda: _graph(shape=(2, 1)), r"input tokens has shape \(2, 1\), wanted \('batch', 1\)"),
        (lambda: _graph(shape=("rows", 1)), r"input tokens has shape \('rows', 1\)"),
    ],
)
def test_what_an_exporter_drops_or_freezes_is_named(change: Callable[[], ir.Model], sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        check.check_interface(change(), SPEC, "fold")


def test_a_file_that_the_onnx_checker_refuses(tmp_path: Path) -> None:
    model = ir.to_proto(_graph())
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "g.onnx")
    with pytest.raises(ExportError, match=r"g\.onnx does not pass the ONNX checker"):
        check.check_file(tmp_path / "g.onnx")


# ---- warnings ---------------------------------------------------------------------------------------------


def test_warnings_without_an_explanation_are_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), export._explained_warnings():
        warnings.warn("# The axis name: batch will not be used, since it shares", stacklevel=1)
        warnings.warn("the trace was cut short", stacklevel=1)
    assert caplog.messages == ["while exporting: the trace was cut short"]


def test_every_expected_warning_has_a_reason() -> None:
    assert all(len(reason) > 10 for _, reason in export.EXPECTED_WARNINGS)


# ---- weights and cost -------------------------------------------------------------------------------------


def _weighted(name: str, *tensors: np.ndarray) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((BATCH, 32)))
    initializers = [ir.Value(name=f"w{i}", const_value=ir.tensor(w, name=f"w{i}")) for i, w in enumerate(tensors)]
    nodes, last = [], x
    for value in initializers:
        nodes.append(ir.node("MatMul", [last, value]))
        last = nodes[-1].outputs[0]
        last.name, last.type, last.shape = f"y{len(nodes)}", x.type, x.shape
    graph = ir.Graph([x], [last], nodes=nodes, initializers=initializers, opset_imports={"": 20}, name=name)
    return ir.Model(graph, ir_version=10)


def test_equal_tensors_are_stored_once_and_read_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((32, 32), np.float32), random.standard_normal((32, 32), np.float32)
    weights.save({"one": _weighted("one", a, b), "two": _weighted("two", b, a, b)}, tmp_path)
    size = (tmp_path / weights.FILE).stat().st_size
    assert a.nbytes + b.nbytes <= size < a.nbytes + b.nbytes + 2 * weights.PAGE
    x = random.standard_normal((2, 32), np.float32)
    for name, wanted in (("one", x @ a @ b), ("two", x @ b @ a @ b)):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        assert np.allclose(session.run(None, {"x": x})[0], wanted, rtol=1e-3, atol=1e-3)


def test_cost_counts_matrix_products() -> None:
    w = np.zeros((32, 32), np.float32)
    assert cost.flops(_weighted("g", w, w)) == 2 * 2 * 32 * 32


def test_the_cost_of_an_unknown_size_is_refused() -> None:
    model = _weighted("g", np.zeros((32, 32), np.float32))
    model.graph.node(0).outputs[0].shape = ir.Shape(("chunk", 32))
    with pytest.raises(ValueError, match="symbolic size chunk"):
        cost.flops(model)
