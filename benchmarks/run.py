"""Latency of the example bundles against the original models, with the machine described.

    python benchmarks/run.py [--rounds 20] [--out benchmarks/results]

Bundles that `make demo` has left under build/ are used, others are exported first. Writes one JSON file a model.
Each engine runs in a process of its own and rounds are interleaved, so that noise meets all of them alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mscompile import bench, codec, compile_checkpoint
from validation import render

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
MODELS = ("transformer-xl", "hourglass")
WORKLOADS = ("decode@256", "decode@1024", "prefill:126")


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds over all engines.")] = 8,
    samples: Annotated[int, typer.Option(help="Steps of each engine in a round.")] = 12,
    build: Annotated[Path, typer.Option(help="Where bundles are, or are put.")] = Path("build"),
    out: Annotated[Path, typer.Option(help="Where results go.")] = HERE / "results",
) -> None:
    console = Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        checkpoint, bundle = EXAMPLES / f"{name}.pt", build / f"{name}.msc"
        if not bundle.exists():
            console.print(f"exporting {checkpoint}")
            compile_checkpoint(checkpoint, ["ort"], bundle)
        report = bench.run(bundle, ["ort"], WORKLOADS, checkpoint, rounds, samples)
        console.print(render.latency_table(report.latencies, f"{name}, {report.machine['processor']}"))
        for line in render.gain_lines(report.latencies, report.schedule_gains):
            console.print(line)
        (out / f"{name}.json").write_text(json.dumps(codec.encode(report), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
