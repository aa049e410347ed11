"""Reports as tables for a terminal. The reports themselves are the source; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from validation.evidence import Validation
from validation.latency import Latency, Ratio, ScheduleGain
from validation.parity import ParityReport, TensorParity

if TYPE_CHECKING:
    from rich.console import RenderableType


def parity_table(report: ParityReport) -> Table:
    """One line a rollout: its logits, and the largest error of any state."""
    verdict = "[green]passed[/]" if report.passed else "[red]failed[/]"
    table = Table(title=f"parity of {report.engine}, {report.precision}: {verdict}", title_justify="left")
    table.add_column("rollout", no_wrap=True)
    for column in ("tokens", "logit error", "argmax agrees", "KL, nats", "state error", "bits (original)"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in dict.fromkeys(tensor.rollout for tensor in report.tensors):
        table.add_row(name, *_rollout_cells([tensor for tensor in report.tensors if tensor.rollout == name]))
    table.caption, table.caption_justify = _perplexity_line(report), "left"
    return table


def evidence_lines(found: Validation) -> list[str]:
    """What stands beside the parity tables of a validation: engines left out, looser limits, the older bundle."""
    lines = [f"{engine}: not run here: {reason}" for engine, reason in found.skipped.items()]
    lines += list(found.limits.overrides)
    if (older := found.baseline) is not None:
        lines += [f"since {older.bundle}: {change}" for change in older.changes]
        for one in older.logits:
            limit = "not gated, another checkpoint" if one.limit is None else f"limit {one.limit:.3g}"
            lines.append(
                f"{one.engine} {one.rollout}: logits differ from {older.bundle} by {one.max_abs:.1e} ({limit})"
            )
        for slow in older.latencies:
            times = f"{slow.ms:.3f} ms, {older.bundle} {slow.baseline_ms:.3f} ms"
            ratio = f"{_spread(slow.ratio)}, surely {slow.surely:.2f}x, limit {slow.limit:.2f}x"
            lines.append(f"{slow.engine} {slow.workload}: {times}: {ratio}")
        lines += [f"{what}: not compared: {reason}" for what, reason in older.skipped.items()]
    return lines


def _perplexity_line(report: ParityReport) -> str | None:
    """What was lost on text, below FP32."""
    if report.precision == "fp32":
        return None
    if (lost := report.perplexity) is None:
        return "perplexity: not measured, for want of --tokens text; KL divergence is gated alone"
    interval = f"95 % interval {lost.low:+.2%} to {lost.high:+.2%}"
    return f"perplexity on {lost.tokens:,} tokens of text: {lost.loss:+.2%} of the original's ({interval})"


def _rollout_cells(tensors: Sequence[TensorParity]) -> list[str]:
    logits = next(tensor for tensor in tensors if tensor.tensor == "logits")
    states = [tensor for tensor in tensors if tensor.tensor != "logits"]
    worst = max((tensor.max_abs for tensor in states), default=0.0)
    bits = "" if logits.engine_bits is None else f"{logits.engine_bits:.4f} ({logits.reference_bits:.4f})"
    return [
        f"{logits.tokens:,}",
        f"{logits.max_abs:.1e}",
        f"{100 * (logits.argmax_agreement or 0):.2f} %",
        f"{logits.kl:.1e}",
        f"{worst:.1e}",
        bits,
    ]


def latency_table(latencies: Sequence[Latency], title: str) -> Table:
    """One line an engine and workload; the ratio is to the first engine of that workload."""
    table = Table(title=title, title_justify="left")
    table.add_column("workload", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for column in ("ms a step", "p95", "least", "tokens/s", "speed-up"):
        table.add_column(column, justify="right")
    first: dict[str, float] = {}
    for row in latencies:
        base = first.setdefault(row.workload, row.ms_per_step)
        table.add_row(
            row.workload,
            "original" if row.engine == "torch" else row.engine,
            f"{row.ms_per_step:.3f}",
            f"{row.p95_ms:.3f}",
            f"{row.min_ms:.3f}",
            f"{row.tokens_per_second:,.0f}",
            f"{base / row.ms_per_step:.1f}x",
        )
    return table


def gain_lines(latencies: Sequence[Latency], gains: Mapping[str, ScheduleGain]) -> list[str]:
    """What the schedule of a multi-rate model saves, predicted and measured."""
    lines = []
    for row in latencies:
        if gain := gains.get(f"{row.engine} {row.workload}"):
            ticks = ", ".join(f"{name} {ms:.3f} ms" for name, ms in row.ms_by_graph.items())
            lines.append(
                f"{row.engine} {row.workload}: {ticks}; running scales only when due saves {gain.measured:.2f}x "
                f"(its operations predict {gain.predicted:.2f}x)"
            )
    return lines


def ratio_lines(speedups: Mapping[str, Ratio], ceilings: Mapping[str, Ratio]) -> list[str]:
    """How the engines stand to their peers and to what the machine can do, each with the middle 80 % of rounds."""
    lines = []
    for key, ratio in ceilings.items():
        lines.append(f"{key}: {_spread(ratio)} as long as the machine's ceiling allows")
        for name, found in speedups.items():
            if name.startswith(f"{key} "):
                lines.append(f"{key}: {_spread(found)} as fast as {name.removeprefix(f'{key} ')}")
    return lines


def _spread(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def fields_table(title: str, fields: Mapping[str, object]) -> RenderableType:
    """Two columns: what, and its value."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(escape(name), escape(str(value)))
    return table


def rows_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def inspection_tables(title: str, facts: Mapping[str, Any]) -> list[RenderableType]:
    """What `inspect` found: plain facts first, then the schedule, graphs, states, rules and passes."""
    nested = ("schedule", "graphs", "states", "host_inputs", "rules", "passes")
    tables: list[RenderableType] = [fields_table(title, {k: v for k, v in facts.items() if k not in nested})]
    if schedule := facts.get("schedule"):
        ticks = [(f"{t['repeat']} x", ", ".join(t["graphs"]), ", ".join(t["closing"])) for t in schedule["ticks"]]
        tables.append(rows_table("schedule, in order of phase", ("phases", "graphs", "then"), ticks))
        if schedule["prefill"]:
            longest, multiple = schedule["max_chunk"], schedule["chunk_multiple"]
            tables.append(f"{schedule['prefill']}: up to {longest} tokens at once, in multiples of {multiple}")
    if graphs := facts.get("graphs"):
        counts = [(name, len(graph["reads"]), len(graph["writes"])) for name, graph in graphs.items()]
        tables.append(rows_table("graphs", ("graph", "states read", "states written"), counts))
    if states := facts.get("states"):
        columns = ("name", "dtype", "shape", "update")
        tables.append(rows_table("states", columns, [[state[column] for column in columns] for state in states]))
    if inputs := facts.get("host_inputs"):
        told = [[given[column] for column in ("name", "dtype", "shape", "every")] for given in inputs]
        tables.append(rows_table("supplied by the host", ("name", "dtype", "shape", "once in tokens"), told))
    return [*tables, *hit_tables(facts)]


def hit_tables(facts: Mapping[str, Any]) -> list[RenderableType]:
    """What each rule and pass did, or why it did not."""
    tables: list[RenderableType] = []
    for name in ("rules", "passes"):
        if hits := facts.get(name):
            told = [(h["name"], h["place"], "applied" if h["applied"] else "refused", h["reason"]) for h in hits]
            tables.append(rows_table(name, ("name", "place", "", "why"), told))
    return tables
