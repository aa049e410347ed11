"""Spoiled and hostile inputs: every reader opens them or refuses them in one line, within limits, and runs no code.

In short here; `benchmarks/reliability.py` opens thousands, and its results stand in docs/reliability.md.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fuzzing
import mutators
import pytest
from attacks import ATTACKS
from hypothesis import given
from hypothesis import strategies as st

from mscompile import bundle, codec
from mscompile.bundle import Manifest
from mscompile.errors import BundleError, MsCompileError

QUICK = ("checkpoint .pt, contents", "manifest, session")
MadeOnce = Callable[[str, Callable[[Path], object]], Path]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory and crashes of readers are measured by /proc, so on Linux"
)


@pytest.fixture(scope="session")
def seeds(made_once: MadeOnce, compiled: Path) -> Path:
    return made_once("fuzz-seeds", lambda path: fuzzing.seed(path, compiled))


def check(reader: str, seeds: Path, inputs: int) -> None:
    found = fuzzing.fuzz(reader, seeds, inputs)
    assert found.findings == []
    assert found.inputs == inputs == found.outcomes["opened"] + found.outcomes["refused"]
    assert found.outcomes["refused"] > inputs // 4


@pytest.mark.parametrize("reader", QUICK)
def test_spoiled_inputs_are_opened_or_refused(reader: str, seeds: Path) -> None:
    check(reader, seeds, 30)


@pytest.mark.slow
@pytest.mark.parametrize("reader", fuzzing.READERS)
def test_spoiled_inputs_of_every_reader(reader: str, seeds: Path) -> None:
    check(reader, seeds, 100)


def test_attacks_are_refused(seeds: Path) -> None:
    found = fuzzing.attack(seeds)
    assert found.findings == []
    harmless = sum(attack.harmless for attack in ATTACKS.values())
    assert (found.outcomes["opened"], found.outcomes["refused"]) == (harmless, len(ATTACKS) - harmless)


# The harness itself: what it looks for, it finds


def test_the_payload_runs_where_pickles_are_trusted(tmp_path: Path) -> None:
    content = pickle.dumps(mutators.Payload(tmp_path / "canary"))
    assert not (tmp_path / "canary").exists()
    pickle.loads(content)  # noqa: S301
    assert (tmp_path / "canary").exists()


FAULTY: dict[str, str] = {
    "ZeroDivisionError": "1 / 0",
    "not one line": "raise OneLine('')",
    "hang": "exec('while True: pass')",
    "killed": "os.kill(os.getpid(), 9)",
    "crash: SIGSEGV": "os.kill(os.getpid(), 11)",
    "too much memory": "bytearray(b'x' * (fuzzing.RESIDENT_BYTES + 2**24))",
    "code ran": "Path(path.parent.parent, 'canary').touch()",
}

FAULTY_READER = """
import os, sys
from pathlib import Path
import fuzzing
from mscompile.errors import MsCompileError as OneLine
fuzzing.CPU_SECONDS, fuzzing.RESIDENT_BYTES = 2, 2**26
path = None
def fault(given):
    global path
    path = given
    if given.parent.name == "input":
        {fault}
fuzzing.READERS["faulty"] = fuzzing.Reader(fuzzing._bytes_of("own.pt"), fault)
fuzzing.child("faulty", Path(sys.argv[sys.argv.index("--seeds") + 1]), *[
    int(sys.argv[sys.argv.index("--first") + 1]), 2])
"""


@pytest.mark.parametrize("outcome", FAULTY)
def test_faults_of_a_reader_are_found(
    outcome: str, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY_READER.format(fault=FAULTY[outcome]), encoding="utf-8")
    monkeypatch.setattr(fuzzing, "__file__", str(script))
    monkeypatch.setenv("PYTHONPATH", str(Path(mutators.__file__).parent))
    found = fuzzing.fuzz("faulty", seeds, 2)
    assert found.outcomes == {outcome: 2}
    assert len(found.findings) == 2


# Any JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)
FIELDS = st.sampled_from([*Manifest.__dataclass_fields__, "states", "graphs", "shape"])


@given(st.dictionaries(FIELDS, JSON))
def test_any_json_is_no_manifest(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"manifest"):
        codec.decode(Manifest, data, "manifest")


@given(st.dictionaries(FIELDS, JSON) | JSON, st.binary(max_size=5))
def test_any_bytes_are_no_manifest(data: Any, noise: bytes) -> None:
    for content in (json.dumps(data).encode(), json.dumps(data).encode() + noise, noise):
        with pytest.raises(BundleError) as caught:
            bundle._parse(Path("x"), content)
        assert "\n" not in str(caught.value)


@given(st.data())
def test_a_changed_manifest_is_read_or_refused(data: st.DataObject) -> None:
    """One value of a good manifest becomes any other JSON value."""
    path = Path(__file__).parent / "data" / "schema-1"
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    places = list(mutators.places(manifest))
    container, key = data.draw(st.sampled_from(places))
    container[key] = data.draw(JSON)
    with suppress(MsCompileError):
        found = bundle._parse(path, json.dumps(manifest).encode())
        bundle._manifest_fault(found)
