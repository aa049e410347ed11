"""Freeze a bundle as this version writes it: python tests/data/freeze.py

Writes `tests/data/schema-N`, where N is the number of the schema. Run it once for each schema, in the last commit
before `mscompile.bundle.SCHEMA` is raised, and never again for that number: it is what bundles of users look like.
`tests/test_old_bundles.py` opens every one of them with the code of today.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

import cases  # noqa: E402
import torch  # noqa: E402

from mscompile import bundle, checkpoint  # noqa: E402
from mscompile.contracts import Profile  # noqa: E402
from mscompile.pipeline import Options, compile_checkpoint  # noqa: E402

VOCAB = tuple("\n abcdefghi")


def main() -> None:
    out = HERE / f"schema-{bundle.SCHEMA}"
    if out.exists():
        sys.exit(f"{out} is there, and what was frozen stays as it is")
    model = cases.transformer_xl(torch.float32, vocab_size=len(VOCAB), n_layer=1, mem_len=4, same_length=True)
    with tempfile.TemporaryDirectory() as directory:
        source, made = Path(directory, "tiny.pt"), Path(directory, "tiny.msc")
        checkpoint.save(source, "transformer-xl", model, VOCAB)
        compile_checkpoint(source, ["ort"], made, Options(profile=Profile(1, 2, 8), steps=32))
        shutil.copytree(made, out)


if __name__ == "__main__":
    main()
