"""The host: walking the schedule, rings and buffers, refusals. Its engine here is a few lines of numpy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.session import StreamSession
from mscompile.contracts import (
    Array,
    GraphSpec,
    Schedule,
    ScheduledCall,
    Snapshot,
    StateSpec,
    StreamSpec,
    TensorSpec,
    Tick,
)
from mscompile.errors import EngineError, InputError

VOCAB, CAPACITY = 9, 4

# Schedule


def one(*graphs: str) -> ScheduledCall:
    return ScheduledCall(graphs, 1)


def many(tokens: int, *closing: str) -> ScheduledCall:
    return ScheduledCall(("prefill", *closing), tokens)


PLAIN = Schedule((Tick(("decode",)),), "prefill", chunk_multiple=1, max_chunk=8)
SINGLE = Schedule((Tick(("decode",)),))
SEGMENT = Schedule((Tick(("decode",), repeat=3), Tick(("decode",), closing=("close",))), "prefill", 1, 4)
THREE = Schedule((Tick(("decode_3",)), Tick(("decode_1",), repeat=2)), "prefill", 3, 6)
NESTED = Schedule((Tick(("decode_4",)), Tick(("decode_1",)), Tick(("decode_2",)), Tick(("decode_1",))), "prefill", 4, 8)
LAST_OF_EACH_PAIR = Schedule((Tick(("decode",)), Tick(("decode",), ("close",))), "prefill", 1, 8)
CLOSING_RUN = Schedule((Tick(("decode",), repeat=2), Tick(("decode",), ("close",), repeat=2)), "prefill", 1, 8)
CLOSING_FIRST = Schedule((Tick(("decode",), ("close",)), Tick(("decode",), repeat=4)), "prefill", 1, 8)

CALLS = [
    (PLAIN, 0, 1, one("decode")),
    (PLAIN, 0, 2, many(2)),
    (PLAIN, 5, 8, many(8)),
    (PLAIN, 5, 100, many(8)),
    (SINGLE, 0, 100, one("decode")),
    (SEGMENT, 0, 1, one("decode")),
    (SEGMENT, 3, 1, one("decode", "close")),
    (SEGMENT, 7, 9, one("decode", "close")),
    (SEGMENT, 0, 3, many(3)),
    (SEGMENT, 0, 4, many(4, "close")),
    (SEGMENT, 0, 9, many(4, "close")),
    (SEGMENT, 1, 9, many(3, "close")),
    (SEGMENT, 2, 9, many(2, "close")),
    (SEGMENT, 4, 2, many(2)),
    (SEGMENT, 401, 9, many(3, "close")),
    (THREE, 0, 1, one("decode_3")),
    (THREE, 1, 9, one("decode_1")),
    (THREE, 2, 9, one("decode_1")),
    (THREE, 3, 2, one("decode_3")),
    (THREE, 0, 3, many(3)),
    (THREE, 0, 5, many(3)),
    (THREE, 3, 6, many(6)),
    (THREE, 300, 100, many(6)),
    (NESTED, 0, 3, one("decode_4")),
    (NESTED, 1, 9, one("decode_1")),
    (NESTED, 2, 9, one("decode_2")),
    (NESTED, 3, 9, one("decode_1")),
    (NESTED, 4, 7, many(4)),
    (NESTED, 8, 8, many(8)),
    (LAST_OF_EACH_PAIR, 0, 9, many(2, "close")),
    (LAST_OF_EACH_PAIR, 1, 9, one("decode", "close")),
    (CLOSING_RUN, 0, 9, many(3, "close")),
    (CLOSING_RUN, 2, 9, one("decode", "close")),
    (CLOSING_RUN, 3, 9, one("decode", "close")),
    (CLOSING_FIRST, 0, 9, one("decode", "close")),
    (CLOSING_FIRST, 1, 9, many(5, "close")),
    (CLOSING_FIRST, 4, 9, many(2, "close")),
]


@pytest.mark.parametrize(("schedule", "position", "remaining", "call"), CALLS)
def test_the_next_call(schedule: Schedule, position: int, remaining: int, call: ScheduledCall) -> None:
    assert schedule.next_call(position, remaining) == call


def test_a_period_is_the_sum_of_its_ticks_and_repeats_for_ever() -> None:
    assert [schedule.period for schedule in (PLAIN, SEGMENT, THREE, NESTED)] == [1, 4, 3, 4]
    names = [THREE.tick(position).graphs[0] for position in range(7)]
    assert names == ["decode_3", "decode_1", "decode_1"] * 2 + ["decode_3"]
    assert THREE.tick(10**15 * 3) == THREE.tick(0)


_TICKS = st.lists(
    st.builds(Tick, st.just(("decode",)), st.sampled_from([(), (), ("close",)]), st.integers(1, 4)),
    min_size=1, max_size=4,
)  # fmt: skip


@given(ticks=_TICKS, max_chunk=st.integers(1, 12), position=st.integers(0, 40), length=st.integers(1, 30))
def test_calls_cover_the_tokens_and_close_after_each_closing_tick(
    ticks: list[Tick], max_chunk: int, position: int, length: int
) -> None:
    schedule = Schedule(tuple(ticks), "prefill" if max_chunk > 1 else None, 1, max_chunk)
    closings, done = [], position
    while done < position + length:
        call = schedule.next_call(done, position + length - done)
        assert 1 <= call.tokens <= max(1, min(max_chunk, position + length - done))
        assert call.graphs[0] == ("prefill" if call.tokens > 1 else "decode")
        done += call.tokens
        if call.graphs[1:]:
            assert call.graphs[1:] == ("close",)
            closings.append(done - 1)
    assert done == position + length
    assert closings == [token for token in range(position, done) if schedule.tick(token).closing]


@given(multiple=st.integers(1, 5), factor=st.integers(1, 3), position=st.integers(0, 20), length=st.integers(1, 40))
def test_chunks_start_at_and_take_multiples(multiple: int, factor: int, position: int, length: int) -> None:
    schedule = Schedule((Tick(("decode",), repeat=multiple),), "prefill", multiple, multiple * factor)
    call = schedule.next_call(position, length)
    aligned = position % multiple == 0 and length >= multiple and multiple * factor > 1
    if aligned and call.tokens > 1:
        assert call.tokens == min(length - length % multiple, multiple * factor)
    else:
        assert call.tokens == 1
        assert not aligned or multiple == 1


# A model in numpy: `ring` remembers the last tokens, `total` their sum, `seen` the position; logits tell the total.


def state(name: str, *shape: int | str, **settings: Any) -> StateSpec:
    return StateSpec(name, "int64", shape, **settings)


RING = state("ring", "batch", CAPACITY, update="append", time_axis=1)
TOTAL = state("total", 1, "batch", batch_axis=1)
CLOSED = state("closed", "batch", initial=-1.0)


def graph(name: str, tokens: int | str, reads: tuple[StateSpec, ...], writes: tuple[StateSpec, ...]) -> GraphSpec:
    head = (TensorSpec("tokens", "int64", ("batch", tokens)), TensorSpec("position", "int64", ("batch",)))
    logits = (TensorSpec("logits", "float32", ("batch", tokens, VOCAB)),)
    inputs = tuple(state.as_input() for state in reads)
    outputs = tuple(state.as_output(tokens) for state in writes)
    if tokens == 0:
        head, logits = (), ()
    names = tuple(state.name for state in reads), tuple(state.name for state in writes)
    return GraphSpec(name, (*head, *inputs), (*logits, *outputs), *names, tokens)


def counter(schedule: Schedule = SEGMENT, max_batch: int = 4, max_context: int | None = None) -> StreamSpec:
    graphs = [
        graph(name, 1, (TOTAL,), (RING, TOTAL))
        for name in sorted({name for tick in schedule.ticks for name in tick.graphs})
    ]
    if schedule.prefill:
        graphs.append(graph("prefill", "chunk", (TOTAL,), (RING, TOTAL)))
    graphs.append(graph("close", 0, (RING, TOTAL), (CLOSED,)))
    return StreamSpec((CLOSED, RING, TOTAL), tuple(graphs), schedule, VOCAB, max_batch, max_context)


class Counter:
    """Adds up tokens. `calls` records what ran; `fail` raises instead, `block` waits in the middle of a run."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int], int]] = []
        self.bound = 0
        self.fail: Exception | None = None
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.block = False

    def bind(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        self.bound += 1

        def close() -> None:
            self.calls.append((graph, [], 0))
            outputs["closed.out"][...] = inputs["total.in"][0]

        def run() -> None:
            if self.block:
                self.inside.set()
                assert self.go_on.wait(timeout=30)
            tokens = inputs["tokens"]
            self.calls.append((graph, inputs["position"].tolist(), tokens.shape[1]))
            outputs["ring.out"][...] = tokens
            sums = inputs["total.in"][0][:, None] + np.cumsum(tokens, axis=1)  # (batch, time)
            outputs["logits"][...] = sums[:, :, None]
            if self.fail:
                raise self.fail
            outputs["total.out"][0] = sums[:, -1]

        return close if graph == "close" else run


def counting(schedule: Schedule = SEGMENT, batch: int = 2, **settings: Any) -> tuple[StreamSession, Counter]:
    executor = Counter()
    return StreamSession(counter(schedule, **settings), executor, batch), executor


def sums(session: StreamSession, tokens: Any) -> list[list[float]]:
    """Logits of the counter, one number a token."""
    logits = session.step(tokens)
    assert logits.shape == (*np.shape(tokens), VOCAB)
    assert (logits == logits[:, :, :1]).all()
    return logits[:, :, 0].tolist()  # type: ignore[no-any-return]


def test_steps_of_any_length_give_every_token_its_logits() -> None:
    session, executor = counting(batch=1)
    assert sums(session, [[1, 2]]) == [[1, 3]]
    assert sums(session, [[1]]) == [[4]]
    assert sums(session, [[1, 0, 3, 2, 5, 1]]) == [[5, 5, 8, 10, 15, 16]]
    assert executor.calls == [
        ("prefill", [0], 2), ("decode", [2], 1), ("decode", [3], 1), ("close", [], 0),
        ("prefill", [4], 4), ("close", [], 0), ("decode", [8], 1),
    ]  # fmt: skip
    assert session.position.tolist() == [9]
    assert session.step([[1]]).dtype == np.float32


def test_closing_graphs_see_the_state_after_their_token() -> None:
    session, _ = counting(batch=1)
    session.step([[1, 2, 3]])
    assert session.state().states["closed"].tolist() == [-1]
    session.step([[4, 8]])
    assert session.state().states["closed"].tolist() == [10]


@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=8), schedule=st.sampled_from([PLAIN, SINGLE, SEGMENT]))
def test_the_ring_holds_the_newest_rows_at_their_slots(chunks: list[int], schedule: Schedule) -> None:
    limited = Schedule(schedule.ticks, schedule.prefill, 1, min(schedule.max_chunk, CAPACITY))
    session, _ = counting(limited, batch=2)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, sum(chunks)))
    ring, done = np.zeros((2, CAPACITY), dtype=np.int64), 0
    for length in chunks:
        session.step(ids[:, done : done + length])
        for token in range(done, done + length):
            ring[:, token % CAPACITY] = ids[:, token]
        done += length
        snapshot = session.state()
        assert snapshot.states["ring"].tolist() == ring.tolist()
        assert snapshot.cursors["ring"].tolist() == [done, done]


