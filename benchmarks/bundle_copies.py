"""A copy of a bundle and its graphs, to be changed: then its engine is built and its manifest is sealed again."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from engines import ort
from mscompile import bundle
from mscompile.contracts import Array, Schedule, Session, StreamSpec

MASKED = -1e30


class Graph:
    """One graph of a bundle, to be changed in place."""

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():  # ONNX Runtime's keys for packed weights are not of the standard
            warnings.filterwarnings("ignore", "Ignoring unknown external data key")
            self.path, self.proto = path, onnx.load(path)
        self.nodes = self.proto.graph.node

    def save(self) -> None:
        onnx.save(self.proto, self.path)

    def constants(self) -> dict[str, Array]:
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in self.proto.graph.initializer}

    def set(self, name: str, value: Array) -> None:
        """Give a constant another value, or add one."""
        kept = [tensor for tensor in self.proto.graph.initializer if tensor.name != name]
        del self.proto.graph.initializer[:]
        self.proto.graph.initializer.extend([*kept, numpy_helper.from_array(np.asarray(value), name)])

    def change(self, name: str, function: Callable[[Array], Array]) -> None:
        old = self.constants()[name]
        self.set(name, function(old.copy()).astype(old.dtype))

    def of(self, *operators: str) -> list[onnx.NodeProto]:
        found = [node for node in self.nodes if node.op_type in operators]
        assert found, f"{self.path.name} has no {' or '.join(operators)}"
        return found

    def weights(self) -> list[str]:
        """Matrices that products multiply by, in the order of the products."""
        constants = self.constants()
        named = [node.input[1] for node in self.of("MatMul") if node.input[1] in constants]
        return [name for name in named if constants[name].ndim == 2]

    def masks(self) -> list[str]:
        """What is added to scores: 0, or the lowest number."""
        constants = self.constants()
        lowest = {
            name for name, value in constants.items() if value.dtype.kind == "f" and value.min(initial=0) < MASKED
        }
        return [node.output[0] for node in self.of("Where") if lowest & set(node.input)]

    def after(self, tensor: str, operator: str, *others: Array, **attributes: Any) -> None:
        """Let everything that took `tensor` take operator(tensor, *others) instead."""
        self.replace(tensor, lambda right: _made(self, right, tensor, operator, others, attributes))

    def replace(self, tensor: str, make: Callable[[str], list[onnx.NodeProto]]) -> None:
        """Insert what `make` gives for the right tensor's new name; the last of it makes `tensor`."""
        maker = next((index for index, node in enumerate(self.nodes) if tensor in node.output), None)
        nodes = list(self.nodes)
        if maker is None:  # an input of the graph
            right = tensor
            for node in nodes:
                node.input[:] = [f"{tensor}.wrong" if name == tensor else name for name in node.input]
            made = make(right)
            made[-1].output[0] = f"{tensor}.wrong"
        else:
            right = f"{tensor}.right"
            nodes[maker].output[:] = [right if name == tensor else name for name in nodes[maker].output]
            made = make(right)
        at = 0 if maker is None else maker + 1
        del self.nodes[:]
        self.nodes.extend([*nodes[:at], *made, *nodes[at:]])

    def swap(self, first: str, second: str) -> None:
        """Exchange two tensors: outputs where nodes make them, otherwise inputs."""
        other = {first: second, second: first}
        made = any(first in node.output for node in self.nodes)
        for node in self.nodes:
            names = node.output if made else node.input
            names[:] = [other.get(name, name) for name in names]
        if made:  # what else reads them goes on reading the right ones
            for node in self.nodes:
                node.input[:] = [other.get(name, name) for name in node.input]


def _made(
    graph: Graph, right: str, tensor: str, operator: str, others: Iterable[Array], attributes: Mapping[str, Any]
) -> list[onnx.NodeProto]:
    names = []
    for number, value in enumerate(others):
        names.append(f"{tensor}.planted{number}")
        graph.set(names[-1], value)
    return [helper.make_node(operator, [right, *names], [tensor], **attributes)]


class Copy:
    """A copy of a bundle, to be changed."""

    def __init__(self, source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        self.path, self.manifest = target, bundle.read(target)
        self.rebuild, self.reseal = True, True
        self.session: Callable[[Session], Session] = lambda session: session
        self._graphs: dict[str, Graph] = {}

    @property
    def spec(self) -> StreamSpec:
        return self.manifest.spec

    def graph(self, name: str) -> Graph:
        return self._graphs.setdefault(name, Graph(self.path / "graphs" / f"{name}.onnx"))

    @property
    def decode(self) -> Graph:
        """The graph of the first token."""
        return self.graph(self.spec.schedule.ticks[0].graphs[0])

    @property
    def last(self) -> Graph:
        """The graph of the last phase."""
        return self.graph(self.spec.schedule.ticks[-1].graphs[0])

    @property
    def prefill(self) -> Graph:
        return self.graph("prefill")

    def appended(self) -> list[str]:
        """Rings that the first token writes and whose new rows have one shape, in pairs."""
        names = self.spec.graph(self.spec.schedule.ticks[0].graphs[0]).writes
        return [name for name in names if self.spec.state(name).update == "append"]

    def spec_is(self, **changes: Any) -> None:
        self.manifest = replace(self.manifest, spec=replace(self.spec, **changes))

    def schedule_is(self, **changes: Any) -> None:
        schedule: Schedule = replace(self.spec.schedule, **changes)
        self.spec_is(schedule=schedule)

    def state_is(self, name: str, **changes: Any) -> None:
        self.spec_is(states=tuple(replace(each, **changes) if each.name == name else each for each in self.spec.states))

    def finish(self) -> None:
        """Write the graphs, build the engine again, seal."""
        for graph in self._graphs.values():
            graph.save()
        engine = self.path / "engines" / "ort"
        if self.rebuild:
            shutil.rmtree(engine)
            engine.mkdir()
            facts = ort.ENGINE.build(self.path / "graphs", engine, self.spec, self.manifest.profile)
            self.manifest = replace(self.manifest, engines={"ort": facts})
        if self.reseal:
            bundle.seal(self.path, self.manifest)
