"""The gates against planted faults, in short: one of each kind in a tiny bundle; all of them with --slow.

`benchmarks/mutation.py` runs all of them on both families; its results stand in docs/reliability.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import mutation
import pytest
from faults import FAULTS

ROOT = Path(__file__).parent.parent

SHORT = (
    "weight 0.1 % too large",
    "mask one row off",
    "memory read one slot later",
    "ring along another axis",
    "vocabulary one token smaller",
    "called int4, weight 2 % too large",
    "weight in a graph that this machine does not run",
    "two characters of the tokenizer swapped",
    "single rows are not reset",
)
NAMED = {fault.name: fault for fault in FAULTS}


@pytest.mark.parametrize("name", SHORT)
def test_the_default_gate_catches(name: str, compiled: Path, trained: Path, tmp_path: Path) -> None:
    found = mutation.verdict("transformer-xl", NAMED[name], compiled, trained, tmp_path)
    assert found.caught, f"{name} survived"


@pytest.mark.slow
def test_no_fault_survives_unexplained(family: str, bundle_of: Path, checkpoint_of: Path) -> None:
    found = mutation.run(family, bundle_of, checkpoint_of)
    assert len(found) >= 30
    assert mutation.survivors(found) == []
    assert [each.fault for each in found if each.equivalent and each.caught] == []


def test_faults_have_names_of_their_own_and_are_enough() -> None:
    assert len(NAMED) == len(FAULTS) >= 30
    assert {fault.kind for fault in FAULTS} == {"graph", "contract", "file", "session"}


def test_the_stored_result_is_of_these_faults() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "mutation.json").read_text(encoding="utf-8"))
    ran = {(each["family"], each["fault"]) for each in stored["verdicts"]}
    assert ran == {(family, fault.name) for fault in FAULTS for family in fault.families}
    assert not [each for each in stored["verdicts"] if not each["caught"] and not each["equivalent"]]
