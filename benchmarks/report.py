"""The report of the last results, one HTML file: python benchmarks/report.py [--results DIR] [--out FILE]"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from targets import DECODE, HOURGLASS, PREFILL, TXL, VANILLA, timing

from validation import html
from validation.svg import Axis, Series, bars, chart

HERE = Path(__file__).parent
Section = Mapping[str, Any]


def main(
    results: Annotated[Path, typer.Option(help="Where results are.")] = HERE / "results",
    out: Annotated[Path, typer.Option(help="The report.")] = HERE / "results" / "report.html",
) -> None:
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    if "targets" not in found:
        raise typer.BadParameter(f"{results} has no targets.json; run benchmarks/run.py first")
    out.write_text(report(found["targets"], found.get("soak", {})), encoding="utf-8")
    typer.echo(str(out))


def report(result: Section, soak: Section) -> str:
    """The page."""
    sections = result["sections"]
    speed = sections.get("speed", {})
    parts = [
        html.paragraph(html.machine_line(next(iter(sections.values()))["machine"]), "facts"),
        html.paragraph(
            "Ratios are medians over interleaved rounds; in brackets where the middle 80 % of rounds lie. Ceilings "
            "were measured in the same rounds. A dashed line is a ceiling."
        ),
        html.heading("Targets"),
        target_table(result["rows"]),
        *timings(speed, TXL, DECODE, (f"{TXL} fp32",)),
        *timings(speed, TXL, PREFILL, (f"{TXL} fp32",)),
        *timings(speed, "", DECODE, (), (HOURGLASS, VANILLA)),
        html.heading("Shape of the curves"),
        by_position(speed),
        by_batch(speed),
        by_precision(speed, sections.get("precision", {})),
        by_length(sections.get("memory", {})),
        by_block(soak),
    ]
    return html.page("mscompile: measured performance", parts)


def target_table(rows: Iterable[Section]) -> str:
    cells = []
    for row in rows:
        value = "" if row["measured"] is None else f"{row['measured']:.3g}{row['unit']}"
        spread = f"{row['spread'][0]:.3g} to {row['spread'][1]:.3g}" if row["spread"] else ""
        limit = "" if row["limit"] is None else f"{row['sense']} {row['limit']:g}{row['unit']}"
        met = "" if row["met"] is None else row["met"]
        cells.append((row["target"], row["what"], value, spread, limit, met, row["note"]))
    columns = ("", "what", "measured", "80 % of rounds", "target", "met", "note")
    return html.table(columns, cells, words=(1, 6))


def timings(
    speed: Section, model: str, workload: str, ceiling_of: Sequence[str], models: Sequence[str] = ()
) -> list[str]:
    """Bars and a table of everything measured on one workload of one or more models, batch 1."""
    wanted = models or (model,)
    rows = [
        row
        for row in speed.get("timings", ())
        if row["workload"] == workload and row["batch"] == 1 and row["engine"].split()[0] in wanted
    ]
    if not rows:
        return []
    title = f"{' and '.join(wanted)}, {workload}"
    lengths = [(_short(row, wanted), row["ms_per_step"], f"{row['ms_per_step']:.3g} ms") for row in rows]
    ceilings = [row["of_ceiling"]["ms"] for row in rows if row["engine"] in ceiling_of and row["of_ceiling"]]
    limit = ("the machine's ceiling in FP32", ceilings[0]) if ceilings else None
    ours = [row["engine"] for row in rows if row["engine"].split()[1].startswith(("fp", "int", "bf"))]
    cells = [
        (
            _short(row, wanted),
            f"{row['ms_per_step']:.2f}",
            f"{row['p95_ms']:.2f}",
            f"{row['min_ms']:.2f}",
            html.ratio(row["of_ceiling"]),
            *(html.ratio(timing(speed, engine, workload)["versus"].get(row["engine"])) for engine in ours[:2]),
        )
        for row in rows
    ]
    columns = ("engine", "ms a step", "p95", "least", "of its ceiling", *(f"to {engine}" for engine in ours[:2]))
    return [html.heading(title), bars(f"ms a step, {title}", lengths, limit), html.table(columns, cells)]


def _short(row: Section, models: Sequence[str]) -> str:
    name: str = row["engine"]
    return name.partition(" ")[2] if len(models) == 1 else name


def by_position(speed: Section) -> str:
    """Latency of decode against the position of the token."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in speed.get("timings", ()):
        kind, _, position = row["workload"].partition("@")
        if kind == "decode" and row["batch"] == 1 and row["engine"].split()[1] in ("fp32", "torch"):
            points.setdefault(row["engine"], []).append((float(position), row["ms_per_step"]))
    series = [Series(name, sorted(found)) for name, found in points.items() if len(found) > 1]
    return chart("decode against position", Axis("tokens before", log=True), Axis("ms a step", log=True), series)


def by_batch(speed: Section) -> str:
    """Tokens a second against the streams that are stepped together, and what the machine allows."""
    rows = [row for row in speed.get("timings", ()) if row["engine"] == f"{TXL} fp32" and row["workload"] == DECODE]
    rows = sorted(rows, key=lambda row: row["batch"])
    allowed = [(row["batch"], 1e3 * row["batch"] / row["of_ceiling"]["ms"]) for row in rows if row["of_ceiling"]]
    series = [
        Series("tokens/s", [(row["batch"], row["tokens_per_second"]) for row in rows]),
        Series("ceiling", allowed, dashed=True),
    ]
    batches = tuple(float(row["batch"]) for row in rows)
    return chart("tokens a second against batch", Axis("streams", log=True, ticks=batches), Axis("tokens/s"), series)


def by_precision(speed: Section, precision: Section) -> str:
    """What a precision costs against what it gains: perplexity on trained weights, speed on the large shape."""
    series = []
    for name in ("fp32", "int8", "int4"):
        found, lost = timing(speed, f"{TXL} {name}", DECODE), precision.get(f"transformer-xl {name}", {})
        if found and "perplexity_loss_percent" in lost:
            point = (1e3 / found["ms_per_step"], max(lost["perplexity_loss_percent"], 0.0))
            series.append(Series(name, [point], joined=False))
    across, up = Axis(f"tokens/s, {TXL}", log=True), Axis("perplexity lost, %, trained model")
    return chart("error against speed, by precision", across, up, series)


def by_length(memory: Section) -> str:
    """State of one stream against its length."""
    lengths = memory.get("lengths", {})
    series = [
        Series(name, [(float(length), found[name]["state_bytes"] / 1e6) for length, found in lengths.items()])
        for name in (HOURGLASS, VANILLA)
    ]
    return chart("state of one stream against its length", Axis("tokens"), Axis("MB"), series)


def by_block(soak: Section) -> str:
    """Latency over a long run."""
    points = [(float(number), ms) for number, ms in enumerate(soak.get("block_ms", ()), 1)]
    steps = f"{soak.get('steps', 0):,} steps on one session"
    return chart(steps, Axis("block of steps"), Axis("ms a step, median"), [Series("latency", points)])


if __name__ == "__main__":
    typer.run(main)
