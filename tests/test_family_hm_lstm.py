"""Hierarchical multiscale LSTM: each operation written down on its own, gates that flip, and its streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cases import TOLERANCE, build, eager_session, full, seeded, worst

from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.hm_lstm import HMLSTM, HMLSTMConfig, Layer

FAMILY = "hm-lstm"
VARIANTS = tuple(tiny.TINY[FAMILY])
EXACT = TOLERANCE[torch.float64]


def tokens(length: int, batch: int = 1, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, tiny.VOCAB, (batch, length))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def normed(x: Array, weights: dict[str, Array], name: str) -> Array:
    if f"{name}.weight" not in weights:
        return x
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def oracle(reference: Any, ids: Array) -> tuple[Array, Array, list[str]]:
    """Logits (T, V), boundaries (T, L), and every operation that ran: one branch at a time."""
    c, w = reference.config, {name: value.numpy() for name, value in reference.state_dict().items()}
    sizes = c.hidden_sizes
    h, cell, z = [np.zeros(n) for n in sizes], [np.zeros(n) for n in sizes], [0] * len(sizes)
    logits, boundaries, operations = [], [], []
    for token in ids:
        old_h, below, z_below = [*h, None], w["embedding.weight"][token], 1
        for number, n in enumerate(sizes):
            name = f"cells.{number}"
            s = w[f"{name}.recurrent.weight"] @ h[number]
            if z_below:
                s = s + w[f"{name}.below.weight"] @ below
            if z[number] and number + 1 < len(sizes):
                s = s + w[f"{name}.above.weight"] @ old_h[number + 1]
            s = normed(s, w, f"{name}.gates_norm") + w[f"{name}.bias"]
            i, g, o, f = sigmoid(s[:n]), np.tanh(s[n : 2 * n]), sigmoid(s[2 * n : 3 * n]), sigmoid(s[3 * n : 4 * n])
            if z[number]:
                operations.append("flush")
                cell[number] = normed(i * g, w, f"{name}.cell_norm")
                h[number] = o * np.tanh(cell[number])
            elif z_below:
                operations.append("update")
                cell[number] = normed(f * cell[number] + i * g, w, f"{name}.cell_norm")
                h[number] = o * np.tanh(cell[number])
            else:
                operations.append("copy")
            z[number] = int(np.clip((c.slope * s[4 * n] + 1) / 2, 0, 1) > 0.5) if len(s) > 4 * n else 0
            below, z_below = h[number], z[number]
        boundaries.append(list(z))
        logits.append(classify(w, np.concatenate(h), h))
    return np.stack(logits), np.array(boundaries), operations


def classify(w: dict[str, Array], everything: Array, h: list[Array]) -> Array:
    x = np.zeros(1)
    for number, own in enumerate(h):
        gate = sigmoid(normed(w[f"output.gates.{number}.0.weight"] @ everything, w, f"output.gates.{number}.1"))
        x = x + w[f"output.embeddings.{number}.weight"] @ (gate * own) + w[f"output.embeddings.{number}.bias"]
    x, number = np.maximum(normed(x, w, "output.norm"), 0), 0
    while f"output.hidden.{number}.0.weight" in w:
        name = f"output.hidden.{number}"
        x = np.tanh(normed(w[f"{name}.0.weight"] @ x + w[f"{name}.0.bias"], w, f"{name}.1"))
        number += 1
    return w["output.output.weight"] @ x + w["output.output.bias"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_is_each_operation_on_its_own(variant: str) -> None:
    reference: Any = tiny.model(FAMILY, variant)
    ids, ran = tokens(30, batch=3), set()
    logits = full(reference, ids)
    for row in range(3):
        want, boundaries, operations = oracle(reference, ids[row])
        ran |= set(operations)
        assert worst(logits[row], want) <= EXACT
        assert np.array_equal(boundaries_of(reference, ids[row]), boundaries)
    assert ran == ({"update"} if variant == "one-layer" else {"flush", "update", "copy"})


def boundaries_of(reference: HMLSTM, ids: Array) -> Array:
    """z of every layer after every token, (T, L)."""
    state, rows = reference.start(1), []
    with torch.inference_mode():
        for token in torch.from_numpy(ids):
            state = reference.step(token[None], state)
            rows.append([int(layer.z.item()) for layer in state])
    return np.array(rows)


def test_the_top_layer_flushes_itself_only_where_it_has_a_boundary() -> None:
    boundaries = {variant: oracle(tiny.model(FAMILY, variant), tokens(40)[0])[1] for variant in VARIANTS[:3]}
    assert boundaries["three-layers"][:, -1].any()
    assert boundaries["no-top-boundary"].any()
    assert not boundaries["no-top-boundary"][:, -1].any()


@pytest.mark.parametrize("variant", ["three-layers", "layer-norm"])
def test_gates_flip_in_fp32_only_where_they_are_undecided(variant: str) -> None:
    """From the same state, fp32 decides as fp64 does, unless the gate's input is within rounding of 0.

    Printed (`pytest -s`): flips of 512 tokens in all layers, from the same states and in a run of its own.
    """
    exact: Any = tiny.model(FAMILY, variant)
    rounded: Any = tiny.model(FAMILY, variant, torch.float32)
    ids, forced = tokens(512)[0], 0
    state = exact.start(1)
    with torch.inference_mode():
        for token in torch.from_numpy(ids):
            narrow = [Layer(*(value.float() for value in layer)) for layer in state]
            margins, new = [], exact.step(token[None], state)
            for number, cell in enumerate(exact.cells):
                below = exact.embedding(token[None]) if number == 0 else new[number - 1].h * new[number - 1].z
                above = state[number + 1].h if number + 1 < len(state) else None
                margins.append(abs(float(cell.gates(below, state[number], above)[0, -1])))
            for number, (one, other) in enumerate(zip(new, rounded.step(token[None], narrow), strict=True)):
                if one.z != other.z:
                    forced += 1
                    assert min(margins[: number + 1]) < 1e-4, f"layer {number} flips at {margins[number]:.2g}"
            state = new
    free = int((boundaries_of(exact, ids) != boundaries_of(rounded, ids)).sum())
    count = 512 * len(exact.cells)
    print(f"{variant}: of {count} gates {forced} flip from the same states, {free} in a run of its own")
    assert free <= 0.01 * count, f"{free} gates flip"


def test_a_gate_within_rounding_of_its_threshold_flips_and_changes_the_stream() -> None:
    sizes = {"vocab_size": tiny.VOCAB, "hidden_sizes": (4, 4), "d_embedding": 3, "d_output": 5}
    boundaries, logits = [], []
    for dtype in (torch.float64, torch.float32):
        model = seeded(HMLSTM(HMLSTMConfig(**sizes)), dtype)
        first: Any = model.cells[0]
        for projection in (first.below, first.recurrent, first.above):
            projection.weight[-1] = 0.0
        first.bias[-1] = 1e-9  # 1 + 1e-9 is 1 in fp32
        boundaries.append(boundaries_of(model, tokens(6)[0])[:, 0])
        logits.append(full(model, tokens(6)))
    assert boundaries[0].all()
    assert not boundaries[1].any()
    assert worst(*logits) > 100 * TOLERANCE[torch.float32]


def test_the_slope_decides_nothing_once_it_is_trained() -> None:
    gentle, steep = (made(slope=slope) for slope in (1.0, 5.0))
    assert worst(full(gentle, tokens(30)), full(steep, tokens(30))) == 0.0


def made(**settings: Any) -> HMLSTM:
    sizes: dict[str, Any] = {"vocab_size": tiny.VOCAB, "hidden_sizes": (5, 4), "d_embedding": 3, "d_output": 6}
    return seeded(HMLSTM(HMLSTMConfig(**{**sizes, **settings})))


def test_in_training_a_gate_has_the_gradient_of_its_hard_sigmoid() -> None:
    cell: Any = made(slope=3.0).train().cells[0]
    gate = torch.tensor([[-0.5], [-0.1], [0.2], [0.4]], requires_grad=True)
    z = cell.boundary(gate)
    assert z.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
    z.sum().backward()
    assert gate.grad is not None
    assert gate.grad.flatten().tolist() == [0.0, 1.5, 1.5, 0.0]


def test_normed_output_gates_are_constants() -> None:
    """The norm of one value is its bias: followed, as published."""
    gate: Any = made(layer_norm=True).output.gates[0]
    one, other = torch.randn(2, 9, dtype=torch.float64)
    assert torch.equal(gate(one), gate(other))
    assert torch.equal(gate(one), gate[1].bias)


def test_states_are_replaced_at_every_token() -> None:
    program = build(tiny.model(FAMILY, "no-top-boundary"))
    assert [(state.name, state.shape, state.update) for state in program.spec.states] == [
        ("layer00.c", ("batch", 9), "replace"),
        ("layer00.h", ("batch", 9), "replace"),
        ("layer00.z", ("batch", 1), "replace"),
        ("layer01.c", ("batch", 7), "replace"),
        ("layer01.h", ("batch", 7), "replace"),
        ("layer01.z", ("batch", 1), "replace"),
        ("layer02.c", ("batch", 5), "replace"),
        ("layer02.h", ("batch", 5), "replace"),
    ]
    assert program.spec.schedule == Schedule((Tick(("decode",)),), None, 1, 1)


def test_the_boundaries_of_a_stream_are_those_of_the_model() -> None:
    reference: Any = tiny.model(FAMILY, "three-layers")
    session, ids = eager_session(reference), tokens(20)
    want = boundaries_of(reference, ids[0])
    for position in range(20):
        session.step(ids[:, position : position + 1])
        states = session.state().states
        assert [states[f"layer{number:02}.z"].item() for number in range(3)] == want[position].tolist()


def test_what_is_carried_serves_the_next_tokens_of_chosen_rows() -> None:
    reference, ids = tiny.model(FAMILY, "three-layers"), torch.from_numpy(tokens(12, batch=3))
    with torch.inference_mode():
        _, carry = reference.advance(ids[:, :7])
        rest, _ = reference.advance(ids[[2, 0], 7:], reference.select(carry, [2, 0]))
        torch.testing.assert_close(rest, reference.full(ids)[[2, 0], 7:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_sizes": []}, "hidden_sizes must name at least one layer"),
        ({"hidden_sizes": [4, 0]}, "hidden_sizes must be a list of whole numbers of at least 1, not [4, 0]"),
        ({"linear_sizes": 3}, "linear_sizes must be a list of whole numbers of at least 1, not 3"),
        ({"slope": 0}, "slope must be a number above 0, not 0"),
        ({"d_output": 2.5}, "d_output must be a whole number of at least 1, not 2.5"),
        ({"top_boundary": None}, "top_boundary must be true or false, not None"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        HMLSTMConfig(**{"vocab_size": tiny.VOCAB, **settings})
    assert str(refused.value) == message
