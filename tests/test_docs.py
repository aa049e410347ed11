"""What README.md and docs/ say is true: their commands run, their links lead somewhere, names and versions agree.

Every ```bash and ```python block of a document is run, in order, in one temporary copy of the example files; the
commands of a bash block stop at the first that fails. Blocks with any other tag (console, text, json ...) are for
reading only. `mscompile` runs as `python -m mscompile.cli`, and `pytest` with its plugin.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import mscompile

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
RUN = ("bash", "python")
PRELUDE = """set -euo pipefail
mscompile() { "$PYTHON" -m mscompile.cli "$@"; }
pytest() { "$PYTHON" -m pytest -p mscompile.pytest_plugin "$@"; }
"""
BLOCK_SECONDS = 900


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def prose(document: Path) -> str:
    """A document without its fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", document.read_text(encoding="utf-8")))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def relative(document: Path) -> str:
    return str(document.relative_to(ROOT))


RUNNABLE = [document for document in DOCUMENTS if any(block.language in RUN for block in blocks(document))]


@pytest.mark.slow
@pytest.mark.timeout(4 * BLOCK_SECONDS)
@pytest.mark.parametrize("document", RUNNABLE, ids=relative)
def test_blocks_run(document: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "*.msc"))
    for block in blocks(document):
        if block.language in RUN:
            code, output = run(block, tmp_path)
            assert code == 0, f"{relative(document)}:{block.line} ended with {code}\n{output}"


def run(block: Block, directory: Path) -> tuple[int, str]:
    """Exit code and all output of a block; nothing that it started is left when its time is up."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable}
    command = ["bash", "-c", PRELUDE + block.text] if block.language == "bash" else [sys.executable, "-c", block.text]
    with subprocess.Popen(
        command, cwd=directory, env=environment, start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=BLOCK_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_resolve(document: Path) -> None:
    for match in LINK.finditer(prose(document)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue  # another site
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), f"{relative(document)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{relative(document)} links to {target}, which has no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_make_targets_exist(document: Path) -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    named = re.findall(r"^(?:\$ )?make (\w+)|`make (\w+)`", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert {first or second for first, second in named} <= set(phony[1].split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_files_named_in_backticks_exist(document: Path) -> None:
    folders = "mscompile|exporters|engines|validation|examples|tests|docs|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w/.-]+\.(?:py|pt|txt|md|json|png))`", document.read_text(encoding="utf-8"))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{relative(document)} names {', '.join(missing)}"


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    released = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version in released
    assert version == mscompile.__version__


def test_constraints_are_exact_and_name_no_place() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)]
    assert not wrong


def test_hooks_ci_and_make_check_the_same_packages() -> None:
    hooks, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in (".pre-commit-config.yaml", "Makefile"))
    listed = re.search(r"^PACKAGES := (.+)$", makefile, re.MULTILINE)
    assert listed is not None
    assert f"mypy --strict {listed[1]} examples" in hooks
