"""benchmarks/serving.py in short: every way serves every token right, and memory is what `inspect` says of a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import serving
import tables

from mscompile.runtime import open_bundle

ROOT = Path(__file__).parent.parent

EXACT = 1e-5


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that end within the context of the tiny models, and out of phase."""
    monkeypatch.setattr(serving, "SHORTEST", 3)
    monkeypatch.setattr(serving, "LONGEST", 20)


def test_traffic_asks_for_what_it_says() -> None:
    streams = serving.traffic(4000, 28, 500.0, seed=0)
    asked = sum(len(stream.tokens) for stream in streams) / streams[-1].arrives_s
    assert streams[0].arrives_s == 0
    assert asked == pytest.approx(500, rel=0.1)
    assert {len(stream.tokens) for stream in streams} == set(range(3, 21))


@pytest.mark.parametrize("way", serving.WAYS)
def test_every_stream_gets_the_logits_of_a_session_of_its_own(way: str, bundle_of: Path) -> None:
    opened = open_bundle(bundle_of)
    streams = serving.traffic(12, opened.spec.vocab_size, 3000.0, seed=1)
    serving.WAYS[way](opened, streams, 3)
    assert all(stream.done for stream in streams)
    assert all(np.all(np.diff([stream.arrives_s, *stream.delivered_s]) > 0) for stream in streams)
    for stream, expected in zip(streams, serving.alone(opened, streams), strict=True):
        np.testing.assert_allclose(stream.last, expected, rtol=0, atol=EXACT)


def test_rows_that_nobody_uses_do_not_reach_the_end_of_a_context(bundle_of: Path) -> None:
    opened = open_bundle(bundle_of)
    limit = opened.spec.max_context or 64
    streams = [serving.Stream(0.0, np.ones(20, np.int64)) for _ in range(2 * limit // 20)]
    serving.serve_rows(opened, streams, 1)
    busy = [serving.Stream(0.0, np.ones(limit - 4, np.int64)) for _ in range(3)]
    serving.serve_rows(opened, busy, 2)
    assert all(stream.done for stream in (*streams, *busy))


def test_a_measurement_compares_all_ways_on_the_same_arrivals(compiled: Path) -> None:
    found = serving.measure(open_bundle(compiled), rows=2, count=4, load=0.5, rounds=2)
    assert set(found["ways"]) == {"rows", "sessions", "sequential"}
    assert [len(ratios) for ratios in found["rows_to"].values()] == [2, 2]
    for figures in found["ways"].values():
        assert figures["max_logit_difference"] < EXACT
        assert 0 < figures["token_ms_p50"] <= figures["token_ms_p99"]
        assert 0 < figures["first_ms_p50"] <= figures["first_ms_p99"]
    result = {"serving": {"models": {"tiny": {**found, "memory": serving.memory(compiled, 3)}}}}
    assert tables.serving(result).count("| tiny |") == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer-xl", "hourglass"])
def test_a_stream_takes_the_memory_that_inspect_says(name: str, tmp_path: Path) -> None:
    """Of the trained examples, whose states are of a size that a process can be measured by."""
    from mscompile.inspection import inspect_bundle
    from mscompile.pipeline import Options, compile_checkpoint

    bundle = tmp_path / f"{name}.msc"
    compile_checkpoint(ROOT / "examples" / f"{name}.pt", ["ort"], bundle, Options(validate=False))
    found = serving.in_a_process(bundle, 64)
    assert found["predicted_bytes"] == inspect_bundle(bundle)["state_bytes_per_stream"]
    for measured in ("session_bytes", "row_bytes"):
        assert found[measured] == pytest.approx(found["predicted_bytes"], rel=0.1)
