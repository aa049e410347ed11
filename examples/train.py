"""Train one of the small character-level example models on a text file with one verse (or sentence) a line.

    python examples/train.py transformer-xl --text kjv.txt --out examples
    python examples/train.py hourglass --text kjv.txt --out examples

Writes `<family>.pt` (the best model on the held-out verses so far), `<family>.json` (bits per character of the
model and of an interpolated 4-gram), `<family>.png` (validation curve) and `held-out.txt` (verses never trained on).
Needs the `export` and `dev` extras.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from ngram import bits_per_character
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mscompile import checkpoint
from mscompile.models import families
from mscompile.models.family import ReferenceModel

BLOCK_VERSES = 100  # verses are held out in blocks, so that a held-out stream is continuous text
HELD_OUT_EVERY = 25  # one block in this many
SAMPLE_CHARACTERS = 24_000
VALIDATION_WINDOW = 384  # tokens; the second half of each window is scored


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    config: dict[str, Any]
    batch: int
    length: int
    learning_rate: float


RECIPES = {
    "transformer-xl": Recipe(
        config={
            "n_layer": 6, "d_model": 128, "n_head": 4, "d_head": 32, "d_inner": 512,
            "mem_len": 128, "tgt_len": 128, "same_length": True,
        },
        batch=16, length=128, learning_rate=2e-3,
    ),
    "hourglass": Recipe(
        config={
            "d_model": 128, "d_ff": 448, "n_head": 4, "hierarchy": "1@1 3@3 1@1",
            "shortening": "attention", "upsampling": "attention", "context": 2048,
        },
        batch=6, length=384, learning_rate=1.5e-3,
    ),
}  # fmt: skip


def split(text: str) -> tuple[str, str]:
    """Training and held-out text: every HELD_OUT_EVERY-th block of verses is held out."""
    verses = text.splitlines()
    blocks = [verses[i : i + BLOCK_VERSES] for i in range(0, len(verses), BLOCK_VERSES)]
    held_out = [block for n, block in enumerate(blocks) if n % HELD_OUT_EVERY == HELD_OUT_EVERY // 2]
    train = [block for n, block in enumerate(blocks) if n % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return tuple("\n".join(verse for block in part for verse in block) + "\n" for part in (train, held_out))  # type: ignore[return-value]


def held_out_bits(model: ReferenceModel, ids: Tensor, batch: int = 16) -> float:
    """Bits per character, each scored with at least half a validation window of context."""
    model.eval()
    half = VALIDATION_WINDOW // 2
    windows = ids[: (len(ids) - 1) // half * half + 1].unfold(0, VALIDATION_WINDOW + 1, half)
    total, count = 0.0, 0
    with torch.inference_mode():
        for rows in windows.split(batch):
            logits = model.full(rows[:, :-1])[:, half:]
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, half + 1 :].flatten(), reduction="sum")
            )
            count += logits.shape[0] * logits.shape[1]
    model.train()
    return total / count / math.log(2)


def losses(model: Any, family: str, ids: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """An endless run of training losses: chained segments for recurrent families, random windows otherwise."""
    if family == "transformer-xl":
        width = len(ids) // recipe.batch
        streams = ids[: width * recipe.batch].view(recipe.batch, width)
        while True:
            mems = model.empty_mems(recipe.batch)
            for start in range(0, width - recipe.length - 1, recipe.length):
                segment = streams[:, start : start + recipe.length + 1]
                logits, mems = model(segment[:, :-1], mems)
                yield torch.nn.functional.cross_entropy(logits.flatten(0, 1), segment[:, 1:].flatten())
    while True:
        starts = torch.randint(len(ids) - recipe.length - 1, (recipe.batch,), generator=generator)
        rows = torch.stack([ids[start : start + recipe.length + 1] for start in starts])
        logits = model(rows[:, :-1])
        yield torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 200 steps, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / 200) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def plot(path: Path, curve: list[tuple[int, float]], baseline: float, family: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([step for step, _ in curve], [bits for _, bits in curve], marker="o", markersize=3, label=family)
    axes.axhline(baseline, color="grey", linestyle="--", label="interpolated 4-gram")
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out bits per character")
    axes.set_ylim(bottom=min(1.4, min(bits for _, bits in curve)), top=max(baseline + 0.6, 2.6))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})


def main(
    family: Annotated[str, typer.Argument(help=f"One of: {', '.join(RECIPES)}.")],
    text: Annotated[Path, typer.Option(help="The text to train on, one verse a line.")],
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("examples"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 4500,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of initialization and sampling.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the choice to PyTorch.")] = 0,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    train_text, held_out_text = split(text.read_text(encoding="utf-8"))
    vocab = ("\n", *sorted(set(train_text) - {"\n"}))
    ids = {c: i for i, c in enumerate(vocab)}
    train_ids, held_out_ids = (torch.tensor([ids[c] for c in part]) for part in (train_text, held_out_text))
    baseline = bits_per_character(train_text, held_out_text, len(vocab))
    print(f"{len(train_ids):,} training and {len(held_out_ids):,} held-out characters; 4-gram: {baseline:.4f} bits")

    recipe, row = RECIPES[family], families.find(family)
    model = row.model(row.parse_config({"vocab_size": len(vocab), **recipe.config}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    stream = losses(model, family, train_ids, recipe, torch.Generator().manual_seed(seed))

    out.mkdir(parents=True, exist_ok=True)
    (out / "held-out.txt").write_text(held_out_text[:SAMPLE_CHARACTERS].rsplit("\n", 1)[0] + "\n", encoding="utf-8")
    curve: list[tuple[int, float]] = []
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(family, total=steps)
        for step in range(1, steps + 1):
            loss = next(stream)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"{family} {loss.item() / math.log(2):.3f} bits")
            if step % validate_every and step != steps:
                continue
            curve.append((step, held_out_bits(model, held_out_ids)))
            print(
                f"step {step}: {curve[-1][1]:.4f} held-out bits per character, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
            plot(out / f"{family}.png", curve, baseline, family)
            if curve[-1][1] == min(bits for _, bits in curve):
                checkpoint.save(out / f"{family}.pt", family, model, vocab)
                result = {
                    "family": family, "parameters": sum(p.numel() for p in model.parameters()), "step": step,
                    "held_out_bits_per_character": round(curve[-1][1], 4),
                    "interpolated_4gram_bits_per_character": round(baseline, 4),
                    "held_out_characters": len(held_out_ids),
                }  # fmt: skip
                (out / f"{family}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
