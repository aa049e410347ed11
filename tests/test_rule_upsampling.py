"""Upsampling as state: the newest coarse row, expanded at its tick, serves k fine rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import build, check_rollout, eager_session, hourglass, model, plans, spoiled, tokens, worst
from hypothesis import given
from hypothesis import strategies as st

from exporters.rules import RULES
from exporters.stream import Scope
from exporters.upsampling import StreamUpsampling
from mscompile.errors import Refusal
from mscompile.models.hourglass import UPSAMPLINGS

Plan = tuple[int, int, list[tuple[Any, ...]]]
RISING = [f"{shortening}+{upsampling}" for shortening in ("average", "linear") for upsampling in UPSAMPLINGS]
EXPANSION = "scale1.valley.upsampling.expansion"


def scope(context: int | None) -> Scope:
    return Scope("", 1, context, torch.float64, RULES, [])


def upsampling(kind: str) -> Any:
    return hourglass(hierarchy="1@1 1@3 1@1", upsampling=kind).level.valley.upsampling


@pytest.mark.parametrize(("kind", "slots"), [("repeat", 1), ("linear", 3)])
def test_the_newest_row_is_kept_expanded(kind: str, slots: int) -> None:
    streaming = scope(None).stream(upsampling(kind), "upsampling")
    assert isinstance(streaming, StreamUpsampling)
    (expansion,) = streaming.states()
    assert (expansion.name, expansion.shape, expansion.update) == (
        "upsampling.expansion", ("batch", slots, 8), "replace",
    )  # fmt: skip


def test_attention_upsampling_also_keeps_a_key_and_a_value_a_coarse_row() -> None:
    streaming = scope(10).stream(upsampling("attention"), "upsampling")
    assert [(state.name, state.shape, state.update, state.time_axis) for state in streaming.states()] == [
        ("upsampling.expansion", ("batch", 3, 8), "replace", None),
        ("upsampling.key", ("batch", 2, 4, 4), "append", 2),
        ("upsampling.value", ("batch", 2, 4, 4), "append", 2),
    ]


def test_attention_upsampling_refuses_an_endless_stream() -> None:
    with pytest.raises(Refusal) as caught:
        scope(None).stream(upsampling("attention"), "upsampling")
    assert str(caught.value) == "upsampling: this memory grows with the stream, so a context length must be given"


@pytest.mark.parametrize("kind", UPSAMPLINGS)
def test_its_states_are_written_at_ticks_and_read_between_them(kind: str) -> None:
    spec = build(hourglass(hierarchy="1@1 1@3 1@1", shortening="average", upsampling=kind)).spec
    own = {state.name for state in spec.states if ".upsampling." in state.name}
    assert own & set(spec.graph("decode_1").writes) == set()
    assert own <= set(spec.graph("decode_1").reads)
    assert own <= set(spec.graph("decode_3").writes)
    assert own <= set(spec.graph("prefill").writes)
    assert EXPANSION not in spec.graph("decode_3").reads, "a tick makes a new row and needs no old one"
    if kind == "attention":
        shapes = {tensor.name: tensor.shape for tensor in spec.graph("prefill").outputs}
        assert shapes["scale1.valley.upsampling.key.out"] == ("batch", 2, "chunk/3", 4)


@pytest.mark.parametrize("kind", ["linear", "attention"])
@pytest.mark.parametrize("position", [1, 2, 4, 5])
def test_fine_row_n_takes_slot_n_modulo_the_group_and_no_other(kind: str, position: int) -> None:
    session = eager_session(model(f"average+{kind}"))
    session.step(tokens(1, position))
    snapshot, ids = session.state(), tokens(1, 1, seed=5)
    clean, slot = session.step(ids), position % 3
    session.restore(spoiled(snapshot, EXPANSION, 1, [range(slot, slot + 1)]))
    assert worst(session.step(ids), clean) == 0.0
    others = [row for row in range(3) if row != slot]
    session.restore(spoiled(snapshot, EXPANSION, 1, [range(others[0], others[1] + 1, others[1] - others[0])], 3.0))
    assert worst(session.step(ids), clean) > 1e-3


@pytest.mark.parametrize("kind", UPSAMPLINGS)
@pytest.mark.parametrize("chunk", [3, 6])
def test_a_chunk_leaves_the_expansion_of_its_last_coarse_row(kind: str, chunk: int) -> None:
    reference, ids = model(f"linear+{kind}"), tokens(2, chunk)
    many, single = eager_session(reference, batch=2), eager_session(reference, batch=2, max_chunk=1)
    many.step(ids)
    single.step(ids)
    assert worst(many.state().states[EXPANSION], single.state().states[EXPANSION]) <= 1e-12
    assert np.abs(many.state().states[EXPANSION]).max() > 1e-3


@pytest.mark.parametrize("name", RISING)
@given(plan=plans())
def test_any_stream_equals_the_full_forward(name: str, plan: Plan) -> None:
    check_rollout(model(name), plan)


@given(name=st.sampled_from(RISING), plan=plans())
def test_any_stream_equals_the_full_forward_in_single_precision(name: str, plan: Plan) -> None:
    check_rollout(model(name, torch.float32), plan)
