"""The processes that measure, what they are asked, and the ceilings; no test depends on how fast the machine is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mscompile import bench, codec, footprint, worker
from mscompile.bench import CEILING, Contestant, Field, Heat, Lane, Rates
from mscompile.contracts import Schedule, Tick
from mscompile.errors import EngineError, EngineUnavailable, UsageError
from mscompile.footprint import Footprint
from mscompile.runtime import open_bundle
from validation import ceilings, html
from validation.ceilings import ProductRate, ReadBandwidth
from validation.latency import Ratio, parse

ONE_GRAPH = Schedule((Tick(("decode",)),))

ANSWERS = """
from mscompile import worker
from mscompile.errors import BundleError, EngineUnavailable

KINDS = {"unavailable": EngineUnavailable, "bundle": BundleError, "own": ValueError}

def start():
    print("noise of a library")
    def answer(question):
        if "fail" in question:
            raise KINDS[question["fail"]]("why\\nmore")
        if "end" in question:
            raise SystemExit(7)
        return {"twice": 2 * question["number"]}
    return answer

worker.serve(start)
"""


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module whose process answers questions."""
    (tmp_path / "answering.py").write_text(ANSWERS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent}")
    return "answering"


def test_a_process_answers_whatever_its_libraries_print(answering: str) -> None:
    with worker.process("a test", answering) as ask:
        assert [ask(number=number)["twice"] for number in (3, 4)] == [6, 8]


@pytest.mark.parametrize(
    ("fail", "kind", "said"),
    [
        ("unavailable", EngineUnavailable, "why"),
        ("bundle", EngineError, "why"),
        ("own", EngineError, "ValueError: why"),
    ],
)
def test_what_goes_wrong_in_a_process_is_raised_here(
    answering: str, fail: str, kind: type[Exception], said: str
) -> None:
    with worker.process("a test", answering) as ask, pytest.raises(kind, match=said) as raised:
        ask(fail=fail)
    assert type(raised.value) is kind


def test_a_process_that_ends_is_named(answering: str) -> None:
    with (
        worker.process("a test", answering) as ask,
        pytest.raises(EngineError, match="measures a test ended with code 7"),
    ):
        ask(end=True)


