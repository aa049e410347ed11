"""MEGABYTE as in the paper: against an oracle that predicts byte by byte, its states, its schedule, what is refused."""

from __future__ import annotations

import math
from typing import Any

import cases
import numpy as np
import pytest
import tiny

from exporters import program
from mscompile.contracts import Array, Profile, Schedule, Tick
from mscompile.errors import ConfigError, Refusal
from mscompile.models.megabyte import Megabyte, MegabyteConfig

FAMILY = "megabyte"
VARIANTS = list(tiny.TINY[FAMILY])
SIZES: dict[str, Any] = {"vocab_size": cases.VOCAB, "patch_size": 3, "d_global": 4, "n_layer_global": 1,
                         "n_head_global": 2, "d_ff_global": 10, "d_local": 8, "n_layer_local": 1, "n_head_local": 2,
                         "d_ff_local": 12, "context": 24}  # fmt: skip


def built(**settings: Any) -> Megabyte:
    return cases.seeded(Megabyte(MegabyteConfig(**{**SIZES, **settings})))


class Oracle:
    """The equations of the paper, one predicted byte at a time; nothing is shared with the model but weights."""

    def __init__(self, model: Megabyte) -> None:
        self.config = model.config
        self.weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def logits(self, tokens: Array) -> Array:
        """Of byte t + 1 from bytes 0 .. t, for every t."""
        return np.stack([self.predict(tokens[: t + 1]) for t in range(len(tokens))])

    def predict(self, before: Array) -> Array:
        """Of the byte that follows these."""
        size, w = self.config.patch_size, self.weights
        patch, place = divmod(len(before), size)
        rows = [w["global_pad"]]
        for k in range(patch):
            members = range(k * size, (k + 1) * size)
            rows.append(
                np.concatenate([w["global_embedding.weight"][before[t]] + w["position.weight"][t] for t in members])
            )
        out = self.norm("global_norm", self.transformer("global_model", rows, self.config.n_head_global))
        parts = out.reshape(size, self.config.d_global)
        local = []
        for p in range(place + 1):
            own = w["local_pad"] if p == 0 else w["local_embedding.weight"][before[patch * size + p - 1]]
            local.append(w["to_local.weight"] @ parts[p] + own)
        last = self.transformer("local_model", local, self.config.n_head_local)
        return w["local_embedding.weight"] @ self.norm("local_norm", last)

    def transformer(self, name: str, rows: list[Array], heads: int) -> Array:
        """The last row of a causal stack."""
        number = 0
        while f"{name}.blocks.{number}.attention.query.weight" in self.weights:
            rows = [self.block(f"{name}.blocks.{number}", rows[: i + 1], heads) for i in range(len(rows))]
            number += 1
        return rows[-1]

    def block(self, name: str, rows: list[Array], heads: int) -> Array:
        normed = [self.norm(f"{name}.attention_norm", row) for row in rows]
        query, *_ = self.projected(name, "query", normed[-1:], heads, len(rows) - 1)
        keys, values = self.projected(name, "key", normed, heads), self.projected(name, "value", normed, heads)
        mixed = []
        for head in range(heads):
            scores = np.array([query[head] @ key[head] for key in keys]) / math.sqrt(query.shape[1])
            weights = np.exp(scores - scores.max())
            mixed.append(weights / weights.sum() @ np.stack([value[head] for value in values]))
        x = rows[-1] + self.linear(f"{name}.attention.output", np.concatenate(mixed))
        inner = self.linear(f"{name}.feed_forward.0", self.norm(f"{name}.feed_forward_norm", x))
        active = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in inner])
        return x + self.linear(f"{name}.feed_forward.2", active)

    def projected(self, name: str, kind: str, rows: list[Array], heads: int, first: int = 0) -> list[Array]:
        """(heads, width) for each row, turned by its place where positions are rotary."""
        out = []
        for place, row in enumerate(rows, start=first):
            parts = self.linear(f"{name}.attention.{kind}", row).reshape(heads, -1)
            turn = self.config.rotary and kind != "value"
            out.append(np.stack([self.turned(part, place) for part in parts]) if turn else parts)
        return out

    def turned(self, part: Array, place: int) -> Array:
        half = len(part) // 2
        pairs = [complex(part[i], part[half + i]) * np.exp(1j * place * 10000.0 ** (-i / half)) for i in range(half)]
        return np.array([pair.real for pair in pairs] + [pair.imag for pair in pairs])

    def linear(self, name: str, x: Array) -> Array:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean()
        scaled = centred / math.sqrt((centred**2).mean() + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_is_what_the_equations_say(variant: str) -> None:
    model = tiny.model(FAMILY, variant)
    assert isinstance(model, Megabyte)
    tokens = cases.tokens(1, 14)
    assert cases.worst(cases.full(model, tokens)[0], Oracle(model).logits(tokens[0])) <= 1e-10


def test_bytes_of_a_patch_reach_the_next_ones_through_the_global_model_alone() -> None:
    """Without what the global model hands on, a patch does not know what was before it."""
    model = cases.seeded(Megabyte(MegabyteConfig(**SIZES)))
    model.to_local.weight.zero_()
    tokens = cases.tokens(1, 11)
    other = tokens.copy()
    other[0, :6] = (other[0, :6] + 1) % cases.VOCAB
    assert cases.worst(cases.full(model, tokens)[:, 6:], cases.full(model, other)[:, 6:]) <= 1e-12
    assert cases.worst(cases.full(built(), tokens)[:, 6:], cases.full(built(), other)[:, 6:]) > 1e-3


def test_the_last_byte_of_a_patch_gives_the_logits_of_the_first_of_the_next_from_the_padding() -> None:
    """So with nothing from the global model they do not depend on any byte."""
    model = cases.seeded(Megabyte(MegabyteConfig(**SIZES)))
    model.to_local.weight.zero_()
    logits = cases.full(model, cases.tokens(1, 12))[0]
    assert cases.worst(logits[[2, 5, 8]], logits[[5, 8, 11]]) <= 1e-12
    assert cases.worst(logits[1], logits[4]) > 1e-4


def test_states_hold_patches_and_one_patch_of_bytes() -> None:
    spec = cases.build(built()).spec
    assert {state.name: (state.dtype, state.shape[1:], state.update) for state in spec.states} == {
        "global.block00.key": ("float64", (2, 8, 6), "append"),
        "global.block00.value": ("float64", (2, 8, 6), "append"),
        "local.block00.key": ("float64", (2, 3, 4), "append"),
        "local.block00.value": ("float64", (2, 3, 4), "append"),
        "spread": ("float64", (3, 8), "replace"),
        "tokens": ("int64", (3,), "append"),
    }
    assert spec.max_context == 24


def test_the_global_model_runs_at_the_last_byte_of_a_patch() -> None:
    spec = cases.build(built(), max_chunk=8).spec
    assert spec.schedule == Schedule((Tick(("decode_1",), repeat=2), Tick(("decode_3",))), "prefill", 3, 6)
    assert not any(name.startswith("global") for name in spec.graph("decode_1").reads)
    assert not any(name.startswith("local") for name in spec.graph("decode_3").reads), "a first row sees itself alone"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 3, 5, 12, 23])
