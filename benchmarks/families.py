"""Every family once: exported, verified, and its decode timed against the original. python benchmarks/families.py

One model of each, small enough for minutes and large enough that arithmetic counts: width 256, about six layers,
streams of 512 tokens; random weights from a seed, or the trained model of examples/ where there is one. Writes
benchmarks/results/families.json, from which README's table of families is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from mscompile import bench, checkpoint, compile_checkpoint
from mscompile.contracts import Profile
from mscompile.models import families
from mscompile.pipeline import Options

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
SEED, VOCAB, CONTEXT, STEPS, POSITION = 20260101, 256, 512, 768, 256
WORKLOAD = f"decode@{POSITION}"

XL = {"n_layer": 6, "d_model": 256, "n_head": 4, "d_head": 64, "d_inner": 1024, "mem_len": 128, "tgt_len": 64}
PLAIN = {"d_model": 256, "d_ff": 1024, "n_head": 4, "context": CONTEXT}

# family -> settings; those with a trained model in examples/ are not among them
SETTINGS: dict[str, dict[str, Any]] = {
    "skip-cross-head": {**XL, "rel_shift": "txl"},
    "segatron-xl": {**XL, "same_length": True, "sentence_end": [10, 46], "paragraph_end": [10]},
    "hm-lstm": {"hidden_sizes": [256, 256, 256], "d_embedding": 128, "d_output": 256},
    "multiscale-top-down": {**PLAIN, "scales": "2@1 2@4 2@16"},
    "multiscale-bottom-up": {**PLAIN, "scales": "2@1 2@4 2@16", "post_layers": 1},
    "multiscale-retina": {**PLAIN, "n_layer": 6, "resolutions": "64@1 128@4 0@16"},
    "multiscale-heads": {"d_model": 256, "d_ff": 1024, "windows": [[4, 16, 64, 0]] * 6, "context": CONTEXT},
    "long-short": {"n_layer": 6, "d_model": 256, "n_head": 4, "d_inner": 1024, "window_len": 64, "chunk_size": 16,
                   "mem_len": 256, "tgt_len": 64},
    "megabyte": {"patch_size": 4, "d_global": 64, "n_layer_global": 4, "n_head_global": 4, "d_ff_global": 1024,
                 "d_local": 128, "n_layer_local": 2, "n_head_local": 4, "d_ff_local": 512, "context": CONTEXT},
    "megabyte-pytorch": {"dim": [256, 128], "depth": [4, 2], "max_seq_len": [128, 4], "heads": 4},
    "compressive": {"n_layer": 6, "d_model": 256, "n_head": 4, "d_ff": 1024, "tgt_len": 64, "mem_len": 64,
                    "cmem_len": 64},
    "feedback": {"n_layer": 6, "d_model": 256, "n_head": 4, "d_ff": 1024, "mem_len": 128},
    "memory-transformer": {**PLAIN, "n_layer": 6},
    "recurrent-memory": {**XL, "num_mem_tokens": 10, "mem_len": 0},
    "recurrent-memory-wrapper": {"n_layer": 6, "d_model": 256, "n_head": 4, "d_ff": 1024, "num_mem_tokens": 10,
                                 "segment_size": 64, "n_positions": 128},
    "recurrent-memory-pytorch": {"n_layer": 4, "d_model": 256, "n_head": 4, "num_mem_tokens": 10, "seq_len": 128},
    "retro": {**PLAIN, "n_layer": 6, "cross_layers": [2, 5], "chunk": 64, "neighbour_length": 64, "d_encoder": 256,
              "d_encoder_ff": 512},
    "product-key-memory": {**PLAIN, "n_layer": 6, "memory_layers": [2, 4], "mem_n_keys": 64, "mem_k_dim": 128,
                           "mem_knn": 8},
    "chapters": {**PLAIN, "n_kv_head": 2, "n_layer": 6, "memory_layers": [1, 4], "num_memory_tokens": 4160,
                 "num_chapters": 65, "top_k_chapters": 4, "memory_n_head": 4, "memory_n_kv_head": 4},
    "dynamic-pooling": {"d_model": 256, "n_head": 4, "d_inner": 1024, "pre_layers": 2, "shortened_layers": 2,
                        "post_layers": 2, "context": CONTEXT},
    "xlnet": {"n_layer": 6, "d_model": 256, "n_head": 4, "d_head": 64, "d_inner": 1024, "mem_len": 128},
    "hourglass-pytorch": {"d_model": 256, "n_head": 4, "d_head": 64, "pre_layers": [2], "middle_layers": 4,
                          "post_layers": [2], "shorten_factors": [3], "context": 510},
}  # fmt: skip

# Wide random weights amplify rounding from segment to segment; this model begins as the published training does.
NARROW = {"recurrent-memory": 0.02}  # standard deviation of the matrices

console = Console(width=120)


def main(
    only: Annotated[str, typer.Option(help="Families, comma-separated; all by default.")] = "",
    build: Annotated[Path, typer.Option(help="Where bundles are put.")] = Path("build"),
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = HERE / "results",
) -> None:
    target = out / "families.json"
    result = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"families": {}}
    chosen = [family.name for family in families.FAMILIES if not only or family.name in only.split(",")]
    for name in chosen:
        console.print(name)
        result["families"][name] = measured(name, build / "families")
        result["machine"] = bench.machine()
        known = [family.name for family in families.FAMILIES]
        result["families"] = {family: result["families"][family] for family in known if family in result["families"]}
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(name: str, build: Path) -> dict[str, Any]:
    """What README says of a family: parameters, the largest error of a logit, and the ratio of decode times."""
    source = EXAMPLES / f"{name}.pt" if name not in SETTINGS else saved(name, build)
    options = Options(profile=Profile(1, 4, 128), steps=STEPS, force=True)
    bundle = compile_checkpoint(source, ["ort"], build / f"{name}.msc", options)
    report = bench.run(bundle.path, ["ort"], [WORKLOAD], source, rounds=6, samples=8)
    ratio = next(iter(report.speedups.values()))
    rollouts = (bundle.manifest.parity or {})["ort"]["tensors"]
    errors = [row["max_abs"] for row in rollouts if row["tensor"] == "logits"]
    return {
        "weights": "random" if name in SETTINGS else "trained",
        "parameters": bundle.manifest.source["parameters"],
        "max_logit_error": max(errors),
        "tokens_compared": sum(row["tokens"] for row in rollouts if row["tensor"] == "logits"),
        "ms_per_token": {row.engine: row.ms_per_step for row in report.latencies},
        "speedup": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
    }


def saved(name: str, build: Path) -> Path:
    """A checkpoint of the family with random weights."""
    build.mkdir(parents=True, exist_ok=True)
    row, path = families.find(name), build / f"{name}.pt"
    torch.manual_seed(SEED)
    model = row.model(row.parse_config({"vocab_size": VOCAB, **SETTINGS[name]})).eval()
    for parameter in model.parameters() if name in NARROW else ():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=NARROW[name])
    checkpoint.save(path, name, model, tuple(f"token {number}" for number in range(VOCAB)))
    return path


if __name__ == "__main__":
    typer.run(main)
