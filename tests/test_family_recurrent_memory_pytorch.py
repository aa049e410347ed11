"""The model of recurrent-memory-transformer-pytorch: against its equations row by row, and its states.

`test_package_recurrent_memory.py` compares it with the package itself, where that is installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tiny
from cases import build, eager_session, edited, full, stream, tokens, worst

from mscompile.contracts import Array
from mscompile.errors import ConfigError
from mscompile.models.recurrent_memory_pytorch import FAMILY

NAMES = list(tiny.TINY["recurrent-memory-pytorch"])
EPSILON = float(np.finfo(np.float64).eps)
Weights = dict[str, Array]


def model(name: str) -> Any:
    return tiny.model("recurrent-memory-pytorch", name)


# The oracle: numpy, one stream, layer after layer, row after row.


@dataclass
class Row:
    streams: list[Array]
    place: int  # rotary position
    sees: list[int]  # rows of the segment
    first_value: Array = field(default_factory=lambda: np.zeros(0))


def norm(x: Array, weight: Array) -> Array:
    return x / math.sqrt((x**2).mean() + EPSILON) * weight


def gelu(x: Array) -> Array:
    return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])


def turned(x: Array, place: int, w: Weights) -> Array:
    """One head turned: the halves are the parts of complex numbers."""
    if "frequency" not in w:
        return x
    half = len(x) // 2
    out = (x[:half] + 1j * x[half:]) * np.exp(1j * place * w["frequency"])
    return np.concatenate([out.real, out.imag])


def read(streams: list[Array], w: Weights, name: str) -> tuple[Array, list[Array], list[float]]:
    """The input of a sub-layer, the streams mixed, and the share of its output that each gets."""
    if f"{name}.gamma" not in w:
        return streams[0], streams, [1.0]
    count = len(streams)
    alpha, beta = np.zeros((count, count + 1)), []
    for i, x in enumerate(streams):
        normed = x / np.linalg.norm(x) * math.sqrt(len(x)) * (w[f"{name}.gamma"] + 1)
        dynamic = np.tanh(normed @ w[f"{name}.dynamic_alpha"]) * w[f"{name}.alpha_scale"]
        alpha[i] = w[f"{name}.static_alpha"][i] + dynamic
        share = np.tanh(normed @ w[f"{name}.dynamic_beta"]) * w[f"{name}.beta_scale"]
        beta.append(float(w[f"{name}.static_beta"][i] + share))
    mixed = [sum(alpha[i, j] * streams[i] for i in range(count)) for j in range(count + 1)]
    return mixed[0], mixed[1:], beta


def layer(rows: list[Row], w: Weights, name: str, heads: int) -> None:
    width = w[f"{name}.null_key_value"].shape[2]
    queries, keys, values, joins = [], [], [], []
    for row in rows:
        entering, mixed, shares = read(row.streams, w, f"{name}.attention_residual")
        x = norm(entering, w[f"{name}.attention_norm.weight"])
        query, key, value = (
            (w[f"{name}.{part}.weight"] @ x).reshape(heads, width) for part in ("query", "key", "value")
        )
        if f"{name}.value_mix.weight" in w:
            share = 1 / (1 + np.exp(-w[f"{name}.value_mix.weight"] @ x))[:, None]
            value = (1 - share) * value + share * row.first_value
        else:
            row.first_value = value
        queries.append([turned(head, row.place, w) for head in query])
        keys.append([turned(head, row.place, w) for head in key])
        values.append(value)
        joins.append((mixed, shares))
    null_key, null_value = w[f"{name}.null_key_value"]
    for number, row in enumerate(rows):
        attended = []
        for head in range(heads):
            seen_keys = [turned(null_key[head], 9999, w), *(keys[j][head] for j in row.sees)]
            seen_values = [null_value[head], *(values[j][head] for j in row.sees)]
            weight = np.exp([queries[number][head] @ key / math.sqrt(width) for key in seen_keys])
            attended.append(sum(share * value for share, value in zip(weight / weight.sum(), seen_values, strict=True)))
        output = w[f"{name}.output.weight"] @ np.concatenate(attended)
        streams = [x + share * output for x, share in zip(*joins[number], strict=True)]
        entering, mixed, shares = read(streams, w, f"{name}.feed_forward_residual")
        inner = w[f"{name}.feed_forward.inner.weight"] @ norm(entering, w[f"{name}.feed_forward.norm.weight"])
        value, gate = np.split(inner, 2)
        output = w[f"{name}.feed_forward.outer.weight"] @ (value * gelu(gate))
        row.streams = [x + share * output for x, share in zip(mixed, shares, strict=True)]


def row_by_row(reference: Any, ids: Array) -> Array:
    config, w = reference.config, {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    memory: Array | None = np.zeros_like(w["read_memory"]) if config.always_have_read_memories else None
    logits = []
    for start in range(0, len(ids), config.seq_len):
        part = ids[start : start + config.seq_len]
        before = (
            []
            if memory is None
            else [remembered + own for remembered, own in zip(memory, w["read_memory"], strict=True)]
        )
        written = w["write_memory"] + (memory if config.add_write_to_next_write_mem and memory is not None else 0.0)
        count, total = len(before), len(before) + len(part) + len(written)
        entering = [(x, 0, list(range(count))) for x in before]
        for t, token in enumerate(part):
            x = w["embedding.weight"][token]
            x = x + w["position_embedding.weight"][t] if config.abs_pos_emb else x
            entering.append((x, 10000 + t, list(range(count + t + 1))))
        entering += [(x, 0, list(range(total))) for x in written]
        rows = [Row([x] * config.num_residual_streams, place, sees) for x, place, sees in entering]
        for n in range(config.n_layer):
            layer(rows, w, f"layers.{n}", config.n_head)
        out = [norm(sum(row.streams), w["norm.weight"]) for row in rows]
        logits += [w["output.weight"] @ x + w["output.bias"] for x in out[count : count + len(part)]]
        memory = np.stack(out[count + len(part) :])
    return np.stack(logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 4, 13])
def test_the_model_equals_the_equations_row_by_row(name: str, length: int) -> None:
    ids = tokens(2, length)
    found = full(model(name), ids)
    for row in range(2):
        assert worst(found[row], row_by_row(model(name), ids[row])) <= 1e-10


# The stream.


def test_states() -> None:
    spec = build(model("rotary")).spec
    assert {state.name: (state.shape, state.update) for state in spec.states if "layer01" not in state.name} == {
        "memory": (("batch", 3, 8), "replace"),
        "layer00.read.key": (("batch", 2, 3, 4), "replace"),
        "layer00.read.value": (("batch", 2, 3, 4), "replace"),
        "layer00.key": (("batch", 2, 4, 4), "append"),
        "layer00.value": (("batch", 2, 4, 4), "append"),
    }
    assert "memory" not in spec.graph("close").reads, "write rows are learned: memory only shows what was handed on"
    assert "memory" in build(model("written-on")).spec.graph("close").reads


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_first_segment_reads_no_memory_whatever_its_states_hold(name: str, before: int) -> None:
    reference, ids = model(name), tokens(1, before + 9)
    session = eager_session(reference)
    if before:
        session.step(ids[:, :before])
    snapshot = session.state()
    garbage = {
        state: np.full_like(value, 1e6)
        for state, value in snapshot.states.items()
        if "read" in state or state == "memory"
    }
    session.restore(edited(snapshot, garbage))
    assert worst(stream(session, ids[:, before:], [1, 4, 4]), full(reference, ids)[:, before:]) <= 1e-10


def test_memory_reaches_over_segments() -> None:
    reference, ids = model("rotary"), tokens(1, 12)
    changed = ids.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 11
    assert worst(full(reference, changed)[:, 8:], full(reference, ids)[:, 8:]) > 1e-6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seq_len": 0}, "seq_len must be a whole number of at least 1, not 0"),
        ({"num_residual_streams": 0}, "num_residual_streams must be a whole number of at least 1, not 0"),
        ({"abs_pos_emb": False}, "one of abs_pos_emb and rotary_pos_emb must be true"),
        ({"rotary_pos_emb": True, "d_head": 3}, "d_head must be even for rotary_pos_emb, not 3"),
        ({"always_have_read_memories": None}, "always_have_read_memories must be true or false, not None"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    settings = {"vocab_size": 11, "d_model": 8, "n_layer": 1, "num_mem_tokens": 2, "seq_len": 4}
    with pytest.raises(ConfigError) as caught:
        FAMILY.parse_config({**settings, **changes})
    assert str(caught.value) == sentence
