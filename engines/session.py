"""The host of a stream program: walks the schedule, owns the states. Engines only run graphs.

- A replaced state has two buffers; a graph reads one and writes the other, then they swap.
- An appended state has one buffer, a ring; the graph returns new rows, which are copied in.
- Rows normally share their phase. Where resets have put them out of phase, each distinct tick runs once
  for the whole batch and only the rows it is meant for keep its results.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mscompile.contracts import (
    LOGITS,
    POSITION,
    TOKENS,
    Array,
    Executor,
    GraphSpec,
    ScheduledCall,
    Snapshot,
    StateSpec,
    StreamSpec,
    check_tokens,
)
from mscompile.errors import EngineError, InputError


class _State:
    """The buffers of one state."""

    def __init__(self, spec: StateSpec, batch: int) -> None:
        self.spec = spec
        copies = 2 if spec.update == "replace" else 1
        self.buffers = [spec.initial_value(batch) for _ in range(copies)]
        self.current = 0
        self.cursor = np.zeros(batch, dtype=np.int64)  # rows written so far, appended states only

    @property
    def value(self) -> Array:
        return self.buffers[self.current]

    @property
    def spare(self) -> Array:
        return self.buffers[1 - self.current]

    def rows(self, shape: tuple[int, ...]) -> Array:
        """The value itself, or a copy of its leading rows where `shape` has fewer of them."""
        if shape == self.value.shape:
            return self.value
        return np.ascontiguousarray(self.value[tuple(slice(size) for size in shape)])

    def commit(self, rows: Array | None) -> None:
        """Make the spare buffer the current one; `rows` (a mask) limits that to some rows."""
        if rows is not None:
            others = self._of_rows(~rows)
            self.spare[others] = self.value[others]
        self.current = 1 - self.current

    def append(self, new: Array, rows: Array | None) -> None:
        """Write new rows behind the last ones, wrapping around."""
        axis = self.spec.time_axis
        assert axis is not None
        count, capacity = new.shape[axis], self.value.shape[axis]
        assert count <= capacity, "a call appends no more rows than the ring holds"
        chosen = np.arange(len(self.cursor)) if rows is None else np.flatnonzero(rows)
        together = rows is None and bool((self.cursor == self.cursor[0]).all())
        for group in [slice(None)] if together else [slice(row, row + 1) for row in chosen]:
            start = int(self.cursor[0 if together else group.start]) % capacity
            head = min(count, capacity - start)
            self._copy(group, new, 0, start, head)
            self._copy(group, new, head, 0, count - head)
        self.cursor[chosen] += count

    def _copy(self, batch_rows: slice, new: Array, source: int, target: int, count: int) -> None:
        if count:
            into = self._slice(batch_rows, slice(target, target + count))
            self.value[into] = new[self._slice(batch_rows, slice(source, source + count))]

    def _slice(self, batch_rows: slice, time: slice) -> tuple[slice, ...]:
        index = [slice(None)] * len(self.spec.shape)
        index[self.spec.batch_axis] = batch_rows
        if self.spec.time_axis is not None:
            index[self.spec.time_axis] = time
        return tuple(index)

    def _of_rows(self, rows: Any) -> tuple[Any, ...]:
        return (*(slice(None),) * self.spec.batch_axis, rows)

    def reset(self, rows: Array) -> None:
        self.value[self._of_rows(rows)] = self.spec.initial_value(len(rows))
        self.cursor[rows] = 0


class StreamSession:
    """A `Session` over any executor."""

    def __init__(self, spec: StreamSpec, executor: Executor, batch: int = 1) -> None:
        if not 1 <= batch <= spec.max_batch:
            raise InputError(
                f"batch {batch} is outside this engine's profile of 1 to {spec.max_batch}; "
                f"export again with --batch 1:{max(batch, 1)}"
            )
        self.spec, self._executor, self._batch = spec, executor, batch
        self._states = {state.name: _State(state, batch) for state in spec.states}
        self._graphs = {graph.name: graph for graph in spec.graphs}
        self._position = np.zeros(batch, dtype=np.int64)
        self._bound: dict[tuple[Any, ...], tuple[dict[str, Array], dict[str, Array], Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._failed = False

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def position(self) -> Array:
        return self._position.copy()

    def step(self, tokens: Any) -> Array:
        """Consume tokens (batch, T), any T >= 1; logits (batch, T, vocab).

        Raises InputError for tokens that do not fit, with nothing consumed, and EngineError if the engine
        fails; then `reset()` or `restore()` before the next step.
        """
        array = check_tokens(tokens, self._batch, self.spec.vocab_size)
        self._check_context(array.shape[1])
        if not self._lock.acquire(blocking=False):
            raise InputError("this session is in use by another thread; give each thread a session of its own")
        try:
            if self._failed:
                raise EngineError("an earlier step failed, so the state is unknown: reset() or restore() first")
            self._failed = True
            logits = self._consume(array)
            self._failed = False
            return logits
        finally:
            self._lock.release()

    def state(self) -> Snapshot:
        states = {name: state.value.copy() for name, state in self._states.items()}
        cursors = {name: s.cursor.copy() for name, s in self._states.items() if s.spec.update == "append"}
        return Snapshot(self._position.copy(), states, cursors)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of a session with the same spec and batch."""
        if set(snapshot.states) != set(self._states):
            raise InputError("the snapshot is of another model: its states have other names")
        for name, state in self._states.items():
            if snapshot.states[name].shape != state.value.shape:
                raise InputError(
                    f"the snapshot's {name} has shape {snapshot.states[name].shape}, this session's {state.value.shape}"
                )
        for name, state in self._states.items():
            state.value[...] = snapshot.states[name]
            state.cursor[...] = snapshot.cursors.get(name, 0)
        self._position[...] = snapshot.position
        self._failed = False

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Begin new streams in these rows, all of them by default."""
        chosen = np.arange(self._batch) if rows is None else np.array([operator.index(row) for row in rows], np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self._batch):
            raise InputError(f"rows {list(chosen)} are outside this session's batch of {self._batch}")
        for state in self._states.values():
            state.reset(chosen)
        self._position[chosen] = 0
        if rows is None:
            self._failed = False

    def _check_context(self, count: int) -> None:
        limit = self.spec.max_context
        if limit is not None and (over := self._position + count > limit).any():
            row = int(np.flatnonzero(over)[0])
            raise InputError(
                f"row {row} has consumed {self._position[row]} tokens and {count} more exceed the context of "
                f"{limit}; reset the row, or export again with a larger --context"
            )

    def _consume(self, tokens: Array) -> Array:
        schedule = self.spec.schedule
        logits = np.empty((*tokens.shape, self.spec.vocab_size), dtype=self._logits_dtype())
        done = 0
        while done < tokens.shape[1]:
            phases = self._position % schedule.period
            if (phases == phases[0]).all():
                call = schedule.next_call(int(phases[0]), tokens.shape[1] - done)
                self._run(call, tokens[:, done : done + call.tokens], logits[:, done : done + call.tokens], None)
                done += call.tokens
            else:
                for call, rows in self._by_tick(phases):
                    self._run(call, tokens[:, done : done + 1], logits[:, done : done + 1], rows)
                done += 1
        return logits

    def _by_tick(self, phases: Array) -> Iterable[tuple[ScheduledCall, Array]]:
        """One-token calls for rows out of phase, with the mask of rows each is for."""
        calls = [self.spec.schedule.next_call(int(phase), 1) for phase in phases]
        for distinct in dict.fromkeys(calls):
            yield distinct, np.array([call == distinct for call in calls])

    def _run(self, call: ScheduledCall, tokens: Array, logits: Array, rows: Array | None) -> None:
        for name in call.graphs:
            graph = self._graphs[name]
            inputs, outputs, execute = self._binding(graph, call.tokens)
            if graph.tokens:
                inputs[TOKENS][...] = tokens
                inputs[POSITION][...] = self._position
            execute()
            if graph.tokens:
                logits[...] = (
                    outputs[LOGITS] if rows is None else np.where(rows[:, None, None], outputs[LOGITS], logits)
                )
            for written in graph.writes:
                state = self._states[written]
                if state.spec.update == "append":
                    state.append(outputs[state.spec.output_name], rows)
                else:
                    state.commit(rows)
        self._position += call.tokens if rows is None else np.where(rows, call.tokens, 0)

    def _binding(self, graph: GraphSpec, tokens: int) -> tuple[dict[str, Array], dict[str, Array], Callable[[], None]]:
        """Arrays and a bound call for a graph; kept for calls of one token, whose shapes recur."""
        read = [self._states[name] for name in graph.reads]
        written = [self._states[name] for name in graph.writes]
        key = (graph.name, *(state.current for state in (*read, *written)))
        if tokens == 1 and key in self._bound:
            return self._bound[key]
        context = max(int(self._position.max()), self.spec.schedule.chunk_multiple)
        sizes = {"batch": self._batch, "chunk": tokens, "context": context}
        shapes = {tensor.name: tensor.concrete(**sizes) for tensor in graph.inputs}
        inputs = {t.name: np.empty(shapes[t.name], t.dtype) for t in graph.inputs if t.name in (TOKENS, POSITION)}
        inputs |= {state.spec.input_name: state.rows(shapes[state.spec.input_name]) for state in read}
        swapped = {state.spec.output_name: state.spare for state in written if state.spec.update == "replace"}
        outputs = {
            tensor.name: swapped[tensor.name]
            if tensor.name in swapped
            else np.empty(tensor.concrete(**sizes), tensor.dtype)
            for tensor in graph.outputs
        }
        bound = (inputs, outputs, self._executor.bind(graph.name, inputs, outputs))
        if tokens == 1:
            self._bound[key] = bound
        return bound

    def _logits_dtype(self) -> str:
        return next(t.dtype for graph in self.spec.graphs for t in graph.outputs if t.name == LOGITS)
