"""The values that describe a streaming model, shared by every layer. Needs numpy only.

A stream program is states + graphs + a schedule:

- every *state* tensor has a name, dtype, shape, batch axis, initial value and an update rule;
- every *graph* is a pure function `(tokens, position, states it reads) -> (logits, states it writes)`;
- the *schedule* says which graphs run for token number n; it is periodic in n;
- a *host input* is what graphs take besides, once every m tokens, and the host gets from a source that it is given.

`position` (batch,) int64 counts the tokens a row has consumed since its reset. Fill levels, phases and valid
lengths all follow from it, so it is the only counter. Axis words in shapes: "batch", "chunk" for the number
of tokens of one call, "context" for the tokens that the longest row has consumed before it, and "chunk/k" or
"context/k" for one row every k tokens. Tokens are int64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mscompile.errors import InputError

Array = NDArray[Any]
Dim = int | str
Source = Callable[[Array], Array]  # int64 tokens (N, every) of completed chunks -> (N, *shape), see HostInput
Sources = Mapping[str, Source]  # by the name of the host input

BATCH = "batch"
CHUNK = "chunk"
CONTEXT = "context"
TOKENS = "tokens"
POSITION = "position"
LOGITS = "logits"


def _size(dim: str, sizes: Mapping[str, int]) -> int:
    word, _, divisor = dim.partition("/")
    return sizes[word] // int(divisor or 1)


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: numpy dtype name, and a shape whose words are symbolic dimensions."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def concrete(self, **sizes: int) -> tuple[int, ...]:
        """The shape with its words replaced, as in `concrete(batch=2, chunk=16)`."""
        return tuple(dim if isinstance(dim, int) else _size(dim, sizes) for dim in self.shape)


@dataclass(frozen=True)
class StateSpec:
    """One remembered tensor. Its graph input is `<name>.in`, its output `<name>.out`.

    replace: `.out` is the whole new tensor; hosts keep two buffers and swap them.
    append: `.out` holds only new rows along `time_axis`; the host writes them into its buffer of
    `shape[time_axis]` rows behind the rows already there, as a ring. Which slots are valid follows from
    `position`, so what lies in a slot that was not written does not matter, unless the original attends to what its
    memory begins with (`reads_initial`).
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    update: Literal["replace", "append"] = "replace"
    time_axis: int | None = None
    batch_axis: int = 0
    initial: float | tuple[float, ...] = 0.0  # a tuple is one row: all axes but batch and time, row-major
    reads_initial: bool = False  # append: do logits depend on slots that hold `initial` and were not written yet?

    def initial_value(self, batch: int) -> Array:
        """The state of `batch` new streams."""
        shape = tuple(dim if isinstance(dim, int) else batch for dim in self.shape)
        if isinstance(self.initial, float):
            return np.full(shape, self.initial, dtype=self.dtype)
        shared = (self.batch_axis, self.time_axis)
        row = [1 if axis in shared else size for axis, size in enumerate(shape)]
        return np.broadcast_to(np.array(self.initial, dtype=self.dtype).reshape(row), shape).copy()

    @property
    def input_name(self) -> str:
        return f"{self.name}.in"

    @property
    def output_name(self) -> str:
        return f"{self.name}.out"

    def as_input(self, rows: Dim | None = None) -> TensorSpec:
        """The input tensor; `rows` is the length of its time axis where a graph takes fewer than there are."""
        return TensorSpec(self.input_name, self.dtype, self._with_rows(rows))

    def as_output(self, rows: Dim | None = None) -> TensorSpec:
        """The output tensor; `rows` is the length of its time axis where the state only gains rows."""
        return TensorSpec(self.output_name, self.dtype, self._with_rows(rows))

    def _with_rows(self, rows: Dim | None) -> tuple[Dim, ...]:
        if self.update != "append" or rows is None or self.time_axis is None:
            return self.shape
        return (*self.shape[: self.time_axis], rows, *self.shape[self.time_axis + 1 :])

    def bytes_per_stream(self) -> int:
        """Bytes one batch row keeps in this state (one buffer)."""
        sizes = [dim for dim in self.shape if isinstance(dim, int)]
        return prod(sizes) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class HostInput:
    """What graphs cannot compute, such as neighbours in a database: one entry for every whole `every` tokens.

    A graph that completes such chunks takes it as input `name`, (batch, 1 or "chunk/every", *shape). The host gets
    the entries from a source, which sees the tokens of the chunks and nothing else. For this the state
    `<name>.recent` is a ring of the last `every` tokens, which every graph that consumes tokens writes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    every: int
    below: int | None = None  # whole numbers are 0 to below - 1; None where `dtype` is no integer

    @property
    def recent(self) -> StateSpec:
        return StateSpec(f"{self.name}.recent", "int64", (BATCH, self.every), "append", time_axis=1)

    def as_input(self, tokens: Dim) -> TensorSpec:
        """The input of a graph that consumes 1 or "chunk" tokens."""
        entries: Dim = f"{CHUNK}/{self.every}" if tokens == CHUNK and self.every > 1 else tokens
        return TensorSpec(self.name, self.dtype, (BATCH, entries, *self.shape))

    def source(self, sources: Sources) -> Source:
        """The one that supplies this; InputError where it is missing."""
        if self.name not in sources:
            raise InputError(f"this model needs sources={{{self.name!r}: f}} from its host, f {self._function}")
        return sources[self.name]

    def ask(self, sources: Sources, chunks: Array) -> Array:
        """The entries (N, *shape) for chunks (N, every); InputError where the source is missing or answers wrongly."""
        source = self.source(sources)
        if not len(chunks):
            return np.zeros((0, *self.shape), self.dtype)
        found = np.asarray(source(chunks))
        if found.shape != (len(chunks), *self.shape) or not np.can_cast(found.dtype, self.dtype, "same_kind"):
            came = f"{found.dtype} {found.shape} for N = {len(chunks)}"
            raise InputError(f"the source of {self.name} returned {came}; it must be {self._function}")
        if not np.isfinite(found).all():
            raise InputError(f"the source of {self.name} returned a number that is not finite")
        if self.below is not None and (outside := (found < 0) | (found >= self.below)).any():
            wrong = found[outside][0]
            raise InputError(f"the source of {self.name} returned {wrong}; it must be {self._function}")
        return np.ascontiguousarray(found, self.dtype)

    @property
    def _function(self) -> str:
        result = f"{self.dtype} ({', '.join(map(str, ('N', *self.shape)))})"
        numbers = "" if self.below is None else f" of 0 to {self.below - 1}"
        return f"a function from int64 tokens (N, {self.every}) to {result}{numbers}"


@dataclass(frozen=True)
class GraphSpec:
    """One static graph. `tokens` is how many tokens a call consumes: 0 (it only updates states), 1 or "chunk"."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tokens: Dim


