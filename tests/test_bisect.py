"""Bisection: the parts by themselves, and planted faults whose layer and step it must name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import copy as duplicate
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bundles
import cases
import faults
import faulty_sessions
import mutation
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import small_graphs
import tiny
import torch
from bundle_copies import Copy
from click.testing import Result
from faults import Fault, planted
from torch import nn
from typer.testing import CliRunner

from engines import trt_rtx
from exporters import cut, origin
from mscompile import adapters, checkpoint, cli, compile_checkpoint
from mscompile import bundle as bundle_file
from mscompile.bisect import Report, Search, bisect
from mscompile.contracts import Array, Plan
from mscompile.errors import EngineUnavailable, GateFailed, UsageError
from mscompile.locate import Exported
from mscompile.runtime import open_bundle
from validation import contract, sources
from validation.suspects import Evidence, relative_error, suspects

ROOT = Path(__file__).parent.parent

STEPS = 64  # tokens a row in the long rollouts

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
    copy = replace(spec, schedule=replace(spec.schedule, ticks=ticks), vocab_size=9)
    told = contract.differences(copy, spec)
    assert "vocab_size is 9, the export says 11" in told
    assert "schedule.ticks.0.graphs is ['decode_1'], the export says ['decode_3']" in told


# ---- Planted faults ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A bundle, its checkpoint, and an export of it to compare with."""

    bundle: Path
    exported: Exported

    def search(self, copy: Path, altered: Callable[[Any], Any] | None = None) -> Report:
        opened = open_bundle(copy)
        if altered is not None:
            opened = mutation._AlteredBundle(opened.path, opened.manifest)
            opened.alter = altered
        return Search(opened, "ort", self.exported).report(steps=STEPS)

    def planted(self, target: Path, plant: Callable[[Copy], None]) -> Report:
        copy = planted(self.bundle, target / "planted.msc", Fault("", "", plant))
        return self.search(copy.path, copy.session)


def subject(bundle: Path, checkpoint: Path, directory: Path, adapter: str | None = None) -> Subject:
    opened = open_bundle(bundle)
    model = adapters.trained(checkpoint, adapter=adapter, context=opened.spec.max_context).model
    model.sources = sources.pseudo(opened.spec.inputs)
    return Subject(bundle, Exported(model, opened, directory))


