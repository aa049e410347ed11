"""The check for CUDA machines: its recurrence is the original, and without a device it says so and exits 3."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import gpu_check
import pytest
import shapes
import torch
from recurrence import Recurrence

ROOT = Path(__file__).parent.parent

SETTINGS: list[dict[str, Any]] = [
    {"mem_len": 5},
    {"mem_len": 2, "pre_norm": True},
    {"mem_len": 9, "clamp_len": 3, "tie_embedding": False},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_the_recurrence_is_the_original(settings: dict[str, Any], seed: int) -> None:
    model = cases.transformer_xl(torch.float64, same_length=True, **settings)
    remembered = model.config.mem_len - 1
    tokens = torch.from_numpy(cases.tokens(2, 40, seed))
    sizes = torch.randint(1, remembered + 1, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    recurrence, found, done = Recurrence(model, batch=2), [], 0
    with torch.inference_mode():
        for size in sizes:
            found.append(recurrence.step(tokens[:, done : done + size]))
            done += size
            if done >= 40:
                break
        expected = model.full(tokens)
        assert cases.worst(torch.cat(found, dim=1).numpy(), expected.numpy()) < 1e-10
        recurrence.reset()
        assert cases.worst(recurrence.step(tokens[:, :1]).numpy(), expected[:, :1].numpy()) < 1e-10


def test_a_ring_needs_a_rolling_memory() -> None:
    with pytest.raises(ValueError, match="same_length"):
        Recurrence(cases.transformer_xl(torch.float32))


def test_the_bytes_of_a_step_are_counted_once() -> None:
    model = cases.transformer_xl(torch.float32, same_length=True)
    config, own = model.config, sum(parameter.nbytes for parameter in model.parameters())
    width = config.n_head * config.d_head
    positions = config.n_layer * config.d_model * width * 4  # W_r, which the tables replace
    tables = config.n_layer * width * config.mem_len * 4
    memory = 2 * config.n_layer * width * (config.mem_len - 1) * 4
    assert Recurrence(model).step_bytes() == own - positions + tables + memory


def test_the_check_runs_where_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shapes, "transformer_xl", lambda: cases.transformer_xl(torch.float32, same_length=True, mem_len=9)
    )
    monkeypatch.setattr(gpu_check, "PREFIX", 16)
    monkeypatch.setattr(gpu_check, "PREFILL", 4)
    monkeypatch.setattr(gpu_check, "READ_BYTES", 2**16)
    result = gpu_check.check(torch.device("cpu"), rounds=2)
    assert all(found["passed"] for found in result["parity"].values())
    assert result["parity"]["float32"]["max_abs"] < 1e-5
    assert result["skipped"] == {"bundle, ONNX Runtime CUDA": "no --bundle was given"}
    names = {name.split(" ", 2)[2] for name in result["latency"]}
    assert names == {"original, eager", "recurrence, eager"}
    row = result["latency"]["float32 decode recurrence, eager"]
    assert row["samples"] == 2 * gpu_check.SAMPLES
    assert row["share_of_bandwidth"] == pytest.approx(row["ceiling_ms"] / row["ms"])


def test_a_way_that_cannot_run_is_skipped_with_its_reason() -> None:
    def fails() -> None:
        raise RuntimeError("no compiler\nand more")

    skipped: dict[str, str] = {}
    ways = [gpu_check.Way("a", "decode", "float32", fails), gpu_check.Way("b", "decode", "float32", lambda: None)]
    assert [way.name for way in gpu_check.attempted(ways, skipped)] == ["b"]
    assert skipped == {"a, decode, float32": "RuntimeError: no compiler"}


def test_without_a_device_it_says_so_and_exits_3(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "PYTHONPATH": ""}
    script, out = ROOT / "benchmarks" / "gpu_check.sh", tmp_path / "gpu.json"
    done = subprocess.run(
        [script, "--out", out], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "no CUDA device: nothing was measured\n")
    assert not out.exists()
