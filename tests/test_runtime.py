"""Opening and running bundles, with nothing installed but numpy and one engine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch

import mscompile
from engines.torch_eager import TorchSession
from mscompile import checkpoint, runtime
from mscompile.errors import EngineUnavailable, InputError, UsageError

ROOT = Path(mscompile.__file__).parents[1]

# The script below may import these and the standard library, and nothing else.
ALONE = """
import sys

class Only:
    allowed = set(sys.stdlib_module_names) | {
        "numpy", "onnxruntime", "flatbuffers", "google", "packaging", "mscompile", "engines", "validation",
    }

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.allowed:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Only())
import mscompile

bundle = mscompile.open_bundle(sys.argv[1])
bundle.verify("ort").raise_if_failed()
prompt = bundle.tokenizer.encode("and he said")
tokens = mscompile.generate(bundle.session("ort"), prompt, 24)
print(bundle.tokenizer.decode(list(tokens)), end="")
"""


def test_a_process_without_torch_opens_verifies_and_generates_what_the_original_does(
    bundle_of: Path, checkpoint_of: Path
) -> None:
    ended = subprocess.run([sys.executable, "-c", ALONE, str(bundle_of)], capture_output=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr.decode()
    trained = checkpoint.load(checkpoint_of)
    prompt = [trained.vocab.index(c) for c in "and he said"]
    tokens = runtime.generate(TorchSession(trained.model), prompt, 24)
    assert ended.stdout.decode() == "".join(trained.vocab[token] for token in tokens)


def test_sessions_stream_in_any_chunks(bundle_of: Path, checkpoint_of: Path) -> None:
    bundle = mscompile.open_bundle(bundle_of)
    model = checkpoint.load(checkpoint_of).model
    tokens = np.random.default_rng(0).integers(0, bundle.spec.vocab_size, (3, 60))
    with torch.inference_mode():
        wanted = model.full(torch.from_numpy(tokens)).numpy()
    for chunks in ([1] * 60, [60], [7, 1, 16, 2, 1, 33]):
        assert cases.worst(cases.stream(bundle.session("ort", batch=3), tokens, chunks), wanted) < 1e-4


def test_snapshots_and_row_resets(bundle_of: Path, checkpoint_of: Path) -> None:
    bundle = mscompile.open_bundle(bundle_of)
    rollout = cases.Rollout(checkpoint.load(checkpoint_of).model, bundle.session(batch=2))
    rollout.step(7)
    rollout.save()
    rollout.reset([1])
    rollout.step(5)
    rollout.step(1)
    rollout.back()
    rollout.step(9)
    assert rollout.error() < 1e-4


def test_a_plan_is_loaded_once_and_shared(compiled: Path) -> None:
    bundle = mscompile.open_bundle(compiled)
    assert bundle.plan("ort") is bundle.plan()
    first, second = bundle.session(), bundle.session()
    first.step([[1, 2, 3]])
    assert second.position.tolist() == [0]


def test_an_engine_that_was_not_built_or_does_not_exist(compiled: Path) -> None:
    bundle = mscompile.open_bundle(compiled)
    with pytest.raises(UsageError, match="was not built for trt-rtx; it has ort"):
        bundle.plan("trt-rtx")
    with pytest.raises(UsageError, match="unknown engine 'ortt'; did you mean ort"):
        bundle.plan("ortt")


def test_an_engine_that_cannot_run_here(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable, match="ONNX Runtime is not installed"):
        mscompile.open_bundle(compiled).session()


def test_a_batch_beyond_the_profile(compiled: Path) -> None:
    with pytest.raises(InputError, match=r"batch 4 is outside this engine's profile of 1 to 3; .* --batch 1:4"):
        mscompile.open_bundle(compiled).session(batch=4)


@pytest.mark.parametrize("tokens", [[[28]], [[-1]]])
def test_token_ids_out_of_range(compiled: Path, tokens: list[list[int]]) -> None:
    session = mscompile.open_bundle(compiled).session()
    with pytest.raises(InputError, match=rf"token id {tokens[0][0]} is out of range: this model knows ids 0 to 27"):
        session.step(tokens)
    assert session.position.tolist() == [0]


class Fixed:
    """A session whose logits are always the same."""

    batch = 1

    def __init__(self, logits: Sequence[float]) -> None:
        self.logits = np.array(logits, dtype=np.float32)
        self.fed: list[Any] = []

    def step(self, tokens: Any) -> Any:
        tokens = np.asarray(tokens)
        self.fed.append(tokens.tolist())
        return np.broadcast_to(self.logits, (*tokens.shape, len(self.logits)))


def test_generation_feeds_back_what_it_yields() -> None:
    session: Any = Fixed([0.0, 2.0, 1.0])
    assert list(runtime.generate(session, [2, 0], 3)) == [1, 1, 1]
    assert session.fed == [[[2, 0]], [[1]], [[1]]]


def test_sampling_follows_the_distribution_and_its_seed() -> None:
    logits = np.log([0.5, 0.3, 0.2])

    def sample(temperature: float, seed: int) -> np.ndarray:
        session: Any = Fixed(logits.tolist())
        return np.bincount(list(runtime.generate(session, [0], 4000, temperature, seed)), minlength=3) / 4000

    assert np.abs(sample(1.0, 1) - [0.5, 0.3, 0.2]).max() < 0.03
    assert np.abs(sample(0.5, 1) - np.array([25, 9, 4]) / 38).max() < 0.03
    assert (sample(1.0, 1) == sample(1.0, 1)).all()
    assert (sample(1.0, 1) != sample(1.0, 2)).any()
    assert sample(1e-6, 3)[0] == 1.0


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_impossible_temperatures(temperature: float) -> None:
    session: Any = Fixed([0.0, 1.0])
    with pytest.raises(InputError, match="temperature must be 0"):
        next(runtime.generate(session, [0], 1, temperature))


@pytest.mark.parametrize(("told", "writes"), [({}, False), ({"ORT_DISABLE_TELEMETRY": "0"}, True)])
def test_onnxruntime_reports_nothing_unless_told_to(told: dict[str, str], writes: bool, tmp_path: Path) -> None:
    """Where it reports, it first writes an id of the device below the home directory."""
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **told}
    line = [sys.executable, "-c", "import mscompile, onnxruntime"]
    subprocess.run(line, env=environment, check=True, timeout=120)
    assert bool(list(tmp_path.rglob("deviceid"))) == writes


def test_public_names_are_the_documented_ones() -> None:
    declaring = ["Adapter", "Profile", "StateSpec", "Tick", "state"]
    running = ["Bundle", "MsCompileError", "compile_checkpoint", "generate", "open_bundle"]
    assert mscompile.__all__ == sorted([*declaring, *running])
    for name in mscompile.__all__:
        assert getattr(mscompile, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mscompile.nothing
