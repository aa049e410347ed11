"""The node of a graph that makes a wrong tensor from right ones, by sub-graphs. Part of `bisect`; needs torch.

The reference is the checkpoint exported again, in FP32, and evaluated operator by operator by `onnx.reference`. Every
part of the bundle's graph runs on ONNX Runtime as a model of its own that returns the tensors of one cut
(`exporters.cut`) and no others, so that it is optimised as the whole graph is. Tensors are paired by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from engines import ort
from engines.session import StreamSession
from exporters import cut, derived, origin, program, streaming, weights
from exporters.passes import append, table
from mscompile.contracts import BATCH, Array, GraphSpec, Session
from mscompile.errors import EngineError, MsCompileError
from mscompile.models.family import ReferenceModel
from mscompile.models.own import OwnModule
from mscompile.pipeline import MEMORIES, traced
from mscompile.runtime import Bundle
from validation.suspects import Evidence, error, relative_error, scale

Values = Mapping[str, Array]

ROUNDING = 1e-5  # relative error between two ways to add up the same FP32 numbers


@dataclass(frozen=True)
class Tensor:
    """The first tensor that is wrong, where it is wrong most, and what made it."""

    name: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    found: float
    wanted: float
    largest_error: float
    share: float  # of its numbers that are wrong
    graph: str
    node: str
    operator: str
    module: str  # of the original model; "" is the model as a whole
    module_class: str
    together_with: tuple[str, ...] = ()  # other nodes that this form of the graph has in one


@dataclass(frozen=True)
class Form:
    """One form of a bundle's graphs, as files that ONNX Runtime takes."""

    title: str
    paths: Mapping[str, Path]  # by graph
    weights: Path  # the folder of their external data

    def model(self, graph: str) -> onnx.ModelProto:
        return onnx.load(self.paths[graph], load_external_data=False)

    def arrays(self, graph: str, names: Sequence[str]) -> dict[str, Array]:
        """Constants of a graph, those of them that it has."""
        tensors = {tensor.name: tensor for tensor in self.model(graph).graph.initializer}
        return {
            name: onnx.numpy_helper.to_array(tensors[name], base_dir=str(self.weights))
            for name in names
            if name in tensors
        }


class GatherElements(OpRun):
    """As in the standard; that of `onnx.reference` takes 64 rows at most, since it is made with numpy.choose."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        return (np.take_along_axis(data, indices, axis),)


class Exported:
    """The checkpoint as it is exported now: graphs in FP32, contract, stream program."""

    def __init__(self, model: ReferenceModel, bundle: Bundle, directory: Path) -> None:
        self.model, self.sources = model, model.sources
        self.named = model.adapter.module if isinstance(model, OwnModule) else model
        self.program = streaming.build(model, bundle.manifest.profile, bundle.spec.max_context)
        graphs = traced(self.program, lambda _: None)
        is_append = any(hit.name == append.NAME for hit in bundle.manifest.passes)
        passed = table.run(graphs, self.program.spec, MEMORIES["append" if is_append else "replace"])
        weights.save({**graphs, **derived.models(passed.derived)}, directory)
        self.spec = passed.spec
        self.form = Form("an export", {name: directory / f"{name}.onnx" for name in graphs}, directory)
        self._states = derived.DerivedStates(directory, self.spec)
        self._loaded: dict[str, onnx.ModelProto] = {}

    def session(self, batch: int) -> Session:
        executor = program.EagerExecutor(self.program)
        return derived.DerivedSession(StreamSession(self.program.spec, executor, batch, self.sources), self._states)

    def has(self, graph: str, inputs: Values) -> bool:
        """Is there such a graph, with these inputs?"""
        return graph in self.form.paths and {value.name for value in self.graph(graph).graph.input} == set(inputs)

    def graph(self, name: str) -> onnx.ModelProto:
        if name not in self._loaded:
            self._loaded[name] = onnx.load(self.form.paths[name])
        return self._loaded[name]

    def evaluate(self, name: str, given: Values) -> dict[str, Array]:
        """Every tensor that a node makes, operator by operator."""
        try:
            evaluator = ReferenceEvaluator(self.graph(name), new_ops=[GatherElements])
            found: Any = evaluator.run(None, dict(given), intermediate=True)
        except Exception as fault:
            raise EngineError(f"onnx.reference cannot evaluate graph {name} of an export: {fault}") from fault
        return {tensor: np.asarray(value) for tensor, value in found.items() if tensor}

    def module(self, graph: str, node: int) -> tuple[str, str]:
        """Name and class of the original's module that a node came from."""
        path = cut.module_of(self.graph(graph).graph, node) or ""
        name = origin.original_name(self.named, self.program.graphs[graph], path)
        return name, type(self.named.get_submodule(name)).__name__


