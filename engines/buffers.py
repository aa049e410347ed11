"""What a session keeps of each state, and how a step's results get there.

- A replaced state has two buffers; a graph reads one and writes the other, then they swap.
- An appended state has one buffer, a ring; the graph returns new rows, which are copied in.

Steps come by the thousand a second, so views and slots are worked out once, when buffers are made or bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mscompile.contracts import Array, StateSpec, StreamSpec, require_memory


class Buffer:
    """The value of one state, its batch rows and those of its time axis."""

    def __init__(self, spec: StateSpec, batch: int) -> None:
        self.spec, self.batch = spec, batch
        self.value = spec.initial_value(batch)

    def leading(self, shape: tuple[int, ...]) -> Array:
        """The value itself, or a copy of its leading rows where `shape` has fewer of them."""
        if shape == self.value.shape:
            return self.value
        return np.ascontiguousarray(self.value[tuple(slice(size) for size in shape)])

    def output(self, shape: tuple[int, ...]) -> Array:
        """Where a graph may write its output of this state."""
        raise NotImplementedError

    def view(self, output: Array) -> Array:
        """An output as `keep` takes it."""
        return output

    def keep(self, new: Array, rows: Array | None) -> None:
        """Take a graph's output; `rows` (a mask) limits that to some batch rows."""
        raise NotImplementedError

    def restore(self, value: Array, cursor: Array | None) -> None:
        self.value[...] = value

    def reset(self, rows: Array) -> None:
        self.value[self._of_rows(rows)] = self.spec.initial_value(len(rows))

    def _of_rows(self, rows: Any) -> tuple[Any, ...]:
        return (*(slice(None),) * self.spec.batch_axis, rows)


class Replaced(Buffer):
    def __init__(self, spec: StateSpec, batch: int) -> None:
        super().__init__(spec, batch)
        self.spare = spec.initial_value(batch)
        self.version = 0  # which of the two arrays is the value

    def output(self, shape: tuple[int, ...]) -> Array:
        return self.spare

    def keep(self, new: Array, rows: Array | None) -> None:
        if rows is not None:
            others = self._of_rows(~rows)
            self.spare[others] = self.value[others]
        self.value, self.spare = self.spare, self.value
        self.version = 1 - self.version


class Ring(Buffer):
    """`written` counts the rows that each stream has appended since its reset."""

    def __init__(self, spec: StateSpec, batch: int) -> None:
        super().__init__(spec, batch)
        assert spec.time_axis is not None
        self.capacity = self.value.shape[spec.time_axis]
        self.written = [0] * batch
        self._slots = self.view(self.value)

    @property
    def cursor(self) -> Array:
        return np.array(self.written, dtype=np.int64)

    def output(self, shape: tuple[int, ...]) -> Array:
        return np.empty(shape, self.spec.dtype)

    def view(self, output: Array) -> Array:
        """(time, batch, ...)."""
        return np.moveaxis(output, (self.spec.time_axis or 0, self.spec.batch_axis), (0, 1))

    def keep(self, new: Array, rows: Array | None) -> None:
        """Write new rows (time, batch, ...) behind the last ones, wrapping around; of too many, the newest."""
        added, first = len(new), self.written[0]
        if rows is None and self.written.count(first) == self.batch:
            if added == 1:
                self._slots[first % self.capacity] = new[0]
            else:
                self._write(slice(None), new, first)
            self.written = [first + added] * self.batch
            return
        for row in range(self.batch) if rows is None else np.flatnonzero(rows).tolist():
            self._write(row, new, self.written[row])
            self.written[row] += added

    def _write(self, row: int | slice, new: Array, written: int) -> None:
        count = min(len(new), self.capacity)
        skipped = len(new) - count
        start = (written + skipped) % self.capacity
        head = min(count, self.capacity - start)
        self._slots[start : start + head, row] = new[skipped : skipped + head, row]
        self._slots[: count - head, row] = new[skipped + head :, row]

    def restore(self, value: Array, cursor: Array | None) -> None:
        super().restore(value, cursor)
        self.written = [0] * self.batch if cursor is None else cursor.tolist()

    def reset(self, rows: Array) -> None:
        super().reset(rows)
        for row in rows.tolist():
            self.written[row] = 0


def buffers(spec: StreamSpec, batch: int) -> dict[str, Buffer]:
    """The states of `batch` new streams, by name. InputError where they need more memory than there is."""
    require_memory(spec.states, batch)
    return {
        state.name: Ring(state, batch) if state.update == "append" else Replaced(state, batch) for state in spec.states
    }
