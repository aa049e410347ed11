"""RETRO against an oracle that loops over positions; what the graphs take, keep and refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cases import TOLERANCE, build, eager_session, full, seeded, stream, worst

from exporters import program
from mscompile.contracts import Array, HostInput, Profile, StateSpec, TensorSpec
from mscompile.errors import ConfigError, InputError
from mscompile.models.retro import FAMILY, Retro, RetroConfig
from validation import sources

VARIANTS = list(tiny.TINY["retro"])
each = pytest.mark.parametrize("variant", VARIANTS)
LENGTH = 15
BASE: dict[str, Any] = {"vocab_size": 11, **tiny.TINY["retro"]["two-crosses"]}


def retro(**changes: Any) -> Retro:
    """A tiny RETRO in FP64 with sources."""
    model = seeded(Retro(RetroConfig(**{**BASE, **changes})))
    model.sources = sources.pseudo(model.inputs)
    return model


def ids(batch: int, length: int, seed: int = 3) -> Array:
    return np.random.default_rng(seed).integers(0, 11, (batch, length))


class Oracle:
    """The equations, row by row, in NumPy: `rows` are lists of vectors, `places` their positions."""

    def __init__(self, model: Retro) -> None:
        self.config = model.config
        self.weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def linear(self, name: str, row: Array) -> Array:
        return self.weights[f"{name}.weight"] @ row + self.weights[f"{name}.bias"]

    def norm(self, name: str, row: Array) -> Array:
        return row / np.sqrt((row**2).mean() + 1e-6) * self.weights[f"{name}.weight"]

    def feed_forward(self, name: str, row: Array) -> Array:
        hidden = self.linear(f"{name}.feed_forward.0", self.norm(f"{name}.feed_forward_norm", row))
        gelu = torch.nn.functional.gelu(torch.from_numpy(hidden)).numpy()
        return row + self.linear(f"{name}.feed_forward.2", gelu)

    def turned(self, vector: Array, place: int) -> Array:
        half = len(vector) // 2
        turned = np.empty_like(vector)
        for i in range(half):
            angle = place * 10000.0 ** (-i / half)
            a, b = vector[i], vector[half + i]
            turned[i], turned[half + i] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return turned

    def attention(
        self, name: str, row: Array, place: int, rows: list[Array], places: list[int], rotary: bool, null: str = ""
    ) -> Array:
        heads = self.config.n_head
        query = np.split(self.linear(f"{name}.query", row), heads)
        keys = [np.split(self.linear(f"{name}.key", other), heads) for other in rows]
        values = [np.split(self.linear(f"{name}.value", other), heads) for other in rows]
        mixed = []
        for head in range(heads):
            q = self.turned(query[head], place) if rotary else query[head]
            ks = [self.turned(key[head], at) if rotary else key[head] for key, at in zip(keys, places, strict=True)]
            vs = [value[head] for value in values]
            if null:
                ks.append(self.weights[f"{null}.key"][head, 0])
                vs.append(self.weights[f"{null}.value"][head, 0])
            scores = np.array([q @ k for k in ks]) / np.sqrt(len(q))
            weights = np.exp(scores - scores.max())
            mixed.append(sum(w * v for w, v in zip(weights / weights.sum(), vs, strict=True)))
        return self.linear(f"{name}.output", np.concatenate(mixed))

    def encode(self, neighbours: Array, chunk: list[Array]) -> list[list[Array]]:
        """The encoder of one chunk: k lists of r rows."""
        config, table = self.config, self.weights["embedding.weight"]
        chunk = [self.norm("encoder.chunk_norm", row) for row in chunk]
        encoded = []
        for neighbour in neighbours:
            rows = [self.linear("encoder.enter", table[token]) for token in neighbour]
            places = list(range(len(rows)))
            for number in range(config.n_encoder_layer):
                name = f"encoder.layers.{number}"
                normed = [self.norm(f"{name}.attention_norm", row) for row in rows]
                rows = [
                    row + self.attention(f"{name}.attention", normed[i], i, normed, places, rotary=True)
                    for i, row in enumerate(rows)
                ]
                rows = [
                    row
                    + self.attention(
                        f"{name}.cross.attention", self.norm(f"{name}.cross.norm", row), i, chunk,
                        list(range(len(chunk))), config.cross_rotary,
                    )
                    for i, row in enumerate(rows)
                ]  # fmt: skip
                rows = [self.feed_forward(name, row) for row in rows]
            encoded.append([self.norm("encoder.norm", row) for row in rows])
        return encoded

    def full(self, tokens: Array, neighbours: Array) -> Array:
        """Logits (T, V) of tokens (T,) with neighbours (T // m, k, r)."""
        config, size = self.config, self.config.chunk
        xs = [self.weights["embedding.weight"][token] for token in tokens]
        encoded: list[list[list[Array]]] = []
        for number in range(config.n_layer):
            name = f"layers.{number}"
            normed = [self.norm(f"{name}.attention_norm", x) for x in xs]
            xs = [
                x + self.attention(f"{name}.attention", normed[t], t, normed[: t + 1], list(range(t + 1)), rotary=True)
                for t, x in enumerate(xs)
            ]
            if number == config.cross_layers[0]:
                encoded = [self.encode(neighbours[u], xs[u * size : (u + 1) * size]) for u in range(len(neighbours))]
            if number in config.cross_layers:
                xs = [self.crossed(f"{name}.cross", x, t, encoded) for t, x in enumerate(xs)]
            xs = [self.feed_forward(name, x) for x in xs]
        return np.stack([self.linear("output", self.norm("norm", x)) for x in xs])

    def crossed(self, name: str, x: Array, t: int, encoded: list[list[list[Array]]]) -> Array:
        """Row t attends to the chunk that ended last, at t itself at the latest."""
        config, size = self.config, self.config.chunk
        ended = (t + 1) // size
        if ended == 0:
            return x
        rows = [row for neighbour in encoded[ended - 1] for row in neighbour]
        places = [place for neighbour in encoded[ended - 1] for place in range(len(neighbour))]
        place = size - 1 + (t + 1 - ended * size)
        null = f"{name}.null" if config.null_key else ""
        normed = self.norm(f"{name}.norm", x)
        return x + self.attention(f"{name}.attention", normed, place, rows, places, config.cross_rotary, null)


@each
@pytest.mark.parametrize("length", [1, 2, 4, 7, LENGTH])
def test_full_is_the_equations(variant: str, length: int) -> None:
    model = tiny.model("retro", variant)
    assert isinstance(model, Retro)
    tokens = ids(1, length)
    neighbours = model.supplied(model.inputs[0], torch.from_numpy(tokens))[0].numpy()
    assert neighbours.shape == (length // model.config.chunk, *model.inputs[0].shape)
    assert worst(full(model, tokens)[0], Oracle(model).full(tokens[0], neighbours)) <= TOLERANCE[torch.float64]


def test_neighbours_serve_from_the_last_token_of_their_chunk_to_the_last_but_one_of_the_next() -> None:
    """With one layer nothing else carries them further."""
    model = retro(n_layer=1, cross_layers=[0])
    tokens = torch.from_numpy(ids(1, LENGTH))
    neighbours = model.supplied(model.inputs[0], tokens)
    base = model(tokens, neighbours)
    for chunk in range(3):
        changed = neighbours.clone()
        changed[0, chunk, 1, 2] = (changed[0, chunk, 1, 2] + 1) % 11
        difference = (model(tokens, changed) - base)[0].abs().amax(dim=-1)
        served = [t for t in range(LENGTH) if difference[t] > 1e-9]
        assert served == list(range(4 * chunk + 3, 4 * chunk + 7))


def test_the_first_rows_need_no_neighbours() -> None:
    """Before the first chunk ends, RETRO is its decoder without cross-attention."""
    model = retro(null_key=True)
    tokens = torch.from_numpy(ids(2, 7))
    assert worst(full(model, tokens[:, :3].numpy()), model(tokens[:, :3], torch.zeros(2, 0, 2, 3)).numpy()) == 0.0
    without = retro(null_key=True)
    for layer in without.layers:
        layer.cross = None
    assert worst(full(model, tokens.numpy())[:, :3], full(without, tokens.numpy())[:, :3]) <= 1e-12


def test_states_graphs_and_schedule() -> None:
    spec = build(tiny.model("retro", "two-crosses"), max_chunk=8).spec
    assert spec.inputs == (HostInput("neighbours", "int64", (2, 3), 4, below=11),)
    shapes = {state.name: (state.shape, state.update) for state in spec.states}
    cross, cache = (("batch", 2, 6, 4), "replace"), (("batch", 2, 24, 4), "append")
    assert shapes == {
        "chunk": (("batch", 4, 8), "append"),
        "neighbours.recent": (("batch", 4), "append"),
        **{f"layer01.cross.{name}": cross for name in ("key", "value")},
        **{f"layer02.cross.{name}": cross for name in ("key", "value")},
        **{f"layer0{layer}.attention.{name}": cache for layer in range(3) for name in ("key", "value")},
    }
    assert spec.state("neighbours.recent") == StateSpec("neighbours.recent", "int64", ("batch", 4), "append", 1)
    assert [(tick.graphs, tick.repeat) for tick in spec.schedule.ticks] == [(("decode_1",), 3), (("decode_4",), 1)]
    assert (spec.schedule.prefill, spec.schedule.chunk_multiple, spec.max_context) == ("prefill", 4, 24)
    taken = {graph.name: [t for t in graph.inputs if t.name == "neighbours"] for graph in spec.graphs}
    assert taken == {
        "decode_1": [],
        "decode_4": [TensorSpec("neighbours", "int64", ("batch", 1, 2, 3))],
        "prefill": [TensorSpec("neighbours", "int64", ("batch", "chunk/4", 2, 3))],
    }


def test_what_serves_a_chunk_is_written_where_it_ends_and_only_read_between() -> None:
    spec = build(tiny.model("retro", "two-crosses"), max_chunk=8).spec
    between, end = spec.graph("decode_1"), spec.graph("decode_4")
    cross = {f"layer0{layer}.cross.{name}" for layer in (1, 2) for name in ("key", "value")}
    assert cross <= set(between.reads)
    assert cross.isdisjoint(between.writes)
    assert cross <= set(end.writes)
    assert cross.isdisjoint(end.reads)
    assert "chunk" in end.reads
    assert "chunk" not in between.reads
    for graph in spec.graphs:
        assert {"chunk", "neighbours.recent"} <= set(graph.writes)
        assert "neighbours.recent" not in graph.reads


def test_the_same_tokens_with_other_neighbours_are_another_stream() -> None:
    model = retro()
    tokens = ids(1, 11)
    other = sources.pseudo(model.inputs, seed=1)
    first = stream(eager_session(model), tokens, [5, 6])
    model.sources = other
    second = stream(eager_session(model), tokens, [1] * 11)
    assert worst(first[:, :3], second[:, :3]) <= 1e-10
    assert worst(first[:, 3:], second[:, 3:]) > 1e-3
    assert worst(second, full(model, tokens)) <= 1e-10


def test_a_model_without_its_source_says_what_it_needs() -> None:
    model = Retro(RetroConfig(**BASE))
    with pytest.raises(InputError) as raised:
        model.full(torch.zeros(1, 5, dtype=torch.int64))
    assert str(raised.value) == (
        "this model needs sources={'neighbours': f} from its host, f a function from int64 tokens (N, 4) to "
        "int64 (N, 2, 3) of 0 to 10"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 1}, "chunk must be at least 2 tokens, not 1"),
        ({"neighbours": 0}, "neighbours must be a whole number of at least 1, not 0"),
        ({"cross_layers": []}, "cross_layers must be numbers from 0 to 2 in rising order, not []"),
        ({"cross_layers": [2, 1]}, "cross_layers must be numbers from 0 to 2 in rising order, not [2, 1]"),
        ({"cross_layers": [3]}, "cross_layers must be numbers from 0 to 2 in rising order, not [3]"),
        ({"null_key": 1}, "null_key must be true or false, not 1"),
        (
            {"d_model": 6},
            "d_model 6 must be divisible by twice n_head 2, since rotary heads have even width",
        ),
        (
            {"d_encoder": 10},
            "d_encoder 10 must be divisible by twice n_head 2, since rotary heads have even width",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        FAMILY.parse_config({**BASE, **changes})
    assert str(raised.value) == message


def test_a_chunk_longer_than_a_prefill_call_leaves_token_by_token() -> None:
    model = retro(chunk=6, context=24)
    spec = program.build(model, Profile(1, 1, 5)).spec
    assert spec.schedule.prefill is None
    tokens = ids(2, 20)
    assert worst(stream(eager_session(model, 2, max_chunk=5), tokens, [7, 13]), full(model, tokens)) <= 1e-10