def test_rings_of_rows_out_of_phase_wrap_each_at_its_own_slot() -> None:
    session, _ = counting(PLAIN, batch=3)
    session.step([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    session.reset([1])
    session.step([[4, 5], [6, 7], [4, 5]])
    assert session.state().states["ring"].tolist() == [[5, 2, 3, 4], [6, 7, 0, 0], [5, 2, 3, 4]]
    assert session.state().cursors["ring"].tolist() == [5, 2, 5]


def test_rows_out_of_phase_run_each_distinct_tick_once_and_keep_only_their_own_results() -> None:
    session, executor = counting(batch=3)
    session.step([[1, 1], [1, 1], [1, 1]])
    session.reset([1])
    executor.calls.clear()
    assert sums(session, [[1, 2], [3, 4], [5, 6]]) == [[3, 5], [3, 7], [7, 13]]
    assert executor.calls == [
        ("decode", [2, 0, 2], 1),
        ("decode", [3, 1, 3], 1), ("close", [], 0), ("decode", [4, 1, 4], 1),
    ]  # fmt: skip
    assert session.state().states["closed"].tolist() == [5, -1, 13]
    assert session.state().states["total"].tolist() == [[5, 7, 13]]
    assert session.state().states["ring"].tolist() == [[1, 1, 1, 2], [3, 4, 0, 0], [1, 1, 5, 6]]
    assert session.state().cursors["ring"].tolist() == [4, 2, 4]
    assert session.position.tolist() == [4, 2, 4]


def test_rows_whose_positions_differ_by_whole_periods_share_chunks_again() -> None:
    session, executor = counting(batch=2)
    session.step([[1] * 4, [1] * 4])
    session.reset([0])
    executor.calls.clear()
    assert sums(session, [[1, 1], [1, 1]]) == [[1, 2], [5, 6]]
    assert executor.calls == [("prefill", [0, 4], 2)]


def test_reset_restores_the_initial_values_of_some_rows() -> None:
    session, _ = counting(batch=3)
    session.step([[1] * 4, [2] * 4, [3] * 4])
    session.reset([2, 0])
    snapshot = session.state()
    assert snapshot.states["closed"].tolist() == [-1, 8, -1]
    assert snapshot.states["total"].tolist() == [[0, 8, 0]]
    assert snapshot.states["ring"].tolist() == [[0] * 4, [2] * 4, [0] * 4]
    assert snapshot.cursors["ring"].tolist() == snapshot.position.tolist() == [0, 4, 0]
    session.reset()
    assert session.position.tolist() == [0, 0, 0]
    assert sums(session, [[1], [1], [1]]) == [[1], [1], [1]]


def test_reset_of_no_rows_changes_nothing() -> None:
    session, _ = counting(batch=1)
    session.step([[1, 2]])
    session.reset([])
    assert sums(session, [[1]]) == [[4]]


@pytest.mark.parametrize("rows", [[2], [-1], [0, 7]])
def test_reset_of_rows_that_do_not_exist_is_refused(rows: list[int]) -> None:
    session, _ = counting(batch=2)
    session.step([[1], [1]])
    with pytest.raises(InputError, match=r"^rows \[.*\] are outside this session's batch of 2$"):
        session.reset(rows)
    assert session.position.tolist() == [1, 1]


def test_what_a_session_hands_out_is_a_copy() -> None:
    session, _ = counting(batch=1)
    session.step([[1, 2]])
    session.position[...] = 99
    for value in session.state().states.values():
        value[...] = 99
    assert session.position.tolist() == [2]
    assert sums(session, [[1]]) == [[4]]


# Refusals


@pytest.mark.parametrize(("batch", "wanted"), [(5, 5), (0, 1), (-1, 1)])
def test_a_batch_outside_the_profile_is_refused_with_the_remedy(batch: int, wanted: int) -> None:
    with pytest.raises(InputError) as caught:
        counting(batch=batch)
    assert str(caught.value) == (
        f"batch {batch} is outside this engine's profile of 1 to 4; export again with --batch 1:{wanted}"
    )
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


BAD_TOKENS = [
    ([[0], [9]], "token id 9 is out of range: this model knows ids 0 to 8"),
    ([[-1], [0]], "token id -1 is out of range: this model knows ids 0 to 8"),
    (np.array([[2**63], [0]], dtype=np.uint64), "token id 9223372036854775808 is out of range: this model knows"),
    ([[0.0], [1.0]], "tokens must be whole numbers, not float64"),
    ([[True], [False]], "tokens must be whole numbers, not bool"),
    ([["a"], ["b"]], "tokens must be whole numbers, not <U1"),
    ([1, 2], "tokens must have shape (batch=2, T >= 1), not (2,)"),
    (5, "tokens must have shape (batch=2, T >= 1), not ()"),
    ([[1, 2]], "tokens must have shape (batch=2, T >= 1), not (1, 2)"),
    (np.zeros((2, 0), dtype=np.int64), "tokens must have shape (batch=2, T >= 1), not (2, 0)"),
    (np.zeros((2, 1, 1), dtype=np.int64), "tokens must have shape (batch=2, T >= 1), not (2, 1, 1)"),
]


@pytest.mark.parametrize(("tokens", "sentence"), BAD_TOKENS, ids=[sentence for _, sentence in BAD_TOKENS])
def test_tokens_that_do_not_fit_are_refused_and_nothing_is_consumed(tokens: Any, sentence: str) -> None:
    session, executor = counting(batch=2)
    session.step([[1], [2]])
    before, calls = session.state(), len(executor.calls)
    with pytest.raises(InputError) as caught:
        session.step(tokens)
    assert str(caught.value).startswith(sentence)
    assert len(executor.calls) == calls
    _same(session.state(), before)
    assert sums(session, [[1], [1]]) == [[2], [3]]


def test_tokens_of_unequal_lengths_are_refused() -> None:
    session, _ = counting(batch=2)
    with pytest.raises(InputError, match="tokens must"):
        session.step([[1, 2], [3]])


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint32"])
def test_every_whole_number_type_is_taken(dtype: str) -> None:
    session, _ = counting(batch=1)
    assert sums(session, np.array([[1, 8, 3]], dtype=dtype)) == [[1, 9, 12]]


def test_a_context_overrun_is_refused_before_anything_is_consumed() -> None:
    session, _ = counting(batch=2, max_context=6)
    session.step([[1] * 3, [1] * 3])
    session.reset([0])
    session.step([[1] * 2, [1] * 2])
    before = session.state()
    with pytest.raises(InputError) as caught:
        session.step([[1] * 2, [1] * 2])
    assert str(caught.value) == (
        "row 1 has consumed 5 tokens and 2 more exceed the context of 6; "
        "reset the row, or export again with a larger --context"
    )
    _same(session.state(), before)
    session.step([[1], [1]])
    session.reset([1])
    assert sums(session, [[1] * 3, [1] * 3]) == [[4, 5, 6], [1, 2, 3]]


def test_a_failed_step_blocks_until_reset_or_restore() -> None:
    session, executor = counting(batch=2)
    session.step([[1], [1]])
    saved = session.state()
    for recover in (session.reset, lambda: session.restore(saved)):
        executor.fail = RuntimeError("device lost")
        with pytest.raises(RuntimeError, match=r"^device lost$"):
            session.step([[1, 2], [1, 2]])
        executor.fail = None
        session.reset([0])  # one row alone does not make the others known
        for _ in range(2):
            with pytest.raises(EngineError) as caught:
                session.step([[1], [1]])
            assert str(caught.value) == ("an earlier step failed, so the state is unknown: reset() or restore() first")
            assert caught.value.exit_code == 3
        recover()
        begin = session.state().states["total"][0] + 1
        assert sums(session, [[1], [1]]) == [[total] for total in begin.tolist()]


def test_a_failed_step_does_not_keep_the_session_locked() -> None:
    session, executor = counting(batch=1)
    executor.fail = ValueError("no")
    with pytest.raises(ValueError, match=r"^no$"):
        session.step([[1]])
    executor.fail = None
    session.reset()
    assert sums(session, [[1]]) == [[1]]


def test_a_second_thread_is_refused_and_the_first_goes_on() -> None:
    session, executor = counting(batch=1)
    executor.block = True
    found: list[Any] = []
    first = threading.Thread(target=lambda: found.append(sums(session, [[1, 2]])))
    first.start()
    try:
        assert executor.inside.wait(timeout=30)
        with pytest.raises(InputError) as caught:
            session.step([[5]])
    finally:
        executor.go_on.set()
        first.join(timeout=30)
    assert str(caught.value) == "this session is in use by another thread; give each thread a session of its own"
    assert found == [[[1, 3]]]
    executor.block = False
    assert sums(session, [[1]]) == [[4]]


def test_sessions_of_one_plan_do_not_share_state() -> None:
    executor, spec = Counter(), counter()
    left, right = StreamSession(spec, executor, 1), StreamSession(spec, executor, 2)
    left.step([[1, 2]])
    assert sums(right, [[1], [2]]) == [[1], [2]]
    assert sums(left, [[1]]) == [[4]]


# Snapshots


def _same(left: Snapshot, right: Snapshot) -> None:
    assert left.position.tolist() == right.position.tolist()
    for mine, other in ((left.states, right.states), (left.cursors, right.cursors)):
        assert {name: value.tolist() for name, value in mine.items()} == {
            name: value.tolist() for name, value in other.items()
        }


@pytest.mark.parametrize("parity", [0, 1], ids=["even number of swaps", "odd number of swaps"])
def test_restore_goes_back_in_this_session_or_in_another(parity: int) -> None:
    session, _ = counting(batch=2)
    session.step([[1] * 5, [2] * 5])
    session.reset([1])
    saved = session.state()
    wanted = sums(session, [[1] * 6, [2] * 6])
    for target in (session, counting(batch=2)[0]):
        for _ in range(parity):
            target.step([[7], [7]])
        target.restore(saved)
        _same(target.state(), saved)
        assert sums(target, [[1] * 6, [2] * 6]) == wanted


def test_a_snapshot_of_another_model_or_batch_is_refused_and_nothing_is_restored() -> None:
    session, _ = counting(batch=2)
    session.step([[1], [2]])
    before = session.state()
    renamed = Snapshot(before.position, {"other": before.states["ring"]}, {})
    with pytest.raises(InputError, match=r"^the snapshot is of another model: its states have other names$"):
        session.restore(renamed)
    with pytest.raises(InputError, match=r"^the snapshot's closed has shape \(1,\), this session's \(2,\)$"):
        session.restore(counting(batch=1)[0].state())
    _same(session.state(), before)


# Buffers


@pytest.mark.parametrize("batch", [1, 3])
def test_bound_calls_do_not_grow_with_the_stream(batch: int) -> None:
    session, executor = counting(NESTED, batch=batch)
    random = np.random.default_rng(0)
    for step in range(100):
        session.step(random.integers(0, VOCAB, (batch, 1)))
        if step % 10 == 9:
            session.reset([int(random.integers(batch))])
    kept, bound = len(session._bound), executor.bound
    assert bound == kept <= 2 * len(session.spec.graphs)
    for step in range(1000):
        session.step(random.integers(0, VOCAB, (batch, 1)))
        if step % 10 == 9:
            session.reset([int(random.integers(batch))])
    assert (len(session._bound), executor.bound) == (kept, bound)


def test_chunks_are_not_kept() -> None:
    session, _ = counting(PLAIN, batch=1)
    session.step([[1]])
    for length in (2, 3, 4, 3, 2):
        session.step([[1] * length])
    assert all(bound.tokens is not None and bound.tokens.shape == (1, 1) for bound in session._bound.values())
    assert len(session._bound) <= 2


def test_replaced_states_alternate_between_two_buffers_and_appended_ones_have_one() -> None:
    session, _ = counting(SINGLE, batch=1)
    kinds = {name: type(state).__name__ for name, state in session._states.items()}
    assert kinds == {"closed": "Replaced", "ring": "Ring", "total": "Replaced"}
    addresses = set()
    for _ in range(6):
        session.step([[1]])
        addresses.add(session._states["total"].value.ctypes.data)
    assert len(addresses) == 2
