"""Transformer-XL memory as state: rolling with `same_length`, frozen within a segment without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    TRANSFORMER_XL,
    build,
    check_rollout,
    eager_session,
    full,
    model,
    plans,
    spoiled,
    stream,
    tokens,
    transformer_xl,
    worst,
)
from hypothesis import given
from hypothesis import strategies as st

from engines.session import StreamSession
from exporters.memory import RollingLayer, SegmentLayer
from exporters.rules import RULES
from exporters.stream import Scope
from mscompile.contracts import Schedule, Snapshot, Tick
from mscompile.models.family import ReferenceModel

Plan = tuple[int, int, list[tuple[Any, ...]]]
ROLLING = [name for name in TRANSFORMER_XL if model(name).config.same_length]
SEGMENTED = [name for name in TRANSFORMER_XL if name not in ROLLING]


def test_with_same_length_a_layer_keeps_one_row_less_than_its_window() -> None:
    layer = transformer_xl(same_length=True, mem_len=5).layers[0]
    streaming = Scope("", 1, None, torch.float64, RULES, []).stream(layer, "layer00")
    assert isinstance(streaming, RollingLayer)
    (mems,) = streaming.states()
    assert (mems.name, mems.shape, mems.update, mems.dtype) == ("layer00.mems", ("batch", 4, 8), "replace", "float64")


def test_without_it_a_layer_keeps_the_memory_and_the_segment_apart() -> None:
    layer = transformer_xl(mem_len=5, tgt_len=3).layers[0]
    streaming = Scope("", 1, None, torch.float32, RULES, []).stream(layer, "layer00")
    assert isinstance(streaming, SegmentLayer)
    mems, segment = streaming.states()
    assert (mems.name, mems.shape, mems.update) == ("layer00.mems", ("batch", 5, 8), "replace")
    assert (segment.name, segment.shape) == ("layer00.segment", ("batch", 3, 8))
    assert (segment.update, segment.time_axis, segment.dtype) == ("append", 1, "float32")


def test_rolling_needs_one_graph_a_token_and_one_for_many() -> None:
    spec = build(transformer_xl(same_length=True, tgt_len=4), max_chunk=16).spec
    assert spec.schedule == Schedule((Tick(("decode",)),), "prefill", chunk_multiple=1, max_chunk=16)
    assert [graph.name for graph in spec.graphs] == ["decode", "prefill"]
    for graph in spec.graphs:
        assert graph.reads == graph.writes == ("layer00.mems", "layer01.mems")
    assert spec.max_context is None


@pytest.mark.parametrize(("max_chunk", "longest"), [(16, 4), (3, 3)])
def test_segments_close_every_tgt_len_tokens_and_chunks_never_pass_their_end(max_chunk: int, longest: int) -> None:
    spec = build(transformer_xl(tgt_len=4), max_chunk=max_chunk).spec
    ticks = (Tick(("decode",), repeat=3), Tick(("decode",), closing=("close",)))
    assert spec.schedule == Schedule(ticks, "prefill", chunk_multiple=1, max_chunk=longest)
    assert [graph.name for graph in spec.graphs] == ["close", "decode", "prefill"]


def test_only_closing_writes_the_memory_of_a_segmented_model() -> None:
    spec = build(transformer_xl()).spec
    mems, segments = ("layer00.mems", "layer01.mems"), ("layer00.segment", "layer01.segment")
    assert spec.graph("close").writes == mems
    assert spec.graph("decode").writes == spec.graph("prefill").writes == segments
    assert set(spec.graph("close").reads) == set(spec.graph("decode").reads) == {*mems, *segments}
    assert spec.graph("close").tokens == 0
    assert [tensor.name for tensor in spec.graph("close").inputs] == [f"{name}.in" for name in sorted(mems + segments)]


def test_segments_of_one_token_and_single_token_profiles_have_no_prefill() -> None:
    closing = (Tick(("decode",), closing=("close",)),)
    assert build(transformer_xl(tgt_len=1), max_chunk=8).spec.schedule == Schedule(closing, None, 1, 1)
    assert build(transformer_xl(same_length=True), max_chunk=1).spec.schedule.prefill is None


def test_a_context_does_not_bound_a_model_whose_memory_does_not_grow() -> None:
    for same_length in (True, False):
        assert build(transformer_xl(same_length=same_length), context=7).spec.max_context is None


def test_the_rules_that_fired_are_listed_with_their_places() -> None:
    rolling = [(hit.name, hit.place) for hit in build(transformer_xl(same_length=True)).hits]
    assert rolling == [("rolling-memory", "layer00"), ("rolling-memory", "layer01"), ("transformer-xl", "model")]
    frozen = [(hit.name, hit.place) for hit in build(transformer_xl()).hits]
    assert frozen == [
        ("segment-memory", "layer00"),
        ("segment-memory", "layer01"),
        ("transformer-xl-segments", "model"),
    ]


@pytest.mark.parametrize("name", SEGMENTED)
def test_memory_is_frozen_within_a_segment_and_then_equals_the_published_one(name: str) -> None:
    reference: Any = model(name)
    session, ids = eager_session(reference, batch=2), tokens(2, 15)
    mems, segment_length = reference.empty_mems(2), reference.config.tgt_len
    before = session.state().states["layer01.mems"]
    for position in range(15):
        session.step(ids[:, position : position + 1])
        now = session.state().states["layer01.mems"]
        if (position + 1) % segment_length:
            assert worst(now, before) == 0.0, "memory moved within a segment"
        else:
            begin = position + 1 - segment_length
            _, mems = reference(torch.from_numpy(ids[:, begin : position + 1]), mems)
            published = mems[1].numpy()
            assert worst(now[:, now.shape[1] - published.shape[1] :], published) <= 1e-10
        before = now


@pytest.mark.parametrize("name", ROLLING)
def test_rolling_memory_holds_the_newest_inputs_of_each_layer(name: str) -> None:
    reference: Any = model(name)
    session, ids = eager_session(reference), tokens(1, 9)
    kept = session.state().states["layer00.mems"].shape[1]
    for position in range(9):
        session.step(ids[:, position : position + 1])
        wanted = reference.embed(torch.from_numpy(ids[:, : position + 1])).numpy()[:, -kept:]
        found = session.state().states["layer00.mems"][:, kept - wanted.shape[1] :]
        assert worst(found, wanted) <= 1e-12


@pytest.mark.parametrize("name", TRANSFORMER_XL)
@given(plan=plans())
def test_any_stream_equals_the_full_forward(name: str, plan: Plan) -> None:
    check_rollout(model(name), plan)


@given(name=st.sampled_from([*TRANSFORMER_XL]), plan=plans())
def test_any_stream_equals_the_full_forward_in_single_precision(name: str, plan: Plan) -> None:
    check_rollout(model(name, torch.float32), plan)


@pytest.mark.parametrize("same_length", [True, False])
@pytest.mark.parametrize("skipped", range(9))
def test_a_row_reset_at_any_position_starts_as_if_new_and_leaves_the_other_alone(
    same_length: bool, skipped: int
) -> None:
    reference = model("pre-norm-same-length" if same_length else "pre-norm")
    session, ids = eager_session(reference, batch=2), tokens(2, 9 + skipped)
    before = stream(session, ids[:, :skipped], [1] * skipped) if skipped else np.zeros((2, 0, 11))
    session.reset([1])
    after = stream(session, ids[:, skipped:], [4, 3, 2])
    assert worst(np.concatenate([before, after], axis=1)[0], full(reference, ids[:1])[0]) <= 1e-10
    assert worst(after[1], full(reference, ids[1:, skipped:])[0]) <= 1e-10


def _unread_spoiled(reference: Any, snapshot: Snapshot) -> Snapshot:
    """Garbage in every memory row that was not filled and in every segment row of an earlier segment."""
    config = reference.config
    for name, value in snapshot.states.items():
        rows, kept = value.shape[1], []
        for position in snapshot.position.tolist():
            phase = 0 if config.same_length else position % config.tgt_len
            if name.endswith(".segment"):
                kept.append(range(phase))
            else:
                kept.append(range(max(0, rows - (position - phase)), rows))
        snapshot = spoiled(snapshot, name, 1, kept)
    return snapshot


def _continued(session: StreamSession, snapshot: Snapshot, chunks: list[int]) -> np.ndarray:
    session.restore(snapshot)
    return stream(session, tokens(session.batch, sum(chunks), seed=9), chunks)


@pytest.mark.parametrize("name", ["pre-norm", "post-norm-clamp", "pre-norm-same-length", "post-norm-same-length"])
@pytest.mark.parametrize("seen", [0, 1, 2, 3, 4, 6, 9])
def test_rows_that_were_not_filled_are_never_seen(name: str, seen: int) -> None:
    reference = model(name)
    session = eager_session(reference, batch=2)
    if seen:
        session.step(tokens(2, seen))
        session.reset([1])
        session.step(tokens(2, 1))
    snapshot = session.state()
    for chunks in ([1] * 6, [3, 1, 4]):
        clean = _continued(session, snapshot, chunks)
        garbage = _continued(session, _unread_spoiled(reference, snapshot), chunks)
        assert worst(garbage, clean) <= 1e-12


@pytest.mark.parametrize("name", ["pre-norm", "pre-norm-same-length"])
def test_filled_rows_are_seen(name: str) -> None:
    """The counterpart of the test above: garbage in what is remembered does show."""
    reference: ReferenceModel = model(name)
    session = eager_session(reference)
    session.step(tokens(1, 9))
    snapshot = session.state()
    clean = _continued(session, snapshot, [1])
    for state in snapshot.states:
        garbage = spoiled(snapshot, state, 1, [range(0)], garbage=3.0)
        assert worst(_continued(session, garbage, [1]), clean) > 1e-3, state
