"""Bundles of every schema there has been open and give the logits that they gave.

`tests/data/freeze.py` makes the bundle of a schema, before the next one is begun.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mscompile import bundle
from mscompile.errors import BundleError
from mscompile.runtime import generate, open_bundle

DATA = Path(__file__).parent / "data"
FROZEN = sorted(DATA.glob("schema-*"))


def test_there_is_a_frozen_bundle_of_every_schema() -> None:
    wanted = [f"schema-{number}" for number in range(1, bundle.SCHEMA + 1)]
    assert [path.name for path in FROZEN] == wanted, (
        "the schema was raised: check out the last commit before that and run tests/data/freeze.py there; then let "
        "mscompile/bundle.py read the older schema, too"
    )


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.name)
def test_a_bundle_of_an_older_schema_opens_and_computes_what_it_did(path: Path) -> None:
    opened = open_bundle(path)
    assert opened.manifest.schema == int(path.name.removeprefix("schema-"))
    assert opened.manifest.verified
    report = opened.verify("ort")
    assert report.passed, report.failures
    assert {tensor.tensor for tensor in report.tensors} == {"logits", *(state.name for state in opened.spec.states)}
    tokens = list(generate(opened.session("ort"), opened.tokenizer.encode("abc"), 8))
    assert len(opened.tokenizer.decode(tokens)) == 8


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.name)
def test_frozen_bundles_are_small(path: Path) -> None:
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 120_000


def test_a_newer_schema_says_to_upgrade(tmp_path: Path) -> None:
    path = Path(shutil.copytree(FROZEN[-1], tmp_path / "model.msc"))
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest |= {"schema": bundle.SCHEMA + 1, "something": "new"}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    newer = f"this bundle has schema {bundle.SCHEMA + 1}, this mscompile reads up to {bundle.SCHEMA}; upgrade mscompile"
    assert str(caught.value) == f"{path}: {newer}"
