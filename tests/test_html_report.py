"""The HTML report in a real browser: nothing in the console, no other file, nothing that scrolls sideways, in any look.

What it says is checked without a browser, in test_validate_outputs.py and here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import browser
import pictures
import pytest
from test_bench_html import BENCH

from mscompile import gate
from mscompile.runtime import open_bundle
from validation.html import bench_page
from validation.parity_html import parity_page

ROOT = Path(__file__).parent.parent

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
LOOKS = {
    "desk": (browser.DESK, False),
    "phone": (browser.PHONE, False),
    "dark": (browser.DESK, True),
    "dark phone": (browser.PHONE, True),
}
# What reaches beyond the right edge, but for what scrolls in a box of its own.
SIDEWAYS = """() => {
  const edge = document.documentElement.clientWidth + 1;
  return [...document.querySelectorAll("main, main *")]
    .filter((e) => !e.closest(".scroll, svg") && e.getBoundingClientRect().right > edge)
    .map((e) => e.outerHTML.slice(0, 80));
}"""
# Contrast of text with what is behind it, by the formula of WCAG 2; the least of all elements that hold text.
CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const told = [...document.querySelectorAll("main *")].filter((e) =>
    [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()) && e.checkVisibility()
    && !e.closest("svg"));
  return Math.min(...told.map((element) => {
    const [x, y] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
    return (x + 0.05) / (y + 0.05);
  }));
}"""


@pytest.fixture(scope="session")
def report(made_once: MadeOnce, family: str, bundle_of: Path, checkpoint_of: Path) -> Path:
    """The page of a tiny bundle of each family, against its original and against itself as a baseline."""

    def make(path: Path) -> None:
        original = gate.Original(checkpoint_of, steps=64)
        release = gate.Release(bundle_of, max_slowdown=10.0, rounds=6)
        found = gate.validate(open_bundle(bundle_of), [], original, None, release, command="mscompile validate <tiny>")
        path.write_text(parity_page(found), encoding="utf-8")

    return made_once(f"{family}-report.html", make)


def assert_good(path: Path) -> None:
    """In every look; a complaint in the console fails the test, too."""
    asked: list[str] = []
    with browser.page() as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        for look, (viewport, dark) in LOOKS.items():
            page.set_viewport_size(viewport)
            page.emulate_media(color_scheme="dark" if dark else "light")
            assert page.evaluate(SIDEWAYS) == [], look
            assert page.evaluate(CONTRAST) >= 4.5, look  # level AA
    assert asked == [path.as_uri()]


def test_a_report_looks_right(report: Path) -> None:
    assert_good(report)


def test_a_page_of_a_benchmark_looks_right(tmp_path: Path) -> None:
    path = tmp_path / "bench.html"
    path.write_text(bench_page(BENCH), encoding="utf-8")
    assert_good(path)


def test_a_report_prints_in_light_on_pages(report: Path, tmp_path: Path) -> None:
    with browser.page(browser.DESK, dark=True) as page:
        page.goto(report.as_uri())
        page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page\n") >= 2


def test_columns_sort_by_a_click_and_nothing_is_lost(report: Path) -> None:
    with browser.page() as page:
        page.goto(report.as_uri())
        page.locator("summary").first.click()
        cells = "[...document.querySelectorAll('details tbody tr')].map((row) => parseFloat(row.cells[3].textContent))"
        before = page.evaluate(cells)
        head = page.locator("details th", has_text="value").first.locator("button")
        head.click()
        assert page.evaluate(cells) == sorted(before)
        head.click()
        assert page.evaluate(cells) == sorted(before, reverse=True)


def test_a_report_is_complete_without_its_script(report: Path, family: str) -> None:
    root = ElementTree.fromstring(report.read_text(encoding="utf-8").split("\n", 1)[1])  # noqa: S314 (our own text)
    sections = [heading.text for heading in root.iter("h2")]
    assert sections[:4] == ["What was checked", "What was not checked", "Errors", "Latency"]
    assert sections[4].startswith("Against ")  # type: ignore[union-attr]
    assert sections[5:] == ["Memory", "Schedule", "Graphs", "Every tensor", "Provenance"]
    text = " ".join("".join(root.itertext()).split())
    checks = ("token by token", "around multiples", "rows reset in mid-stream", "snapshot", "row permutation")
    for said in (*checks, "poisoned rows", "poisoned slots", "greedy continuation", "mscompile validate <tiny>"):
        assert said in text
    assert "ort: perplexity" in text  # which was not checked
    captions = [caption.text for caption in root.iter("figcaption")]
    assert "token by token: error by tensor and step" in captions
    assert "nodes when traced, and now" in captions
    assert ("what runs for which token" in captions) == (family == "hourglass")  # the other has one graph for all
    assert all(figure.get("aria-label") for figure in root.iter("svg"))


def test_the_pictures_in_the_documents_are_small() -> None:
    for name in ("report.png", "report-phone.png"):
        assert 10_000 < (pictures.PICTURES / name).stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer-xl", "hourglass"])
def test_the_reports_of_the_examples_look_right(name: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(parity_page(pictures.validated(name, tmp_path, 256)), encoding="utf-8")
    assert_good(path)
    for picture in pictures.take(path, tmp_path):
        assert 10_000 < picture.stat().st_size < 200_000
