"""Attention over everything seen so far: keys and values are appended once and never change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    CONTEXT,
    HOURGLASS,
    build,
    check_rollout,
    eager_session,
    full,
    hourglass,
    model,
    plans,
    seeded,
    spoiled,
    stream,
    tokens,
    worst,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from exporters import program
from exporters.attention import CachedAttention
from exporters.rules import RULES
from exporters.stream import Call, Scope
from mscompile.contracts import Hit, Profile
from mscompile.errors import Refusal
from mscompile.models.relative import Biases, Geometry, RelativeAttention

Plan = tuple[int, int, list[tuple[Any, ...]]]
ATTENTIVE = ["attention+repeat", "average+attention", "attention+attention", "attention-linear+attention", "one-scale"]


def scope(context: int | None, factor: int = 1, hits: list[Hit] | None = None) -> Scope:
    return Scope("", factor, context, torch.float64, RULES, [] if hits is None else hits)


def attention(geometry: Geometry) -> RelativeAttention:
    return seeded(RelativeAttention(8, 2, 3, bias=True, geometry=geometry))  # type: ignore[type-var]


@pytest.mark.parametrize(("factor", "rows"), [(1, 10), (2, 5), (3, 4), (4, 3), (16, 1)])
def test_states_hold_one_key_and_one_value_a_row_of_the_context(factor: int, rows: int) -> None:
    hits: list[Hit] = []
    streaming = scope(10, factor, hits).stream(attention(Geometry(scale=-factor)), "attention")
    assert isinstance(streaming, CachedAttention)
    assert [state.name for state in streaming.states()] == ["attention.key", "attention.value"]
    for state in streaming.states():
        assert state.shape == ("batch", 2, rows, 3)  # (batch, heads, rows, d_head)
        assert (state.update, state.time_axis, state.batch_axis, state.initial) == ("append", 2, 0, 0.0)
    assert [(hit.name, hit.place, hit.applied) for hit in hits] == [("cached-attention", "attention", True)]


def test_without_a_context_it_refuses() -> None:
    with pytest.raises(Refusal) as caught:
        scope(None).child("scale1").stream(attention(Geometry()), "attention")
    assert str(caught.value) == (
        "scale1.attention: this memory grows with the stream, so a context length must be given"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("module", [nn.LSTM(4, 4), attention(Geometry(window=3))], ids=["LSTM", "windowed attention"])
def test_a_module_that_no_rule_streams_is_refused_with_what_to_do(module: nn.Module) -> None:
    with pytest.raises(Refusal) as caught:
        scope(8).child("body").stream(module, "cell")
    assert str(caught.value) == (
        f"body.cell: no rule streams a {type(module).__name__}; `mscompile rules` lists what is streamed, "
        "and an adapter takes modules of your own"
    )


def test_a_model_that_no_rule_streams_is_refused() -> None:
    class Unknown(nn.Module):
        config = None

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    with pytest.raises(Refusal, match=r"^model: no rule streams a Unknown; "):
        program.build(Unknown(), Profile())  # type: ignore[arg-type]


def _in_chunks(module: RelativeAttention, x: Tensor, chunks: list[int], garbage: float) -> Tensor:
    """x (B, T, d) through the streaming form, with `garbage` in slots that were not written yet."""
    streaming = scope(x.shape[1]).stream(module, "attention")
    biases = _biases(module)
    states = {s.name: torch.full((x.shape[0], *s.shape[1:]), garbage).double() for s in streaming.states()}
    done, out = 0, []
    for length in chunks:
        first = torch.full((x.shape[0],), done)
        call = Call(first, states, biases, single=length == 1, due=lambda _: True)
        rows = x[:, done : done + length]
        out.append(streaming(rows, rows, call))
        for name, new in call.written.items():
            states[name][:, :, done : done + length] = new
        done += length
    return torch.cat(out, dim=1)


def _biases(module: RelativeAttention) -> Biases:
    generator = torch.Generator().manual_seed(1)
    shape = (module.n_head, module.d_head)
    content, position = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return Biases(content, position)


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(scale=-3), Geometry(scale=2, clamp=4)], ids=str)
@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 1, 3, 1]], ids=str)
def test_the_streaming_form_equals_the_module(geometry: Geometry, chunks: list[int]) -> None:
    module = attention(geometry)
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = module(x, x, _biases(module)).numpy()
    assert worst(_in_chunks(module, x, chunks, garbage=0.0).numpy(), whole) <= 1e-12
    assert worst(_in_chunks(module, x, chunks, garbage=1e6).numpy(), whole) <= 1e-12


def test_graphs_append_one_row_a_token_and_read_what_they_append_to() -> None:
    spec = build(hourglass(hierarchy="1@1", context=10), max_chunk=4).spec
    shapes = {
        graph.name: {tensor.name: tensor.shape for tensor in graph.outputs if tensor.name != "logits"}
        for graph in spec.graphs
    }
    key, value = "scale1.pre.block00.attention.key.out", "scale1.pre.block00.attention.value.out"
    assert shapes["decode"] == {key: ("batch", 2, 1, 4), value: ("batch", 2, 1, 4)}
    assert shapes["prefill"] == {key: ("batch", 2, "chunk", 4), value: ("batch", 2, "chunk", 4)}
    assert all(graph.reads == graph.writes for graph in spec.graphs)
    assert spec.max_context == 10


@pytest.mark.parametrize("hierarchy", ["1@1", "1@1 1@3 1@1", "1@1 1@2 1@4 1@2 1@1"])
@pytest.mark.parametrize("context", [1, 2, 5, 7, 12, 13])
def test_a_stream_may_fill_its_context_to_the_last_token(hierarchy: str, context: int) -> None:
    reference = hourglass(hierarchy=hierarchy)
    ids = tokens(2, context)
    for max_chunk in (1, 16):
        session = eager_session(reference, batch=2, max_chunk=max_chunk, context=context)
        assert worst(stream(session, ids, [context]), full(reference, ids)) <= 1e-10


def test_a_context_given_to_the_build_is_used_in_place_of_the_configured_one() -> None:
    reference = hourglass(hierarchy="1@1", context=10)
    spec = build(reference, context=6).spec
    assert spec.max_context == 6
    assert {state.shape[2] for state in spec.states} == {6}


@pytest.mark.parametrize("name", ATTENTIVE)
@given(plan=plans())
def test_any_stream_equals_the_full_forward(name: str, plan: Plan) -> None:
    check_rollout(model(name), plan)


@given(name=st.sampled_from(ATTENTIVE), plan=plans())
def test_any_stream_equals_the_full_forward_in_single_precision(name: str, plan: Plan) -> None:
    check_rollout(model(name, torch.float32), plan)


@pytest.mark.parametrize("name", HOURGLASS)
@pytest.mark.parametrize("seen", [0, 1, 4, 6])
def test_slots_that_were_not_written_are_never_seen(name: str, seen: int) -> None:
    session = eager_session(model(name), batch=2)
    if seen:
        session.step(tokens(2, seen))
        session.reset([1])
        session.step(tokens(2, 2))
    snapshot = garbage = session.state()
    for state, cursor in snapshot.cursors.items():
        garbage = spoiled(garbage, state, 2, [range(count) for count in cursor])
    for chunks in ([1] * 8, [4, 1, 7, 1]):
        ids = tokens(2, sum(chunks), seed=3)
        session.restore(snapshot)
        clean = stream(session, ids, chunks)
        session.restore(garbage)
        assert worst(stream(session, ids, chunks), clean) <= 1e-12


@pytest.mark.parametrize("name", ["attention+attention", "two-valleys"])
def test_written_slots_are_seen(name: str) -> None:
    """The counterpart of the test above: garbage in any remembered key or value does show."""
    session = eager_session(model(name))
    session.step(tokens(1, 8))
    snapshot, ids = session.state(), tokens(1, CONTEXT - 8 - 1, seed=3)
    clean = session.step(ids)
    for state in snapshot.cursors:
        session.restore(spoiled(snapshot, state, 2, [range(0)], garbage=3.0))
        assert worst(session.step(ids), clean) > 1e-4, state


def test_keys_and_values_never_change_once_written() -> None:
    session = eager_session(model("two-valleys"))
    before = session.state()
    for position in range(12):
        session.step(tokens(1, 1, seed=position))
        after = session.state()
        for name, cursor in before.cursors.items():
            written = int(cursor[0])
            assert np.array_equal(after.states[name][:, :, :written], before.states[name][:, :, :written]), name
        before = after
