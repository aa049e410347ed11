"""Pictures of reports for the documents: python benchmarks/pictures.py

Compiles examples/hourglass.pt, validates it against the original, and takes the page of the result in Chromium, as on a
desk and as on a phone. Writes docs/pictures/report.png and docs/pictures/report-phone.png.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import typer

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
EXAMPLES = ROOT / "examples"
sys.path.append(str(ROOT / "tests"))

import browser  # noqa: E402

from mscompile import compile_checkpoint, gate  # noqa: E402
from mscompile.pipeline import Options  # noqa: E402
from validation.evidence import Validation  # noqa: E402
from validation.parity_html import parity_page  # noqa: E402

TALL = {"width": 1100, "height": 1500}  # CSS pixels: the summary and the first charts


def validated(name: str, directory: Path, steps: int) -> Validation:
    """A new bundle of an example, and what its validation against the original found."""
    checkpoint, text = EXAMPLES / f"{name}.pt", EXAMPLES / "held-out.txt"
    bundle = compile_checkpoint(checkpoint, ["ort"], directory / f"{name}.msc", Options(text=text, validate=False))
    command = (
        f"mscompile validate {name}.msc --reference {name}.pt --tokens held-out.txt --steps {steps} --html report.html"
    )
    return gate.validate(bundle, [], gate.Original(checkpoint, text=text, steps=steps), command=command)


def take(page: Path, directory: Path) -> list[Path]:
    """The page on a desk and on a phone, as much of it as one screen shows."""
    taken = []
    for name, viewport in (("report.png", TALL), ("report-phone.png", browser.PHONE)):
        with browser.page(viewport) as opened:
            opened.goto(page.as_uri())
            browser.picture(opened, directory / name, whole=False)
        taken.append(directory / name)
    return taken


def main(steps: int = 2048) -> None:
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory, "report.html")
        page.write_text(parity_page(validated("hourglass", Path(directory), steps)), encoding="utf-8")
        for picture in take(page, PICTURES):
            typer.echo(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
