"""What `mscompile validate` writes for people and for CI servers, and the limits that a project sets."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from commands import Run

from mscompile import bundle, codec
from mscompile.errors import GateFailed, UsageError
from mscompile.golden import Golden
from validation import junit, markdown, parity_html, thresholds
from validation.evidence import Baseline, LogitChange, Slowdown, Validation, least_median
from validation.invariants import Check
from validation.latency import Ratio
from validation.parity import TOLERANCES, ParityReport, TensorParity, thinned
from validation.perplexity import Perplexity

FP32 = TOLERANCES["fp32"]
STATES = ("layer00.mems", "layer01.mems")
SHA = "ab" * 32


def tensor(name: str, max_abs: float, rollout: str = "random", **more: Any) -> TensorParity:
    logits = {"argmax_agreement": 1.0, "kl": 1e-12, "outlier_share": 0.0} if name == "logits" else {"relative": 1e-6}
    found = TensorParity(rollout, name, 64, max_abs, max_abs / 2, 1.0, 1.0, "graph decode, step 7 of row 0")
    return replace(found, **(logits | more))


def report(*tensors: TensorParity, failures: tuple[str, ...] = (), engine: str = "ort") -> ParityReport:
    return ParityReport(engine, "fp32", FP32, tensors, failures)


PASSED = report(tensor("logits", 3e-5), tensor("layer00.mems", 4e-6), tensor("layer01.mems", 8e-4))
FAULT = "random: logits: max abs error 0.5 exceeds 0.001; largest error 0.5 at graph decode, step 7 of row 0"
SNAPSHOT = "snapshot: a restored session does not repeat itself"
FAILED = report(tensor("logits", 0.5), tensor("layer00.mems", 4e-6), failures=(FAULT, SNAPSHOT))
SLOW = Slowdown("ort", "decode@256", 1.0, 1.4, Ratio(1.4, 1.3, 1.5), 1.35, 1.1)
MOVED = LogitChange("ort", "golden, batch 1", 192, 0.25, 0.9, 2e-3)
BASELINE = Baseline(
    "last.msc", True, ("schedule.max_chunk is 64, the baseline says 512",), (MOVED,), (SLOW,), {"x": "y"}
)


def validation(*reports: ParityReport, **more: Any) -> Validation:
    machine = {"processor": "A | B", "cores": 2, "python": "3.11", "versions": {"onnxruntime": "1"}}
    usual: dict[str, Any] = {
        "bundle": "model", "title": "Transformer-XL", "precision": "fp32", "checkpoint_sha256": SHA,
        "against": "its golden rollouts", "machine": machine, "reports": reports, "skipped": {},
        "limits": thresholds.defaults("fp32"), "thresholds": None, "faults": (),
    }  # fmt: skip
    return Validation(**(usual | more))


# ---- Evidence ---------------------------------------------------------------------------------------------


def test_the_worst_tensor_is_the_one_that_uses_most_of_its_limit() -> None:
    found = validation(PASSED)
    assert found.worst(PASSED) is PASSED.tensors[2]
    assert found.limit(PASSED.tensors[2]) == ("max abs error", 8e-4, 1e-3)
    assert found.share(PASSED.tensors[2]) == pytest.approx(0.8)
    near = tensor("logits", 1e-5, kl=9.9e-7)
    assert found.limit(near) == ("mean KL divergence", 9.9e-7, 1e-6)
    assert found.share(tensor("logits", math.inf)) == math.inf


def test_verdict_and_sentence_of_a_failed_gate() -> None:
    assert validation(PASSED).verdict == "model (fp32) passed, against its golden rollouts"
    found = validation(FAILED, baseline=BASELINE)
    assert found.verdict == "model (fp32) failed: 4 limits broken, against its golden rollouts"
    with pytest.raises(GateFailed, match=r"ort is not the original model: random: logits: .* \(and 1 more\)$"):
        found.raise_if_failed()
    with pytest.raises(GateFailed, match=r"logits differ from the baseline's by up to 0.25, .* \(and 1 more\)$"):
        validation(PASSED, baseline=BASELINE).raise_if_failed()
    with pytest.raises(GateFailed, match=r"^pinned \(and 2 more\)$"):
        validation(FAILED, faults=("pinned",)).raise_if_failed()
    validation(PASSED).raise_if_failed()


def test_a_bound_of_the_median_takes_enough_values_and_grows_sharper() -> None:
    assert least_median([1.5] * 5) == -math.inf
    assert least_median([1.5, 1.2, 1.3, 1.9, 1.8, 1.7]) == 1.2
    ten = [1.0 + 0.01 * n for n in range(10)]
    assert least_median(ten) == ten[1]  # 11 of 1024 cases have at most one value below the median
    assert least_median(ten * 4) > least_median(ten)


def test_curves_keep_their_peaks() -> None:
    curve = [(step, 1.0) for step in range(1000)]
    curve[613] = (613, 5.0)
    assert (613, 5.0) in thinned(curve, 10)
    assert len(thinned(curve, 10)) == 10
    assert thinned(curve[:3], 10) == tuple(curve[:3])
    assert thinned([], 10) == ()


def test_what_was_not_checked_is_named() -> None:
    skipped = Check("row permutation", "rows exchanged", skipped="one row only")
    found = validation(replace(PASSED, checks=(skipped,)), skipped={"trt": "no GPU"})
    assert found.unchecked == {
        "trt": "no GPU",
        "ort: generation": "it takes the original beside it: --reference",
        "ort: perplexity": "it takes --reference and 2,048 tokens of text: --tokens",
        "ort: row permutation": "one row only",
    }


# ---- JUnit ------------------------------------------------------------------------------------------------


def suites(found: Validation) -> ElementTree.Element:
    return ElementTree.fromstring(junit.document(found).split("\n", 1)[1])  # noqa: S314 (our own text)


def test_junit_has_a_case_for_each_tensor_and_counts_them() -> None:
    root = suites(validation(PASSED, FAILED, skipped={"trt-rtx": "no GPU"}))
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("7", "2", "1")
    cases = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert cases[0] == ("model.ort.random", "logits")
    failures = {case.get("name"): case.find("failure") for case in root[1].iter("testcase")}
    assert failures["layer00.mems"] is None
    assert failures["logits"] is not None
    assert failures["logits"].get("message") == FAULT
    assert failures["snapshot"] is not None
    assert failures["snapshot"].get("message") == SNAPSHOT
    assert root[2][0].find("skipped").get("message") == "no GPU"  # type: ignore[union-attr]


def test_junit_shows_the_bundle_and_its_baseline() -> None:
    root = suites(validation(PASSED, faults=("pinned",), baseline=BASELINE))
    messages = [failure.get("message") for failure in root.iter("failure")]
    assert messages == ["pinned", MOVED.fault(), SLOW.fault()]
    assert root.get("skipped") == "1"


def test_junit_drops_what_xml_cannot_hold() -> None:
    assert "logit\ufffds" in junit.document(validation(report(tensor("logit\x00s", 1e-5))))


# ---- Markdown ---------------------------------------------------------------------------------------------


def test_markdown_begins_with_the_verdict_and_has_one_open_table() -> None:
    text = markdown.summary(validation(PASSED))
    assert text.startswith("### \u2705 model (fp32) passed, against its golden rollouts\n")
    opened, _, folded = text.partition("<details>")
    rows = [line for line in opened.splitlines() if line.startswith("|")]
    assert len(rows) == 3  # the head, the rule, and one engine
    assert "| ort | passed | 64 | 3.0e-05 | 100.00% | layer01.mems, random | 8.0e-04 | 0.001 |" in rows
    assert len([line for line in folded.splitlines() if line.startswith("| random |")]) == 3
    assert "A \\| B" in text


def test_markdown_lists_what_failed_first() -> None:
    text = markdown.summary(validation(FAILED, baseline=BASELINE, skipped={"trt": "no GPU"}))
    lines = text.splitlines()
    assert lines[0].startswith("### \u274c model (fp32) failed: 4 limits broken")
    assert lines[2].startswith("- ort: random: logits: max abs error 0.5 exceeds 0.001")
    assert "1.40x (1.30 to 1.50) | 1.35x | 1.10x | **slower**" in text
    assert "- trt was not run here: no GPU" in text
    assert "1 change of the interface" in text
    many = replace(FAILED, failures=tuple(f"random: fault {n}" for n in range(30)))
    assert "<details><summary>20 more</summary>" in markdown.summary(validation(many))


def test_every_markdown_row_has_as_many_cells_as_its_head() -> None:
    odd = report(tensor("a|b`c<d>", 1e-5))
    for found in (validation(PASSED, FAILED, baseline=BASELINE), validation(odd)):
        for block in markdown.summary(found).split("\n\n"):
            rows = [line for line in block.splitlines() if line.startswith("|")]
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


# ---- HTML -------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained_and_says_what_was_found() -> None:
    curve = tuple((step, 1e-6 * (1 + step)) for step in range(64))
    shown = report(tensor("logits", 6.4e-5, error_by_step=curve), tensor("<b>", math.inf), failures=(FAULT,))
    shown = replace(shown, perplexity=Perplexity(4096, 0.001, 0.0005, 0.0, 0.002, 3.1, 3.1031))
    page = parity_html.parity_page(validation(shown, baseline=BASELINE, skipped={"trt": "no GPU"}))
    assert page.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"(?:src|href)=|url\(|@import|<script.+src|https?://", page)
    root = ElementTree.fromstring(page.split("\n", 1)[1])  # noqa: S314 (our own text)
    text = " ".join("".join(root.itertext()).split())
    for said in ("model (fp32) failed", FAULT, "A | B", "1.40x (1.30 to 1.50)", "+0.100%", "no GPU", "<b>"):
        assert said in text
    titles = [figure.text for figure in root.iter("figcaption")]
    assert titles == [
        "what the worst tensors of ort use of their limits",
        "random: error against the step",
        "decode@256: ms a step, in the same interleaved rounds",
    ]
    lines = [line for line in root.iter("polyline") if "dashed" not in str(line.get("class"))]
    assert len(str(lines[0].get("points")).split()) == 64


def test_a_page_without_curves_has_no_empty_chart() -> None:
    page = parity_html.parity_page(validation(PASSED))
    assert "error against the step" not in page
    assert "<strong>model (fp32) passed" in page


# ---- Limits -----------------------------------------------------------------------------------------------


def read(tmp_path: Path, text: str) -> thresholds.Thresholds:
    path = tmp_path / "parity.toml"
    path.write_text(text, encoding="utf-8")
    return thresholds.load(path)


def test_stricter_limits_fail_what_the_defaults_pass(tmp_path: Path) -> None:
    limits = read(tmp_path, "[fp32]\nlogit_max_abs = 1e-5\n[int4]\nmax_kl = 1e-9\n").limits("fp32", STATES)
    gated = limits.gate(PASSED)
    assert [failure.partition(";")[0] for failure in gated.failures] == [
        "random: logits: max abs error 3e-05 exceeds 1e-05"
    ]
    assert gated.tolerance == replace(FP32, logit_max_abs=1e-5)
    assert thresholds.defaults("fp32").gate(PASSED) == PASSED


def test_later_state_tables_win_and_leave_other_states_alone(tmp_path: Path) -> None:
    text = (
        '[[state]]\nname = "layer*"\nmax_abs = 1e-6\n'
        '[[state]]\nname = "layer01.*"\nmax_abs = 9e-4\nrelative = 1e-9\n'
        '[[state]]\nname = "nowhere"\nprecision = "int4"\nmax_abs = 1\n'
    )
    limits = read(tmp_path, text).limits("fp32", STATES)
    gated = limits.gate(PASSED)
    assert [failure.partition(";")[0] for failure in gated.failures] == [
        "random: layer00.mems: max abs error 4e-06 exceeds 1e-06",
        "random: layer01.mems: relative error 1e-06 exceeds 1e-09",
    ]
    assert limits.overrides == ()


def test_an_override_with_a_reason_drops_the_default_and_is_repeated(tmp_path: Path) -> None:
    text = '[fp32]\nlogit_max_abs = 1.0\noverride = "the model only ranks"\n'
    limits = read(tmp_path, text).limits("fp32", STATES)
    gated = limits.gate(FAILED)
    assert gated.failures == (SNAPSHOT,)  # which no limit is about
    sentence = "[fp32] logit_max_abs = 1 is looser than the default 0.001: the model only ranks"
    assert limits.overrides == (sentence,)
    found = validation(gated, limits=limits)
    assert sentence.replace("[", "\\[").replace("]", "\\]").replace("_", "\\_") in markdown.summary(found)
    assert sentence in parity_html.parity_page(found)


def test_perplexity_is_gated_by_the_files_limit(tmp_path: Path) -> None:
    lost = replace(PASSED, perplexity=Perplexity(4096, 0.004, 0.001, 0.002, 0.006, 3.1, 3.1124))
    limits = read(tmp_path, "[fp32]\nmax_perplexity_loss = 0.003\n").limits("fp32", STATES)
    assert limits.gate(lost).failures[0].startswith("perplexity on text is 0.40%")
    assert limits.gate(limits.gate(lost)) == limits.gate(lost)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[fp32]\nlogit_max_ab = 1\n", r"\[fp32\] has an unknown key 'logit_max_ab'; did you mean logit_max_abs\?"),
        ("[fp99]\n", "the file has an unknown key 'fp99'; known: checkpoint_sha256, state, fp32"),
        ("[[state]]\nname = 'x'\nmaximum = 1\n", r"\[\[state\]\] 'x' has an unknown key 'maximum'; (did|known)"),
        ("[[state]]\nmax_abs = 1\n", r'needs name = "a pattern"'),
        ("[[state]]\nname = 'x'\n", "limits nothing; give max_abs or relative"),
        ("[[state]]\nname = 'x'\nprecision = 'fp8'\nmax_abs = 1\n", "has precision 'fp8'; known: fp32"),
        ("[state]\nname = 'x'\n", "must be a list of tables"),
        ("[fp32]\nlogit_max_abs = -1\n", "must be a number of 0 or more, not -1"),
        ("[fp32]\nlogit_max_abs = nan\n", "must be a number of 0 or more, not nan"),
        ("[fp32]\nlogit_max_abs = true\n", "must be a number of 0 or more, not True"),
        ("[fp32]\nmin_argmax_agreement = 99.9\n", "is a share, from 0 to 1, not 99.9"),
        ("[fp32]\nlogit_outlier_above = 1e-5\n", "logit_outlier_above cannot be set"),
        ("[fp32]\noverride = ''\n", "override must be a sentence that gives the reason"),
        ("fp32 = 3\n", r"fp32 must be a table, \[fp32\]"),
        ("checkpoint_sha256 = 'AB'\n", "must be 64 hexadecimal digits in lower case"),
        ("[fp32\n", "is not valid TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        read(tmp_path, text)


def test_a_looser_limit_without_a_reason_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"logit_max_abs = 0.01 is looser than the default 0.001; tighten it, or add"):
        read(tmp_path, "[fp32]\nlogit_max_abs = 0.01\n").limits("fp32", STATES)
    with pytest.raises(UsageError, match=r"min_argmax_agreement = 0.5 is looser"):
        read(tmp_path, "[fp32]\nmin_argmax_agreement = 0.5\n").limits("fp32", STATES)
    with pytest.raises(UsageError, match="state_max_abs = 1 is looser"):
        read(tmp_path, '[[state]]\nname = "*"\nmax_abs = 1\n').limits("fp32", STATES)
    read(tmp_path, "[fp32]\nlogit_max_abs = 0.01\n").limits("int4", STATES)  # not about that precision


def test_a_pattern_without_a_match_is_refused(tmp_path: Path) -> None:
    own = read(tmp_path, '[[state]]\nname = "layer1.*"\nmax_abs = 1e-6\n')
    with pytest.raises(UsageError, match=r"'layer1.\*' matches no state of the bundle; it has layer00.mems, layer01"):
        own.limits("fp32", STATES)


# ---- The command ------------------------------------------------------------------------------------------


def test_validate_writes_every_report(run: Run, bundle_of: Path, checkpoint_of: Path, tmp_path: Path) -> None:
    outputs = {f"--{kind}": tmp_path / f"parity.{kind}" for kind in ("junit", "markdown", "html")}
    words = [word for pair in outputs.items() for word in pair]
    code, out, _ = run("validate", bundle_of, "--reference", checkpoint_of, "--steps", "48", "--json", *words)
    found = json.loads(out)
    assert code == 0
    assert (found["passed"], found["failures"], found["thresholds"]) == (True, [], None)
    (report,) = found["reports"]
    assert codec.decode(ParityReport, report).passed
    logits = [tensor for tensor in report["tensors"] if tensor["tensor"] == "logits"]
    assert all(len(tensor["error_by_step"]) > 1 for tensor in logits)
    for tensor in logits:
        assert max(error for _, error in tensor["error_by_step"]) == tensor["max_abs"]
    root = ElementTree.parse(outputs["--junit"]).getroot()  # noqa: S314 (our own text)
    assert (root.get("tests"), root.get("failures")) == (str(len(report["tensors"])), "0")
    assert outputs["--markdown"].read_text(encoding="utf-8").startswith("### \u2705 ")
    assert "error against the step" in outputs["--html"].read_text(encoding="utf-8")


def test_a_manifest_keeps_no_curves(bundle_of: Path) -> None:
    parity = bundle.read(bundle_of).parity
    assert parity is not None
    assert not any(tensor["error_by_step"] for tensor in parity["ort"]["tensors"])


def test_the_projects_limits_decide_and_reports_are_written_first(run: Run, compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "parity.toml").write_text("[fp32]\nlogit_max_abs = 1e-12\n", encoding="utf-8")
    page = tmp_path / "parity.md"
    code, out, err = run("validate", compiled, "--thresholds", tmp_path / "parity.toml", "--markdown", page)
    assert code == 1
    assert "failed" in out
    assert re.fullmatch(r"error: ort is not the original model: golden, batch 1: .* exceeds 1e-12; .*\n", err)
    assert page.read_text(encoding="utf-8").startswith("### \u274c ")


def test_a_wrong_file_of_limits_ends_the_command_before_it_runs(run: Run, compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "parity.toml").write_text("[fp32]\nspeed = 3\n", encoding="utf-8")
    code, out, err = run("validate", compiled, "--thresholds", tmp_path / "parity.toml")
    assert (code, out) == (2, "")
    assert "[fp32] has an unknown key 'speed'; known: logit_max_abs" in err
    code, _, err = run("validate", compiled, "--thresholds", tmp_path / "no.toml")
    assert code == 2
    assert "cannot read the thresholds" in err


def test_a_pinned_checkpoint(run: Run, compiled: Path, tmp_path: Path) -> None:
    path = tmp_path / "parity.toml"
    path.write_text(f'checkpoint_sha256 = "{bundle.read(compiled).source["sha256"]}"\n', encoding="utf-8")
    assert run("validate", compiled, "--thresholds", path)[0] == 0
    path.write_text(f'checkpoint_sha256 = "{SHA}"\n', encoding="utf-8")
    code, _, err = run("validate", compiled, "--thresholds", path, "--junit", tmp_path / "parity.xml")
    assert code == 1
    assert f"and {path} pins abababababab...; restore that checkpoint, or review the new one" in err
    assert "pins abababababab" in (tmp_path / "parity.xml").read_text(encoding="utf-8")


def test_a_bundle_without_golden_rollouts_is_not_passed(run: Run, compiled: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.msc"
    shutil.copytree(compiled, path)
    manifest = bundle.read(path)
    Golden(()).save(path / bundle.GOLDEN)
    bundle.seal(path, manifest)
    code, _, err = run("validate", path)
    assert code == 1
    assert "nothing was compared: the bundle has no golden rollouts" in err


def test_a_report_that_cannot_be_written(run: Run, compiled: Path, tmp_path: Path) -> None:
    code, _, err = run("validate", compiled, "--html", tmp_path / "no" / "page.html")
    assert code == 2
    assert "cannot write" in err
