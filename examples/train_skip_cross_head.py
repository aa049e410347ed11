"""Train a small character-level Skip Cross-Head Transformer-XL, in the two phases of its paper.

    python examples/train_skip_cross_head.py --text kjv.txt --out trained

Phase 1 skips layers at random, phase 2 runs all of them; both cross heads. Prints the held-out bits per character after
each phase and writes `skip-cross-head.pt`, configured for evaluation (`same_length`). Needs the `export` and `dev`
extras.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from skip_cross_head import SkipRetain, losses
from train import held_out_bits, learning_rate_factor, split

from mscompile import checkpoint
from mscompile.models.skip_cross_head import SkipCrossHead, SkipCrossHeadConfig

BATCH, LENGTH = 16, 128


def config(vocab_size: int) -> SkipCrossHeadConfig:
    """As it is trained: a token sees its own segment and the one before it."""
    return SkipCrossHeadConfig(
        vocab_size, n_layer=6, d_model=128, n_head=4, d_head=32, d_inner=512, mem_len=LENGTH, tgt_len=LENGTH,
        same_length=False,
    )  # fmt: skip


def evaluated(trained: SkipCrossHead) -> SkipCrossHead:
    """The model as it is evaluated: every token sees as many keys."""
    model = SkipCrossHead(replace(trained.config, same_length=True))
    model.load_state_dict(trained.state_dict())
    return model.eval()


def main(
    text: Annotated[Path, typer.Option(help="The text to train on, one verse a line.")],
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("trained"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of phase 1, which skips layers.")] = 4000,
    finetune: Annotated[int, typer.Option(help="Optimizer steps of phase 2, which runs all layers.")] = 1000,
    cross_heads: Annotated[float, typer.Option(help="Probability that a layer crosses its heads.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of initialization and sampling.")] = 1,
) -> None:
    torch.manual_seed(seed)
    train_text, held_out_text = split(text.read_text(encoding="utf-8"))
    vocab = ("\n", *sorted(set(train_text) - {"\n"}))
    ids = {character: number for number, character in enumerate(vocab)}
    train_ids, held_out_ids = (torch.tensor([ids[c] for c in part]) for part in (train_text, held_out_text))

    model = SkipCrossHead(config(len(vocab)))
    trainer = SkipRetain(model, cross_heads)
    for phase, count in enumerate((steps, finetune), start=1):
        trainer.train()
        trainer.skips = phase == 1
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3 / phase, betas=(0.9, 0.98), weight_decay=0.01)
        stream = losses(trainer, train_ids, BATCH, LENGTH)
        for step in range(count):
            optimizer.param_groups[0]["lr"] = 2e-3 / phase * learning_rate_factor(step, count)
            loss = next(stream)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if count:
            bits = held_out_bits(evaluated(model), held_out_ids)
            print(f"phase {phase}, {count} steps: {bits:.4f} held-out bits per character", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out / "skip-cross-head.pt", "skip-cross-head", evaluated(model), vocab)


if __name__ == "__main__":
    typer.run(main)
