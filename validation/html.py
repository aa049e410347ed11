"""Reports as one HTML file: no other file, no network, complete without its script. Light or dark as the reader's
system says, readable on a phone and in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from validation import svg
from validation.style import SCRIPT, STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document; `parts` are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n" + "\n".join(part for part in parts if part) + "\n</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def verdict(passed: bool, sentence: str, beside: str) -> str:
    """The first thing to read."""
    kind, sign = ("", "\u2713") if passed else (" failed", "\u2717")
    return (
        f'<div class="verdict{kind}"><span class="sign" aria-hidden="true">{sign}</span>'
        f"<div><strong>{escape(sentence)}</strong><p>{escape(beside)}</p></div></div>"
    )


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """Figures side by side: what, its value, and what stands below it."""
    told = (
        f'<div class="tile"><dt>{escape(what)}</dt><dd>{escape(value)}</dd><dd>{escape(below)}</dd></div>'
        for what, value, below in facts
    )
    return f'<dl class="tiles">{"".join(told)}</dl>'


def listed(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>" if sentences else ""


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], words: Sequence[int] = (0,)) -> str:
    """`words` are the columns whose text may break into lines; a bool is shown as yes or no."""
    kinds = (' class="words"' if number in words else "" for number in range(len(columns)))
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(kinds, columns, strict=True))
    body = "".join("<tr>" + "".join(_cell(cell, n in words) for n, cell in enumerate(row)) + "</tr>" for row in rows)
    whole = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{whole}</div>'


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
        tiles(_fastest(report)),
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


def _fastest(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of each workload the fastest engine, and how it stands to the original."""
    facts = []
    for workload in dict.fromkeys(row["workload"] for row in report["latencies"]):
        rows = [row for row in report["latencies"] if row["workload"] == workload]
        best = min(rows, key=lambda row: row["ms_per_step"])
        found = report["speedups"].get(f"{best['engine']} {workload} torch")
        beside = f"{best['engine']}; {found['median']:.1f}x as fast as the original" if found else best["engine"]
        facts.append((workload, f"{best['ms_per_step']:.3g} ms", beside))
    return facts


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
    spreads = [
        (shown[row["engine"]], (row["min_ms"], None, row["ms_per_step"], None, row["p95_ms"]), "") for row in rows
    ]
    parts = [
        heading(workload),
        svg.bars(f"ms a step, {workload}", lengths, limit),
        svg.spreads("spread of single steps: least, median, 95 % of them", spreads, "ms"),
        table(columns, cells),
    ]
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
