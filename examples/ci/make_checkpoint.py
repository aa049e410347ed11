"""Train the tiny model of this repository: python make_checkpoint.py, some seconds. Writes model.pt and prints its pin.

Another release of PyTorch may give other weights, and then the pin in parity.toml changes with model.pt.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch

from mscompile import checkpoint
from mscompile.models import families
from mscompile.models.family import ReferenceModel

HERE = Path(__file__).parent
CONFIG = {
    "n_layer": 1, "d_model": 24, "n_head": 2, "d_head": 12, "d_inner": 48,
    "mem_len": 16, "tgt_len": 32, "same_length": True,
}  # fmt: skip
HELD_OUT = 1000  # characters at the end of the text that are not trained on
STEPS, BATCH, LENGTH = 400, 8, 32


def train(model: ReferenceModel, ids: torch.Tensor) -> float:
    """The loss of the last step, in bits per character."""
    optimizer, bits = torch.optim.AdamW(model.parameters(), lr=1e-2), math.nan
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,))
        rows = torch.stack([ids[start : start + LENGTH + 1] for start in starts])
        loss = torch.nn.functional.cross_entropy(model.full(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bits = loss.item() / math.log(2)
    return bits


def main() -> None:
    torch.manual_seed(0)
    text = (HERE / "verses.txt").read_text(encoding="utf-8")
    vocab = tuple(sorted(set(text)))
    ids = torch.tensor([vocab.index(character) for character in text[:-HELD_OUT]])
    family = families.find("transformer-xl")
    model = family.model(family.parse_config({"vocab_size": len(vocab), **CONFIG}))
    bits = train(model, ids)
    checkpoint.save(HERE / "model.pt", family.name, model.eval(), vocab)
    print(f"training loss {bits:.2f} bits per character")
    print(f'checkpoint_sha256 = "{hashlib.sha256((HERE / "model.pt").read_bytes()).hexdigest()}"')


if __name__ == "__main__":
    main()
