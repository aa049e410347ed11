"""Shortening as state: the last k - 1 fine rows wait, and a coarse row is made when its group is complete."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import HOURGLASS, build, check_rollout, eager_session, edited, hourglass, model, plans, tokens, worst
from hypothesis import given
from hypothesis import strategies as st

from exporters.pooling import StreamShortening
from exporters.rules import RULES
from exporters.stream import Scope
from mscompile.errors import Refusal
from mscompile.models.hourglass import SHORTENINGS

Plan = tuple[int, int, list[tuple[Any, ...]]]
POOLED = [f"{shortening}+repeat" for shortening in SHORTENINGS]
PLACE = "scale1.valley.shortening"


def scope(context: int | None, factor: int = 1) -> Scope:
    return Scope("", factor, context, torch.float64, RULES, [])


def shortening(kind: str, hierarchy: str = "1@1 1@3 1@1") -> Any:
    return hourglass(hierarchy=hierarchy, shortening=kind).level.valley.shortening


@pytest.mark.parametrize("kind", ["average", "linear"])
def test_pooling_waits_with_one_row_less_than_its_group(kind: str) -> None:
    streaming = scope(None).stream(shortening(kind), "shortening")
    assert isinstance(streaming, StreamShortening)
    (rows,) = streaming.states()
    assert (rows.name, rows.shape, rows.update) == ("shortening.rows", ("batch", 2, 8), "replace")
    assert rows.initial == 0.0  # the zeros that the shift brings in


@pytest.mark.parametrize("kind", ["attention", "attention-linear"])
@pytest.mark.parametrize(("context", "rows"), [(9, 9), (10, 12)])
def test_attention_shortening_also_keeps_keys_and_values_of_whole_groups(kind: str, context: int, rows: int) -> None:
    streaming = scope(context).stream(shortening(kind), "shortening")
    found = [(state.name, state.shape, state.update, state.time_axis) for state in streaming.states()]
    assert found == [
        ("shortening.key", ("batch", 2, rows, 4), "append", 2),
        ("shortening.rows", ("batch", 2, 8), "replace", None),
        ("shortening.value", ("batch", 2, rows, 4), "append", 2),
    ]


def test_attention_shortening_refuses_an_endless_stream() -> None:
    with pytest.raises(Refusal) as caught:
        scope(None).stream(shortening("attention"), "shortening")
    assert str(caught.value) == "shortening: this memory grows with the stream, so a context length must be given"


def test_keys_are_appended_by_the_group_and_only_when_it_is_complete() -> None:
    spec = build(hourglass(hierarchy="1@1 1@3 1@1", shortening="attention")).spec
    rows, key, value = f"{PLACE}.rows", f"{PLACE}.key", f"{PLACE}.value"
    assert not {key, value} & {*spec.graph("decode_1").writes, *spec.graph("decode_1").reads}
    assert rows in spec.graph("decode_1").writes
    assert {rows, key, value} <= set(spec.graph("decode_3").writes)
    shapes = {tensor.name: tensor.shape for tensor in spec.graph("decode_3").outputs}
    assert shapes[f"{key}.out"] == ("batch", 2, 3, 4)
    assert shapes[f"{rows}.out"] == ("batch", 2, 8)
    shapes = {tensor.name: tensor.shape for tensor in spec.graph("prefill").outputs}
    assert shapes[f"{key}.out"] == ("batch", 2, "chunk", 4)


def test_a_deeper_shortening_counts_rows_of_its_own_scale() -> None:
    spec = build(hourglass(hierarchy="1@1 1@2 1@6 1@2 1@1", shortening="attention"), max_chunk=12).spec
    place = "scale1.valley.scale2.valley.shortening"
    assert spec.state(f"{place}.rows").shape == ("batch", 2, 8)  # 6 / 2 rows a group, one less
    assert spec.state(f"{place}.key").shape == ("batch", 2, 12, 4)  # 24 tokens are 12 rows of two
    shapes = {tensor.name: tensor.shape for tensor in spec.graph("prefill").outputs}
    assert shapes[f"{place}.key.out"] == ("batch", 2, "chunk/2", 4)


@pytest.mark.parametrize("kind", SHORTENINGS)
def test_the_rows_that_wait_are_the_newest_fine_rows(kind: str) -> None:
    reference: Any = model(f"{kind}+repeat")
    session, ids = eager_session(reference), tokens(1, 8)
    for position in range(8):
        session.step(ids[:, position : position + 1])
        embedded = reference.embedding(torch.from_numpy(ids[:, : position + 1]))
        fine = reference.level.pre(embedded, reference.biases).numpy()
        wanted = np.concatenate([np.zeros((1, 2, 8)), fine], axis=1)[:, -2:]
        assert worst(session.state().states[f"{PLACE}.rows"], wanted) <= 1e-12


@pytest.mark.parametrize("kind", SHORTENINGS)
def test_the_zeros_before_a_stream_are_part_of_the_model(kind: str) -> None:
    """They are averaged and attended to: other initial rows give other logits from the first token on."""
    session = eager_session(model(f"{kind}+repeat"))
    fresh = session.state()
    logits = session.step(tokens(1, 4))
    session.restore(edited(fresh, {f"{PLACE}.rows": np.linspace(-1, 1, 16).reshape(1, 2, 8)}))
    assert worst(session.step(tokens(1, 4))[:, :1], logits[:, :1]) > 1e-4


@pytest.mark.parametrize("kind", SHORTENINGS)
def test_a_token_reaches_the_coarse_scale_with_its_own_tick_or_the_next(kind: str) -> None:
    """The coarse row made at token g k covers tokens g k - k + 1 .. g k, the newest included."""
    reference = model(f"{kind}+repeat")
    state = "scale1.valley.scale3.pre.block00.attention.key"
    keys = []
    for changed in (None, 0, 1, 2, 3):
        ids = tokens(1, 4)
        if changed is not None:
            ids[0, changed] = (ids[0, changed] + 1) % 11
        session = eager_session(reference)
        session.step(ids)
        keys.append(session.state().states[state][0, :, :2])  # rows made at tokens 0 and 3
    moved = [[bool(worst(key[:, row], keys[0][:, row]) > 1e-6) for row in range(2)] for key in keys[1:]]
    assert moved == [[True, True], [False, True], [False, True], [False, True]]


@pytest.mark.parametrize("name", POOLED)
@given(plan=plans())
def test_any_stream_equals_the_full_forward(name: str, plan: Plan) -> None:
    check_rollout(model(name), plan)


@given(name=st.sampled_from(POOLED), plan=plans())
def test_any_stream_equals_the_full_forward_in_single_precision(name: str, plan: Plan) -> None:
    check_rollout(model(name, torch.float32), plan)


@given(name=st.sampled_from([*HOURGLASS]), plan=plans())
def test_every_kind_streams_exactly(name: str, plan: Plan) -> None:
    check_rollout(model(name), plan)