def test_what_is_remembered_does_not_depend_on_how_the_bytes_came(variant: str, length: int) -> None:
    model, tokens = tiny.model(FAMILY, variant), cases.tokens(2, length)
    one, many = (cases.remembered(model, tokens, chunks) for chunks in ([1] * length, [length]))
    assert {name: cases.worst(one[name], many[name]) for name in one} == pytest.approx(
        dict.fromkeys(many, 0.0), abs=1e-10
    )


def test_a_stream_beyond_the_learned_positions_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        program.build(built(), Profile(1, 1, 8), context=27)
    assert str(caught.value) == (
        "the model has 24 positions, so a stream of 27 tokens is too long; export with --context 24 or less"
    )
    assert program.build(built(), Profile(1, 1, 8), context=12).spec.max_context == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 1}, "patch_size must be at least 2, not 1"),
        ({"context": 25}, "context 25 must be divisible by patch_size 3"),
        ({"n_head_global": 5}, "patch_size * d_global = 12 must be divisible by its 5 heads"),
        ({"n_head_local": 3}, "d_local = 8 must be divisible by its 3 heads"),
        (
            {"n_head_global": 4, "rotary": True},
            "rotary positions need an even width of a head, not patch_size * d_global / heads = 3",
        ),
        ({"rotary": 1}, "rotary must be true or false, not 1"),
        ({"d_local": 0}, "d_local must be a whole number of at least 1, not 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MegabyteConfig(**{**SIZES, **settings})
    assert str(caught.value) == message
