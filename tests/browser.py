"""Pages in a real browser without a window: Chromium, driven by Playwright. Tests skip where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"width": 390, "height": 844}  # CSS pixels
DESK = {"width": 1280, "height": 900}


def executable() -> str:
    """The Chromium that MSCOMPILE_CHROMIUM names, or the one on the PATH."""
    named = os.environ.get("MSCOMPILE_CHROMIUM")
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium: install Debian's package chromium, or name one in MSCOMPILE_CHROMIUM")
    return found


@contextmanager
def page(viewport: dict[str, int] | None = None, *, scale: float = 1.0, dark: bool = False) -> Iterator[Any]:
    """A page of a fresh browser; it must leave nothing in the console and fail no request."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        scheme = "dark" if dark else "light"
        opened = browser.new_page(viewport=viewport or DESK, device_scale_factor=scale, color_scheme=scheme)
        complaints: list[str] = []
        opened.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        yield opened
        browser.close()
    assert not complaints, "\n".join(complaints)


def picture(opened: Any, path: Path, *, whole: bool = True) -> None:
    """The page as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=path, full_page=whole)
