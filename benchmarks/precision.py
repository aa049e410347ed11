"""Target 3, second half: what a precision costs the trained models in perplexity on held-out text.

The figures are those of the export's own parity gate: the engine and the original over the same text rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mscompile import compile_checkpoint
from mscompile.errors import MsCompileError
from mscompile.pipeline import Options

EXAMPLES = ("transformer-xl", "hourglass")
PRECISIONS = ("fp32", "int8", "int4")


def measure(examples: Path, build: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """By "model precision": the loss in percent, or the reason why there is none."""
    found: dict[str, Any] = {}
    options = Options(text=examples / "held-out.txt", force=True)
    build.mkdir(parents=True, exist_ok=True)
    for name in EXAMPLES:
        for precision in PRECISIONS:
            say(f"exporting the trained {name} in {precision}, with its gate")
            out = build / f"trained-{name}-{precision}.msc"
            try:
                bundle = compile_checkpoint(
                    examples / f"{name}.pt", ["ort"], out, replace(options, precision=precision)
                )
            except MsCompileError as error:
                found[f"{name} {precision}"] = {"reason": str(error)}
            else:
                found[f"{name} {precision}"] = loss((bundle.manifest.parity or {})["ort"])
    return found


def loss(report: Mapping[str, Any]) -> dict[str, float]:
    """Perplexity lost on text, with its standard error, in percent, and the largest logit error, of a parity report."""
    lost = report["perplexity"]
    return {
        "perplexity_loss_percent": 100 * lost["loss"],
        "standard_error_percent": 100 * lost["standard_error"],
        "tokens": lost["tokens"],
        "logit_error": max(tensor["max_abs"] for tensor in report["tensors"] if tensor["tensor"] == "logits"),
    }
