"""A sweep as one table, for terminals and as Markdown, and as one HTML file. Nothing is computed here."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich import box, markup
from rich.console import Console
from rich.table import Table

from mscompile.sweep.plan import Cell
from mscompile.sweep.result import Result
from mscompile.sweep.sweeping import Outcome
from validation import html, svg

MARKDOWN_WIDTH = 10_000  # characters, so that no cell is broken into lines
MEASURED = (
    "Times are of one step of the engine, in ms. In brackets: how many times as fast as the original, measured in the "
    "same rounds; trust it more than the milliseconds where several cells ran at a time."
)
ORIGINAL = "torch"  # the engine that is the original model


def table(outcome: Outcome, shown: Callable[[str], str] = str) -> Table:
    """One line a cell: parity, size, and for each workload the time of a step and the ratio to the original's.

    `shown` is applied to every text.
    """
    columns = _figures(outcome)
    drawn = Table(title=outcome.verdict, title_justify="left")
    drawn.add_column("cell", overflow="fold")
    drawn.add_column("result", no_wrap=True)
    for name in columns:
        drawn.add_column(markup.escape(name), justify="right", overflow="fold")
    for row in _rows(outcome, columns):
        drawn.add_row(*(markup.escape(shown(text)) for text in row))
    return drawn


def markdown(outcome: Outcome) -> str:
    """The table and the reasons, for a pull request."""
    drawn = table(outcome, _plain)
    drawn.title, drawn.box = None, box.MARKDOWN
    file = io.StringIO()
    Console(file=file, width=MARKDOWN_WIDTH, color_system=None).print(drawn)
    lines = [line.strip() for line in file.getvalue().splitlines() if line.strip()]
    sign = "❌" if outcome.failed else "✅"
    reasons = [f"- {_plain(cell.label)}: {_plain(reason)}" for cell, reason in _reasons(outcome)]
    return "\n".join((f"### {sign} {outcome.verdict}", "", *lines, "", *reasons)).rstrip() + "\n"


def page(outcome: Outcome) -> str:
    """The HTML report: verdict, all cells, reasons, a chart a checkpoint and workload, and where it comes from."""
    columns = _figures(outcome)
    rows = list(_rows(outcome, columns))
    parts = [_verdict(outcome), html.heading("Cells"), html.table(("cell", "result", *columns), rows)]
    if workloads := _workloads(outcome):
        parts.append(html.paragraph(MEASURED))
    if reasons := [(cell.label, reason) for cell, reason in _reasons(outcome)]:
        parts += [html.heading("Why not"), html.table(("cell", "reason"), reasons, words=(0, 1))]
    parts += [*_charts(outcome, workloads), html.heading("Provenance"), *_provenance(outcome)]
    return html.page(f"Sweep of {outcome.plan}", parts)


def _verdict(outcome: Outcome) -> str:
    cells = [cell for cell, _ in outcome.cells]
    spans = (
        ("checkpoints", dict.fromkeys(cell.checkpoint.name for cell in cells)),
        ("targets", dict.fromkeys(cell.target for cell in cells)),
        ("precisions", dict.fromkeys(cell.precision for cell in cells)),
        ("shapes", dict.fromkeys(cell.shape.name for cell in cells)),
    )
    beside = "; ".join(f"{what}: {', '.join(names)}" for what, names in spans)
    return html.verdict(not outcome.failed, outcome.verdict, beside)


def _reasons(outcome: Outcome) -> Iterator[tuple[Cell, str]]:
    """Why cells did not pass."""
    for cell, result in outcome.cells:
        if result.reason is not None:
            stage = f" at {result.stage}" if result.status == "failed" else ""
            yield cell, f"{result.status}{stage}: {result.reason}"


def _figures(outcome: Outcome) -> dict[str, list[str]]:
    """Columns by their names, a text a cell; without those that are empty."""
    columns: dict[str, list[str]] = {}
    workloads = _workloads(outcome)
    for number, (cell, result) in enumerate(outcome.cells):
        texts = _parity(result) | {f"{each}, ms": _time(result, each, cell.target) for each in workloads}
        for name, text in texts.items():
            columns.setdefault(name, [""] * len(outcome.cells))[number] = text
    return {name: column for name, column in columns.items() if any(column)}


def _rows(outcome: Outcome, columns: Mapping[str, list[str]]) -> Iterator[tuple[str, ...]]:
    for number, (cell, result) in enumerate(outcome.cells):
        yield cell.label, result.status, *(column[number] for column in columns.values())


def _parity(result: Result) -> dict[str, str]:
    texts = dict.fromkeys(("logit error", "argmax", "KL, nats", "perplexity"), "")
    if (found := result.parity) is not None:
        loss = "" if found.perplexity_loss is None else f"{found.perplexity_loss:+.2%}"
        values = (f"{found.logit_max_abs:.1e}", f"{found.argmax_agreement:.2%}", f"{found.kl:.1e}", loss)
        texts = dict(zip(texts, values, strict=True))
    return {**texts, "MB": f"{result.size_bytes / 1e6:.2f}" if result.size_bytes else ""}


def _charts(outcome: Outcome, workloads: list[str]) -> Iterator[str]:
    """Bars of the time of a step: a chart for each checkpoint and workload."""
    for name in dict.fromkeys(cell.checkpoint.name for cell, _ in outcome.cells):
        for workload in workloads:
            bars = []
            for cell, result in outcome.cells:
                row = _latency(result, workload, cell.target) if cell.checkpoint.name == name else None
                if row is not None:
                    label = f"{cell.target} {cell.precision} {cell.shape.name}"
                    ratio = _ratio(result, workload, cell.target)
                    bars.append((label, row["ms_per_step"], f"{row['ms_per_step']:.3g} ms{ratio}"))
            if bars:
                yield html.heading(f"{name}, {workload}")
                yield svg.bars("ms a step; in brackets, times as fast as the original", bars)


def _provenance(outcome: Outcome) -> Iterator[str]:
    machines = {html.machine_line(result.machine) for _, result in outcome.cells if result.machine}
    for line in sorted(machines):
        yield html.paragraph(line, "facts")
    versions = sorted({pair for cell, _ in outcome.cells for pair in cell.versions})
    yield html.paragraph(", ".join(f"{name} {found}" for name, found in versions), "facts")
    rows = []
    for cell, result in outcome.cells:
        bundle = f"bundles/{cell.id}.msc" if result.size_bytes else ""
        rows.append((cell.label, f"{result.seconds:.0f}", result.attempts, bundle))
    yield html.table(("cell", "seconds", "attempts", "bundle"), rows, words=(0, 3))


def _workloads(outcome: Outcome) -> list[str]:
    """All that were measured, in the order of the plan."""
    reports = (result.bench for _, result in outcome.cells if result.bench)
    return list(dict.fromkeys(row["workload"] for report in reports for row in report["latencies"]))


def _time(result: Result, workload: str, engine: str) -> str:
    row = _latency(result, workload, engine)
    return "" if row is None else f"{row['ms_per_step']:.3f}{_ratio(result, workload, engine)}"


def _latency(result: Result, workload: str, engine: str) -> dict[str, Any] | None:
    rows = result.bench["latencies"] if result.bench else []
    return next((row for row in rows if (row["engine"], row["workload"]) == (engine, workload)), None)


def _ratio(result: Result, workload: str, engine: str) -> str:
    """` (12.5x)`: how many times as long the original takes."""
    found = result.bench["speedups"].get(f"{engine} {workload} {ORIGINAL}") if result.bench else None
    return "" if found is None else f" ({found['median']:.1f}x)"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    for mark in "\\`*_{}[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
