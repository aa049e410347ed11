"""Memory Transformer: against its equations row by row; memory as constants of the graphs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
from cases import build, eager_session, full, tokens, worst

from exporters.families.memory_transformer import PrefixedSelfAttention
from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.memory_transformer import FAMILY

NAMES = list(tiny.TINY["memory-transformer"])


def model(name: str) -> Any:
    return tiny.model("memory-transformer", name)


# The oracle: numpy, one stream. Layer by layer all rows at once, memory first, each row's softmax on its own.


def norm(row: Array, w: dict[str, Array], name: str) -> Array:
    return (row - row.mean()) / np.sqrt(row.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(row: Array, w: dict[str, Array], name: str) -> Array:
    return w[f"{name}.weight"] @ row + w[f"{name}.bias"]


def gelu(x: Array) -> Array:
    return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])


def updated(row: Array, seen: list[Array], w: dict[str, Array], name: str, heads: int) -> Array:
    """A row after one sub-network that sees the rows `seen`."""
    query = dense(norm(row, w, f"{name}.attention_norm"), w, f"{name}.attention.query")
    normed = [norm(other, w, f"{name}.attention_norm") for other in seen]
    keys = [dense(other, w, f"{name}.attention.key") for other in normed]
    values = [dense(other, w, f"{name}.attention.value") for other in normed]
    mixed, width = [], len(row) // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weight = np.exp([query[part] @ key[part] / math.sqrt(width) for key in keys])
        mixed.append(sum(share * value[part] for share, value in zip(weight / weight.sum(), values, strict=True)))
    row = row + dense(np.concatenate(mixed), w, f"{name}.attention.output")
    inner = gelu(dense(norm(row, w, f"{name}.feed_forward_norm"), w, f"{name}.feed_forward.0"))
    return row + dense(inner, w, f"{name}.feed_forward.2")


def place(position: int, w: dict[str, Array], config: Any) -> Array:
    if config.positions == "learned":
        return w["position_embedding.weight"][position]
    half = config.d_model // 2
    angles = [position / 10000 ** (m / half) for m in range(half)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def row_by_row(reference: Any, ids: Array) -> Array:
    config, w = reference.config, {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    memory = list(w["memory"])
    rows = [w["embedding.weight"][token] + place(t, w, config) for t, token in enumerate(ids)]
    for n in range(config.n_layer):
        own = f"layers.{n}.controller" if config.variant == "controller" else f"layers.{n}.block"
        rows, memory = (
            [updated(row, memory + rows[: t + 1], w, f"layers.{n}.block", config.n_head) for t, row in enumerate(rows)],
            [updated(row, memory, w, own, config.n_head) for row in memory],
        )
    return np.stack([dense(norm(row, w, "norm"), w, "output") for row in rows])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_model_equals_the_equations_row_by_row(name: str, length: int) -> None:
    ids = tokens(2, length)
    found = full(model(name), ids)
    for row in range(2):
        assert worst(found[row], row_by_row(model(name), ids[row])) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_every_memory_row_matters(name: str) -> None:
    """As each has another effect on the logits, none can be left out."""
    ids = tokens(1, 5)
    config, settings = model(name).config, tiny.TINY["memory-transformer"][name]
    for row in range(config.num_mem_tokens):
        changed = FAMILY.model(FAMILY.parse_config({"vocab_size": tiny.VOCAB, **settings})).double().eval()
        changed.load_state_dict(model(name).state_dict())
        changed.requires_grad_(False).memory[row, 0] += 1.0
        assert worst(full(changed, ids), full(model(name), ids)) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_memory_takes_no_state(name: str) -> None:
    reference = model(name)
    program = build(reference)
    rows, heads = tiny.CONTEXT, reference.config.n_head
    assert {state.name: state.shape for state in program.spec.states} == {
        f"layer{n:02}.attention.{part}": ("batch", heads, rows, 8 // heads)
        for n in range(reference.config.n_layer)
        for part in ("key", "value")
    }
    assert program.spec.schedule == Schedule((Tick(("decode",)),), "prefill", chunk_multiple=1, max_chunk=8)
    assert program.spec.max_context == tiny.CONTEXT
    prefixes = [module for module in program.root.modules() if isinstance(module, PrefixedSelfAttention)]
    assert [tuple(prefix.prefix_key.shape) for prefix in prefixes] == [
        (1, heads, reference.config.num_mem_tokens, 8 // heads)
    ] * reference.config.n_layer


def test_the_first_token_sees_memory_beside_itself() -> None:
    """With nothing remembered yet, the prefix alone makes the difference to plain attention."""
    reference, ids = model("memory"), tokens(1, 1)
    logits = eager_session(reference).step(ids)
    assert worst(logits, full(reference, ids)) <= 1e-10
    layers = [module for module in build(reference).root.modules() if isinstance(module, PrefixedSelfAttention)]
    assert all(layer.prefix_key.abs().max() > 0.1 for layer in layers)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_mem_tokens": 0}, "num_mem_tokens must be a whole number of at least 1, not 0"),
        ({"n_head": 3}, "d_model 8 must be a multiple of n_head 3"),
        ({"variant": "ctrl"}, "variant must be one of transformer, controller, not 'ctrl'"),
        ({"positions": "none"}, "positions must be one of sinusoid, learned, not 'none'"),
        ({"d_model": 9, "n_head": 3}, "d_model must be even for sinusoid positions, not 9"),
        (
            {"variant": "bottleneck"},
            (
                "variant 'bottleneck' has no causal form: tokens would see each other through a memory that has read "
                "the tokens after them; take one of transformer, controller"
            ),
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FAMILY.parse_config({"vocab_size": 11, "d_model": 8, "n_head": 2, **changes})
    assert str(caught.value) == sentence
