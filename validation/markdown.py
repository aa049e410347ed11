"""A validation as Markdown for a pull request: the verdict, what failed, one line an engine, and the rest folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from validation.evidence import Baseline, Validation
from validation.parity import ParityReport

SHOWN = 10  # failures that are not folded


def summary(found: Validation) -> str:
    """The whole text; every table and list is empty where there is nothing to say."""
    sign = "✅" if found.passed else "❌"
    parts = [f"### {sign} {_plain(found.verdict)}", *_failures(found.failures), _engines(found)]
    if found.skipped:
        parts.append(_list(f"{engine} was not run here: {reason}" for engine, reason in found.skipped.items()))
    if found.limits.overrides:
        parts += ["Limits looser than the default:", _list(found.limits.overrides)]
    if found.baseline:
        parts += _baseline(found.baseline)
    parts += [_folded(f"Every rollout of {report.engine}", _rollouts(found, report)) for report in found.reports]
    limits = found.thresholds or "the defaults"
    parts.append(_plain(f"Checkpoint {found.checkpoint_sha256[:12]}, limits: {limits}, {found.machine['processor']}."))
    return "\n\n".join(part for part in parts if part) + "\n"


def _failures(failures: Sequence[str]) -> list[str]:
    rest = failures[SHOWN:]
    return [_list(failures[:SHOWN]), _folded(f"{len(rest)} more", _list(rest)) if rest else ""]


def _engines(found: Validation) -> str:
    columns = ("engine", "verdict", "tokens", "largest logit error", "argmax agrees", "worst tensor", "error", "limit")
    return _table(columns, [_engine(found, report) for report in found.reports])


def _engine(found: Validation, report: ParityReport) -> tuple[str, ...]:
    verdict = "passed" if report.passed else "**failed**"
    tokens = sum(tensor.tokens for tensor in report.tensors if tensor.tensor == "logits")
    agree = f"{report.argmax_agreement:.2%}"
    figures = (report.engine, verdict, f"{tokens:,}", f"{report.logit_max_abs:.1e}", agree)
    worst = found.worst(report)
    if worst is None:
        return (*figures, "nothing was compared", "", "")
    _, value, limit = found.limit(worst)
    return (*figures, f"{worst.tensor}, {worst.rollout}", f"{value:.1e}", f"{limit:.3g}")


def _rollouts(found: Validation, report: ParityReport) -> str:
    rows = []
    for tensor in report.tensors:
        what, value, limit = found.limit(tensor)
        rows.append((tensor.rollout, tensor.tensor, what, f"{value:.1e}", f"{limit:.3g}", tensor.worst))
    return _table(("rollout", "tensor", "measure", "value", "limit", "where it is largest"), rows)


def _baseline(baseline: Baseline) -> list[str]:
    same = "the same checkpoint" if baseline.same_checkpoint else "another checkpoint"
    parts = [f"#### Against {_plain(baseline.bundle)}, made from {same}"]
    rows = [
        (
            one.engine,
            one.workload,
            f"{one.baseline_ms:.3f}",
            f"{one.ms:.3f}",
            f"{one.ratio.median:.2f}x ({one.ratio.low:.2f} to {one.ratio.high:.2f})",
            f"{one.surely:.2f}x",
            f"{one.limit:.2f}x",
            "**slower**" if one.fault() else "passed",
        )
        for one in baseline.latencies
    ]
    parts.append(_table(("engine", "workload", "baseline, ms", "now, ms", "ratio", "surely", "limit", "verdict"), rows))
    logits = [
        (
            one.engine,
            one.rollout,
            f"{one.max_abs:.1e}",
            "not gated" if one.limit is None else f"{one.limit:.3g}",
            f"{one.argmax_agreement:.2%}",
        )
        for one in baseline.logits
    ]
    parts.append(_table(("engine", "rollout", "logits differ by", "limit", "argmax agrees"), logits))
    count = len(baseline.changes)
    parts.append(
        _folded(f"{count} change{'s' if count > 1 else ''} of the interface", _list(baseline.changes)) if count else ""
    )
    parts.append(_list(f"{what} was not compared: {reason}" for what, reason in baseline.skipped.items()))
    return parts


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(item)}" for item in items)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n\n{content}\n\n</details>"


def _cell(text: str) -> str:
    return _plain(text) if text not in ("**failed**", "**slower**") else text


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line and in one table cell."""
    for mark in "\\`*_{}[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
