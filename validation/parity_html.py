"""A validation as one HTML file. First what a manager reads: the verdict, the worst figure against its limit, what was
checked, how fast it is. Then the evidence: errors against the step and by layer, latency, memory, the schedule, the
graphs, all tensors, the comparison with an older bundle, and where everything is from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from math import inf, isfinite, log10
from typing import Any

from mscompile.contracts import Schedule, StateSpec
from validation import svg
from validation.evidence import Baseline, Subject, Validation
from validation.html import (
    folded,
    heading,
    listed,
    machine_line,
    page,
    paragraph,
    ratio,
    size,
    table,
    tiles,
    verdict,
)
from validation.parity import ParityReport, TensorParity
from validation.svg import Axis, Cell, Series

BARS, CURVES = 10, 6  # tensors in a chart
COLUMNS = 48  # of a heat map or a schedule
DECADES = 4  # below a limit that a heat map tells apart


def parity_page(found: Validation) -> str:
    """The whole document."""
    subject = found.subject
    parts = [
        verdict(found.passed, f"{found.verdict}.", f"{found.title}. {_limits(found)}"),
        tiles(list(_tiles(found))),
        *_section("What failed", listed(found.failures)),
        *_section("Limits looser than the default", listed(found.limits.overrides)),
        *_section("What was checked", _engines(found), *(_checks(report) for report in found.reports)),
        *_section("What was not checked", _unchecked(found)),
        *_section("Errors", *(part for report in found.reports for part in _errors(found, report))),
        *_section("Latency", *(part for report in found.reports for part in _latency(report))),
        *_section(f"Against {found.baseline.bundle}" if found.baseline else "", *_baseline(found.baseline)),
    ]
    if subject:
        parts += [
            *_section("Memory", *_memory(subject)),
            *_section("Schedule", *_schedule(subject.spec.schedule)),
            *_section("Graphs", *_graphs(subject)),
        ]
    parts += _section("Every tensor", *(_tensors(found, report) for report in found.reports))
    parts += _section("Provenance", _provenance(found))
    return page(f"Parity of {found.bundle}", parts)


def _section(title: str, *parts: str) -> list[str]:
    """A heading and what stands below it; nothing where that is empty."""
    return [heading(title), *parts] if any(parts) else []


def _limits(found: Validation) -> str:
    return f"Limits: {found.thresholds}." if found.thresholds else "Limits: the defaults of its precision."


# Summary


def _tiles(found: Validation) -> Iterator[tuple[str, str, str]]:
    yield _worst_tile(found)
    logits = [tensor for report in found.reports for tensor in report.tensors if tensor.tensor == "logits"]
    done = [check for report in found.reports for check in report.checks if not check.skipped]
    rollouts = len({tensor.rollout for tensor in logits})
    beside = f"in {rollouts} rollouts, and {len(done)} checks of sessions, on {_engine_names(found)}"
    yield "Tokens compared", f"{sum(tensor.tokens for tensor in logits):,}", beside
    if lost := next((report.perplexity for report in found.reports if report.perplexity), None):
        yield "Perplexity on text", _signed(lost.loss), f"95 % interval {_signed(lost.low)} to {_signed(lost.high)}"
    elif found.reports:
        agree = min(report.argmax_agreement for report in found.reports)
        yield "Likeliest token agrees", f"{agree:.2%}", "of all tokens, in the worst rollout"
    yield from _speed(found)
    if found.subject:
        yield "State of a stream", size(found.subject.spec.bytes_per_stream()), "beside the weights, which are shared"


def _speed(found: Validation) -> Iterator[tuple[str, str, str]]:
    """As measured against the baseline, or else as seen while checking, when the machine did least else."""
    if found.baseline and found.baseline.latencies:
        one = found.baseline.latencies[0]
        yield "Speed", f"{one.ms:.3g} ms", f"{one.engine} {one.workload}; {one.ratio.median:.2f}x the baseline's time"
        return
    for report in found.reports:
        times = [one for one in report.step_times if one.batch == 1]
        if steps := sum(one.steps for one in times):
            quick = sum(one.steps * one.at(0.1) for one in times) / steps
            yield "Speed", f"{quick:.2g} ms", f"a token, {report.engine}: the quickest tenth of steps, seen in passing"
            return


def _signed(share: float) -> str:
    return f"{round(share, 5) + 0.0:+.3%}"


def _worst_tile(found: Validation) -> tuple[str, str, str]:
    worst = [(report, tensor) for report in found.reports if (tensor := found.worst(report))]
    if not worst:
        return "Worst figure", "none", "nothing was compared"
    report, tensor = max(worst, key=lambda pair: found.share(pair[1]))
    what, value, limit = found.limit(tensor)
    beside = f"{what} of {tensor.tensor}, {report.engine}: {value:.2g}, limit {limit:.3g}"
    return "Worst figure, of its limit", _percent(found.share(tensor)), beside


def _percent(share: float) -> str:
    return f"{share:.2g} times" if share >= 10 else f"{100 * share:.2g} %"


def _engine_names(found: Validation) -> str:
    return ", ".join(report.engine for report in found.reports)


# What was checked


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


def _checks(report: ParityReport) -> str:
    """Every rollout and every check of sessions, with what came of it."""
    rows: list[tuple[object, ...]] = []
    for rollout in dict.fromkeys(tensor.rollout for tensor in report.tensors):
        mine = [tensor for tensor in report.tensors if tensor.rollout == rollout]
        tokens, states = max(tensor.tokens for tensor in mine), sum(tensor.tensor != "logits" for tensor in mine)
        what = f"{tokens:,} tokens: logits of every step, {states} states"
        rows.append((rollout, what, not any(fault.startswith(f"{rollout}: ") for fault in report.failures)))
    rows += [(one.name, one.what, "not done" if one.skipped else one.fault is None) for one in report.checks]
    if report.generation:
        fault = any(failure.startswith("greedy continuation") for failure in report.failures)
        rows.append(("greedy continuation", _generation(report), not fault))
    if lost := report.perplexity:
        fault = any(failure.startswith("perplexity") for failure in report.failures)
        what = (
            f"{lost.tokens:,} tokens of text: {lost.engine:.4f}, the original's {lost.reference:.4f}; "
            f"{_signed(lost.loss)}, 95 % interval {_signed(lost.low)} to {_signed(lost.high)}"
        )
        rows.append(("perplexity", what, not fault))
    return heading(f"{report.engine}, {report.precision}", 3) + table(("check", "what", "passed"), rows, words=(0, 1))


def _generation(report: ParityReport) -> str:
    one = report.generation
    assert one is not None
    if one.first_divergence is None:
        return f"{one.rows} rows, running free: {one.tokens} tokens the same as the original's"
    return (
        f"token {one.first_divergence} of row {one.row} is {one.chosen}, the original's {one.expected}; its best two "
        f"logits are {one.margin:.2g} apart there"
    )


def _unchecked(found: Validation) -> str:
    return table(("what", "why"), list(found.unchecked.items()), words=(0, 1)) if found.unchecked else ""


# Errors


def _errors(found: Validation, report: ParityReport) -> list[str]:
    if not report.tensors:
        return []
    parts = [heading(f"{report.engine}, {report.precision}", 3), _shares(found, report)]
    curves = _curves(found, report)
    return [*parts, *_heat(found, report), f'<div class="charts">{"".join(curves)}</div>' if curves else ""]


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


def _heat(found: Validation, report: ParityReport) -> list[str]:
    """A map of the rollouts in which states were compared most often: the error by tensor and step."""
    points = {rollout: _seen(report, rollout) for rollout in dict.fromkeys(tensor.rollout for tensor in report.tensors)}
    rollout = max(points, key=lambda name: points[name], default="")
    if not points or points[rollout] < 4:
        return []
    tensors = [tensor for tensor in report.tensors if tensor.rollout == rollout and tensor.error_by_step]
    last = max(step for tensor in tensors for step, _ in tensor.error_by_step) + 1
    count = min(COLUMNS, last)
    rows = [(tensor.tensor, _heat_row(found, tensor, last, count)) for tensor in tensors]
    shades = "".join(f'<i style="opacity:{0.1 + 0.22 * level:.2f}"></i>' for level in range(DECADES + 1))
    legend = (
        f'<p class="legend">Share of the limit, from {10.0**-DECADES:.0e} '
        f'<span class="scale" aria-hidden="true">{shades}</span>'
        " to all of it; beyond it in red. Empty: not compared there.</p>"
    )
    return [svg.strips(f"{rollout}: error by tensor and step", rows, ("step 0", f"step {last - 1}"), legend)]


def _seen(report: ParityReport, rollout: str) -> int:
    """How often the states of a rollout were compared."""
    return min(
        (len(one.error_by_step) for one in report.tensors if one.rollout == rollout and one.tensor != "logits"),
        default=0,
    )


def _heat_row(found: Validation, tensor: TensorParity, last: int, count: int) -> list[Cell]:
    worst: dict[int, tuple[float, int]] = {}
    for step, error in tensor.error_by_step:
        column = step * count // last
        worst[column] = max(worst.get(column, (0.0, step)), (error, step))
    limit = _absolute_limit(found, tensor)
    return [_heat_cell(*worst[column], limit) if column in worst else ("empty", "") for column in range(count)]


def _heat_cell(error: float, step: int, limit: float) -> Cell:
    said = f"step {step}: {error:.2g}, limit {limit:.3g}"
    if not error <= limit:
        return "over", said
    level = DECADES + log10(max(error / limit, 10.0**-DECADES)) if isfinite(limit) else 0.0
    return f"{min(0.1 + 0.22 * level, 0.98):.2f}".lstrip("0"), said


def _absolute_limit(found: Validation, tensor: TensorParity) -> float:
    """The limit of the largest error; infinite where a tensor is limited otherwise."""
    allowed = found.limits.of(tensor.tensor)
    return allowed.logit_max_abs if tensor.tensor == "logits" else allowed.state_max_abs


def _curves(found: Validation, report: ParityReport) -> list[str]:
    """A chart a rollout: the largest error against the step, of the tensors that use most of their limits."""
    charts = []
    for rollout in dict.fromkeys(tensor.rollout for tensor in report.tensors):
        mine = sorted(
            (tensor for tensor in report.tensors if tensor.rollout == rollout), key=found.share, reverse=True
        )[:CURVES]
        series = [
            Series(tensor.tensor, [(step, error) for step, error in tensor.error_by_step if 0 < error < inf])
            for tensor in mine
        ]
        steps = [step for one in series for step, _ in one.points]
        limits = {limit for tensor in mine if isfinite(limit := _absolute_limit(found, tensor))}
        if steps and len(limits) == 1:
            ends = ((float(min(steps)), *limits), (float(max(steps)), *limits))
            series.append(Series("limit of the largest error", [(x, y) for x, y in ends], dashed=True))
        axes = Axis("step"), Axis("largest error", log=True)
        charts.append(svg.chart(f"{rollout}: error against the step", *axes, series))
    return charts


# Latency, memory, schedule, graphs


def _latency(report: ParityReport) -> list[str]:
    if not report.step_times:
        return []
    rows, series = [], []
    for one in report.step_times:
        name = f"{one.graph}, batch {one.batch}"
        last = len(one.quantiles_ms) - 1
        least, low, middle, high, most = (one.at(share) for share in (0, 0.05, 0.5, 0.95, 1))
        said = f"{one.steps} steps: median {middle:.3g} ms, 90 % from {low:.3g} to {high:.3g} ms"
        rows.append((name, (least, low, middle, high, most), said))
        points = [(100 * number / last, ms) for number, ms in enumerate(one.quantiles_ms) if ms > 0]
        series.append(Series(name, points))
    return [
        paragraph(
            f"Steps of one token on {report.engine}, timed while they were checked, among other work: a hint at how "
            "times are distributed. mscompile bench measures them.",
            "note",
        ),
        svg.spreads(f"{report.engine}: from least to most, 90 % in the box, the median as a mark", rows, "ms"),
        svg.chart(
            f"{report.engine}: share of steps that take at most so long",
            Axis("share of steps, %"),
            Axis("ms a step", log=True),
            series[:CURVES],
        ),
    ]


def _memory(subject: Subject) -> list[str]:
    spec = subject.spec
    files = [
        ("graphs and weights", float(subject.graph_bytes)),
        *((n, float(b)) for n, b in subject.engine_bytes.items()),
    ]
    states = sorted(((state.name, _kept_bytes(state)) for state in spec.states), key=lambda item: -item[1])
    rest = sum(count for _, count in states[BARS:])
    shown = states[:BARS] + ([(f"{len(states) - BARS} more", rest)] if rest else [])
    whole = f"state of one stream: {size(spec.bytes_per_stream())}, {size(8 * spec.bytes_per_stream())} for eight"
    return [
        svg.bars(whole, [(name, float(count), size(count)) for name, count in shown]),
        svg.bars(f"files of the bundle: {size(subject.total_bytes)}", [(n, b, size(b)) for n, b in files]),
    ]


def _kept_bytes(state: StateSpec) -> int:
    return state.bytes_per_stream() * (2 if state.update == "replace" else 1)


def _schedule(schedule: Schedule) -> list[str]:
    """Which graphs run for which token of the period; of a long one, as many as fit, each the sum of its tokens."""
    runs = [(tick.graphs, tick.closing) for tick in schedule.ticks for _ in range(tick.repeat)]
    names = list(dict.fromkeys(name for graphs, closing in runs for name in (*graphs, *closing)))
    count = min(COLUMNS, len(runs))
    rows = [(name, [_on(name, runs[at * len(runs) // count : (at + 1) * len(runs) // count]) for at in range(count)])
            for name in names]  # fmt: skip
    words = f"It repeats every {len(runs)} tokens." if len(runs) > 1 else f"Every token takes {', '.join(names)}."
    if schedule.prefill:
        words += (
            f" Up to {schedule.max_chunk} tokens at once go through {schedule.prefill}, in multiples of "
            f"{schedule.chunk_multiple}, from a token whose number is such a multiple."
        )
    if len(runs) == 1:
        return [paragraph(words)]
    legend = '<p class="legend"><span class="key s0">runs</span><span class="key s1">runs after the token</span></p>'
    return [
        paragraph(words),
        svg.strips("what runs for which token", rows, ("token 0", f"token {len(runs) - 1}"), legend),
    ]


def _on(name: str, runs: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> Cell:
    if any(name in graphs for graphs, _ in runs):
        return "on", f"{name} runs"
    return ("then", f"{name} runs after the token") if any(name in closing for _, closing in runs) else ("empty", "")


def _graphs(subject: Subject) -> list[str]:
    """How many nodes each graph has after each stage of its export."""
    if not subject.nodes:
        return [paragraph("The bundle does not say how many nodes its graphs had; a newer export does.", "note")]
    stages = [stage["after"] for stage in subject.nodes]
    names = list(dict.fromkeys(name for stage in subject.nodes for name in stage["graphs"]))
    rows = [(name, *_counts(subject.nodes, name), _gone(subject.nodes, name)) for name in names]
    sizes = [
        (f"{name}, {word}", float(count), f"{count:,} nodes")
        for name in names
        for word, count in zip(("traced", "now"), _ends(subject.nodes, name), strict=True)
    ]
    operations = [(name, float(count), f"{count / 1e6:,.3g} M") for name, count in subject.operations.items()]
    return [
        svg.bars("nodes when traced, and now", sizes, kinds=2),
        table(("graph", *(f"after {stage}" for stage in stages), "removed"), rows),
        svg.bars("floating-point operations of one token", operations),
    ]


def _counts(nodes: Sequence[Mapping[str, Any]], name: str) -> list[object]:
    return [stage["graphs"].get(name, "") for stage in nodes]


def _ends(nodes: Sequence[Mapping[str, Any]], name: str) -> tuple[int, int]:
    found = [stage["graphs"][name] for stage in nodes if name in stage["graphs"]]
    return int(found[0]), int(found[-1])


def _gone(nodes: Sequence[Mapping[str, Any]], name: str) -> str:
    first, last = _ends(nodes, name)
    return f"{1 - last / first:.0%}" if first else ""


# The rest


def _tensors(found: Validation, report: ParityReport) -> str:
    rows = []
    for tensor in report.tensors:
        what, value, limit = found.limit(tensor)
        rows.append((tensor.rollout, tensor.tensor, what, f"{value:.1e}", f"{limit:.3g}", tensor.worst))
    columns = ("rollout", "tensor", "measure", "value", "limit", "where it is largest")
    every = table(columns, rows, words=(0, 1, 5))
    return folded(f"The {len(rows)} tensors of {report.engine}, each with the limit that it comes closest to", every)


def _provenance(found: Validation) -> str:
    rows: list[tuple[str, object]] = [
        ("checkpoint, SHA-256", found.checkpoint_sha256),
        ("compared with", found.against),
    ]
    if subject := found.subject:
        count = "not stated" if subject.parameters is None else f"{subject.parameters:,}"
        rows += [("family", f"{subject.family}, {count} parameters")]
        rows += [("exported with", ", ".join(f"{name} {version}" for name, version in subject.versions.items()))]
        rows += [("verified when exported", ", ".join(subject.verified_at_export) or "no engine")]
        rows += [("command", subject.command)] if subject.command else []
    rows += [("limits", found.thresholds or "the defaults"), ("machine", machine_line(found.machine))]
    cells = "".join(f'<tr><th scope="row">{escape(what)}</th><td class="words">{escape(str(said))}</td></tr>'
                    for what, said in rows)  # fmt: skip
    return f"<table><tbody>{cells}</tbody></table>"


def _before_and_now(workload: str, baseline: Baseline) -> str:
    both = [
        (f"{one.engine}, {when}", ms, f"{ms:.3g} ms")
        for one in baseline.latencies
        for when, ms in (("baseline", one.baseline_ms), ("now", one.ms))
        if one.workload == workload
    ]
    return svg.bars(f"{workload}: ms a step, in the same interleaved rounds", both, kinds=2)


def _baseline(baseline: Baseline | None) -> list[str]:
    if baseline is None:
        return []
    same = "the same checkpoint" if baseline.same_checkpoint else "another checkpoint"
    parts = [paragraph(f"Made from {same}.", "facts")]
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
        parts += [
            _before_and_now(workload, baseline) for workload in {one.workload: None for one in baseline.latencies}
        ]
        columns: tuple[str, ...] = (
            "engine",
            "workload",
            "baseline, ms",
            "now, ms",
            "ratio",
            "surely",
            "limit",
            "within",
        )
        parts.append(table(columns, rows))
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
    if baseline.changes:
        parts += [heading("Changes of the interface", 3), listed(baseline.changes)]
    return parts
