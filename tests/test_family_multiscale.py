"""Multi-scale models: against their equations in loops, what runs when, what is remembered, what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cases import VOCAB, build, eager_session, full, seeded, stream, tokens, worst
from hypothesis import given
from hypothesis import strategies as st
from slow_blocks import Weights
from torch.utils.flop_counter import FlopCounterMode

from exporters import program
from mscompile.contracts import Array, Profile, Tick
from mscompile.errors import ConfigError, InputError, Refusal
from mscompile.models import families
from mscompile.models.family import ReferenceModel
from mscompile.models.multiscale_retina import Resolution, sights

EXACT = 1e-10
HEADS, WIDTH, INNER = 2, 8, 12
CONTEXT = 50  # so that the last coarse row is cut off
SIZES = {"vocab_size": VOCAB, "d_model": WIDTH, "d_ff": INNER, "n_head": HEADS, "context": CONTEXT}
SCALES = {1: 1, 4: 2, 16: 3}  # factor: layers
NOTATION = {
    "top-down": {"scales": "1@1 2@4 3@16"},
    "bottom-up": {"scales": "1@1 2@4 3@16", "post_layers": 2},
    "retina": {"n_layer": 2, "resolutions": "5@1 9@4 0@16"},
}
LENGTH = 15


def made(family: str, **settings: Any) -> ReferenceModel:
    row = families.find(f"multiscale-{family}")
    return seeded(row.model(row.parse_config({**SIZES, **settings})))


def ended(token: int, factor: int) -> int:
    """The newest row of `factor` tokens at a token, -1 before any: a_k(t) of the paper's reconstruction."""
    return (token + 1) // factor - 1


