"""Train a tiny RETRO that looks up its own training text, compile it, and stream it with real retrieval.

    python examples/retro.py --text examples/held-out.txt --steps 300 --out retro

The database holds the training text in chunks, each with what followed it; a FAISS index finds the nearest ones by
hashed character n-grams. While it trains, a chunk never gets itself or what it overlaps. The engine is given the same
database as a source: it is asked for neighbours whenever a chunk of the stream is complete.

Writes `retro.pt` and the bundle `retro.msc`, prints bits per character of the last tenth of the text, streamed, with
the nearest neighbours and with random ones, and a continuation with the neighbours that were looked up for it.
Needs the `export`, `ort`, `retro` and `dev` extras.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch
import typer
from rich.progress import track
from torch.nn.functional import cross_entropy

from mscompile.checkpoint import save
from mscompile.contracts import Array, Profile, Sources
from mscompile.models.retro import NEIGHBOURS, Retro, RetroConfig
from mscompile.pipeline import Options, compile_checkpoint
from mscompile.runtime import Bundle, generate
from validation import sources

CHUNK, NEIGHBOUR_COUNT = 16, 2
WINDOW, BATCH = 8 * CHUNK, 8  # tokens and rows of a training step
WIDTH = 512  # of an embedding
GRAMS = (2, 3, 4)  # characters
OVERLAPPING = 5  # entries that a chunk shares characters with, itself included: it begins or continues them


def embedded(chunks: Array) -> Array:
    """Unit vectors (N, WIDTH) of chunks (N, m) of token ids: counts of n-grams, hashed, with hashed signs."""
    vectors = np.zeros((len(chunks), WIDTH), np.float32)
    rows = np.arange(len(chunks))[:, None]
    for size in GRAMS:
        windows = np.lib.stride_tricks.sliding_window_view(chunks.astype(np.uint64), size, axis=1)
        hashed = np.full(windows.shape[:2], size, np.uint64)
        for place in range(size):
            hashed = (hashed + windows[..., place] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            hashed ^= hashed >> np.uint64(29)
        sign = np.where(hashed & np.uint64(1), 1.0, -1.0)
        np.add.at(vectors, (rows, (hashed >> np.uint64(1)) % np.uint64(WIDTH)), sign)
    unit: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    return unit


class Database:
    """Chunks of a text with what follows each. Called with chunks (N, m), it gives neighbours (N, k, 2 m)."""

    def __init__(self, ids: Array) -> None:
        count = len(ids) // CHUNK - 1
        self.entries = np.stack([ids[i * CHUNK : (i + 2) * CHUNK] for i in range(count)])
        self.index = faiss.IndexFlatIP(WIDTH)
        self.index.add(embedded(self.entries[:, :CHUNK]))

    def __call__(self, chunks: Array) -> Array:
        neighbours: Array = self.entries[self.nearest(chunks, NEIGHBOUR_COUNT)]
        return neighbours

    def nearest(self, chunks: Array, count: int) -> Array:
        """Numbers (N, count) of the entries, the nearest first."""
        found: Array = self.index.search(embedded(chunks), count)[1]
        return found

    def others(self, chunks: Array, numbers: Array) -> Array:
        """Neighbours (N, k, 2 m) of chunks that are themselves the entries `numbers` (N,), or stand in their place."""
        found = self.nearest(chunks, NEIGHBOUR_COUNT + OVERLAPPING)
        near = np.abs(found - numbers[:, None]) <= OVERLAPPING // 2
        order = np.argsort(near, axis=1, kind="stable")[:, :NEIGHBOUR_COUNT]  # those that are not, nearest first
        others: Array = self.entries[np.take_along_axis(found, order, axis=1)]
        return others


def trained(ids: Array, vocab_size: int, database: Database, steps: int) -> Retro:
    """RETRO trained on windows that begin where chunks do."""
    config = RetroConfig(
        vocab_size, n_layer=4, d_model=96, n_head=4, d_ff=256, cross_layers=[1, 3], chunk=CHUNK,
        neighbours=NEIGHBOUR_COUNT, neighbour_length=2 * CHUNK, n_encoder_layer=1, d_encoder=64, d_encoder_ff=128,
        null_key=True, cross_rotary=True, context=512,
    )  # fmt: skip
    model, random = Retro(config), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for _ in track(range(steps), "training", disable=not sys.stderr.isatty()):
        first = random.integers(0, (len(ids) - WINDOW - 1) // CHUNK, BATCH)
        rows = np.stack([ids[number * CHUNK :][: WINDOW + 1] for number in first])
        chunks = rows[:, :WINDOW].reshape(-1, CHUNK)
        numbers = (first[:, None] + np.arange(WINDOW // CHUNK)).reshape(-1)
        neighbours = torch.from_numpy(database.others(chunks, numbers)).unflatten(0, (BATCH, -1))
        tokens = torch.from_numpy(rows)
        logits = model(tokens[:, :-1], neighbours)
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def bits(bundle: Bundle, ids: Array, supplied: Sources) -> float:
    """Bits per character of a text, streamed through the engine in pieces of the model's context."""
    assert bundle.spec.max_context is not None
    session, total = bundle.session("ort", 1, supplied), 0.0
    for start in range(0, len(ids) - 1, bundle.spec.max_context):
        tokens = ids[start : start + bundle.spec.max_context + 1]
        session.reset()
        logits = torch.from_numpy(session.step(tokens[None, :-1])[0])
        total += float(cross_entropy(logits, torch.from_numpy(tokens[1:]), reduction="sum"))
    return total / (len(ids) - 1) / math.log(2)


def main(
    text: Annotated[Path, typer.Option(help="The text to train on and to look up.")],
    out: Annotated[Path, typer.Option(help="Where the checkpoint and the bundle go.")] = Path("retro"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 300,
    tokens: Annotated[int, typer.Option(help="Characters to generate.")] = 4 * CHUNK,
) -> None:
    torch.manual_seed(0)
    whole = text.read_text(encoding="utf-8")
    vocab = tuple(sorted(set(whole)))
    ids = np.array([vocab.index(character) for character in whole])
    known, held_out = np.split(ids, [len(ids) * 9 // 10])
    database = Database(known)

    out.mkdir(parents=True, exist_ok=True)
    save(out / "retro.pt", "retro", trained(known, len(vocab), database, steps), vocab)
    options = Options(profile=Profile(1, 2, WINDOW), text=text, steps=256, force=True)
    bundle = compile_checkpoint(out / "retro.pt", ["ort"], out / "retro.msc", options)
    print(f"{bundle.path}: verified against the original")

    nearest = bits(bundle, held_out, {NEIGHBOURS: database})
    random = bits(bundle, held_out, sources.pseudo(bundle.spec.inputs))
    print(f"held-out bits per character: {nearest:.3f} with the nearest neighbours, {random:.3f} with random ones")

    def told(chunks: Array) -> Array:
        neighbours = database(chunks)
        for chunk, (nearest, *_) in zip(chunks, neighbours, strict=True):
            print(f"  {bundle.tokenizer.decode(chunk)!r} is like {bundle.tokenizer.decode(nearest)!r}")
        return neighbours

    prompt = held_out[: 2 * CHUNK]
    session: Any = bundle.session("ort", 1, {NEIGHBOURS: told})
    continued = list(generate(session, prompt, tokens, temperature=0.7, seed=0))
    print(f"{bundle.tokenizer.decode(prompt)!r} continues {bundle.tokenizer.decode(continued)!r}")


if __name__ == "__main__":
    typer.run(main)
