"""The performance targets, measured: python benchmarks/run.py [--full] [--only speed,cost]

Prints each target with its ratio and whether it is met, and writes benchmarks/results/targets.json, with the machine
described. The short form takes minutes on a quiet machine, most of them for exports, which build/ keeps for the next
run; `--full` takes more rounds and adds latency against position. Sections that are not measured are taken
from the last result. `--examples` measures the shipped models, as the README quotes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import cost_of_use
import memory
import precision
import speed
import typer
from rich.console import Console
from rich.table import Table
from targets import Row, rows

from mscompile import bench, codec, compile_checkpoint
from validation import render

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
MODELS = ("transformer-xl", "hourglass")
WORKLOADS = ("decode@256", "decode@1024", "prefill:126")
SECTIONS = ("speed", "precision", "memory", "cost")

console = Console(width=140)


def main(
    full: Annotated[bool, typer.Option("--full", help="More rounds, and latency against position.")] = False,
    only: Annotated[str, typer.Option(help="Sections to measure, comma-separated.")] = ",".join(SECTIONS),
    examples: Annotated[bool, typer.Option("--examples", help="The shipped models instead.")] = False,
    build: Annotated[Path, typer.Option(help="Where bundles are, or are put.")] = Path("build"),
    out: Annotated[Path, typer.Option(help="Where results go.")] = HERE / "results",
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if examples:
        shipped(build, out, rounds=20 if full else 8)
        return
    target = out / "targets.json"
    result = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"sections": {}}
    for name in only.split(","):
        result["sections"][name] = {**measured(name, build / "bench", full), "machine": bench.machine()}
        found = rows({**result["sections"], **soaked(out)})
        result["rows"] = [{**asdict(row), "met": row.met} for row in found]
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(table(found))
    for name, reason in result["sections"].get("speed", {}).get("skipped", {}).items():
        console.print(f"{name}: not measured: {reason}")


def measured(name: str, build: Path, full: bool) -> dict[str, Any]:
    """One section."""
    say = console.print
    if name == "speed":
        return speed.measure(build, speed.FULL if full else speed.SHORT, say, lambda *_: None)
    if name == "precision":
        return precision.measure(EXAMPLES, build, say)
    if name == "memory":
        return memory.measure(build, say)
    if name == "cost":
        return cost_of_use.measure(build, HERE / "results", say)
    raise typer.BadParameter(f"unknown section {name!r}; known: {', '.join(SECTIONS)}")


def soaked(out: Path) -> Mapping[str, Any]:
    """What benchmarks/soak.py has left."""
    path = out / "soak.json"
    return {"soak": json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}


def table(found: list[Row]) -> Table:
    """One line a requirement."""
    shown = Table(title="targets", title_justify="left")
    for column in ("", "what", "measured", "80 % of rounds", "target", "met", "note"):
        shown.add_column(column, justify="right" if column in ("measured", "target") else "left")
    verdicts = {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}
    for row in found:
        spread = f"{row.spread[0]:.3g} to {row.spread[1]:.3g}" if row.spread else ""
        value = "-" if row.measured is None else f"{row.measured:.3g}{row.unit}"
        limit = "" if row.limit is None else f"{row.sense} {row.limit:g}{row.unit}"
        shown.add_row(str(row.target), row.what, value, spread, limit, verdicts[row.met], row.note)
    return shown


def shipped(build: Path, out: Path, rounds: int) -> None:
    """Latency of the example models against the originals; one JSON file a model."""
    for name in MODELS:
        checkpoint, bundle = EXAMPLES / f"{name}.pt", build / f"{name}.msc"
        if not bundle.exists():
            console.print(f"exporting {checkpoint}")
            compile_checkpoint(checkpoint, ["ort"], bundle)
        report = bench.run(bundle, ["ort"], WORKLOADS, checkpoint, rounds)
        console.print(render.latency_table(report.latencies, f"{name}, {report.machine['processor']}"))
        for line in render.gain_lines(report.latencies, report.schedule_gains):
            console.print(line)
        (out / f"{name}.json").write_text(json.dumps(codec.encode(report), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
