"""A bundle against that of the last release: differences, logits, and a latency gate that noise does not fail."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bundles
import pytest
import torch

from mscompile import baseline, bundle, checkpoint, cli
from mscompile.contracts import Profile
from mscompile.errors import UsageError
from mscompile.models import families
from mscompile.pipeline import compile_checkpoint
from mscompile.runtime import open_bundle
from validation.evidence import Slowdown

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def other_form(made_once: MadeOnce, trained: Path) -> Path:
    """The same checkpoint with memories that are replaced, and shorter chunks."""
    chosen = bundles.options(memory="replace", profile=Profile(1, 3, 8), validate=False)
    return made_once("other-form.msc", lambda path: compile_checkpoint(trained, ["ort"], path, chosen))


@pytest.fixture(scope="session")
def large(made_once: MadeOnce) -> Path:
    """Another model with the same vocabulary, which takes several times as long, for one row only."""

    def make(path: Path) -> None:
        family = families.find("transformer-xl")
        shape = {"n_layer": 4, "d_model": 192, "n_head": 4, "d_head": 48, "d_inner": 768, "mem_len": 32, "tgt_len": 32}
        torch.manual_seed(0)
        model = family.model(family.parse_config({"vocab_size": len(bundles.VOCAB), "same_length": True, **shape}))
        checkpoint.save(path.with_suffix(".pt"), family.name, model.eval(), bundles.VOCAB)
        chosen = bundles.options(profile=Profile(1, 1, 16), validate=False)
        compile_checkpoint(path.with_suffix(".pt"), ["ort"], path, chosen)

    return made_once("large.msc", make)


def test_the_same_bundle_differs_in_nothing_and_is_no_slower(compiled: Path, tmp_path: Path) -> None:
    shutil.copytree(compiled, tmp_path / "last.msc")
    new, old = open_bundle(compiled), open_bundle(tmp_path / "last.msc")
    found = baseline.compare(new, old, ["ort"], max_slowdown=1.5, rounds=8)
    assert found.same_checkpoint
    assert found.changes == ()
    assert found.skipped == {}
    assert [(one.rollout, one.max_abs, one.argmax_agreement, one.limit) for one in found.logits] == [
        ("golden, batch 1", 0.0, 1.0, 2e-3), ("golden, batch 2", 0.0, 1.0, 2e-3),
    ]  # fmt: skip
    assert [one.workload for one in found.latencies] == ["decode@256", "prefill:128"]
    assert all(one.ratio.low <= one.ratio.median <= one.ratio.high for one in found.latencies)
    assert found.failures() == []


@pytest.mark.slow
def test_another_form_of_the_same_checkpoint_is_listed_and_equal(compiled: Path, other_form: Path) -> None:
    new, old = open_bundle(other_form), open_bundle(compiled)
    changes = baseline.differences(old.manifest, new.manifest)
    assert "max_chunk is 8, the baseline says 16" in changes
    assert "states.layer00.mems.key.update is replace, the baseline says append" in changes
    assert "schedule.max_chunk is 8, the baseline says 16" in changes
    assert not any(change.startswith(("checkpoint", "precision")) for change in changes)
    for rollout in old.golden.rollouts:
        moved = baseline._logits(new, old, "ort", rollout, 2e-3)
        assert 0 < moved.max_abs < 1e-4
        assert moved.fault() is None


@pytest.mark.slow
def test_logits_that_moved_fail_where_the_checkpoint_is_the_same(compiled: Path, large: Path, tmp_path: Path) -> None:
    """A bundle of other weights that says it was made from the baseline's checkpoint."""
    path = tmp_path / "large.msc"
    shutil.copytree(large, path)
    bundle.seal(path, replace(bundle.read(large), source=bundle.read(compiled).source))
    found = baseline.compare(open_bundle(path), open_bundle(compiled), ["ort"], max_slowdown=100.0, rounds=6)
    assert found.same_checkpoint
    (sentence,) = found.failures()
    assert sentence.startswith("ort, golden, batch 1: logits differ from the baseline's by up to ")
    assert sentence.endswith("and both bundles hold the same checkpoint; 0.002 is allowed")


@pytest.mark.slow
def test_a_slower_bundle_fails_the_gate_with_one_sentence(
    compiled: Path, large: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["validate", large, "--baseline", compiled, "--rounds", "8", "--json"]
    monkeypatch.setattr(sys, "argv", ["mscompile", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    found = json.loads(out)["baseline"]
    assert ended.value.code == 1
    assert err.startswith("error: ort decode@256 takes ")
    assert "as long as in the baseline, surely " in err
    assert err.rstrip().endswith("1.10x is allowed (and 1 more)")
    assert not found["same_checkpoint"]
    assert any(change.startswith("checkpoint is ") for change in found["changes"])
    assert any(change.startswith("states.layer03.mems.key is not in the baseline") for change in found["changes"])
    assert [one["limit"] for one in found["logits"]] == [None]  # another checkpoint, and one row
    assert found["skipped"] == {"golden, batch 2": "it takes 1 rows, the rollout has 2"}


def test_only_a_ratio_that_is_surely_above_the_limit_is_slower() -> None:
    steady = [1.0] * 12
    assert "takes 1.30x as long as in the baseline, surely 1.30x; 1.10x is allowed" in str(
        Slowdown.of("ort", "decode", [1.3] * 12, steady, 1.1).fault()
    )
    noisy = [0.9, 1.7, 1.3, 1.0, 1.6, 1.25, 0.95, 1.3, 1.5, 1.05, 1.3, 1.4]
    found = Slowdown.of("ort", "decode", noisy, steady, 1.1)
    assert found.ratio.median > 1.2
    assert found.surely <= 1.1
    assert found.fault() is None
    shared = Slowdown.of("ort", "decode", [3 * ms for ms in noisy], [3 * ms for ms in noisy], 1.1)
    assert shared.surely == 1.0  # a round that is slow for both says nothing


def test_workloads_fit_the_shorter_context(bundle_of: Path, family: str) -> None:
    spec = open_bundle(bundle_of).spec
    names = [workload.name for workload in baseline.workloads(spec, spec)]
    assert names == (["decode@32", "prefill:32"] if family == "hourglass" else ["decode@256", "prefill:128"])


def test_what_cannot_be_replayed_is_said(compiled: Path) -> None:
    old = open_bundle(compiled)
    rollout = old.golden.rollouts[0]
    reason = baseline._cannot_replay
    changed = {"vocab_size": 5, "max_context": 7, "max_batch": 0}
    for (field, value), words in zip(
        changed.items(), ("it has 5 token ids", "it takes 7 tokens", "0 rows"), strict=True
    ):
        spec = replace(old.spec, **{field: value})
        assert words in str(reason(spec, old.spec, rollout))
    assert reason(old.spec, old.spec, rollout) is None


@pytest.mark.parametrize(
    ("engines", "slowdown", "rounds", "sentence"),
    [
        (["trt"], 1.1, 10, r"was built for ort and .* runs here on trt; a baseline needs an engine that both have"),
        (["ort"], 0.9, 10, r"--max-slowdown is a ratio of at least 1, for example 1.10, not 0.9"),
        (["ort"], 1.1, 5, r"--rounds must be at least 6 to tell slow from noisy, not 5"),
    ],
)
def test_comparisons_that_cannot_work(
    compiled: Path, engines: list[str], slowdown: float, rounds: int, sentence: str
) -> None:
    opened = open_bundle(compiled)
    with pytest.raises(UsageError, match=sentence):
        baseline.compare(opened, opened, engines, slowdown, rounds)
