"""Target 7, second half: one session for a long time: python benchmarks/soak.py [--steps 100000]

Decodes random tokens, one at a time, on a bundle of a trained example. Latency and resident memory are taken block
by block; at the end the session and the original go on from the same stream, and their logits are compared. The
original gets what a rolling memory can still know: the last `memory x layers` tokens.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from cost_of_use import process_bytes

from engines.torch_eager import original
from mscompile import bench, checkpoint, compile_checkpoint
from mscompile.models.transformer_xl import TransformerXLConfig
from mscompile.pipeline import Options
from mscompile.runtime import Bundle, open_bundle

HERE = Path(__file__).parent
CHECKED = 64  # tokens behind the soak whose logits are compared


def main(
    steps: Annotated[int, typer.Option(help="Decode steps.")] = 100_000,
    blocks: Annotated[int, typer.Option(help="Blocks whose medians are reported.")] = 10,
    model: Annotated[Path, typer.Option(help="A Transformer-XL checkpoint with a rolling memory.")] = (
        HERE.parent / "examples" / "transformer-xl.pt"
    ),
    bundle: Annotated[Path | None, typer.Option(help="Its bundle; exported first if not given.")] = None,
    out: Annotated[Path, typer.Option(help="The result.")] = HERE / "results" / "soak.json",
) -> None:
    path = bundle or Path("build/bench/soak.msc")
    if bundle is None:
        compile_checkpoint(model, ["ort"], path, Options(validate=False, force=True))
    result = {**soak(open_bundle(path), model, steps, blocks), "machine": bench.machine()}
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result, indent=2))


def soak(opened: Bundle, model: Path, steps: int, blocks: int) -> dict[str, Any]:
    """The result: medians and memory by block, and the error of the last logits."""
    session = opened.session("ort")
    tokens = np.random.default_rng(0).integers(0, opened.spec.vocab_size, steps + CHECKED)
    medians, resident = [], []
    for block in np.split(tokens[: steps // blocks * blocks], blocks):
        times = []
        for token in block:
            begun = time.perf_counter()
            session.step([[token]])
            times.append(time.perf_counter() - begun)
        medians.append(1e3 * median(times))
        resident.append(process_bytes())
    rest = tokens[steps // blocks * blocks :]
    found = np.concatenate([session.step([[token]])[0] for token in rest])
    return {
        "bundle": opened.manifest.name,
        "steps": len(tokens),
        "block_ms": medians,
        "block_resident_bytes": resident,
        "latency_ratio": median(medians[blocks // 2 :]) / median(medians[: blocks - blocks // 2]),
        "memory_growth_percent": 100 * (max(resident[1:]) / resident[0] - 1) if blocks > 1 else 0.0,
        "final_error": float(np.abs(found[-CHECKED:] - _expected(model, tokens)).max()),
    }


def _expected(model: Path, tokens: np.ndarray) -> np.ndarray:
    """The original's logits of the last CHECKED tokens."""
    trained = checkpoint.load(model).model
    config = trained.config
    if not isinstance(config, TransformerXLConfig) or not config.same_length:
        raise typer.BadParameter(f"{model}: a soak needs a stream without end, a Transformer-XL with same_length")
    reach = config.n_layer * config.mem_len
    seen = tokens[None, -(reach + CHECKED) :]
    logits: np.ndarray = original(trained)(seen)[0, -CHECKED:]
    return logits


if __name__ == "__main__":
    typer.run(main)
