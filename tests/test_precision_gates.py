"""Exports in each precision, held to their gates: what passes, what must not, and what a bundle tells about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bundles
import cases
import numpy as np
import onnxruntime
import pytest
import tiny
import torch

import mscompile
from engines.torch_eager import original
from exporters.precision import half
from exporters.precision.rounding import Scheme
from exporters.precision.table import PRECISIONS
from mscompile import checkpoint, inspection
from mscompile.contracts import Array, Profile, Session
from mscompile.errors import EngineUnavailable, GateFailed
from mscompile.pipeline import Options, compile_checkpoint
from validation import parity, rollouts
from validation.parity import TOLERANCES
from validation.perplexity import LEAST_TOKENS

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = EXAMPLES / "held-out.txt"
PRODUCTS = {"fp16": "float16", "bf16": "bfloat16", "int8": "int8", "int8-dynamic": "int8-dynamic"}

# ---- The gate itself --------------------------------------------------------------------------------------


class Blurred:
    """A session of the stream program whose logits have noise of a given size."""

    def __init__(self, session: Session, size: float) -> None:
        self.inner, self.size = session, size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, tokens: Array) -> Array:
        noise = np.random.default_rng(int(tokens.sum())).standard_normal(self.inner.spec.vocab_size)  # type: ignore[attr-defined]
        return (self.inner.step(tokens) + self.size * noise).astype(np.float32)


def report(precision: str, size: float, steps: int = 700) -> parity.ParityReport:
    """Noise against the gate, on tokens that the model itself finds likely, taken for text."""
    model = cases.model("post-norm-same-length", torch.float32)
    spec = cases.build(model).spec
    text = sampled(model, 4 * steps)
    return parity.check(
        "program", precision, spec, lambda batch: Blurred(cases.eager_session(model, batch), size), original(model),
        lambda batch: cases.eager_session(model, batch), rollouts.standard(spec, text, steps),
    )  # fmt: skip


def sampled(model: Any, length: int) -> Array:
    random, session = np.random.default_rng(0), cases.eager_session(model)
    tokens = [0]
    for _ in range(length):
        chances = np.exp(parity.log_softmax(session.step([[tokens[-1]]])[0, -1]))
        tokens.append(int(random.choice(len(chances), p=chances / chances.sum())))
    return np.array(tokens)


@pytest.mark.slow
def test_perplexity_is_gated() -> None:
    good = report("int4", 0.01)
    assert good.failures == ()
    assert good.perplexity is not None
    assert good.perplexity.tokens >= LEAST_TOKENS
    assert abs(good.perplexity.loss) < 0.005
    assert 0 < good.perplexity.standard_error < 0.001
    bad = report("int4", 0.5)
    assert bad.perplexity is not None
    assert bad.perplexity.loss > 0.02
    assert any(fault.startswith("perplexity on text is") and "2.00% is allowed" in fault for fault in bad.failures)


def test_without_enough_text_only_the_other_limits_hold() -> None:
    found = report("int4", 0.01, steps=32)
    assert found.perplexity is None
    assert found.passed


def test_what_passes_for_one_precision_fails_for_a_finer_one() -> None:
    assert report("int4", 0.1, steps=32).passed
    assert any("mean KL divergence" in fault for fault in report("fp16", 0.1, steps=32).failures)


def test_every_precision_has_a_gate() -> None:
    assert set(TOLERANCES) == set(PRECISIONS)
    for name, tolerance in TOLERANCES.items():
        assert ("max_perplexity_loss" in tolerance.limits()) == (name != "fp32")
        assert ("state_max_abs" in tolerance.limits()) == (name == "fp32")


# ---- Tiny exports -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(made_once: bundles.MadeOnce) -> Path:
    """A tiny Transformer-XL, but wide enough that a block of weights is one."""

    def save(path: Path) -> None:
        model = cases.transformer_xl(
            torch.float32, vocab_size=len(bundles.VOCAB), n_layer=1, mem_len=4, same_length=True,
            d_model=32, n_head=2, d_head=16, d_inner=64,
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(0.4)
        checkpoint.save(path, "transformer-xl", model, bundles.VOCAB)

    return made_once("wide.pt", save)


def compiled(wide: Path, tmp_path: Path, precision: str, **changes: Any) -> mscompile.Bundle:
    return compile_checkpoint(wide, ["ort"], tmp_path / "out.msc", bundles.options(precision=precision, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRODUCTS)
def test_an_export_passes_its_gate_and_tells_what_it_is(precision: str, wide: Path, tmp_path: Path) -> None:
    bundle = compiled(wide, tmp_path, precision)
    manifest = bundle.manifest
    assert (manifest.precision, manifest.verified) == (precision, True)
    assert manifest.tolerances == TOLERANCES[precision].limits()
    assert any(hit.name == precision and hit.applied for hit in manifest.passes)
    kinds = {kind for row in manifest.engines["ort"]["numerics"].values() for kind in row["products"]}
    assert kinds == {PRODUCTS[precision]}
    assert PRODUCTS[precision] in inspection.inspect(bundle.path)["numerics"]["ort"]["decode"]
    assert bundle.verify("ort").passed
    assert all(state.dtype == "float32" for state in manifest.spec.states)


@pytest.mark.slow
def test_rounding_that_loses_too_much_ends_with_no_bundle(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match=r"ort is not the original model: .* exceeds .*; no bundle was written"):
        compiled(wide, tmp_path, "int8", rounding=Scheme(bits=2, block=None, clip=False))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_in_another_precision_ends_with_no_bundle(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its optimisations the runtime dequantizes all weights in every step and multiplies in FP32."""

    class Unoptimised(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    monkeypatch.setattr(onnxruntime, "SessionOptions", Unoptimised)
    sentence = "ort does not run in int8: graph decode asks for 5 int8 products and the runtime has 5 float32"
    with pytest.raises(GateFailed, match=sentence):
        compiled(wide, tmp_path, "int8", validate=False)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_lacks_the_operators_is_refused_at_once(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    with pytest.raises(EngineUnavailable, match="trt-rtx cannot be built in int8-dynamic: TensorRT has no") as caught:
        compile_checkpoint(wide, ["ort", "trt-rtx"], tmp_path / "out.msc", Options(precision="int8-dynamic"))
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


# ---- Hard decisions ---------------------------------------------------------------------------------------


def hard(family: str, tmp_path: Path, precision: str) -> mscompile.Bundle:
    """The first tiny model of a family that decides by comparing."""
    model = tiny.model(family, next(iter(tiny.TINY[family])), torch.float32, len(bundles.VOCAB))
    checkpoint.save(tmp_path / "hard.pt", family, model, bundles.VOCAB)
    options = bundles.options(precision=precision)
    return compile_checkpoint(tmp_path / "hard.pt", ["ort"], tmp_path / "out.msc", options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "precision", "operator"),
    [("hm-lstm", "fp16", "Gemm"), ("hm-lstm", "bf16", "Gemm"), ("product-key-memory", "bf16", "TopK")],
)
def test_hard_decisions_are_made_in_fp32(family: str, precision: str, operator: str, tmp_path: Path) -> None:
    manifest = hard(family, tmp_path, precision).manifest
    assert manifest.verified
    islands = [hit.reason for hit in manifest.passes if half.DECIDES in hit.reason]
    assert islands
    assert all(operator in island for island in islands)


@pytest.mark.slow
def test_decisions_that_fall_otherwise_are_the_reason_of_a_refusal(tmp_path: Path) -> None:
    """Which keys are nearest among random ones is close, and 11 bits of mantissa are held to a tenth of a logit."""
    with pytest.raises(GateFailed, match="this model makes hard decisions, and close ones fall otherwise in fp16"):
        hard("product-key-memory", tmp_path, "fp16")
    assert not (tmp_path / "out.msc").exists()


# ---- The trained examples ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), [("transformer-xl", "int8"), ("transformer-xl", "int4"), ("hourglass", "int4")]
)
def test_trained_models_stay_within_the_loss_of_perplexity(name: str, precision: str, tmp_path: Path) -> None:
    options = Options(precision=precision, profile=Profile(1, 3, 128), text=TEXT, steps=1024)
    bundle = compile_checkpoint(EXAMPLES / f"{name}.pt", ["ort"], tmp_path / "out.msc", options)
    parity_of = (bundle.manifest.parity or {})["ort"]
    assert parity_of["failures"] == []
    assert parity_of["perplexity"]["tokens"] >= 4000
    assert parity_of["perplexity"]["loss"] <= {"int8": 0.005, "int4": 0.02}[precision]
    kinds = {kind for row in bundle.manifest.engines["ort"]["numerics"].values() for kind in row["products"]}
    assert kinds == {precision}