@dataclass(frozen=True)
class Tick:
    """What runs for one token, for `repeat` phases in a row.

    `graphs` run in order and consume the token. `closing` graphs run after it; a prefill chunk may end at
    such a token but never pass it, and then they run after the chunk.
    """

    graphs: tuple[str, ...]
    closing: tuple[str, ...] = ()
    repeat: int = 1


@dataclass(frozen=True)
class ScheduledCall:
    """The next thing a host does: these graphs, in order, on this many tokens."""

    graphs: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class Schedule:
    """Which graphs run for token number n: the tick at phase `n % period`.

    `prefill` is a graph that consumes many tokens at once. It may start where the phase is a multiple of
    `chunk_multiple` and takes multiples of `chunk_multiple` tokens, `max_chunk` at most.
    """

    ticks: tuple[Tick, ...]
    prefill: str | None = None
    chunk_multiple: int = 1
    max_chunk: int = 1

    @property
    def period(self) -> int:
        return sum(tick.repeat for tick in self.ticks)

    def tick(self, position: int) -> Tick:
        """The tick of token number `position`."""
        phase = position % self.period
        for tick in self.ticks:
            if phase < tick.repeat:
                return tick
            phase -= tick.repeat
        raise AssertionError("ticks cover the period")

    def next_call(self, position: int, remaining: int) -> ScheduledCall:
        """What to run next for a row that has consumed `position` tokens and has `remaining` to go."""
        length = self._chunk(position, remaining)
        if self.prefill is not None and length > 1:
            return ScheduledCall((self.prefill, *self.tick(position + length - 1).closing), length)
        tick = self.tick(position)
        return ScheduledCall((*tick.graphs, *tick.closing), 1)

    def _chunk(self, position: int, remaining: int) -> int:
        if self.prefill is None or position % self.chunk_multiple:
            return 0
        length = min(remaining, self.max_chunk, self._until_closing(position))
        return length - length % self.chunk_multiple

    def _until_closing(self, position: int) -> int:
        """Tokens up to and including the next one with closing graphs; unlimited where none has."""
        phase, start, ends = position % self.period, 0, []
        for tick in self.ticks:
            if tick.closing:
                first = max(start, phase) if start + tick.repeat > phase else start + self.period
                ends.append(first - phase + 1)
            start += tick.repeat
        return min(ends, default=2**62)


