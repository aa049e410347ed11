"""Bisection: the parts by themselves, and five planted faults whose layer and step it must name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np
import onnx_ir as ir
import pytest
import small_graphs
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import faults  # noqa: E402
from faults import Copy, Fault, planted  # noqa: E402

from exporters import cut, origin  # noqa: E402
from mscompile.contracts import Array  # noqa: E402
from validation import contract  # noqa: E402
from validation.suspects import Evidence, relative_error, suspects  # noqa: E402

DIAMOND = """(float[2] x) => (float[2] y, float[2] z) {
    a = Neg(x)
    b = Abs(a)
    c = Exp(a)
    y = Add(b, c)
    z = Sqrt(b)
}"""


def diamond() -> Any:
    return ir.to_proto(small_graphs.parsed("g", DIAMOND))


def test_a_frontier_is_all_that_crosses_a_cut() -> None:
    assert cut.frontiers(diamond().graph) == [("a",), ("a", "b"), ("b", "c"), ("b", "y"), ("y", "z")]


def test_a_prefix_computes_its_frontier_and_nothing_else() -> None:
    part = cut.prefix(diamond(), ("b", "c"))
    assert [node.op_type for node in part.graph.node] == ["Neg", "Abs", "Exp"]
    found = small_graphs.run(ir.from_proto(part), x=np.array([1, -2], np.float32))
    np.testing.assert_allclose(found["c"], np.exp([-1, 2]), rtol=1e-6)
    assert list(found) == ["b", "c"]


@pytest.mark.parametrize("faulty", range(5))
@pytest.mark.parametrize("heals", [False, True])
def test_the_first_wrong_cut_is_next_to_a_right_one(faulty: int, heals: bool) -> None:
    """Also where an error disappears on its way and comes back, as behind a mask."""
    cuts = [("a",), ("b",), ("c",), ("d",), ("e",)]
    wrong = [number >= faulty and not (heals and number == faulty + 1 < 4) for number in range(5)]
    right, found = cut.first_wrong(cuts, lambda names: wrong[cuts.index(names)])
    assert found == right + 1
    assert wrong[found]
    assert right == -1 or not wrong[right]


def test_cuts_that_another_form_has_in_one_are_left_out() -> None:
    cuts = cut.frontiers(diamond().graph)
    assert cut.present(cuts, {"a", "b", "y", "z"}) == [0, 1, 3, 4]


@pytest.mark.parametrize("name", ["post-norm-same-length", "attention+attention"])
def test_modules_of_the_stream_lead_back_to_those_of_the_original(name: str) -> None:
    model = cases.model(name)
    graph = next(iter(cases.build(model).graphs.values()))
    names = {known for known, _ in model.named_modules()}
    for path, module in graph.named_modules():
        found = origin.original_name(model, graph, path.removeprefix("root").removeprefix("."))
        assert found in names
        if module in set(model.modules()):
            assert model.get_submodule(found) is module
    if name == "post-norm-same-length":
        assert origin.original_name(model, graph, "layers.1.layer.feed_forward.3") == "layers.1.feed_forward.3"
        assert origin.original_name(model, graph, "layers.1") == "layers.1"


VALUE = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
HIDDEN = np.where(VALUE > 0, VALUE, np.float32(-3e38))


@pytest.mark.parametrize(
    ("cause", "found", "wanted", "more"),
    [
        ("changed since the export", VALUE * 2, VALUE, {"differences": ("constant w is twice as large",)}),
        ("overflow", np.where(VALUE > 0, np.float32(np.inf), VALUE), VALUE, {}),
        ("wrong mask", VALUE, HIDDEN, {}),
        ("wrong mask", VALUE > 0, VALUE > 1, {}),
        ("off by one row", np.roll(VALUE, 1, 1), VALUE, {}),
        ("off by one row", np.concatenate([VALUE[:, 1:], VALUE[:, :1] * 0], 1), VALUE, {}),
        ("off by one row", np.arange(4) + 1, np.arange(4), {}),
        ("swapped", VALUE + 1, VALUE, {"others": {"other": VALUE + 1}}),
        ("stale state", VALUE + 1, VALUE, {"before": VALUE + 1}),
        ("shape specialisation", VALUE + 1, VALUE, {"rows_alone_right": True}),
        ("shape specialisation", VALUE + 1, VALUE, {"tokens_alone_right": True}),
        ("runtime fusion", VALUE + 1, VALUE, {"unoptimised_right": True}),
        ("quantization", VALUE + 0.1, VALUE, {"operators": ("MatMulNBits",), "precision": "int4"}),
        ("TF32", VALUE + 3e-4, VALUE, {"operators": ("MatMul",), "on_gpu": True}),
        ("unknown", VALUE + 0.1, VALUE, {}),
    ],
)
def test_each_cause_is_told_from_the_others(cause: str, found: Array, wanted: Array, more: dict[str, Any]) -> None:
    assert [suspect.cause for suspect in suspects(Evidence(found, wanted, 1e-4, **more))] == [cause]


def test_the_lowest_number_and_infinity_are_both_masked() -> None:
    lowest = np.array([1, np.finfo(np.float32).min], np.float32)
    assert relative_error(np.array([1, -np.inf], np.float32), lowest) == 0
    assert relative_error(np.array([1, np.nan], np.float32), lowest) == np.inf
    assert relative_error(np.array([1, 2]), np.array([1, 3])) == np.inf


def test_two_contracts_differ_where_they_do() -> None:
    spec = cases.build(cases.model("attention+attention")).spec
    assert contract.differences(spec, spec) == ()
    ticks = (*spec.schedule.ticks[1:], spec.schedule.ticks[0])
    copy = faults.replace(spec, schedule=faults.replace(spec.schedule, ticks=ticks), vocab_size=9)
    told = contract.differences(copy, spec)
    assert "vocab_size is 9, the export says 11" in told
    assert "schedule.ticks.0.graphs is ['decode_1'], the export says ['decode_3']" in told


FIVE = {
    "a scaled weight": (faults._scaled_weight, "layers.0.feed_forward.3", "MatMul", 0, "changed since the export"),
    "a wrong mask": (faults._mask_too_long, "layers.0", "GreaterOrEqual", 0, "wrong mask"),
    "an off-by-one memory roll": (
        faults._rolled(1, lambda copy: copy.decode), "layers.0", "Transpose", 1, "off by one row",
    ),
    "an overflow of float16": (faults._overflow, "layers.0.feed_forward.1", "Relu", 0, "overflow"),
    "swapped states": (faults._outputs_swapped, "layers.0", "Reshape", 0, "swapped"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_layer_and_step_of_a_planted_fault_are_named(
    name: str, compiled: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mscompile import cli

    plant, module, operator, position, cause = FIVE[name]
    copy = planted(compiled, tmp_path / "planted.msc", Fault(name, "graph", plant))
    with capsys.disabled():
        result = CliRunner().invoke(
            cli.app, ["bisect", str(copy.path), "--reference", str(trained), "--steps", "32", "--json"]
        )
    assert result.exception is not None
    assert getattr(result.exception, "exit_code", None) == 1, result.exception
    found = json.loads(result.stdout)
    tensor, step = found["tensor"], found["step"]
    assert (tensor["module"], tensor["operator"], tensor["graph"]) == (module, operator, "decode"), found["verdict"]
    assert (step["rollout"], step["position"], step["row"]) == ("token by token", position, 0)
    assert cause in {suspect["cause"] for suspect in found["suspects"]}, found["suspects"]
    assert f"at token {position}" in found["verdict"]


@pytest.mark.slow
def test_a_fault_in_the_engines_own_graph_is_found_there(compiled: Path, trained: Path, tmp_path: Path) -> None:
    from mscompile.bisect import bisect
    from mscompile.runtime import open_bundle

    copy = planted(compiled, tmp_path / "planted.msc", Fault("packed", "file", faults._packed_only))
    found = bisect(open_bundle(copy.path), "ort", trained, steps=32)
    assert found.tensor is not None
    assert found.tensor.name == "logits"
    assert "as ONNX Runtime optimised it" in found.found_by


@pytest.mark.slow
def test_a_fault_of_the_contract_is_told_from_one_of_the_graphs(compiled: Path, trained: Path, tmp_path: Path) -> None:
    from mscompile.bisect import bisect
    from mscompile.runtime import open_bundle

    def plant(copy: Copy) -> None:
        copy.state_is(copy.appended()[0], initial=0.5)

    copy = planted(compiled, tmp_path / "planted.msc", Fault("initial", "contract", plant))
    found = bisect(open_bundle(copy.path), "ort", trained, steps=32)
    assert found.step is not None
    assert found.tensor is None
    assert found.differences == ("states.layer00.mems.key.initial is 0.5, the export says 0.0",)
    assert bisect(open_bundle(compiled), "ort", trained, steps=32).step is None
