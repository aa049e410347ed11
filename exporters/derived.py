"""States that a pass replaced by functions of them: what they must be, from the states of the stream program.

A bundle keeps each function as `graphs/derived.<state>.onnx`, with its weights in the shared file, so that a
later parity check against the original can still compare every state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from exporters.passes.base import Derived
from mscompile.contracts import Array, Session, Snapshot, StateSpec, StreamSpec

PREFIX = "derived."
ROWS, SOURCE = "rows", "source"


def evaluate(function: ir.Model, rows: Array) -> Array:
    """The new state of an old state's rows."""
    return _run(ReferenceEvaluator(ir.to_proto(function)), {ROWS: rows})


def _run(function: ReferenceEvaluator, given: Mapping[str, Array]) -> Array:
    outputs: Any = function.run(None, dict(given))
    return np.asarray(outputs[0])


def models(derived: Mapping[str, Derived]) -> dict[str, ir.Model]:
    """The functions as graphs to save beside the others, by file stem."""
    for row in derived.values():
        row.function.metadata_props[SOURCE] = row.source
    return {f"{PREFIX}{name}": row.function for name, row in derived.items()}


class _Saved:
    """A function that was saved; its weights are mapped from their file and given to each call, never copied."""

    def __init__(self, path: Path) -> None:
        graph = ir.load(path).graph
        tensors = {name: value.const_value for name, value in graph.initializers.items()}
        self._weights = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
        proto = onnx.load(path, load_external_data=False)
        del proto.graph.initializer[:]
        self._function = ReferenceEvaluator(proto)
        self.source = next(entry.value for entry in proto.metadata_props if entry.key == SOURCE)

    def __call__(self, rows: Array) -> Array:
        return _run(self._function, {ROWS: rows, **self._weights})


class DerivedStates:
    """Snapshots of the stream program, in terms of the states that a bundle has."""

    def __init__(self, graphs: Path, spec: StreamSpec) -> None:
        """`graphs` is the directory the functions were saved to."""
        self._functions: dict[str, _Saved] = {}
        self._kept = {state.name for state in spec.states}
        self._rings = [state for state in spec.states if state.update == "append"]
        for state in spec.states:
            path = graphs / f"{PREFIX}{state.name}.onnx"
            if path.is_file():
                self._functions[state.name] = _Saved(path)

    def of(self, snapshot: Snapshot) -> Snapshot:
        sources = {function.source for function in self._functions.values()}
        states = {name: value for name, value in snapshot.states.items() if name not in sources}
        for name, function in self._functions.items():
            states[name] = function(snapshot.states[function.source])
        cursors = {name: cursor for name, cursor in snapshot.cursors.items() if name in states}
        appended = {name: f.source for name, f in self._functions.items() if f.source in snapshot.cursors}
        cursors |= {name: snapshot.cursors[source] for name, source in appended.items()}
        for state in self._rings:
            if state.name not in cursors:
                states[state.name] = _ring(state, states[state.name], snapshot.position)
                cursors[state.name] = snapshot.position.copy()
        states = {name: value for name, value in states.items() if name in self._kept}
        return Snapshot(snapshot.position, states, cursors)


def _ring(state: StateSpec, rolled: Array, position: Array) -> Array:
    """Rows in the order of ring slots, from rows in the order of their age: slot s has row s - position."""
    rows = zip(np.moveaxis(rolled, state.batch_axis, 0), position, strict=True)
    axis = (state.time_axis or 0) - (state.batch_axis < (state.time_axis or 0))
    return np.stack([np.roll(row, int(count), axis) for row, count in rows], state.batch_axis)


class DerivedSession:
    """A session of the stream program whose snapshots have the states of the bundle."""

    def __init__(self, session: Session, states: DerivedStates) -> None:
        self._session, self._states = session, states
        self.step, self.reset, self.restore = session.step, session.reset, session.restore

    @property
    def batch(self) -> int:
        return self._session.batch

    @property
    def position(self) -> Array:
        return self._session.position

    def state(self) -> Snapshot:
        return self._states.of(self._session.state())
