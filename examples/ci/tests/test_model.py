"""What this repository demands of its model, beside parity: run by `pytest --mscompile-bundle model.msc`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HELD_OUT = 1000  # characters of verses.txt that the model was not trained on
MOST_BITS = 3.1  # per character; an untrained model needs 5.6


def test_it_still_knows_the_language(mscompile_bundle: Any) -> None:
    text = (Path(__file__).parent.parent / "verses.txt").read_text(encoding="utf-8")[-HELD_OUT:]
    tokens = mscompile_bundle.tokenizer.encode(text)
    logits = mscompile_bundle.session(batch=1).step(tokens[None, :-1])[0].astype(np.float64)
    surprise = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]
    assert surprise.mean() / np.log(2) < MOST_BITS


def test_a_restored_stream_goes_on_as_before(mscompile_bundle: Any) -> None:
    session = mscompile_bundle.session(batch=1)
    session.step([[1, 2, 3]])
    saved = session.state()
    first = session.step([[4]])
    session.restore(saved)
    np.testing.assert_array_equal(session.step([[4]]), first)
