"""Rows of the target table from made-up results: what is compared with what, and which way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tables
from precision import loss
from targets import DECODE, HOURGLASS, PREFILL, TXL, VANILLA, Row, rows

from mscompile.models.families import FAMILIES

ROOT = Path(__file__).parent.parent


def ratio(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.8 * median, "high": 1.25 * median}


def timing(engine: str, workload: str, ms: float, batch: int = 1, **versus: float) -> dict[str, Any]:
    names = {"eager": f"{TXL} torch", "ort": f"{TXL} onnx-plain", "ov": f"{TXL} openvino", "vanilla": f"{VANILLA} fp32"}
    names["public"] = f"{HOURGLASS} hourglass-pytorch"
    return {
        "engine": engine, "workload": workload, "batch": batch, "ms_per_step": ms, "p95_ms": ms, "min_ms": ms,
        "samples": 24, "tokens_per_second": 1000 * batch / ms, "of_ceiling": {**ratio(1.1), "ms": ms / 1.1},
        "versus": {names[name]: ratio(value) for name, value in versus.items()},
    }  # fmt: skip


SPEED = {
    "timings": [
        timing(f"{TXL} fp32", DECODE, 5.0, eager=17.0, ort=8.0, ov=7.0),
        timing(f"{TXL} fp32", PREFILL, 40.0, eager=6.0, ort=2.0, ov=3.0),
        timing(f"{TXL} fp32", DECODE, 8.0, batch=4),
        timing(f"{TXL} int4", DECODE, 2.0, eager=36.0),
        timing(f"{HOURGLASS} fp32", DECODE, 3.0, vanilla=1.8, public=120.0),
    ],
    "skipped": {f"{TXL} int8": "unknown precision 'int8'"},
}


def found(**sections: Any) -> dict[str, Row]:
    return {row.what: row for row in rows(sections)}


def test_decode_and_prefill_are_held_against_ceiling_eager_and_the_faster_plain_export() -> None:
    table = found(speed=SPEED)
    ceiling, eager, plain = (row for row in table.values() if row.target == 1)
    assert (ceiling.measured, ceiling.limit, ceiling.met) == (1.1, 1.15, True)
    assert (eager.measured, eager.met) == (17.0, False)
    assert (plain.measured, plain.note, plain.met) == (7.0, "openvino", True)
    assert plain.spread == (pytest.approx(5.6), pytest.approx(8.75))
    *_, plain = (row for row in table.values() if row.target == 2)
    assert (plain.measured, plain.note, plain.met) == (2.0, "onnx-plain", False)


def test_a_precision_that_cannot_be_built_says_why() -> None:
    table = found(speed=SPEED)
    row = table["int8 decode: time to its byte ceiling"]
    assert (row.measured, row.met) == (None, None)
    assert "unknown precision 'int8'" in row.note
    assert table["int4 decode: original eager to ours"].met is True


def test_hourglass_is_held_against_what_its_layers_predict() -> None:
    table = found(speed=SPEED)
    row = table["Hourglass decode: time to what its layer counts predict from vanilla"]
    assert row.measured == pytest.approx((1 / 1.8) / ((4 + 8 / 3) / 12))
    assert row.spread is not None
    assert row.spread[0] < row.measured < row.spread[1]
    assert row.met is True
    assert table["Hourglass decode: public package, recomputing 1,024 tokens, to ours"].met is True


def test_tokens_a_second_are_held_against_batch_one() -> None:
    row = found(speed=SPEED)["tokens/s of batch 4 to batch 1"]
    assert row.measured == pytest.approx(4 * 5.0 / 8.0)


def test_perplexity_cost_memory_and_soak() -> None:
    table = found(
        precision={"hourglass int8": {"perplexity_loss_percent": 0.6}, "hourglass int4": {"reason": "gate failed"}},
        cost={"help_seconds": 0.2, "overhead_percent": 7.5},
        memory={"lengths": {"255": {HOURGLASS: {"state_bytes": 2.0}, VANILLA: {"state_bytes": 5.0}}}},
        soak={"steps": 100_000, "latency_ratio": 1.02, "memory_growth_percent": 0.0, "final_error": 1e-5},
    )
    assert table["int8: perplexity lost, trained hourglass"].met is False
    assert table["int4: perplexity lost, trained hourglass"].note == "gate failed"
    assert table["mscompile --help"].met is True
    assert table["session over the bare runtime call, a decode step"].met is False
    assert table["Hourglass to vanilla at 255 tokens: state of a stream"].measured == pytest.approx(0.4)
    assert table["100,000 steps: a step of the second half to one of the first"].met is True


def test_nothing_measured_is_no_target_met() -> None:
    empty = rows({})
    assert {row.target for row in empty} == {1, 2, 3, 4, 5, 6, 7}
    assert all(row.met is None and row.note for row in empty)


def test_perplexity_loss_is_that_of_the_gate() -> None:
    def tensor(error: float, name: str = "logits") -> dict[str, Any]:
        return {"tensor": name, "max_abs": error}

    lost = {"tokens": 4096, "loss": 0.004, "standard_error": 0.0005}
    found = loss({"tensors": [tensor(0.2), tensor(0.5), tensor(9.0, "layer00.mems.key")], "perplexity": lost})
    assert found["perplexity_loss_percent"] == pytest.approx(0.4)
    assert found["standard_error_percent"] == pytest.approx(0.05)
    assert (found["tokens"], found["logit_error"]) == (4096, 0.5)


def test_the_documents_quote_the_results() -> None:
    texts = [path.read_text(encoding="utf-8") for path in tables.DOCUMENTS]
    assert {match[2] for text in texts for match in tables.BLOCK.finditer(text)} == set(tables.BLOCKS)
    assert texts == [tables.written(text, tables.results()) for text in texts]


def test_every_family_is_measured() -> None:
    measured = tables.results()["families"]["families"]
    assert list(measured) == [family.name for family in FAMILIES]
    assert all(row["max_logit_error"] < 1e-3 for row in measured.values())


def test_a_changed_figure_is_noticed() -> None:
    section = {
        **SPEED,
        "machine": {"processor": "p", "cores": 2, "threads": 2, "system": "s", "python": "3", "versions": {}},
    }
    result = {"rows": [], "sections": {"speed": section}}
    block = "<!-- measured: decode -->\nold\n<!-- end -->"
    fresh = tables.written(block, {"targets": result})
    assert "| transformer-xl-41m fp32 | 5.00 | 5.00 | 5.00 | 1.10x | 24 |" in fresh
    assert tables.written(fresh.replace("5.00", "4.00", 1), {"targets": result}) == fresh