def means(rows: list[Array], group: int) -> list[Array]:
    return [sum(rows[i * group : (i + 1) * group]) / group for i in range(len(rows) // group)]


def embedded(weights: Weights, ids: Array) -> list[Array]:
    return [weights["embedding.weight"][i] + weights["positions.0.table.weight"][t] for t, i in enumerate(ids)]


def top_down(model: ReferenceModel, ids: Array) -> Array:
    weights, scales = Weights.of(model), model.config.parsed
    tokens = embedded(weights, ids)
    coarse: list[Array] = []
    for s in reversed(range(len(scales))):
        factor, name, rows = scales[s].factor, f"scales.{s}", []
        for g, mean in enumerate(means(tokens, factor)):
            row = mean + weights[f"positions.{s}.table.weight"][g] if s else mean
            if s + 1 < len(scales):
                newest = ended((g + 1) * factor - 1, scales[s + 1].factor)
                above = coarse[newest] if newest >= 0 else weights[f"{name}.null"]
                row = weights.linear(f"{name}.merge", np.concatenate([row, above]))
            rows.append(row)
        coarse = weights.stack(f"{name}.stack", rows, scales[s].layers, HEADS)
    return weights.logits(coarse)


def bottom_up(model: ReferenceModel, ids: Array) -> Array:
    weights, scales = Weights.of(model), model.config.parsed
    outputs: list[list[Array]] = []
    for s, scale in enumerate(scales):
        rows = embedded(weights, ids)
        if s:
            pooled = means(outputs[-1], scale.factor // scales[s - 1].factor)
            rows = [row + weights[f"positions.{s}.table.weight"][g] for g, row in enumerate(pooled)]
        outputs.append(weights.stack(f"stacks.{s}", rows, scale.layers, HEADS))
    aggregated = []
    for t, token in enumerate(outputs[0]):
        seen = [
            weights.norm("aggregation.attention_norm", row) + weights["aggregation.scale_embedding"][s]
            for s, scale in enumerate(scales)
            for row in outputs[s][: ended(t, scale.factor) + 1]
        ]
        query = weights.norm("aggregation.attention_norm", token)
        attended = weights.attention("aggregation.attention", query, [seen] * HEADS)
        aggregated.append(weights.finish("aggregation", token, attended))
    return weights.logits(weights.stack("post", aggregated, model.config.post_layers, HEADS))


def retina(model: ReferenceModel, ids: Array) -> Array:
    weights, resolutions = Weights.of(model), model.config.parsed
    rows = embedded(weights, ids)
    for layer in range(model.config.n_layer):
        block = f"stack.blocks.{layer}"
        normed = [weights.norm(f"{block}.attention_norm", row) for row in rows]
        after = []
        for t, row in enumerate(rows):
            seen, end = [], t + 1
            for s, resolution in enumerate(resolutions):
                start = 0
                if resolution.window:
                    coarser = resolutions[s + 1].factor
                    start = max(0, t + 1 - resolution.window) // coarser * coarser
                seen += means(normed[start:end], resolution.factor)
                end = start
            attended = weights.attention(f"{block}.attention", normed[t], [seen] * HEADS)
            after.append(weights.finish(block, row, attended))
        rows = after
    return weights.logits(rows)


ORACLES = {"multiscale-top-down": top_down, "multiscale-bottom-up": bottom_up, "multiscale-retina": retina}
CASES = [(family, variant) for family in ORACLES for variant in tiny.TINY[family]]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_the_model_follows_its_equations(family: str, variant: str) -> None:
    model, ids = tiny.model(family, variant), tokens(1, LENGTH)
    for length in (1, 2, LENGTH):
        assert worst(full(model, ids[:, :length])[0], ORACLES[family](model, ids[0, :length])) <= 1e-12


@given(
    windows=st.lists(st.integers(1, 20), max_size=3).map(sorted),
    ratios=st.lists(st.integers(2, 4), min_size=3, max_size=3),
    token=st.integers(0, 200),
)
def test_every_token_is_seen_once_and_near_ones_finely(windows: list[int], ratios: list[int], token: int) -> None:
    factors = [int(np.prod(ratios[:s])) for s in range(len(windows) + 1)]
    resolutions = [Resolution(w, k) for w, k in zip([*windows, 0], factors, strict=True)]
    seen: list[int] = []
    for (first, end), resolution in zip(sights(resolutions, torch.tensor(token)), resolutions, strict=True):
        rows = range(int(first), int(end))
        seen = [*(i for row in rows for i in range(row * resolution.factor, (row + 1) * resolution.factor)), *seen]
    assert seen == list(range(token + 1))
    for (first, _), near, far in zip(
        sights(resolutions, torch.tensor(token)), resolutions, resolutions[1:], strict=False
    ):
        reach = token + 1 - int(first) * near.factor  # tokens seen at this resolution or finer
        assert reach == token + 1 or near.window <= reach < near.window + far.factor


@given(
    windows=st.lists(st.integers(1, 12), min_size=1, max_size=2).map(sorted),
    ratio=st.integers(2, 3),
    chunks=st.lists(st.integers(1, 13), min_size=1, max_size=6).filter(lambda cuts: sum(cuts) <= CONTEXT),
)
def test_rings_hold_what_any_window_sees(windows: list[int], ratio: int, chunks: list[int]) -> None:
    text = " ".join(f"{window}@{ratio**s}" for s, window in enumerate([*windows, 0]))
    model, ids = made("retina", n_layer=1, resolutions=text), tokens(1, sum(chunks))
    assert worst(stream(eager_session(model, max_chunk=9), ids, chunks), full(model, ids)) <= EXACT


def block_cost(capacity: int) -> int:
    """Floating-point operations of a block on one row, with so many remembered keys: two a multiply-add."""
    return 2 * (4 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * WIDTH * (capacity + 1)


def rows(factor: int) -> int:
    return -(-CONTEXT // factor)


def top_down_cost(due: list[int]) -> int:
    merges = 4 * WIDTH**2 * sum(factor < 16 for factor in due)
    return merges + sum(SCALES[factor] * block_cost(rows(factor)) for factor in due)


def bottom_up_cost(due: list[int]) -> int:
    stacks = sum(SCALES[factor] * block_cost(rows(factor)) for factor in due)
    other_keys = sum(rows(factor) for factor in (4, 16)) + len(due) - 1  # than the tokens' in the aggregation
    aggregation = block_cost(CONTEXT) + 4 * WIDTH * other_keys + 4 * WIDTH**2 * (len(due) - 1)
    return stacks + aggregation + 2 * block_cost(CONTEXT)


def retina_cost(due: list[int]) -> int:
    keys = (5 + 4 - 2) + (9 + 16 - 2) // 4 + rows(16)
    return 2 * (block_cost(keys) + 4 * WIDTH**2 * (len(due) - 1))


COSTS = {"top-down": top_down_cost, "bottom-up": bottom_up_cost, "retina": retina_cost}


@pytest.mark.parametrize("family", COSTS)
def test_a_token_costs_what_its_scales_cost(family: str) -> None:
    built = build(made(family, **NOTATION[family]), max_chunk=16)
    for coarsest, due in ((1, [1]), (4, [1, 4]), (16, [1, 4, 16])):
        name = f"decode_{coarsest}"
        inputs = [
            torch.zeros(tensor.concrete(batch=1), dtype=getattr(torch, tensor.dtype))
            for tensor in built.spec.graph(name).inputs
        ]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            built.graphs[name](*inputs)
        assert counter.get_total_flops() == COSTS[family](due) + 2 * WIDTH * VOCAB


@pytest.mark.parametrize("family", NOTATION)
def test_coarse_graphs_are_due_where_their_rows_end(family: str) -> None:
    schedule = build(made(family, **NOTATION[family]), max_chunk=40).spec.schedule
    three, four = Tick(("decode_1",), repeat=3), Tick(("decode_4",))
    assert schedule.ticks == (*(three, four) * 3, three, Tick(("decode_16",)))
    assert (schedule.prefill, schedule.chunk_multiple, schedule.max_chunk) == ("prefill", 16, 32)


def scale_of(state: str) -> int:
    return int(re.search(r"scale(\d+)", state)[1]) if "scale" in state else 1  # type: ignore[index]


@pytest.mark.parametrize("family", NOTATION)
def test_a_graph_writes_keys_of_its_own_scales_only(family: str) -> None:
    spec = build(made(family, **NOTATION[family]), max_chunk=16).spec
    for graph in spec.graphs:
        coarsest = int(graph.name.removeprefix("decode_")) if graph.tokens == 1 else 16
        keys = {state.name for state in spec.states if state.update == "append" and scale_of(state.name) <= coarsest}
        assert {name for name in graph.writes if spec.state(name).update == "append"} == keys


def shapes(family: str) -> dict[str, tuple[object, ...]]:
    spec = build(made(family, **NOTATION[family]), max_chunk=16).spec
    return {state.name: state.shape[1:] for state in spec.states if not state.name.endswith("value")}


def test_states_of_top_down() -> None:
    head = WIDTH // HEADS
    assert shapes("top-down") == {
        **{f"scale1.stack.block{i:02}.attention.key": (HEADS, 50, head) for i in range(1)},
        **{f"scale4.stack.block{i:02}.attention.key": (HEADS, 13, head) for i in range(2)},
        **{f"scale16.stack.block{i:02}.attention.key": (HEADS, 4, head) for i in range(3)},
        **{f"scale{factor}.pooling.sum": (WIDTH,) for factor in (4, 16)},
        **{f"scale{factor}.held": (WIDTH,) for factor in (1, 4)},
    }


def test_states_of_bottom_up() -> None:
    head = WIDTH // HEADS
    assert shapes("bottom-up") == {
        **{f"scale1.stack.block{i:02}.attention.key": (HEADS, 50, head) for i in range(1)},
        **{f"scale4.stack.block{i:02}.attention.key": (HEADS, 13, head) for i in range(2)},
        **{f"scale16.stack.block{i:02}.attention.key": (HEADS, 4, head) for i in range(3)},
        **{f"scale{factor}.pooling.sum": (WIDTH,) for factor in (4, 16)},
        **{f"aggregation.scale{factor}.key": (HEADS, size, head) for factor, size in ((1, 50), (4, 13), (16, 4))},
        **{f"post.block{i:02}.attention.key": (HEADS, 50, head) for i in range(2)},
    }


def test_states_of_the_retina() -> None:
    block = {
        "scale1.key": (HEADS, 5 + 4 - 2, WIDTH // HEADS),
        "scale4.key": (HEADS, (9 + 16 - 2) // 4, WIDTH // HEADS),
        "scale16.key": (HEADS, 4, WIDTH // HEADS),
        "scale4.pooling.sum": (WIDTH,),
        "scale16.pooling.sum": (WIDTH,),
    }
    assert shapes("retina") == {f"stack.block{i:02}.{name}": shape for i in range(2) for name, shape in block.items()}


def test_a_new_stream_holds_the_null_row() -> None:
    model = made("top-down", **NOTATION["top-down"])
    held = build(model, max_chunk=16).spec.state("scale4.held")
    assert held.initial_value(2).tolist() == [model.scales[1].null.tolist()] * 2


@pytest.mark.parametrize("family", NOTATION)
def test_rows_out_of_phase_run_to_the_end_of_the_context(family: str) -> None:
    """At the last token row 0 has reached its end when a coarse row ends in row 1: it is carried along."""
    model, ids = made(family, **NOTATION[family]), tokens(2, CONTEXT)
    session = eager_session(model, 2, max_chunk=16)
    session.step(ids[:, :6])
    session.reset([1])
    logits = session.step(ids[:, 6:])
    assert session.position.tolist() == [CONTEXT, CONTEXT - 6]
    assert worst(logits[0], full(model, ids[:1])[0, 6:]) <= EXACT
    assert worst(logits[1], full(model, ids[1:, 6:])[0]) <= EXACT


@pytest.mark.parametrize("family", NOTATION)
def test_positions_end_with_the_context(family: str) -> None:
    model = made(family, **NOTATION[family])
    with pytest.raises(InputError, match=r"^51 tokens are more than the 50 that have positions$"):
        full(model, tokens(1, CONTEXT + 1))
    with pytest.raises(Refusal, match=r"^scale1.positions: the model has positions for 50 tokens, so a stream cannot"):
        program.build(model, Profile(1, 1, 16), context=51)
    assert program.build(model, Profile(1, 1, 16), context=20).spec.max_context == 20


WRONG: list[tuple[str, dict[str, object], str]] = [
    ("top-down", {"scales": 3}, "scales must be a text such as '2@1 4@4', not 3"),
    ("top-down", {"scales": ""}, "scales '' must start at factor 1"),
    ("top-down", {"scales": "2@2 2@4"}, "scales '2@2 2@4' must start at factor 1"),
    ("top-down", {"scales": "2@1 4"}, "scales entry '4' must read layers@factor, for example 2@1"),
    ("top-down", {"scales": "2@1 2@4 2@6"}, "scales '2@1 2@4 2@6': factor 6 must be a larger multiple of 4"),
    ("top-down", {"scales": "2@1 0@4"}, "scales '2@1 0@4' needs at least one layer at factor 4"),
    ("top-down", {"n_head": 3}, "d_model 8 must be divisible by n_head 3"),
    ("top-down", {"scales": "1@1 1@64"}, "context 50 must hold at least one row of the coarsest scale, 64 tokens"),
    ("bottom-up", {"post_layers": 0}, "post_layers must be a whole number of at least 1, not 0"),
    ("bottom-up", {"context": 0}, "context must be a whole number of at least 1, not 0"),
    ("retina", {"n_layer": 0}, "n_layer must be a whole number of at least 1, not 0"),
    ("retina", {"resolutions": "4@1 8@2"}, "resolutions '4@1 8@2' must end with 0@2, which sees the rest"),
    (
        "retina",
        {"resolutions": "4@1 0@2 0@4"},
        "resolutions '4@1 0@2 0@4': only the last window may be 0, not that at factor 2",
    ),
    (
        "retina",
        {"resolutions": "4@1 3@2 0@4"},
        "resolutions '4@1 3@2 0@4': window 3 must be at least the finer one, 4",
    ),
]


@pytest.mark.parametrize(("family", "settings", "sentence"), WRONG, ids=range(len(WRONG)))
def test_impossible_settings_are_refused(family: str, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        made(family, **settings)


@pytest.mark.parametrize("family", NOTATION)
def test_titles_say_what_it_is(family: str) -> None:
    assert families.find(f"multiscale-{family}").title.endswith("(reconstruction)")
