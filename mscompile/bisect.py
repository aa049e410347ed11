"""From an engine that leaves its reference to the first step, tensor and layer that does. Needs torch.

1. The engine and the stream program, run in PyTorch, roll through the standard rollouts, call by call, until logits
   or states leave the tolerance (`mscompile.departure`). What the engine had remembered before that call is kept.
2. The call is repeated from there, graph by graph. The reference is the checkpoint exported again, in FP32, and
   evaluated operator by operator by `onnx.reference`, so that what was changed in the bundle shows, too.
3. In the first graph that departs, bisection over cuts of the graph finds a node that makes a wrong tensor from right
   ones (`mscompile.locate`).
4. The two values of that tensor and a few experiments speak for likely causes (`validation.suspects`).

Where the graphs are right as they were exported, step 3 is repeated with the form that the engine runs: ONNX Runtime's
own, already optimised. Of other engines only inputs and outputs can be seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines import ort
from engines.session import StreamSession
from mscompile import adapters, departure, gate
from mscompile.bundle import ENGINES, GRAPHS
from mscompile.contracts import LOGITS, Array
from mscompile.departure import Departure, Step
from mscompile.errors import MsCompileError, UsageError
from mscompile.locate import ROUNDING, Exported, Form, Located, Tensor, outputs_of
from mscompile.pipeline import read_text
from mscompile.runtime import Bundle
from validation import contract, parity, rollouts, sources
from validation.suspects import Evidence, Suspect, relative_error, suspects

Progress = Callable[[str, int, int], None]
STEPS = 256  # tokens a row in the long rollouts


@dataclass(frozen=True)
class Report:
    """What was found. `step` and `tensor` are None where there is none to name."""

    bundle: str
    engine: str
    precision: str
    verdict: str
    passed: bool = False  # the engine never left the reference
    step: Step | None = None
    tensor: Tensor | None = None
    found_by: str = ""
    suspects: tuple[Suspect, ...] = ()
    differences: tuple[str, ...] = ()  # of the bundle's contract from that of an export of the checkpoint

    def tables(self) -> dict[str, dict[str, object]]:
        """What to show, by the title of a table."""
        found: dict[str, dict[str, object]] = {}
        if self.step is not None:
            found[f"where {self.engine} leaves the original"] = _shown(self.step)
        if self.tensor is not None:
            found["the first tensor that is wrong"] = {**_shown(self.tensor), "found by": self.found_by}
        if self.suspects:
            found["likely causes"] = {suspect.cause: suspect.evidence for suspect in self.suspects}
        if self.differences:
            found["contract"] = {str(number): text for number, text in enumerate(self.differences, 1)}
        return found


def _shown(facts: Any) -> dict[str, object]:
    """The fields of a dataclass that say something."""
    fields = {name.replace("_", " "): value for name, value in asdict(facts).items() if value not in (None, (), "")}
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in fields.items()}


class _Tap:
    """An executor that runs a form of the graphs, and keeps what went in and came out of every call."""

    def __init__(self, form: Form) -> None:
        self.form, self.calls = form, list[tuple[str, dict[str, Array], dict[str, Array]]]()

    def bind(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        def run() -> None:
            given = {name: array.copy() for name, array in inputs.items()}
            results = outputs_of(self.form.model(graph), self.form.weights, given, list(outputs))
            for name, array in outputs.items():
                array[...] = results[name]
            self.calls.append((graph, given, results))

        return run


def bisect(
    bundle: Bundle,
    engine: str | None,
    reference: Path,
    family: str = "auto",
    text: Path | None = None,
    steps: int = STEPS,
    progress: Progress = lambda *_: None,
    adapter: str | None = None,
) -> Report:
    """Where `engine`, by default the first that runs here, first leaves the checkpoint the bundle was made from.

    Raises UsageError where `reference` is another checkpoint, and EngineUnavailable where the engine cannot run here.
    """
    rollouts.require_steps(steps)
    name = engine or gate.runnable(bundle)[0][0]
    bundle.plan(name)  # raises at once, before the long export
    trained = adapters.trained(reference, family, adapter, bundle.spec.max_context)
    if trained.sha256() != bundle.manifest.source["sha256"]:
        raise UsageError(
            f"{reference} is not the checkpoint that {bundle.path} was made from: its sha256 differs; "
            "name the right one by --reference"
        )
    trained.model.sources = sources.pseudo(bundle.spec.inputs)
    with tempfile.TemporaryDirectory() as directory:
        progress("exporting the checkpoint again", 0, 3)
        exported = Exported(trained.model, bundle, Path(directory))
        return Search(bundle, name, exported, progress).report(read_text(text, trained.vocab), steps)


class Search:
    """For the first tensor at which an engine of a bundle departs from an export of its checkpoint."""

    def __init__(self, bundle: Bundle, engine: str, exported: Exported, progress: Progress = lambda *_: None) -> None:
        self.bundle, self.engine, self.exported, self.progress = bundle, engine, exported, progress
        self.precision = bundle.manifest.precision
        self.tolerance = parity.tolerance_of(self.precision)
        self.differences = contract.differences(bundle.spec, exported.spec)
        relative = self.tolerance.state_relative
        self.limit = relative if np.isfinite(relative) else self.tolerance.max_norm_ratio_error

    def report(self, text: Array | None = None, steps: int = STEPS) -> Report:
        about = Report(self.bundle.path.name, self.engine, self.precision, "", differences=self.differences)
        self.progress(f"rolling {self.engine} out", 1, 3)
        rolled = sorted(rollouts.standard(self.exported.spec, text, steps), key=lambda each: not each.every_state)
        try:
            left = departure.first(self.bundle.plan(self.engine), self.exported, rolled, self.tolerance)
        except MsCompileError as error:
            if not self.differences:
                raise
            return replace(about, verdict=f"{self.differences[0]}; {self.engine} cannot follow the original: {error}")
        if left is None:
            return self._healthy(about)
        self.progress("cutting graphs", 2, 3)
        return self._located(replace(about, step=left.step(self.exported.spec)), left)

    def _healthy(self, about: Report) -> Report:
        verdict = f"{self.engine} stays within the tolerance of {self.precision} in every step"
        if self.differences:
            verdict += f"; but its contract is not that of an export: {self.differences[0]}"
        return replace(about, verdict=verdict, passed=True)

    def _located(self, about: Report, left: Departure) -> Report:
        if departure.past_ceiling(parity.TOLERANCES["fp32"], LOGITS, left.program, left.wanted[LOGITS]):
            verdict = "the streaming form itself leaves the original model: the fault is in a rule, not in the engine"
            cause = Suspect("streaming rule", "the stream program in PyTorch leaves the original, too")
            return replace(about, verdict=verdict, suspects=(cause,))
        for form in self._forms():
            if (located := self._in_form(form, left)) is not None:
                return self._told(about, located, self._evidence(located, left))
        return self._outside(about, left)

    def _forms(self) -> Iterator[Form]:
        """As exported, then as ONNX Runtime made it its own."""
        graphs, built = self.bundle.path / GRAPHS, self.bundle.path / ENGINES / "ort"
        names = [graph.name for graph in self.bundle.spec.graphs]
        paths = {name: ort.source(graphs, built, name) for name in names}
        yield Form("the graph as exported", paths, graphs)
        packed = ort.packed(built)
        if self.engine == "ort" and packed is not None:
            yield Form("the graph as ONNX Runtime optimised it", {n: packed / f"{n}.onnx" for n in names}, packed)

    def _in_form(self, form: Form, left: Departure) -> Located | None:
        """The first tensor of the departing call that this form gets wrong; None where it gets all right."""
        allowed = ROUNDING if self.precision == "fp32" else self.limit
        departing = []
        for graph, given, results in self._replayed(form, left, left.tokens.shape[1]).calls:
            if not self.exported.has(graph, given):
                continue  # the fault of the contract
            wanted = self.exported.evaluate(graph, given)
            worst = max((relative_error(value, wanted[name]) for name, value in results.items()), default=0.0)
            if worst > allowed:
                departing.append((graph, given, wanted, worst))
        if not departing:
            return None
        far = [each for each in departing if each[-1] > self.limit]
        graph, given, wanted, worst = (far or departing)[0]
        limit = min(self.limit, worst / 4)
        return Located(self.exported, self.bundle.spec.graph(graph), form, given, wanted, limit)

    def _replayed(self, form: Form, left: Departure, at_once: int) -> _Tap:
        """The departing call once more, from what the engine remembered before it, or token by token."""
        tap = _Tap(form)
        session = StreamSession(self.bundle.spec, tap, left.tokens.shape[0], self.exported.sources)
        session.restore(left.before)
        for start in range(0, left.tokens.shape[1], at_once):
            session.step(left.tokens[:, start : start + at_once])
        return tap

    def _evidence(self, located: Located, left: Departure) -> Evidence:
        name, wanted = located.name, located.wanted
        outputs = [tensor.name for tensor in located.spec.outputs if tensor.name != name]
        written = {self.bundle.spec.state(state).output_name: state for state in located.spec.writes}
        is_chunk = left.tokens.shape[1] > 1 and located.spec.tokens not in (0, 1)
        return replace(
            located.evidence(self.precision, self.differences),
            before=located.given.get(f"{written[name]}.in") if name in written else None,
            others={other: wanted[other] for other in outputs if wanted[other].shape == wanted[name].shape},
            tokens_alone_right=self._right_one_by_one(located.form, left) if is_chunk else None,
            on_gpu=ort.best_provider() != ort.CPU,
        )

    def _right_one_by_one(self, form: Form, left: Departure) -> bool:
        calls = self._replayed(form, left, 1).calls
        logits = [results[LOGITS] for _, _, results in calls if LOGITS in results]
        if len(logits) != left.tokens.shape[1]:
            return False  # rows out of phase take several calls a token
        return not departure.past_ceiling(self.tolerance, LOGITS, np.concatenate(logits, 1), left.wanted[LOGITS])

    def _told(self, about: Report, located: Located, evidence: Evidence) -> Report:
        tensor = located.tensor()
        place = f"{tensor.module} ({tensor.module_class})" if tensor.module else f"the {tensor.module_class} itself"
        verdict = f"{tensor.name}, made by {tensor.operator} of {place} in graph {tensor.graph}, "
        verdict += f"leaves the reference first, {_when(about.step)}"
        return replace(about, verdict=verdict, tensor=tensor, found_by=located.found_by(), suspects=suspects(evidence))

    def _outside(self, about: Report, left: Departure) -> Report:
        """Every graph is right by itself: the contract is wrong, or what the engine does around the graphs."""
        if self.differences:
            cause = Suspect("changed since the export", "; ".join(self.differences))
            verdict = (
                f"the graphs are right and the contract is not: {self.differences[0]}; it shows {_when(about.step)}"
            )
            return replace(about, verdict=verdict, suspects=(cause,))
        verdict = f"every graph is right on what {self.engine} had remembered, and {left.shows_in} is not, "
        verdict += f"{_when(about.step)}: the fault is in the engine's own form of {self._writer(left)}, "
        verdict += "or in how its session keeps states"
        verdict += "" if self.precision == "fp32" else f", or errors of {self.precision} have added up over many steps"
        return replace(about, verdict=verdict, suspects=suspects(self._evidence_outside(left)))

    def _evidence_outside(self, left: Departure) -> Evidence:
        name = left.shows_in
        wanted, graph = left.wanted[name], self.exported.graph(self._writer(left)).graph
        others = {other: value for other, value in left.wanted.items() if other != name and value.shape == wanted.shape}
        return Evidence(
            left.found[name],
            wanted,
            self.limit,
            tuple(sorted({node.op_type for node in graph.node})),
            self.precision,
            on_gpu=self.engine != "ort" or ort.best_provider() != ort.CPU,
            before=left.before.states.get(name),
            others=others,
        )

    def _writer(self, left: Departure) -> str:
        """The last graph of the call that makes what is wrong."""
        spec, name = self.bundle.spec, left.shows_in
        position = int(left.before.position[left.step(self.exported.spec).row])
        graphs = spec.schedule.next_call(position, left.tokens.shape[1]).graphs
        made = [each for each in graphs if {name, f"{name}.out"} & {tensor.name for tensor in spec.graph(each).outputs}]
        return (made or graphs)[-1]


def _when(step: Step | None) -> str:
    """Such as "at token 12 of segment 3"."""
    assert step is not None
    segment = "" if step.segment is None else f" of segment {step.segment}"
    return f"at token {step.position}{segment}"