@dataclass(frozen=True)
class StreamSpec:
    """Everything a host needs to run a model; this is what a bundle's manifest holds."""

    states: tuple[StateSpec, ...]
    graphs: tuple[GraphSpec, ...]
    schedule: Schedule
    vocab_size: int
    max_batch: int
    max_context: int | None = None  # tokens after which a row must be reset; None: endless
    inputs: tuple[HostInput, ...] = ()  # what sources supply

    def graph(self, name: str) -> GraphSpec:
        return next(graph for graph in self.graphs if graph.name == name)

    def state(self, name: str) -> StateSpec:
        return next(state for state in self.states if state.name == name)

    def bytes_per_stream(self) -> int:
        """Bytes of state one stream keeps, two buffers for each replaced state."""
        return sum(state.bytes_per_stream() * (2 if state.update == "replace" else 1) for state in self.states)


@dataclass(frozen=True)
class Profile:
    """The shapes an engine is built for: batch sizes and tokens per prefill call."""

    min_batch: int = 1
    max_batch: int = 8
    max_chunk: int = 512


@dataclass(frozen=True)
class Hit:
    """What a rule or pass did at one place, or why it did not."""

    name: str  # of the rule or pass
    place: str  # module path or node name
    applied: bool
    reason: str


@dataclass(frozen=True)
class Snapshot:
    """All that a session knows: a copy, independent of the session."""

    position: Array  # (batch,) int64
    states: Mapping[str, Array]
    cursors: Mapping[str, Array]  # rows written so far into each append state, (batch,) int64


class Session(Protocol):
    """A group of streams, one a batch row, that keeps its own state. Not for use by two threads at once."""

    @property
    def batch(self) -> int: ...

    @property
    def position(self) -> Array:
        """Tokens consumed by each row since its reset, (batch,) int64."""
        ...

    def step(self, tokens: Any) -> Array:
        """Consume tokens (batch, T), any T >= 1, and return logits (batch, T, vocab) float32."""
        ...

    def state(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...

    def reset(self, rows: Sequence[int] | None = None) -> None: ...


class Executor(Protocol):
    """Runs the graphs of one plan on arrays that the caller owns."""

    def bind(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """A call that reads `inputs` and writes `outputs`, which keep their addresses. Names as in the GraphSpec."""
        ...


class Plan(Protocol):
    """A loaded engine: immutable, shared by its sessions."""

    spec: StreamSpec

    def session(self, batch: int = 1, sources: Sources | None = None) -> Session:
        """A new group of streams at position 0; `sources` supply the spec's host inputs."""
        ...


class Engine(Protocol):
    """One runtime. Its module imports that runtime only inside functions."""

    name: str
    title: str

    def cannot_build(self) -> str | None:
        """Why `build` would fail on this machine, with what to do; None if it can."""
        ...

    def cannot_run(self) -> str | None:
        """Why `load(...).session()` would fail on this machine, with what to do; None if it can."""
        ...

    def build(self, graphs: Path, out: Path, spec: StreamSpec, profile: Profile) -> dict[str, Any]:
        """Compile `graphs/<name>.onnx` into the existing empty directory `out`; returns facts for the manifest."""
        ...

    def load(self, graphs: Path, built: Path, spec: StreamSpec) -> Plan: ...


def require_memory(states: Iterable[StateSpec], batch: int) -> None:
    """InputError where the states of `batch` streams take more than all the memory that this process may have."""
    needed, given = batch * sum(state.bytes_per_stream() for state in states), _memory_bytes()
    if needed > given:
        raise InputError(
            f"the states of {batch} streams take {needed} bytes, and there are {given:.0f} bytes of memory; "
            "use a smaller batch, or a model that remembers less"
        )


def _memory_bytes() -> float:
    """Of the machine, or less where the process has a limit (ulimit -v); infinity where the system does not say."""
    try:
        import resource
    except ImportError:  # not on every system
        return inf
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine if limit == resource.RLIM_INFINITY else min(machine, limit)


def check_tokens(tokens: Any, batch: int, vocab_size: int) -> Array:
    """`tokens` as int64 (batch, T); InputError where shape, type or range is not right."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InputError(f"tokens must be a rectangle of shape (batch={batch}, T >= 1): {error}") from error
    if array.ndim != 2 or array.shape[0] != batch or array.shape[1] < 1:
        raise InputError(f"tokens must have shape (batch={batch}, T >= 1), not {array.shape}")
    if array.dtype.kind not in "iu":
        raise InputError(f"tokens must be whole numbers, not {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"token id {wrong} is out of range: this model knows ids 0 to {vocab_size - 1}")
    return np.ascontiguousarray(array, dtype=np.int64)
