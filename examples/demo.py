"""The main job, on both shipped checkpoints: export and verify, latency against the original, some generated text.

python examples/demo.py [--out DIR]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
MODELS = ("transformer-xl", "hourglass")
PROMPT = "And the LORD spake unto "


def mscompile(*arguments: str | Path) -> None:
    """Run the command line as a user would, and show what is run."""
    command = ["mscompile", *(str(argument) for argument in arguments)]
    typer.secho("\n$ " + " ".join(repr(word) if " " in word else word for word in command), bold=True)
    subprocess.run([sys.executable, "-m", "mscompile.cli", *command[1:]], check=True)


def main(out: Annotated[Path, typer.Option(help="Where the bundles go.")] = Path("build")) -> None:
    for name in MODELS:
        checkpoint, bundle = HERE / f"{name}.pt", out / f"{name}.msc"
        mscompile(
            "export", "--model", checkpoint, "--target", "ort,trt-rtx",
            "--tokens", HERE / "held-out.txt", "--out", bundle, "--force",
        )  # fmt: skip
        mscompile("bench", bundle, "--engine", "ort", "--reference", checkpoint)
        mscompile("generate", bundle, "--prompt", PROMPT, "--tokens", "400", "--temperature", "0.7", "--seed", "1")


if __name__ == "__main__":
    typer.run(main)
