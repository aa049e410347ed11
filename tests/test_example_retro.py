"""examples/retro.py: its database, and the whole of it with a few steps of training."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mscompile.runtime import open_bundle

EXAMPLES = Path(__file__).parent.parent / "examples"
faiss = pytest.importorskip("faiss", reason="needs the extra retro", exc_type=ImportError)


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import retro
    finally:
        sys.path.remove(str(EXAMPLES))
    return retro


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    text = (EXAMPLES / "held-out.txt").read_text(encoding="utf-8")[:6000]
    vocab = sorted(set(text))
    return np.array([vocab.index(character) for character in text])


def test_an_entry_is_a_chunk_and_what_followed_it_and_is_nearest_to_itself(example: Any, ids: np.ndarray) -> None:
    database, size = example.Database(ids), example.CHUNK
    numbers = np.array([0, 7, 100])
    chunks = np.stack([ids[number * size :][:size] for number in numbers])
    assert database.nearest(chunks, 1)[:, 0].tolist() == numbers.tolist()
    neighbours = database(chunks)
    assert neighbours.shape == (3, example.NEIGHBOUR_COUNT, 2 * size)
    np.testing.assert_array_equal(neighbours[1, 0], ids[7 * size : 9 * size])


def test_a_changed_letter_is_near_and_another_text_is_not(example: Any, ids: np.ndarray) -> None:
    chunk = ids[:64].reshape(1, 64)
    changed = chunk.copy()
    changed[0, 30] = (changed[0, 30] + 1) % 20
    same, near, far = (
        example.embedded(other) @ example.embedded(chunk)[0] for other in (chunk, changed, ids[None, 3000:3064])
    )
    assert same[0] == pytest.approx(1.0)
    assert 0.85 < near[0] < 0.99
    assert far[0] < 0.5


def test_a_training_chunk_never_sees_itself_or_what_overlaps_it(example: Any, ids: np.ndarray) -> None:
    database, size = example.Database(ids), example.CHUNK
    numbers = np.arange(len(database.entries))
    found = database.others(database.entries[:, :size], numbers)
    for number, neighbours in enumerate(found):
        for near in range(max(0, number - 2), min(len(numbers), number + 3)):
            distinct = (database.entries == database.entries[near]).all(axis=1).sum() == 1
            assert not distinct or not (neighbours == database.entries[near]).all(axis=1).any()


@pytest.mark.slow
def test_it_trains_compiles_and_streams_with_its_database(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "retro.py"), "--text", str(EXAMPLES / "held-out.txt")]
    command += ["--out", str(tmp_path), "--steps", "2", "--tokens", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verified, figures, *told, continued = done.stdout.splitlines()
    assert verified.endswith("retro.msc: verified against the original")
    assert re.fullmatch(
        r"held-out bits per character: \d\.\d+ with the nearest neighbours, \d\.\d+ with random ones", figures
    )
    assert len(told) == 4  # of 32 characters of prompt and 39 that were consumed
    assert all(" is like " in line for line in told)
    assert " continues " in continued
    assert open_bundle(tmp_path / "retro.msc").manifest.verified
