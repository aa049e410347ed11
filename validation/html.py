"""Reports as one HTML file: no script, no other file, no network. Light or dark as the reader's system says, readable
on a phone and in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from validation import svg

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #667; --rule: #d5d9df;
  --c0: #2563b8; --c1: #c2571a; --c2: #2e7d4f; --c3: #8445ad; --c4: #a8861a; --c5: #b03a5b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #14171b; --soft: #9aa3ad; --rule: #343a42;
  --c0: #6fa8ee; --c1: #f0995f; --c2: #6cc48f; --c3: #c493e6; --c4: #dcbf5a; --c5: #ec8aa5; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.facts, p.legend, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; break-inside: avoid; } svg { width: 100%; height: auto; display: block; }
.label { font-size: 13px; fill: currentColor; } .grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2.2; } .dashed { stroke-dasharray: 6 5; } .line.limit { stroke: var(--ink); }
.line.s0 { stroke: var(--c0); } .line.s1 { stroke: var(--c1); } .line.s2 { stroke: var(--c2); }
.line.s3 { stroke: var(--c3); } .line.s4 { stroke: var(--c4); } .line.s5 { stroke: var(--c5); }
.bar.s0, .mark.s0 { fill: var(--c0); } .bar.s1, .mark.s1 { fill: var(--c1); } .bar.s2, .mark.s2 { fill: var(--c2); }
.bar.s3, .mark.s3 { fill: var(--c3); } .bar.s4, .mark.s4 { fill: var(--c4); } .bar.s5, .mark.s5 { fill: var(--c5); }
.key { margin-right: 1.1rem; white-space: nowrap; } .key::before { content: "\\25CF "; }
.key.s0::before { color: var(--c0); } .key.s1::before { color: var(--c1); } .key.s2::before { color: var(--c2); }
.key.s3::before { color: var(--c3); } .key.s4::before { color: var(--c4); } .key.s5::before { color: var(--c5); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, td.words { text-align: left; }
td.words { white-space: normal; } .yes { color: var(--c2); } .no { color: var(--c5); font-weight: 600; }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #444; --rule: #bbb; }
  body { max-width: none; padding: 0; font-size: 11pt; } h2 { break-after: avoid; } .scroll { overflow: visible; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document; `parts` are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], words: Sequence[int] = (0,)) -> str:
    """`words` are the columns whose text may break into lines; a bool is shown as yes or no."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(cell, n in words) for n, cell in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object, words: bool) -> str:
    if isinstance(value, bool):
        word = "yes" if value else "no"
        return f'<td class="{word}">{word}</td>'
    kind = ' class="words"' if words else ""
    return f"<td{kind}>{escape(str(value))}</td>"


def ratio(found: Mapping[str, float] | None) -> str:
    """`4.20x (4.05 to 4.41)`."""
    return f"{found['median']:.2f}x ({found['low']:.2f} to {found['high']:.2f})" if found else ""


def machine_line(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    threads = machine.get("threads", machine["cores"])
    return (
        f"{machine['processor']}, {machine['cores']} cores, {threads} threads; Python {machine['python']}; {versions}"
    )


def bench_page(report: Mapping[str, Any]) -> str:
    """The page of a benchmark report, given as its JSON: each workload as bars and as a table."""
    title = f"Latency of {report['bundle']}"
    parts = [
        paragraph(machine_line(report["machine"]), "facts"),
        paragraph(
            f"Batch {report['batch']}, {report['rounds']} interleaved rounds, each engine in a process of its own. "
            "Ratios are medians over rounds; in brackets where the middle 80 % of rounds lie. Trust them more than "
            "the milliseconds."
        ),
    ]
    for workload in dict.fromkeys(row["workload"] for row in report["latencies"]):
        parts += _workload(report, workload)
    if report["skipped"]:
        parts += [heading("Not measured"), table(("what", "why"), list(report["skipped"].items()), words=(0, 1))]
    return page(title, parts)


def _workload(report: Mapping[str, Any], workload: str) -> list[str]:
    rows = [row for row in report["latencies"] if row["workload"] == workload]
    shown = {row["engine"]: "original" if row["engine"] == "torch" else row["engine"] for row in rows}
    ours = [row["engine"] for row in rows if f"{row['engine']} {workload}" in report["ceilings"]]
    limit = None
    if ours:
        first = next(row for row in rows if row["engine"] == ours[0])
        limit = ("the machine's ceiling", first["ms_per_step"] / report["ceilings"][f"{ours[0]} {workload}"]["median"])
    lengths = [(shown[row["engine"]], row["ms_per_step"], f"{row['ms_per_step']:.3g} ms") for row in rows]
    cells = [
        (
            shown[row["engine"]],
            f"{row['ms_per_step']:.3f}",
            f"{row['p95_ms']:.3f}",
            f"{row['min_ms']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            ratio(report["ceilings"].get(f"{row['engine']} {workload}")),
            f"{report['errors'][row['engine']]:.1e}" if row["engine"] in report["errors"] else "",
        )
        for row in rows
    ]
    compared = [
        (key.removesuffix(f" {other}").removesuffix(f" {workload}"), shown.get(other, other), ratio(found))
        for key, found in report["speedups"].items()
        for other in shown
        if key.endswith(f" {workload} {other}")
    ]
    columns = ("engine", "ms a step", "p95", "least", "tokens/s", "of the ceiling", "logit error")
    parts = [heading(workload), svg.bars(f"ms a step, {workload}", lengths, limit), table(columns, cells)]
    if compared:
        parts.append(table(("engine", "against", "times as fast"), compared))
    parts += [
        paragraph(
            f"{key}: running scales only when due saves {gain['measured']:.2f}x; its operations predict "
            f"{gain['predicted']:.2f}x."
        )
        for key, gain in report["schedule_gains"].items()
        if key.endswith(f" {workload}")
    ]
    return parts
