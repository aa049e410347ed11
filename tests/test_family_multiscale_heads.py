"""Heads with windows of their own: against a loop, what each head remembers, streams without an end."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tiny
from cases import VOCAB, build, eager_session, full, seeded, stream, tokens, worst
from hypothesis import given
from hypothesis import strategies as st
from slow_blocks import Weights

from mscompile.contracts import Array
from mscompile.errors import ConfigError
from mscompile.models.multiscale_heads import HeadsConfig, MultiscaleHeads

FAMILY = "multiscale-heads"
EXACT = 1e-10
CONTEXT = 40


def made(windows: object, **settings: Any) -> MultiscaleHeads:
    sizes = {"vocab_size": VOCAB, "d_model": 8, "d_ff": 12, "context": CONTEXT}
    return seeded(MultiscaleHeads(HeadsConfig(**{**sizes, "windows": windows, **settings})))


def turned(row: Array, number: int) -> Array:
    """Rotary embedding as a product of complex numbers: entry m of the first half goes with entry m of the second."""
    half = len(row) // 2
    frequency = 10000.0 ** (-np.arange(half) / half)
    product = (row[:half] + 1j * row[half:]) * np.exp(1j * number * frequency)
    return np.concatenate([product.real, product.imag])


def looped(model: MultiscaleHeads, ids: Array) -> Array:
    """The equations, position by position and head by head."""
    weights, config = Weights.of(model), model.config
    rows = [weights["embedding.weight"][i] for i in ids]
    for layer, windows in enumerate(config.windows):
        block = f"stack.blocks.{layer}"
        normed = [weights.norm(f"{block}.attention_norm", row) for row in rows]
        after = []
        for t, row in enumerate(rows):
            seen = [normed[max(0, t + 1 - window) if window else 0 : t + 1] for window in windows]
            attended = weights.attention(f"{block}.attention", normed[t], seen, turned if config.rotary else None)
            after.append(weights.finish(block, row, attended))
        rows = after
    return weights.logits(rows)


@pytest.mark.parametrize("variant", tiny.TINY[FAMILY])
def test_the_model_follows_its_equations(variant: str) -> None:
    model, ids = tiny.model(FAMILY, variant), tokens(1, 13)
    for length in (1, 2, 13):
        assert worst(full(model, ids[:, :length])[0], looped(model, ids[0, :length])) <= 1e-12


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_window_ends_where_it_says(window: int) -> None:
    model, ids = made([[window, window]]), tokens(1, 12)
    changed = ids.copy()
    changed[0, 3] = (changed[0, 3] + 1) % VOCAB
    difference = np.abs(full(model, changed) - full(model, ids))[0].max(axis=-1)
    assert (np.flatnonzero(difference > 1e-9) == np.arange(3, 3 + window)).all()


@given(
    windows=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=2),
    chunks=st.lists(st.integers(1, 13), min_size=1, max_size=6).filter(lambda cuts: sum(cuts) <= CONTEXT),
)
def test_any_windows_and_any_chunks(windows: list[list[int]], chunks: list[int]) -> None:
    model, ids = made(windows), tokens(1, sum(chunks))
    assert worst(stream(eager_session(model), ids, chunks), full(model, ids)) <= EXACT


def test_heads_of_one_window_share_a_cache_as_long_as_they_see() -> None:
    states = build(made([[4, 1, 0, 4], [2, 2, 2, 2]])).spec.states
    assert {state.name: state.shape[1:] for state in states if state.name.endswith("key")} == {
        "stack.block00.unlimited.key": (1, CONTEXT, 2),
        "stack.block00.window4.key": (2, 3, 2),
        "stack.block01.window2.key": (4, 1, 2),
    }


def test_a_context_bounds_only_streams_with_an_unlimited_head() -> None:
    assert build(made([[4, 0]])).spec.max_context == CONTEXT
    model, ids = made([[4, 3], [2, 6]]), tokens(1, CONTEXT + 30)
    session = eager_session(model)
    assert session.spec.max_context is None
    assert worst(stream(session, ids, [9] * 7 + [1] * 7), full(model, ids)) <= EXACT


def test_lists_and_tuples_are_the_same_windows() -> None:
    assert HeadsConfig(5, 8, 8, [[1, 2], [3, 0]]) == HeadsConfig(5, 8, 8, ((1, 2), (3, 0)))  # type: ignore[arg-type]


SHAPE = "windows must hold one row of windows for each layer, such as ((2, 8, 0), (4, 0, 0)), not "
WRONG: list[tuple[dict[str, object], str]] = [
    ({"windows": 4}, f"{SHAPE}4"),
    ({"windows": ()}, f"{SHAPE}()"),
    ({"windows": (2, 4)}, f"{SHAPE}(2, 4)"),
    ({"windows": [[]]}, f"{SHAPE}[[]]"),
    ({"windows": [[1, 2], [3]]}, "windows must name as many heads in every layer, not [2, 1]"),
    ({"windows": [[1, -2]]}, "windows of layer 0 must be whole numbers of at least 0, not -2"),
    ({"windows": [[1, 2], [True, 2]]}, "windows of layer 1 must be whole numbers of at least 0, not True"),
    ({"windows": [[1, 2, 3]]}, "d_model 8 must be divisible by 3 heads"),
    ({"windows": [[1] * 8]}, "rotary positions need heads of even width, not 1"),
    ({"windows": [[1]], "rotary": 1}, "rotary must be true or false, not 1"),
    ({"windows": [[1]], "context": 0}, "context must be a whole number of at least 1, not 0"),
]


@pytest.mark.parametrize(("settings", "sentence"), WRONG, ids=range(len(WRONG)))
def test_impossible_settings_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        made(**settings)
