"""The baseline a trained model must beat: an interpolated character 4-gram.

P(c | h) mixes the maximum-likelihood estimates of orders 0 to 4 (Jelinek and Mercer, 1980), with one weight
an order, fitted by expectation-maximization on a slice of the training text that was not counted.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

ORDER = 4  # characters in a gram: three of context and the one predicted


def _counts(text: str) -> list[tuple[Counter[str], Counter[str]]]:
    """For each order 1..ORDER: how often every gram and every context occurs."""
    tables = []
    for order in range(1, ORDER + 1):
        grams = Counter(text[i : i + order] for i in range(len(text) - order + 1))
        contexts = Counter(text[i : i + order - 1] for i in range(len(text) - order + 1))
        tables.append((grams, contexts))
    return tables


def _probabilities(text: str, tables: list[tuple[Counter[str], Counter[str]]], vocab_size: int) -> np.ndarray:
    """One row a predicted character, one column an order (uniform first)."""
    rows = np.empty((len(text) - ORDER + 1, ORDER + 1))
    rows[:, 0] = 1.0 / vocab_size
    for order, (grams, contexts) in enumerate(tables, start=1):
        for row, end in enumerate(range(ORDER, len(text) + 1)):
            gram = text[end - order : end]
            seen = contexts[gram[:-1]]
            rows[row, order] = grams[gram] / seen if seen else 0.0
    return rows


def bits_per_character(train: str, held_out: str, vocab_size: int) -> float:
    """Bits per character of the interpolated 4-gram on `held_out`."""
    fitted, counted = train[: len(train) // 50], train[len(train) // 50 :]
    tables = _counts(counted)
    weights = np.full(ORDER + 1, 1.0 / (ORDER + 1))
    columns = _probabilities(fitted, tables, vocab_size)
    for _ in range(50):
        shares = columns * weights
        shares /= shares.sum(axis=1, keepdims=True)
        weights = shares.mean(axis=0)
    return float(-np.log2(_probabilities(held_out, tables, vocab_size) @ weights).mean())
