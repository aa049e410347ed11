"""Dynamic pooling: against its equations group by group; boundaries apart from logits; what the stream costs."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cases import TOLERANCE, build, eager_session, edited, full, seeded, spoiled, stream, tokens, worst

from exporters import cost, export
from exporters.passes import fold
from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.dynamic_pooling import FAMILY, DynamicPooling

NAMES = list(tiny.TINY["dynamic-pooling"])
LENGTH = 15


def new_model(name: str = "gelu", dtype: torch.dtype = torch.float64, often: float = 0.0, **settings: Any) -> Any:
    """A tiny model; `often` is added to the logit of the boundaries, so that there are more or fewer of them."""
    values = {"vocab_size": tiny.VOCAB, **tiny.TINY["dynamic-pooling"][name], **settings}
    model = seeded(DynamicPooling(FAMILY.parse_config(values)), dtype)
    model.groups.predictor[2].bias += often
    return model


# The oracle: numpy, one stream. Groups are lists of rows, shortened rows a list that grows.


def norm(row: Array, w: dict[str, Array], name: str) -> Array:
    return (row - row.mean()) / np.sqrt(row.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(row: Array, w: dict[str, Array], name: str) -> Array:
    return w[f"{name}.weight"] @ row + w[f"{name}.bias"]


def activated(x: Array, config: Any) -> Array:
    if config.activation_function == "relu":
        return np.maximum(x, 0)
    return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])


def sinusoid(distance: int, width: int) -> Array:
    angles = np.array([distance / 10000 ** (m / width) for m in range(0, width, 2)])
    return np.concatenate([np.sin(angles), np.cos(angles)])


def layer(rows: list[Array], w: dict[str, Array], name: str, config: Any) -> list[Array]:
    out = []
    for i, row in enumerate(rows):
        query, mixed = dense(row, w, f"{name}.attention.query"), []
        for head in range(config.n_head):
            part = slice(head * config.d_head, (head + 1) * config.d_head)
            u, v = w["content_bias"][head], w["position_bias"][head]
            scores = []
            for j in range(i + 1):
                key = dense(rows[j], w, f"{name}.attention.key")[part]
                place = dense(sinusoid(i - j, config.d_model), w, f"{name}.attention.position")[part]
                scores.append(((query[part] + u) @ key + (query[part] + v) @ place) / math.sqrt(config.d_head))
            share = np.exp(scores) / np.exp(scores).sum()
            values = [dense(other, w, f"{name}.attention.value")[part] for other in rows[: i + 1]]
            mixed.append(sum(a * value for a, value in zip(share, values, strict=True)))
        h = norm(row + dense(np.concatenate(mixed), w, f"{name}.attention.output"), w, f"{name}.attention_norm")
        inner = activated(dense(h, w, f"{name}.feed_forward.0"), config)
        out.append(norm(h + dense(inner, w, f"{name}.feed_forward.3"), w, f"{name}.feed_forward_norm"))
    return out


def layers(rows: list[Array], w: dict[str, Array], name: str, count: int, config: Any) -> list[Array]:
    for number in range(count):
        rows = layer(rows, w, f"{name}.layers.{number}", config)
    return rows


def oracle(model: DynamicPooling, ids: Array) -> tuple[Array, list[bool]]:
    """Logits (T, V) of tokens (T,), and which of them end a group."""
    config = model.config
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    x = layers([w["embedding.weight"][token] for token in ids], w, "pre", config.pre_layers, config)
    ends: list[bool] = []
    rows, group, newest = [w["groups.null"]], [], []
    for row in x:
        group.append(row)
        logit = dense(activated(dense(row, w, "groups.predictor.0"), config), w, "groups.predictor.2")[0]
        ends.append(bool(1 / (1 + math.exp(-logit)) > 0.5))
        if ends[-1]:
            rows.append(np.mean(group, axis=0))
            group = []
        newest.append(len(rows) - 1)
    rows = [norm(row, w, "groups.norm") for row in rows]
    rows = layers(rows, w, "groups.layers", config.shortened_layers, config)
    x = [row + rows[number] for row, number in zip(x, newest, strict=True)]
    x = layers(x, w, "post", config.post_layers, config)
    return np.array([dense(row, w, "head") for row in x]), ends


OFTEN = {"never": -9.0, "seldom": -0.3, "mixed": 0.0, "always": 9.0}


@pytest.mark.parametrize("often", OFTEN)
def test_the_model_and_its_stream_are_what_the_equations_say(often: str) -> None:
    model, ids = new_model(often=OFTEN[often]), tokens(2, LENGTH)
    logits, streamed = full(model, ids), stream(eager_session(model, 2), ids, [1, 1, 5, 1, 7])
    for row in range(2):
        want, ends = oracle(model, ids[row])
        assert worst(logits[row], want) < 1e-10
        assert worst(streamed[row], want) < 1e-10
        least, most = {"never": (0, 0), "always": (LENGTH, LENGTH)}.get(often, (1, LENGTH - 1))
        assert least <= sum(ends) <= most


def test_relu_and_several_layers() -> None:
    model, ids = new_model("no-group-ends", often=0.7), tokens(1, 9)
    want, ends = oracle(model, ids[0])
    assert 0 < sum(ends) < 9
    assert worst(full(model, ids)[0], want) < 1e-10
    assert worst(stream(eager_session(model), ids, [4, 5])[0], want) < 1e-10


# Boundaries


def boundaries(session: Any, row: int, length: int) -> list[bool]:
    """Which tokens ended a group, as the stream remembers."""
    return [bool(number >= 0) for number in session.state().states["groups.group"][row, :length]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_boundaries_are_the_models_own(dtype: torch.dtype) -> None:
    """A boundary may flip where its probability is one half but for rounding: that is counted, and none does here."""
    model, ids, flips = new_model(dtype=dtype), tokens(3, LENGTH), 0
    session = eager_session(model, 3)
    logits = stream(session, ids, [2, 6, 1, 1, 5])
    for row in range(3):
        _, ends = oracle(new_model(), ids[row])
        flips += sum(a != b for a, b in zip(boundaries(session, row, LENGTH), ends, strict=True))
    assert flips == 0
    assert worst(logits, full(model, ids)) < TOLERANCE[dtype]


def test_the_state_numbers_groups_and_carries_the_unfinished_one() -> None:
    model, ids = new_model(often=-0.3), tokens(1, LENGTH)
    _, ends = oracle(model, ids[0])
    session = eager_session(model)
    for length in range(1, LENGTH + 1):
        session.step(ids[:, length - 1 : length])
        states = {name: value[0] for name, value in session.state().states.items() if name.startswith("groups.")}
        seen = ends[:length]
        open_tokens = next((back for back, end in enumerate(reversed(seen)) if end), length)
        assert states["groups.ended"] == sum(seen)
        assert states["groups.count"] == open_tokens
        numbers = states["groups.group"][:length]
        assert numbers[numbers >= 0].tolist() == list(range(sum(seen)))
        assert states["groups.sum"].any() == (open_tokens > 0)


def test_rows_of_a_batch_group_for_themselves() -> None:
    model, ids = new_model(), tokens(3, LENGTH)
    together = stream(eager_session(model, 3), ids, [3, 1, 1, 8, 2])
    for row in range(3):
        assert worst(together[row], stream(eager_session(model), ids[row : row + 1], [LENGTH - 8, 8])[0]) < 1e-10


def test_candidates_that_ended_no_group_are_never_looked_at() -> None:
    model, ids = new_model(often=-0.3), tokens(1, LENGTH)
    session = eager_session(model)
    session.step(ids[:, :10])
    ended = [place for place, end in enumerate(boundaries(session, 0, 10)) if end]
    assert 0 < len(ended) < 10
    snapshot = session.state()
    for part in ("key", "value"):
        for number in range(model.config.shortened_layers):
            snapshot = spoiled(snapshot, f"groups.layer{number:02}.{part}", 2, [ended])  # type: ignore[list-item]
    session.restore(snapshot)
    assert worst(session.step(ids[:, 10:])[0], full(model, ids)[0, 10:]) < 1e-10


def test_group_numbers_that_were_never_written_do_not_matter() -> None:
    model, ids = new_model(), tokens(1, LENGTH)
    session = eager_session(model)
    session.step(ids[:, :4])
    snapshot = session.state()
    numbers = snapshot.states["groups.group"].copy()
    numbers[:, 4:] = 1
    session.restore(edited(snapshot, {"groups.group": numbers}))
    assert worst(stream(session, ids[:, 4:], [1, LENGTH - 5]), full(model, ids)[:, 4:]) < 1e-10


# What it costs


@cache
def flops(shortened: int, context: int) -> int:
    """Of one token: exported, with what is constant folded."""
    program = build(new_model(dtype=torch.float32, shortened_layers=shortened, context=context))
    graphs = {"decode": export.export_graph(program, "decode")}
    fold.apply(graphs, program.spec)
    return cost.flops(graphs["decode"])


@pytest.mark.slow
def test_shortened_layers_cost_every_token_a_whole_layer() -> None:
    """Projections and feed-forward, and attention to the null row, one slot for every token of the context, itself."""
    d_model, width, d_inner, heads, context = 8, 6, 12, 2, 24
    dense_layer = 2 * (4 * d_model * width + 2 * d_model * d_inner)
    positions = 2 * width * (context + 1)
    attention = 2 * 2 * width * (context + 2)
    assert heads * 3 == width
    assert flops(3, context) - flops(2, context) == dense_layer + positions + attention


# Interface


def test_states() -> None:
    spec = build(tiny.model("dynamic-pooling", "gelu")).spec
    keys = [
        (f"{place}.{part}", "float64", ("batch", 2, tiny.CONTEXT, 3), "append")
        for place in ("groups.layer00", "groups.layer01", "post.layer00.attention", "pre.layer00.attention")
        for part in ("key", "value")
    ]
    others = [
        ("groups.count", "int64", ("batch",), "replace"),
        ("groups.ended", "int64", ("batch",), "replace"),
        ("groups.group", "int64", ("batch", tiny.CONTEXT), "append"),
        ("groups.newest", "float64", ("batch", 8), "replace"),
        ("groups.sum", "float64", ("batch", 8), "replace"),
    ]
    found = [(state.name, state.dtype, state.shape, state.update) for state in spec.states]
    assert found == sorted(keys + others)
    assert spec.schedule == Schedule((Tick(("decode",)),), "prefill", 1, 8)
    assert spec.max_context == tiny.CONTEXT


GIVEN = "takes its boundaries from outside, not from a predictor"
AT_RANDOM = "draws its boundaries at random even in evaluation; to stream such a checkpoint, set 'threshold'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boundaries": "gumbel"}, f"boundaries 'gumbel' {AT_RANDOM}"),
        (
            {"boundaries": "fixed"},
            f"boundaries 'fixed' {GIVEN}; for groups of a fixed length there is the family hourglass",
        ),
        ({"boundaries": "whitespaces"}, f"boundaries 'whitespaces' {GIVEN}"),
        ({"boundaries": "none"}, "boundaries 'none' has no groups"),
        ({"boundaries": "entropy"}, "boundaries must be 'threshold', not 'entropy'"),
        ({"activation_function": "tanh"}, "activation_function must be one of gelu, relu, not 'tanh'"),
        ({"shortened_layers": 0}, "shortened_layers must be a whole number of at least 1, not 0"),
        ({"d_model": 7}, "d_model must be even for sinusoid positions, not 7"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        new_model(**settings)
    assert str(refused.value) == message