class Located:
    """A node of a graph that makes a wrong tensor from right ones."""

    def __init__(
        self, exported: Exported, spec: GraphSpec, form: Form, given: Values, wanted: Values, limit: float
    ) -> None:
        self.exported, self.spec, self.form = exported, spec, form
        self.given, self.wanted, self.limit = given, wanted, limit
        self.model, self.reference = form.model(spec.name), exported.graph(spec.name).graph
        cuts = cut.frontiers(self.reference)
        self.shared = cut.made_by(self.model.graph)
        self.usable = cut.present(cuts, self.shared)
        right, wrong = cut.first_wrong([cuts[number] for number in self.usable], self._is_wrong)
        self.first = self.usable[right] + 1 if right >= 0 else 0
        self.last = self.usable[wrong]
        made = [name for node in self.reference.node[self.first : self.last + 1] for name in node.output]
        crossing = [name for name in made if name in cuts[self.last]]
        self.values = self._values(crossing)
        self.name = next(name for name in crossing if self._left(name, self.values[name]))
        self.index = cut.made_by(self.reference)[self.name]

    def _values(self, names: Sequence[str], given: Values | None = None, optimised: bool = True) -> dict[str, Array]:
        part = cut.prefix(self.model, names)
        return outputs_of(part, self.form.weights, self.given if given is None else given, names, optimised)

    def _left(self, name: str, found: Array, wanted: Values | None = None) -> bool:
        return relative_error(found, (wanted or self.wanted)[name]) > self.limit

    def _is_wrong(self, names: cut.Frontier) -> bool:
        return any(self._left(name, value) for name, value in self._values(names).items())

    def tensor(self) -> Tensor:
        found, wanted = self.values[self.name], self.wanted[self.name]
        node = self.reference.node[self.index]
        module, kind = self.exported.module(self.spec.name, self.index)
        others = [each.name for each in self.reference.node[self.first : self.last + 1] if each.name != node.name]
        gap = error(found, wanted) if found.shape == wanted.shape else np.full(found.shape, np.inf)
        index = tuple(int(each) for each in np.unravel_index(int(gap.argmax()), gap.shape))
        return Tensor(
            name=self.name,
            shape=found.shape,
            index=index,
            found=float(found[index]),
            wanted=float(wanted[index]) if found.shape == wanted.shape else np.nan,
            largest_error=float(gap.max()),
            share=float((gap > self.limit * scale(wanted)).mean()),
            graph=self.spec.name,
            node=node.name,
            operator=node.op_type,
            module=module,
            module_class=kind,
            together_with=tuple(others),
        )

    def evidence(self, precision: str, contract: Sequence[str]) -> Evidence:
        operators = {self.model.graph.node[self.shared[self.name]].op_type, self.reference.node[self.index].op_type}
        plain = self._values([self.name], optimised=False)[self.name]
        return Evidence(
            self.values[self.name],
            self.wanted[self.name],
            self.limit,
            tuple(sorted(operators)),
            precision,
            differences=(*self._changes(precision), *contract),
            rows_alone_right=self._rows_alone(),
            unoptimised_right=not self._left(self.name, plain),
        )

    def _changes(self, precision: str) -> Iterator[str]:
        """How the node and its constants differ from those of the export."""
        for wanted in self.reference.node[self.first : self.last + 1]:
            for name in (name for name in wanted.output if name in self.shared):
                found = self.model.graph.node[self.shared[name]]
                is_plain = precision == "fp32" and found.domain == wanted.domain
                if is_plain and (found.op_type, list(found.input)) != (wanted.op_type, list(wanted.input)):
                    yield f"{name} is {_call(found)}, the export has {_call(wanted)}"
                elif is_plain and list(found.attribute) != list(wanted.attribute):
                    yield f"{name} is {found.op_type} with other attributes than in the export"
            stored = self.form.arrays(self.spec.name, list(wanted.input))
            for name, value in self.exported.form.arrays(self.spec.name, list(stored)).items():
                if relative_error(stored[name], value) > ROUNDING and stored[name].dtype == value.dtype:
                    yield f"constant {name} is not that of the export: {_ratio(stored[name], value)}"

    def _rows_alone(self) -> bool | None:
        """Is every row of the batch right by itself?"""
        axes = {tensor.name: tensor.shape.index(BATCH) for tensor in self.spec.inputs if BATCH in tensor.shape}
        batch = next((self.given[name].shape[axis] for name, axis in axes.items()), 1)
        if batch == 1:
            return None
        for row in range(batch):
            alone = {
                name: np.ascontiguousarray(np.take(value, [row], axes[name])) if name in axes else value
                for name, value in self.given.items()
            }
            wanted = self.exported.evaluate(self.spec.name, alone)
            if self._left(self.name, self._values([self.name], alone)[self.name], wanted):
                return False
        return True

    def found_by(self) -> str:
        """Which way shows the fault: parts of the graph, or also the whole with every tensor as an output."""
        common = [name for node in self.reference.node for name in node.output if name in self.shared]
        try:
            marked = self._values(list(self.shared))
        except MsCompileError:
            return f"sub-graphs of {self.form.title}; it does not run with every tensor marked as an output"
        first = next((name for name in common if self._left(name, marked[name])), None)
        if first == self.name:
            return f"sub-graphs of {self.form.title}; marking every tensor as an output shows the same"
        shows = "hides the fault" if first is None else f"shows {first} first"
        return f"sub-graphs of {self.form.title}; marking every tensor as an output {shows}"


def outputs_of(
    model: onnx.ModelProto, folder: Path, given: Values, names: Sequence[str], optimised: bool = True
) -> dict[str, Array]:
    """The outputs of a model by name, on ONNX Runtime."""
    session = ort.part(model.SerializeToString(), folder, optimised)
    try:
        return dict(zip(names, session.run(list(names), dict(given)), strict=True))
    except Exception as fault:
        raise EngineError(f"ONNX Runtime cannot run a part of {model.graph.name}: {fault}") from fault


def _call(node: onnx.NodeProto) -> str:
    return f"{node.op_type}({', '.join(node.input)})"


def _ratio(found: Array, wanted: Array) -> str:
    """How a constant differs, in words."""
    if found.shape != wanted.shape:
        return f"shape {found.shape}, wanted {wanted.shape}"
    if found.dtype.kind == "f":
        ratios = np.divide(found, wanted, out=np.ones_like(found), where=wanted != 0)
        if ratios.size and np.ptp(ratios) < ROUNDING * abs(float(ratios.flat[0])):
            return f"{float(ratios.flat[0]):.6g} times as large"
    count = int((found != wanted).sum())
    return f"{count} of {wanted.size} numbers differ, by {float(error(found, wanted).max()):.3g} at most"
