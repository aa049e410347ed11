"""The host of a stream program: walks the schedule, owns the states. Engines only run graphs.

Rows normally share their phase. Where resets have put them out of phase, each distinct tick runs once for the
whole batch and only the rows it is meant for keep its results.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.buffers import Buffer, Replaced, Ring, buffers
from engines.supply import Supply, supplies
from mscompile.contracts import (
    LOGITS,
    POSITION,
    TOKENS,
    Array,
    Executor,
    GraphSpec,
    ScheduledCall,
    Snapshot,
    Sources,
    StreamSpec,
    check_tokens,
)
from mscompile.errors import EngineError, InputError


@dataclass(frozen=True)
class _Bound:
    """One graph with its arrays: the inputs that change, the logits, and what each written state keeps."""

    graph: GraphSpec
    tokens: Array | None
    position: Array | None
    supplied: tuple[tuple[Supply, Array], ...]
    logits: Array | None
    written: tuple[tuple[Buffer, Array], ...]
    execute: Callable[[], None]


class StreamSession:
    """A `Session` over any executor; `sources` supply the host inputs of the spec, by name."""

    def __init__(self, spec: StreamSpec, executor: Executor, batch: int = 1, sources: Sources | None = None) -> None:
        if not 1 <= batch <= spec.max_batch:
            raise InputError(
                f"batch {batch} is outside this engine's profile of 1 to {spec.max_batch}; "
                f"export again with --batch 1:{max(batch, 1)}"
            )
        self.spec, self._executor, self._batch = spec, executor, batch
        self._states = buffers(spec, batch)
        self._supplies = supplies(spec.inputs, sources or {})
        self._graphs = {graph.name: graph for graph in spec.graphs}
        self._position = np.zeros(batch, dtype=np.int64)
        self._swapped = {graph.name: self._replaced(graph) for graph in spec.graphs}
        self._bound: dict[tuple[Any, ...], _Bound] = {}
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

        Raises InputError for tokens that do not fit, or for a source that answers wrongly, with nothing consumed,
        and EngineError if the engine fails; then `reset()` or `restore()` before the next step.
        """
        array = check_tokens(tokens, self._batch, self.spec.vocab_size)
        self._check_context(array.shape[1])
        if not self._lock.acquire(blocking=False):
            raise InputError("this session is in use by another thread; give each thread a session of its own")
        try:
            if self._failed:
                raise EngineError("an earlier step failed, so the state is unknown: reset() or restore() first")
            for supply in self._supplies:
                supply.ask(self._states[supply.given.recent.name].value, self._position, array)
            self._failed = True
            logits = self._consume(array)
            self._failed = False
            return logits
        finally:
            self._lock.release()

    def state(self) -> Snapshot:
        states = {name: state.value.copy() for name, state in self._states.items()}
        cursors = {name: state.cursor for name, state in self._states.items() if isinstance(state, Ring)}
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
            state.restore(snapshot.states[name], snapshot.cursors.get(name))
        self._position[...] = snapshot.position
        self._failed = False

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Begin new streams in these rows, all of them by default."""
        chosen = np.arange(self._batch) if rows is None else np.array([operator.index(row) for row in rows], np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self._batch):
            raise InputError(f"rows {chosen.tolist()} are outside this session's batch of {self._batch}")
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
            bound = self._binding(self._graphs[name], call.tokens)
            if bound.tokens is not None:
                bound.tokens[...] = tokens
            if bound.position is not None:
                bound.position[...] = self._position
            for supply, entries in bound.supplied:
                supply.fill(entries, self._position, call.tokens)
            bound.execute()
            if bound.logits is not None:
                logits[...] = bound.logits if rows is None else np.where(rows[:, None, None], bound.logits, logits)
            for state, new in bound.written:
                state.keep(new, rows)
        self._position += call.tokens if rows is None else np.where(rows, call.tokens, 0)

    def _binding(self, graph: GraphSpec, tokens: int) -> _Bound:
        """Arrays and a bound call for a graph; kept for calls of one token, whose shapes recur."""
        key = (graph.name, *[state.version for state in self._swapped[graph.name]])
        bound = self._bound.get(key) if tokens == 1 else None
        if bound is None:
            bound = self._bind(graph, tokens)
            if tokens == 1:
                self._bound[key] = bound
        return bound

    def _replaced(self, graph: GraphSpec) -> list[Replaced]:
        """The states whose arrays a bound call of this graph depends on."""
        touched = (self._states[name] for name in sorted({*graph.reads, *graph.writes}))
        return [state for state in touched if isinstance(state, Replaced)]

    def _bind(self, graph: GraphSpec, tokens: int) -> _Bound:
        context = max(int(self._position.max()), self.spec.schedule.chunk_multiple)
        sizes = {"batch": self._batch, "chunk": tokens, "context": context}
        read = {state.spec.input_name: state for state in (self._states[name] for name in graph.reads)}
        written = {self._states[name].spec.output_name: self._states[name] for name in graph.writes}
        inputs, outputs = {}, {}
        for tensor in graph.inputs:
            shape, state = tensor.concrete(**sizes), read.get(tensor.name)
            inputs[tensor.name] = np.empty(shape, tensor.dtype) if state is None else state.leading(shape)
        for tensor in graph.outputs:
            shape, state = tensor.concrete(**sizes), written.get(tensor.name)
            outputs[tensor.name] = np.empty(shape, tensor.dtype) if state is None else state.output(shape)
        return _Bound(
            graph,
            inputs.get(TOKENS),
            inputs.get(POSITION),
            tuple((supply, inputs[supply.given.name]) for supply in self._supplies if supply.given.name in inputs),
            outputs.get(LOGITS),
            tuple((state, state.view(outputs[name])) for name, state in written.items()),
            self._executor.bind(graph.name, inputs, outputs),
        )

    def _logits_dtype(self) -> str:
        return next(t.dtype for graph in self.spec.graphs for t in graph.outputs if t.name == LOGITS)
