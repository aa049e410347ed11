"""Reports: well-formed, self-contained, and true to the figures they are given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import report as benchmarks_report
from test_bench_targets import SPEED, ratio

from validation import html, svg
from validation.svg import Axis, Series

ROOT = Path(__file__).parent.parent

MACHINE = {"processor": "A <fast> one", "cores": 2, "threads": 2, "system": "s", "python": "3", "versions": {"x": "1"}}


def parsed(page: str) -> ElementTree.Element:
    """The document as XML, which is stricter than HTML."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.split("\n", 1)[1])  # noqa: S314 (our own text)


def assert_self_contained(page: str) -> None:
    assert not re.search(r"(?:src|href)=|url\(|@import|<script.+src|https?://", page)


def row(engine: str, workload: str, ms: float) -> dict[str, Any]:
    return {
        "engine": engine, "workload": workload, "ms_per_step": ms, "p95_ms": 2 * ms, "min_ms": ms / 2,
        "tokens_per_second": 1000 / ms,
    }  # fmt: skip


BENCH = {
    "bundle": "a & b", "machine": MACHINE, "batch": 1, "rounds": 8,
    "latencies": [row("torch", "decode@256", 80.0), row("ort", "decode@256", 5.0)],
    "schedule_gains": {"ort decode@256": {"predicted": 1.5, "measured": 1.4}},
    "skipped": {"openvino": "openvino is not installed; pip install 'mscompile[export,openvino]'"},
    "speedups": {"ort decode@256 torch": ratio(16.0)},
    "ceilings": {"ort decode@256": ratio(1.25)},
    "rates": None, "peak_bytes": {}, "errors": {"ort": 3e-6},
}  # fmt: skip


def test_a_bench_page_says_what_was_measured() -> None:
    page = html.bench_page(BENCH)
    assert_self_contained(page)
    text = " ".join("".join(parsed(page).itertext()).split())
    for said in ("A <fast> one", "a & b", "original", "16.00x (12.80 to 20.00)", "1.25x (1.00 to 1.56)", "3.0e-06"):
        assert said in text
    assert "openvino is not installed" in text
    assert "saves 1.40x; its operations predict 1.50x" in text


def test_pages_follow_the_reader() -> None:
    page = html.bench_page(BENCH)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert 'name="viewport"' in page


def test_the_ceiling_is_drawn_where_it_is() -> None:
    drawn = ElementTree.fromstring(svg.bars("t", [("a", 10.0, "10"), ("b", 5.0, "5")], ("limit", 5.0)))  # noqa: S314
    percent = re.compile(r"(?:width|left):([\d.]+)%")
    spans = [(span.get("class", ""), percent.search(span.get("style", ""))) for span in drawn.iter("span")]
    first, second = (float(found[1]) for kind, found in spans if kind.startswith("fill") and found)
    limits = {float(found[1]) for kind, found in spans if kind == "limit" and found}
    assert first == pytest.approx(2 * second)
    assert limits == {second}


@pytest.mark.parametrize("log", [False, True])
def test_points_are_drawn_in_order_and_inside(log: bool) -> None:
    points = [(1.0, 4.0), (10.0, 40.0), (100.0, 400.0)]
    text = svg.chart("t", Axis("x", log), Axis("y", log), [Series("a", points), Series("b", points, dashed=True)])
    figure = ElementTree.fromstring(text)  # noqa: S314
    marks = [(float(mark.get("cx", 0)), float(mark.get("cy", 0))) for mark in figure.iter("circle")]
    assert len(marks) == 3
    assert marks == sorted(marks)
    assert [y for _, y in marks] == sorted((y for _, y in marks), reverse=True)
    assert all(svg.LEFT <= x <= svg.WIDTH - svg.RIGHT and svg.TOP <= y <= svg.HEIGHT - svg.BOTTOM for x, y in marks)
    if log:
        assert marks[1][0] - marks[0][0] == pytest.approx(marks[2][0] - marks[1][0], abs=0.2)


def test_nothing_to_draw_is_no_chart() -> None:
    assert svg.chart("t", Axis("x"), Axis("y"), [Series("a", [])]) == ""
    assert svg.bars("t", []) == ""


def test_one_point_is_a_chart() -> None:
    assert ElementTree.fromstring(svg.chart("t", Axis("x"), Axis("y"), [Series("a", [(1.0, 0.0)])]))  # noqa: S314


def test_the_report_of_the_benchmarks() -> None:
    blocks = {"steps": 100, "block_ms": [1.0, 1.1], "block_resident_bytes": [1, 1], "final_error": 0.0}
    target = {
        "target": 1, "what": "decode", "measured": 1.1, "sense": "<=", "limit": 1.15, "unit": "x",
        "spread": [1.0, 1.2], "note": "", "met": True,
    }  # fmt: skip
    result = {"rows": [target], "sections": {"speed": {**SPEED, "machine": MACHINE}}}
    page = benchmarks_report.report(result, blocks)
    assert_self_contained(page)
    captions = ["".join(found.itertext()) for found in parsed(page).iter("figcaption")]
    assert captions[0] == "ms a step, transformer-xl-41m, decode@1024"
    assert captions[-2:] == ["tokens a second against batch", "100 steps on one session"]
