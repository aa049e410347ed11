"""The stored results of benchmarks/reliability.py are of what there is today, and found nothing.

Short forms of its sections run in test_fuzz_readers.py and test_robustness.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import reliability
import stress
import tables
from attacks import ATTACKS

STORED: dict[str, Any] = json.loads(reliability.RESULT.read_text(encoding="utf-8"))


def test_every_section_was_run_and_found_nothing() -> None:
    assert list(STORED) == list(reliability.SECTIONS)
    assert [finding for section in STORED.values() for finding in section["findings"]] == []


def test_the_stored_results_are_of_these_readers_attacks_and_commands() -> None:
    assert [row["reader"] for row in STORED["readers"]["rows"]] == list(fuzzing.READERS)
    assert [row["attack"] for row in STORED["attacks"]["rows"]] == list(ATTACKS)
    assert {row["command"] for row in STORED["writers"]["rows"]} == {*stress.commands(Path("a"), Path("b")), "sweep"}


def test_thousands_of_inputs_were_opened_or_refused() -> None:
    rows = STORED["readers"]["rows"]
    assert all(row["opened"] + row["refused"] == row["inputs"] for row in rows)
    assert sum(row["inputs"] for row in rows) >= 2000


@pytest.mark.parametrize("name", ["readers", "attacks", "writers", "sessions"])
def test_tables_are_made_from_them_and_say_so_without(name: str) -> None:
    assert tables.BLOCKS[name]({"reliability": STORED}) not in ("", tables.MISSING)
    assert tables.BLOCKS[name]({}) in ("", tables.MISSING)


def test_a_finding_is_counted_in_the_tables() -> None:
    rows = [{**STORED["readers"]["rows"][0], "findings": 7}]
    assert "| 7 |" in tables.readers({"reliability": {**STORED, "readers": {"rows": rows}}})