@pytest.fixture(scope="session")
def one(bundle_of: Path, checkpoint_of: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Of each family in turn."""
    return subject(bundle_of, checkpoint_of, tmp_path_factory.mktemp("exported"))


@dataclass(frozen=True)
class Named:
    """What must be said of a fault."""

    module: str
    operator: str
    graph: str
    position: int
    cause: str
    evidence: str  # a part of it


FIVE: dict[str, tuple[Callable[[Copy], None], dict[str, Named]]] = {
    "a scaled weight": (faults._scaled_weight, {
        "transformer-xl": Named(
            "layers.0.feed_forward.3", "MatMul", "decode", 0, "changed since the export", "1.05 times as large"),
        "hourglass": Named(
            "level.post.blocks.0.feed_forward.3", "MatMul", "decode_3", 0, "changed since the export", "1.05 times"),
    }),
    "a wrong mask": (faults._mask_too_long, {
        "transformer-xl": Named("layers.0", "GreaterOrEqual", "decode", 0, "wrong mask", "1 of 4 places differ"),
        "hourglass": Named(
            "level.pre.blocks.0.attention", "Less", "decode_3", 0, "wrong mask", "1 of 64 places differ"),
    }),
    "an off-by-one memory roll": (faults._rolled(1, lambda copy: copy.decode), {
        "transformer-xl": Named("layers.0", "Transpose", "decode", 1, "off by one row", "rolled by +1 along axis 3"),
        "hourglass": Named(
            "level.post.blocks.0.attention", "Transpose", "decode_3", 3, "off by one row", "rolled by +1"),
    }),
    "an overflow of float16": (faults._overflow, {
        "transformer-xl": Named("layers.0.feed_forward.1", "Relu", "decode", 0, "overflow", "are inf"),
        "hourglass": Named("level.pre.blocks.0.feed_forward.1", "Gelu", "decode_1", 1, "overflow", "are inf"),
    }),
    "swapped states": (faults._outputs_swapped, {
        "transformer-xl": Named("layers.0", "Reshape", "decode", 0, "swapped", "what layer00.mems.value.out should be"),
        "hourglass": Named(
            "level.post.blocks.0.attention", "Reshape", "decode_3", 0, "swapped", "attention.value.out should be"),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", FIVE)
def test_layer_and_step_of_a_planted_fault_are_named(name: str, family: str, one: Subject, tmp_path: Path) -> None:
    plant, wanted = FIVE[name]
    named = wanted[family]
    found = one.planted(tmp_path, plant)
    assert found.tensor is not None, found.verdict
    assert found.step is not None
    place = (found.tensor.module, found.tensor.operator, found.tensor.graph)
    assert place == (named.module, named.operator, named.graph)
    assert (found.step.rollout, found.step.position, found.step.row) == ("token by token", named.position, 0)
    assert named.evidence in {suspect.cause: suspect.evidence for suspect in found.suspects}[named.cause]
    assert f"{named.module} " in found.verdict
    assert f"at token {named.position}" in found.verdict
    assert not found.passed


def test_a_stream_that_is_not_its_model_is_the_fault_of_a_rule(family: str, one: Subject) -> None:
    other = duplicate(one.exported)
    other.model = bundles.MODELS[family]()
    next(weight for name, weight in other.model.named_parameters() if "feed_forward" in name).mul_(1.5)
    found = Search(open_bundle(one.bundle), "ort", other).report(steps=STEPS)
    assert found.verdict.startswith("the streaming form itself leaves the original model")
    assert found.step is not None
    assert [suspect.cause for suspect in found.suspects] == ["streaming rule"]


def test_a_good_bundle_passes(one: Subject) -> None:
    found = one.search(one.bundle)
    assert found.passed
    assert (found.step, found.tensor, found.suspects, found.differences) == (None, None, (), ())
    assert found.verdict == "ort stays within the tolerance of fp32 in every step"


def test_a_fault_that_begins_in_mid_stream_is_found_there(one: Subject, tmp_path: Path) -> None:
    found = one.planted(tmp_path, faults._late)
    assert found.step is not None
    assert found.step.position >= 40
    assert found.tensor is not None
    assert found.tensor.operator == "LayerNormalization"


def test_a_fault_in_the_engines_own_graph_is_found_there(one: Subject, tmp_path: Path) -> None:
    found = one.planted(tmp_path, faults._packed_only)
    assert found.tensor is not None
    assert found.tensor.name == "logits"
    assert "as ONNX Runtime optimised it" in found.found_by


@pytest.mark.parametrize(
    ("alter", "cause"), [(faulty_sessions.StaleBuffer, "stale state"), (faulty_sessions.RollsTooFar, "off by one row")]
)
def test_a_session_that_keeps_states_wrongly_is_not_taken_for_a_wrong_graph(
    alter: type[faulty_sessions.Altered], cause: str, one: Subject
) -> None:
    found = one.search(one.bundle, alter)
    assert found.step is not None
    assert found.tensor is None
    assert "every graph is right on what ort had remembered" in found.verdict
    assert cause in {suspect.cause for suspect in found.suspects}


class Tf32(faulty_sessions.Altered):
    """What a device in TF32 does to a product: 10 bits of mantissa stay."""

    def step(self, tokens: Any) -> Array:
        whole = self.inner.step(tokens).view(np.uint32)
        return ((whole + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


class Device(mutation._AlteredBundle):
    """A bundle whose engine for GPUs runs here."""

    def plan(self, engine: str | None = None) -> Plan:
        return super().plan("ort")


def test_an_engine_in_tf32_is_recognised_where_it_cannot_be_cut(one: Subject) -> None:
    opened = open_bundle(one.bundle)
    device = Device(opened.path, opened.manifest)
    device.alter = Tf32
    found = Search(device, "trt-rtx", one.exported).report(steps=STEPS)
    assert "every graph is right on what trt-rtx had remembered, and logits is not" in found.verdict
    assert [suspect.cause for suspect in found.suspects] == ["TF32"]


@pytest.mark.parametrize(
    ("plant", "evidence"),
    [
        (faults._first_row_for_all, "each row of the batch is right by itself"),
        (faults._no_mask_in_prefill, "the same tokens are right one by one"),
    ],
)
def test_a_graph_that_is_wrong_for_some_shapes_only(
    plant: Callable[[Copy], None], evidence: str, one: Subject, tmp_path: Path
) -> None:
    found = one.planted(tmp_path, plant)
    assert evidence in {suspect.cause: suspect.evidence for suspect in found.suspects}["shape specialisation"]


def test_a_fault_of_the_contract_is_told_from_one_of_the_graphs(one: Subject, tmp_path: Path) -> None:
    name = Copy(one.bundle, tmp_path / "copy.msc").appended()[0]
    found = one.planted(tmp_path, faults._initial)
    assert found.step is not None
    assert found.tensor is None
    assert found.differences == (f"states.{name}.initial is 0.5, the export says 0.0",)
    assert found.verdict.startswith("the graphs are right and the contract is not: ")


def test_a_bundle_that_refuses_what_the_original_takes_is_wrong_in_its_contract(one: Subject, tmp_path: Path) -> None:
    found = one.planted(tmp_path, lambda copy: copy.spec_is(max_context=16))
    assert not found.passed
    assert found.verdict.startswith("max_context is 16, the export says ")
    assert "; ort cannot follow the original: " in found.verdict


# ---- A fault of the runtime's fusion ----------------------------------------------------------------------

BLOCK = 16


def _on_grid(model: nn.Module) -> nn.Module:
    """Weights of one product that 4-bit integers hold exactly, in blocks of BLOCK."""
    weight = model.get_parameter("layers.0.feed_forward.3.weight")
    blocks = weight.data.unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    weight.data.copy_(((blocks / scale).round().clamp(-7, 7) * scale).flatten(1))
    return model


def _dequantized(copy: Copy) -> None:
    """That product's weights from 4-bit integers. They are the same, but ONNX Runtime fuses the two operators, and the
    product then takes activations in 8 bits (MatMulNBits, accuracy level 4)."""
    graph = copy.decode
    graph.proto.opset_import[0].version = 21  # the first with 4-bit integers
    name = graph.weights()[-2]
    weight = graph.constants()[name]  # (K, N)
    blocks = weight.reshape(-1, BLOCK, weight.shape[1])
    scale = np.abs(blocks).max(1) / np.float32(7)
    integers = np.rint(blocks / scale[:, None]).astype(np.int64).ravel().tolist()
    graph.set("planted.scale", scale)
    graph.proto.graph.initializer.append(
        onnx.helper.make_tensor("planted.integers", onnx.TensorProto.INT4, weight.shape, integers)
    )
    graph.nodes.insert(
        0,
        onnx.helper.make_node(
            "DequantizeLinear", ["planted.integers", "planted.scale"], ["planted.weight"], axis=0, block_size=BLOCK
        ),
    )
    for node in graph.nodes:
        node.input[:] = ["planted.weight" if each == name else each for each in node.input]


@pytest.mark.slow
def test_a_fault_that_only_the_fused_graph_has_is_found_by_cutting(tmp_path: Path) -> None:
    model = cases.transformer_xl(
        torch.float32, vocab_size=len(bundles.VOCAB), n_layer=1, d_model=16, d_inner=32, mem_len=4, same_length=True
    )
    checkpoint.save(tmp_path / "grid.pt", "transformer-xl", _on_grid(model), bundles.VOCAB)
    compile_checkpoint(tmp_path / "grid.pt", ["ort"], tmp_path / "grid.msc", bundles.options(validate=False))
    found = subject(tmp_path / "grid.msc", tmp_path / "grid.pt", tmp_path).planted(tmp_path, _dequantized)
    assert found.tensor is not None, found.verdict
    assert (found.tensor.module, found.tensor.operator) == ("layers.0.feed_forward.3", "MatMul")
    assert "runtime fusion" in {suspect.cause for suspect in found.suspects}
    assert found.found_by == "sub-graphs of the graph as exported; marking every tensor as an output hides the fault"


# ---- Other families and precisions, and modules of one's own ----------------------------------------------


def test_a_fault_in_a_module_of_ones_own(tmp_path: Path) -> None:
    weights, adapter = bundles.weights_of("gru", tmp_path / "gru.pt"), str(bundles.ADAPTERS / "gru_adapter.py")
    bundle = compile_checkpoint(
        weights, ["ort"], tmp_path / "gru.msc", bundles.options(adapter=adapter, validate=False)
    ).path

    def plant(copy: Copy) -> None:
        copy.decode.change(copy.decode.of("Gemm")[0].input[1], lambda weight: weight * 1.05)

    found = subject(bundle, weights, tmp_path, adapter).planted(tmp_path, plant)
    assert found.tensor is not None, found.verdict
    assert (found.tensor.module, found.tensor.module_class) == ("cell", "GRUCell")


@pytest.mark.slow
def test_a_fault_in_a_family_with_patches(tmp_path: Path) -> None:
    model = tiny.model("megabyte", "patches-of-three", torch.float32, len(bundles.VOCAB))
    checkpoint.save(tmp_path / "tiny.pt", "megabyte", model, bundles.VOCAB)
    bundle = compile_checkpoint(
        tmp_path / "tiny.pt", ["ort"], tmp_path / "tiny.msc", bundles.options(validate=False)
    ).path
    found = subject(bundle, tmp_path / "tiny.pt", tmp_path).planted(tmp_path, faults._scaled_weight)
    assert found.tensor is not None, found.verdict
    assert model.get_submodule(found.tensor.module)
    assert "1.05 times as large" in found.suspects[0].evidence


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_what_a_precision_costs_is_no_fault(precision: str, tmp_path: Path) -> None:
    bundle = compile_checkpoint(
        ROOT / "examples" / "transformer-xl.pt", ["ort"], tmp_path / "low.msc",
        bundles.options(precision=precision, validate=False, text=ROOT / "examples" / "held-out.txt"),
    )  # fmt: skip
    found = bisect(bundle, "ort", ROOT / "examples" / "transformer-xl.pt", steps=STEPS)
    assert found.passed, found.verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer-xl", "hourglass"])
def test_a_fault_in_an_example_is_found_at_its_size(name: str, tmp_path: Path) -> None:
    source = ROOT / "examples" / f"{name}.pt"
    bundle = compile_checkpoint(source, ["ort"], tmp_path / "good.msc", bundles.options(validate=False))
    copy = planted(bundle.path, tmp_path / "planted.msc", Fault("", "", faults._scaled_weight))
    found = bisect(open_bundle(copy.path), None, source, steps=STEPS)
    assert found.tensor is not None, found.verdict
    assert found.tensor.module.endswith("feed_forward.3")


# ---- The command ------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["bisect", *map(str, arguments), "--steps", str(STEPS)])


@pytest.mark.slow
def test_the_command_says_what_it_found(compiled: Path, trained: Path, tmp_path: Path) -> None:
    copy = planted(compiled, tmp_path / "planted.msc", Fault("", "", faults._overflow))
    done = invoke(copy.path, "--reference", trained, "--json")
    assert isinstance(done.exception, GateFailed)
    found = json.loads(done.stdout)
    assert str(done.exception) == found["verdict"]
    assert found["tensor"]["module"] == "layers.0.feed_forward.1"
    assert found["tensor"]["found"] == "Infinity"
    assert found["passed"] is False
    done = invoke(copy.path, "--reference", trained)
    for said in ("where ort leaves the original", "layers.0.feed_forward.1", "likely causes", "overflow", "inf"):
        assert said in done.stdout


def test_the_command_says_that_nothing_is_wrong(compiled: Path, trained: Path) -> None:
    done = invoke(compiled, "--reference", trained)
    assert (done.exit_code, done.stdout.strip()) == (0, "ort stays within the tolerance of fp32 in every step")


def test_an_engine_that_cannot_run_here(compiled: Path, trained: Path, tmp_path: Path) -> None:
    reason = trt_rtx.ENGINE.cannot_run()
    if reason is None:
        pytest.skip("this machine runs TensorRT for RTX")
    shutil.copytree(compiled, copy := tmp_path / "copy.msc")
    (copy / "engines" / "trt-rtx").mkdir()
    manifest = bundle_file.read(compiled)
    bundle_file.seal(copy, replace(manifest, engines={**manifest.engines, "trt-rtx": {}}))
    done = invoke(copy, "--reference", trained, "--engine", "trt-rtx")
    assert isinstance(done.exception, EngineUnavailable)
    assert done.exception.exit_code == 3
    assert str(done.exception) == reason


def test_another_checkpoint(compiled: Path, tmp_path: Path) -> None:
    bundles.save("hourglass", tmp_path / "other.pt")
    done = invoke(compiled, "--reference", tmp_path / "other.pt")
    assert isinstance(done.exception, UsageError)
    assert "name the right one by --reference" in str(done.exception)
