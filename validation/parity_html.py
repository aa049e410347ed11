"""A validation as one HTML file: the verdict, what each engine's worst tensors use of their limits, the error against
the step where a report has it, all tensors, and the comparison with an older bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from math import inf

from validation import svg
from validation.evidence import Baseline, Validation
from validation.html import heading, machine_line, page, paragraph, ratio, table
from validation.parity import ParityReport
from validation.svg import Axis, Series

BARS, CURVES = 10, 6  # tensors in a chart


def parity_page(found: Validation) -> str:
    """The whole document."""
    parts = [
        _verdict(found),
        paragraph(
            f"{found.title}. Limits: {found.thresholds or 'the defaults'}. {machine_line(found.machine)}", "facts"
        ),
        paragraph(f"Checkpoint {found.checkpoint_sha256}", "facts"),
        _listed("What failed", found.failures),
        _listed("Limits looser than the default", found.limits.overrides),
        heading("Engines"),
        _engines(found),
    ]
    for report in found.reports:
        parts += _engine(found, report)
    if found.baseline:
        parts += _baseline(found.baseline)
    if found.skipped:
        parts += [heading("Not run here"), table(("engine", "why"), list(found.skipped.items()), words=(0, 1))]
    return page(f"Parity of {found.bundle}", parts)


def _verdict(found: Validation) -> str:
    kind, word = ("yes", "Passed") if found.passed else ("no", "Failed")
    return f'<p><strong class="{kind}">{word}.</strong> {escape(found.verdict)}.</p>'


def _listed(title: str, sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return heading(title) + "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _engines(found: Validation) -> str:
    columns = ("engine", "passed", "tokens", "logit error", "argmax agrees", "worst tensor", "of its limit")
    rows = []
    for report in found.reports:
        tokens = sum(tensor.tokens for tensor in report.tensors if tensor.tensor == "logits")
        worst = found.worst(report)
        place = ("nothing was compared", "") if worst is None else (worst.tensor, f"{found.share(worst):.1%}")
        agree = f"{report.argmax_agreement:.2%}"
        rows.append((report.engine, report.passed, f"{tokens:,}", f"{report.logit_max_abs:.1e}", agree, *place))
    return table(columns, rows, words=(0, 5))


def _engine(found: Validation, report: ParityReport) -> list[str]:
    parts = [heading(f"{report.engine}, {report.precision}"), _shares(found, report), *_curves(found, report)]
    if lost := report.perplexity:
        parts.append(
            paragraph(
                f"Perplexity on {lost.tokens:,} tokens of text: {lost.loss:+.3%} of the original's "
                f"(standard error {lost.standard_error:.3%})."
            )
        )
    rows = []
    for tensor in report.tensors:
        what, value, limit = found.limit(tensor)
        rows.append((tensor.rollout, tensor.tensor, what, f"{value:.1e}", f"{limit:.3g}", tensor.worst))
    columns = ("rollout", "tensor", "measure", "value", "limit", "where it is largest")
    every = table(columns, rows, words=(0, 1, 5))
    return [*parts, f"<details><summary>Every tensor of {escape(report.engine)}</summary>{every}</details>"]


def _shares(found: Validation, report: ParityReport) -> str:
    """The worst tensors over all rollouts, as bars: how much of their limit they use."""
    worst: dict[str, tuple[float, str]] = {}
    for tensor in report.tensors:
        _, value, limit = found.limit(tensor)
        share = min(found.share(tensor), 10.0)  # a bar has to fit
        worst[tensor.tensor] = max(worst.get(tensor.tensor, (0.0, "")), (share, f"{value:.1e} of {limit:.3g}"))
    ordered = sorted(worst.items(), key=lambda item: item[1][0], reverse=True)[:BARS]
    values = [(name, share, beside) for name, (share, beside) in ordered]
    return svg.bars(f"what the worst tensors of {report.engine} use of their limits", values, ("the limit", 1.0))


def _curves(found: Validation, report: ParityReport) -> list[str]:
    """A chart a rollout: the largest error against the step, of the tensors that use most of their limits."""
    charts = []
    for rollout in dict.fromkeys(tensor.rollout for tensor in report.tensors):
        series = [
            Series(tensor.tensor, [(step, error) for step, error in tensor.error_by_step if 0 < error < inf])
            for tensor in sorted(report.tensors, key=found.share, reverse=True)
            if tensor.rollout == rollout
        ]
        axes = Axis("step"), Axis("largest error", log=True)
        charts.append(svg.chart(f"{rollout}: error against the step", *axes, series[:CURVES]))
    return charts


def _baseline(baseline: Baseline) -> list[str]:
    same = "the same checkpoint" if baseline.same_checkpoint else "another checkpoint"
    parts = [heading(f"Against {baseline.bundle}"), paragraph(f"Made from {same}.", "facts")]
    if baseline.latencies:
        rows = [
            (
                one.engine,
                one.workload,
                f"{one.baseline_ms:.3f}",
                f"{one.ms:.3f}",
                ratio(asdict(one.ratio)),
                f"{one.surely:.2f}x",
                f"{one.limit:.2f}x",
                one.fault() is None,
            )
            for one in baseline.latencies
        ]
        parts.append(
            table(("engine", "workload", "baseline, ms", "now, ms", "ratio", "surely", "limit", "within"), rows)
        )
    if baseline.logits:
        changed = [
            (
                one.engine,
                one.rollout,
                f"{one.max_abs:.1e}",
                "not gated" if one.limit is None else f"{one.limit:.3g}",
                f"{one.argmax_agreement:.2%}",
                one.fault() is None,
            )
            for one in baseline.logits
        ]
        columns = ("engine", "rollout", "logits differ by", "limit", "argmax agrees", "within")
        parts.append(table(columns, changed, words=(0, 1)))
    if baseline.skipped:
        parts.append(table(("not compared", "why"), list(baseline.skipped.items()), words=(0, 1)))
    return [*parts, _listed("Changes of the interface", baseline.changes)]