def test_a_ratio_is_of_rounds_not_of_all_samples() -> None:
    noisy = Ratio.of([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (noisy.median, noisy.low, noisy.high) == (2.0, 2.0, 2.0)
    assert Ratio.of([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]).median == 2.0


def test_a_heat_compares_lanes_round_by_round() -> None:
    fast, slow = Lane("ours", parse("decode@4"), 2), Lane("torch", parse("decode@4"), 2)
    samples = {fast: [[(4, 1.0), (5, 1.0)], [(6, 5.0), (7, 5.0)]], slow: [[(4, 8.0), (5, 8.0)], [(6, 40.0), (7, 40.0)]]}
    rates = [Rates(1e9, 1e12), Rates(2e8, 1e12)]  # 0.5 ms, then 2.5 ms for half a megabyte
    heat = Heat(samples, rates)
    assert heat.ratio(slow, fast, ONE_GRAPH) == Ratio(8.0, 8.0, 8.0)
    assert heat.of_ceiling(fast, Footprint(4e5, 1e5, 10.0), ONE_GRAPH).median == pytest.approx(2.0)
    assert heat.latency(fast, ONE_GRAPH).samples == 4


def test_the_ceiling_is_the_longer_of_reading_and_computing() -> None:
    cost, rates = Footprint(weight_bytes=1e6, state_bytes=1e5, flops=1e6), Rates(1e9, 1e10)
    assert rates.least_ms(cost) == pytest.approx(1.1)
    assert rates.least_ms(cost, batch=4) == pytest.approx(1.4)
    assert rates.least_ms(cost, tokens=128) == pytest.approx(12.8)


def test_a_step_reads_its_weights_and_the_rows_that_were_written(bundle_of: Path, family: str) -> None:
    opened = open_bundle(bundle_of)
    early, late = (footprint.decode(bundle_of, opened.manifest, position) for position in (16, 64))
    weights = opened.manifest.files["graphs/weights.bin"].size_bytes
    assert 0.3 * weights < early.weight_bytes <= weights + 4096  # small constants lie in the graphs
    assert early.weight_bytes == late.weight_bytes
    assert 0 < late.state_bytes <= opened.spec.bytes_per_stream()
    assert (early.state_bytes < late.state_bytes) == (family == "hourglass")
    assert late.bytes(3) == pytest.approx(late.weight_bytes + 3 * late.state_bytes)
    costs = [opened.manifest.costs[tick.graphs[0]] * tick.repeat for tick in opened.spec.schedule.ticks]
    assert late.flops == pytest.approx(sum(costs) / opened.spec.schedule.period)


def test_products_are_those_of_the_model(compiled: Path) -> None:
    opened = open_bundle(compiled)
    found = footprint.products(compiled / "graphs", opened.spec.graph("decode"))
    assert (8, 12, 1) in found  # the feed-forward: d_model 8, d_inner 12
    assert (12, 8, 1) in found
    assert (8, opened.spec.vocab_size, 1) in found


@pytest.mark.parametrize("compiler", [True, False])
def test_the_machine_reads_every_byte(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(ceilings.shutil, "which", lambda _: None)
    bandwidth = ReadBandwidth(8 * 1003, threads=3)
    assert bandwidth.bytes_per_second() > 0
    bandwidth.buffer[-1] = 5  # the last word counts, too
    with pytest.raises(AssertionError):
        bandwidth.bytes_per_second()


def test_the_machine_multiplies() -> None:
    rate = ProductRate([(8, 4, 2), (4, 8, 1)], rows=16, threads=1)
    assert rate.flops == 16 * 2 * (2 * 8 * 4 + 4 * 8)
    assert rate.flops_per_second() > 0


def test_a_run_against_peers(compiled: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One short run with real processes: a peer that runs, one that cannot, the ceilings, and the page of it."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    report = bench.run(
        compiled, ["ort"], ["decode@8", "prefill:6@8"], trained, rounds=2, samples=3,
        against=["torch", "hourglass-pytorch"], ceilings=True,
    )  # fmt: skip
    assert set(report.skipped) == {"hourglass-pytorch"}
    assert [(row.engine, row.workload) for row in report.latencies] == [
        ("torch", "decode@8"), ("ort", "decode@8"), ("torch", "prefill:6@8"), ("ort", "prefill:6@8"),
    ]  # fmt: skip
    assert set(report.speedups) == {"ort decode@8 torch", "ort prefill:6@8 torch"}
    assert set(report.ceilings) == {"ort decode@8", "ort prefill:6@8"}
    assert all(0 < found.low <= found.median <= found.high for found in report.ceilings.values())
    assert report.errors["ort"] < 1e-4
    assert report.peak_bytes["ort"] > 2**20
    assert "hourglass-pytorch" in html.bench_page(json.loads(json.dumps(codec.encode(report))))


def test_peers_need_the_checkpoint(compiled: Path) -> None:
    with pytest.raises(UsageError, match="give its checkpoint with --reference"):
        bench.run(compiled, [], ["decode"], against=["torch"])


class Answers(Field):
    """A field whose processes are functions."""

    def __init__(self, contestants: list[Contestant], ask: dict[str, Any]) -> None:
        super().__init__(contestants)
        self._ask = ask


def sampled(**question: Any) -> dict[str, Any]:
    if "check" in question:
        return {"logits": [1.0, 2.0]}
    return {"samples": [(0, 1.0)] * question["samples"], "peak_bytes": 1}


def broken(**_: Any) -> dict[str, Any]:
    raise EngineError("out of memory")


def contestants(*names: str) -> list[Contestant]:
    return [Contestant(name, name, Path("bundle"), Path("model.pt")) for name in names]


def test_a_peer_that_fails_on_the_way_is_left_out() -> None:
    field = Answers(contestants("torch", "openvino", "ort"), {"torch": sampled, "openvino": broken, "ort": sampled})
    lanes = [Lane(name, parse("decode@1"), 2) for name in ("torch", "openvino", "ort")]
    heat = field.run(lanes, rounds=2)
    assert [lane.contestant for lane in heat.samples] == ["torch", "ort"]
    assert field.skipped == {"openvino": "out of memory"}
    assert heat.samples[lanes[0]] == [[(0, 1.0)] * 2] * 2


def test_an_engine_of_ours_that_fails_ends_the_run() -> None:
    field = Answers(contestants("ort"), {"ort": broken})
    with pytest.raises(EngineError, match="out of memory"):
        field.run([Lane("ort", parse("decode@1"), 2)], rounds=1)


def test_errors_are_against_the_original() -> None:
    others = {"ort": lambda **_: {"logits": [1.0, 2.5]}, "hourglass-pytorch": lambda **_: {"logits": [9.0]}}
    field = Answers(contestants("torch", *others), {"torch": sampled, **others})
    assert field.errors() == {"ort": 0.5}


def test_ceilings_are_no_contestant() -> None:
    field = Answers(
        contestants("ort"), {"ort": sampled, CEILING: lambda: {"bytes_per_second": 1.0, "flops_per_second": 2.0}}
    )
    assert field.running == ["ort"]
    assert field.run([Lane("ort", parse("decode@1"), 1)], rounds=2).rates == [Rates(1.0, 2.0)] * 2


def test_a_long_run_stays_with_the_original(compiled: Path, trained: Path) -> None:
    import soak

    result = soak.soak(open_bundle(compiled), trained, steps=60, blocks=3)
    assert len(result["block_ms"]) == len(result["block_resident_bytes"]) == 3
    assert result["final_error"] < 1e-4
    assert 0.1 < result["latency_ratio"] < 10
    assert np.isfinite(result["memory_growth_percent"])


def test_the_peak_of_a_process_is_its_own() -> None:
    script = "from mscompile import worker; print(worker.peak_resident_bytes())"
    heavy = f"import subprocess, sys; held = bytearray(400_000_000); subprocess.run([sys.executable, '-c', {script!r}])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert 5_000_000 < int(done.stdout) < 200_000_000
