"""Continues a text greedily with a model on Triton Inference Server: python triton_client.py PROMPT [--count 80]"""

from __future__ import annotations

import argparse
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

HERE = Path(__file__).parent


class Stream:
    """A stream on the server, by a correlation id that nobody else uses."""

    def __init__(self, url: str, model: str) -> None:
        self.client = triton.InferenceServerClient(url)
        self.model, self.id, self.begun = model, secrets.randbits(63) | 1, False
        config = self.client.get_model_config(model).config
        self.max_tokens = int(config.parameters["max_tokens"].string_value or 2**63)

    def step(self, tokens: list[int], end: bool = False) -> Any:
        """Logits (vocab,) behind these tokens; the first request begins the stream, `end` makes the last."""
        for first in range(self.max_tokens, len(tokens), self.max_tokens):
            self.ask(tokens[first - self.max_tokens : first])
        rest = len(tokens) % self.max_tokens or self.max_tokens
        return self.ask(tokens[-rest:], end)[-1]

    def ask(self, tokens: list[int], end: bool = False) -> Any:
        """Logits (T, vocab) of one request."""
        given = triton.InferInput("tokens", [1, len(tokens)], "INT64")
        given.set_data_from_numpy(np.array([tokens], np.int64))
        answer = self.client.infer(
            self.model, [given], sequence_id=self.id, sequence_start=not self.begun, sequence_end=end
        )
        self.begun = True
        return answer.as_numpy("logits")[0]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("prompt", nargs="?", default="", help="The text to continue.")
    options.add_argument("--ids", nargs="+", type=int, help="The same as token ids; ids are printed, too.")
    options.add_argument("--count", type=int, default=80, help="How many tokens to generate.")
    options.add_argument("--url", default="localhost:8001", help="The server's gRPC address.")
    options.add_argument("--model", help="Its name in models/, by default the one that is there.")
    given = options.parse_args()
    model = given.model or next((HERE / "models").iterdir()).name
    texts: list[str] = [] if given.ids else json.loads((HERE / "tokenizer.json").read_bytes())["tokens"]
    ids = given.ids or [texts.index(character) for character in given.prompt]
    if not ids:
        options.error("give a prompt, or --ids")

    stream = Stream(given.url, model)
    written: list[int] = []
    for _ in range(given.count):
        logits = stream.step(ids, end=len(written) == given.count - 1)
        ids = [int(logits.argmax())]
        written += ids
    print(" ".join(map(str, written)) if given.ids else given.prompt + "".join(texts[token] for token in written))


if __name__ == "__main__":
    main()
