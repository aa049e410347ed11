"""Perplexity lost on text: paired, each token once, with an interval that holds as often as it says."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from mscompile.contracts import Array
from validation.perplexity import LEAST_TOKENS, SEGMENT, perplexity

TRUE_LOSS = 0.002  # nats a token


def correlated(random: np.random.Generator, length: int, carried: float) -> Array:
    """Noise of an autoregressive process of order 1, of variance 1."""
    fresh, noise = random.standard_normal(length) * np.sqrt(1 - carried**2), np.empty(length)
    noise[0] = random.standard_normal()
    for place in range(1, length):
        noise[place] = carried * noise[place - 1] + fresh[place]
    return noise


def test_the_loss_is_that_of_the_differences() -> None:
    random = np.random.default_rng(0)
    original = random.gamma(2.0, 0.7, (2, 2000))
    engine = original + 0.01 * random.standard_normal((2, 2000)) - TRUE_LOSS
    found = perplexity([((0, 5000), original, engine)])
    assert found is not None
    assert found.tokens == 4000
    assert found.loss == pytest.approx(float(np.expm1((engine - original).mean())))
    assert found.low < found.loss < found.high < 0
    assert found.reference == pytest.approx(float(np.exp(original.mean())))
    assert found.engine / found.reference == pytest.approx(1 + found.loss)
    independent = float((engine - original).std() / np.sqrt(4000))
    assert found.standard_error == pytest.approx(independent, rel=0.25)  # of 64 segments


def test_the_interval_holds_as_often_as_it_says_although_neighbours_are_correlated() -> None:
    random, held, naive = np.random.default_rng(1), 0, 0
    for _ in range(300):
        lost = TRUE_LOSS + 0.05 * correlated(random, 2560, 0.8)
        zero = np.zeros((1, 2560))
        found = perplexity([((0,), zero, lost[None])])
        assert found is not None
        held += found.low <= np.expm1(TRUE_LOSS) <= found.high
        naive += abs(lost.mean() - TRUE_LOSS) <= 1.96 * lost.std() / np.sqrt(lost.size)
    assert held / 300 > 0.9
    assert naive / 300 < 0.7  # what it would be if tokens were taken as independent


def test_it_agrees_with_a_block_bootstrap() -> None:
    random = np.random.default_rng(2)
    lost = TRUE_LOSS + 0.05 * correlated(random, 6400, 0.8)
    found = perplexity([((0,), np.zeros((1, 6400)), lost[None])])
    assert found is not None
    blocks = lost.reshape(-1, SEGMENT).mean(1)
    drawn = [blocks[random.integers(0, len(blocks), len(blocks))].mean() for _ in range(2000)]
    low, high = np.expm1(np.quantile(drawn, (0.025, 0.975)))
    assert found.high - found.low == pytest.approx(high - low, rel=0.1)


def test_a_token_that_was_read_twice_counts_once() -> None:
    random = np.random.default_rng(3)
    original = random.gamma(2.0, 0.7, (1, 3000))
    engine = original + 0.05 * random.standard_normal((1, 3000))
    once = perplexity([((7,), original, engine)])
    twice = perplexity([((7,), original, engine), ((7, 7), np.repeat(original, 2, 0), np.repeat(engine, 2, 0))])
    assert once is not None
    assert twice is not None
    assert asdict(once) == pytest.approx(asdict(twice))


def test_too_little_text_gives_nothing() -> None:
    short = np.zeros((1, LEAST_TOKENS - 1))
    assert perplexity([((0,), short, short)]) is None
    assert perplexity([]) is None
