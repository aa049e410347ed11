"""From an engine that leaves its reference to the first step, tensor and layer that does. Needs torch.

1. The engine and the stream program, run in PyTorch, roll through the standard rollouts, call by call, until logits
   or states leave the tolerance. What the engine had remembered before that call is kept.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from engines import ort
from engines.session import StreamSession
from engines.torch_eager import original
from mscompile import adapters, gate
from mscompile.bundle import ENGINES, GRAPHS
from mscompile.contracts import Array, Session, Snapshot, StreamSpec
from mscompile.errors import UsageError
from mscompile.locate import ROUNDING, Exported, Form, Located, Tensor, Values, outputs_of
from mscompile.pipeline import read_text
from mscompile.runtime import Bundle
from validation import contract, parity, rollouts, sources
from validation.rollouts import Rollout
from validation.suspects import Evidence, Suspect, error, relative_error, suspects

Progress = Callable[[str, int, int], None]
STEPS = 256  # tokens a row in the long rollouts


@dataclass(frozen=True)
class Step:
    """The call after which the engine has left its reference, and the first token that shows it."""

    rollout: str
    call: int  # its number in the rollout
    tokens: int  # that each row consumed in it
    batch: int
    row: int
    position: int  # of the token, since the reset of its row
    phase: int  # of the schedule
    segment: int | None  # None where the model has no segments
    shows_in: str  # "logits", or the state that left first


@dataclass(frozen=True)
class Report:
    """What was found. `step` is None where the engine never left the reference."""

    bundle: str
    engine: str
    precision: str
    verdict: str
    step: Step | None = None
    tensor: Tensor | None = None
    found_by: str = ""
    suspects: tuple[Suspect, ...] = ()
    differences: tuple[str, ...] = ()  # of the bundle's contract from that of an export of the checkpoint

    def tables(self) -> dict[str, dict[str, object]]:
        """What to show, by the title of a table."""
        found: dict[str, dict[str, object]] = {}
        if self.step is not None:
            found[f"where {self.engine} leaves the original"] = asdict(self.step)
        if self.tensor is not None:
            found["the first tensor that is wrong"] = {**asdict(self.tensor), "found by": self.found_by}
        if self.suspects:
            found["likely causes"] = {suspect.cause: suspect.evidence for suspect in self.suspects}
        if self.differences:
            found["contract"] = {str(number): text for number, text in enumerate(self.differences, 1)}
        return found


@dataclass(frozen=True)
class _Failure:
    """A call that left the reference."""

    step: Step
    snapshot: Snapshot  # of the engine, before it
    tokens: Array
    expected: Array  # logits of the original
    found: Values  # logits and states of the engine, after it
    wanted: Values
    program: Array  # logits of the stream program
    share: float  # of the tolerance that was left


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

    Raises UsageError where `reference` is another checkpoint.
    """
    name = engine or gate.runnable(bundle)[0][0]
    trained = adapters.trained(reference, family, adapter, bundle.spec.max_context)
    if trained.sha256() != bundle.manifest.source["sha256"]:
        raise UsageError(f"{reference} is not the checkpoint that {bundle.path} was made from: its sha256 differs")
    trained.model.sources = sources.pseudo(bundle.spec.inputs)
    with tempfile.TemporaryDirectory() as directory:
        progress("exporting the checkpoint again", 0, 3)
        exported = Exported(trained.model, bundle, Path(directory))
        rolled = rollouts.standard(exported.spec, read_text(text, trained.vocab), steps)
        return _Search(bundle, name, exported, sorted(rolled, key=lambda each: not each.every_state), progress).report()


class _Search:
    def __init__(
        self, bundle: Bundle, engine: str, exported: Exported, rolled: Sequence[Rollout], progress: Progress
    ) -> None:
        self.bundle, self.engine, self.exported, self.rolled, self.progress = bundle, engine, exported, rolled, progress
        self.precision = bundle.manifest.precision
        self.tolerance = parity.TOLERANCES[self.precision]
        self.differences = contract.differences(bundle.spec, exported.spec)
        relative = self.tolerance.state_relative
        self.limit = relative if np.isfinite(relative) else self.tolerance.max_norm_ratio_error

    def report(self) -> Report:
        about = Report(self.bundle.path.name, self.engine, self.precision, "", differences=self.differences)
        self.progress(f"rolling {self.engine} out", 1, 3)
        failure = self._first_failure()
        if failure is None:
            verdict = f"{self.engine} stays within the tolerance of {self.precision} in every step"
            if self.differences:
                verdict += f"; but its contract is not that of an export: {self.differences[0]}"
            return replace(about, verdict=verdict)
        self.progress("cutting graphs", 2, 3)
        about = replace(about, step=failure.step)
        if self._left("logits", failure.program, failure.expected, failure.share):
            text = "the streaming form itself leaves the original model: the fault is in a rule, not in the engine"
            return replace(
                about,
                verdict=text,
                suspects=(Suspect("streaming rule", "the stream program in PyTorch leaves the original, too"),),
            )
        for form in self._forms():
            if (found := self._in_form(form, failure)) is not None:
                return self._told(about, *found)
        return self._outside(about, failure)

    # The first step

    def _first_failure(self) -> _Failure | None:
        """By the ceilings of the tolerance; where none is reached, by what it calls an outlier."""
        for share in (1.0, self.tolerance.logit_outlier_above / self.tolerance.logit_max_abs):
            for rollout in self.rolled:
                if (failure := self._failing(rollout, share)) is not None:
                    return failure
        return None

    def _failing(self, rollout: Rollout, share: float) -> _Failure | None:
        batch = rollout.tokens.shape[0]
        expected = parity.expected_logits(rollout, original(self.exported.model))
        engine = self.bundle.plan(self.engine).session(batch, self.exported.sources)
        reference, resets, done, number = self.exported.session(batch), dict(rollout.resets), 0, 0
        for chunk, count in enumerate(rollout.chunks):
            for session in (engine, reference):
                if chunk in resets:
                    session.reset(resets[chunk])
            for part in _calls(self.bundle.spec, engine, done, done + count):
                before, tokens = engine.state(), rollout.tokens[:, part]
                made = engine.step(tokens)
                expect = reference.step(tokens)
                found, wanted = {"logits": made, **engine.state().states}, dict(reference.state().states)
                wanted = {"logits": expected[:, part], **wanted}
                wrong = [name for name in wanted if self._left(name, found.get(name), wanted[name], share)]
                if wrong:
                    step = self._step(rollout, number, before.position, found, wanted, wrong[0], share)
                    return _Failure(step, before, tokens, expected[:, part], found, wanted, expect, share)
                number += 1
            done += count
        return None

    def _left(self, name: str, found: Array | None, wanted: Array, share: float) -> bool:
        """Does one tensor leave that share of its tolerance?"""
        if found is None or found.shape != wanted.shape:
            return True
        ceiling = self.tolerance.logit_max_abs if name == "logits" else self.tolerance.state_max_abs
        gap = error(found, wanted)
        far = bool((gap > ceiling * share).any() or not np.isfinite(found).all())
        drifted = float(np.linalg.norm(gap)) > self.tolerance.state_relative * float(np.linalg.norm(wanted))
        return far or (name != "logits" and np.isfinite(self.tolerance.state_relative) and drifted)

    def _step(
        self, rollout: Rollout, call: int, before: Array, found: Values, wanted: Values, name: str, share: float
    ) -> Step:
        batch, tokens = wanted["logits"].shape[:2]
        row, offset = 0, tokens - 1
        if name == "logits":
            gap = error(found[name], wanted[name]).max(-1)
            row, offset = (int(each) for each in np.argwhere(gap > self.tolerance.logit_max_abs * share)[0])
        elif name in found and found[name].shape == wanted[name].shape:
            axis = self.exported.spec.state(name).batch_axis
            row = int(np.moveaxis(error(found[name], wanted[name]), axis, 0).reshape(batch, -1).max(-1).argmax())
        schedule, position = self.exported.spec.schedule, int(before[row]) + offset
        segments = any(tick.closing for tick in schedule.ticks)
        segment = position // schedule.period if segments else None
        return Step(rollout.name, call, tokens, batch, row, position, position % schedule.period, segment, name)

    # The first tensor

    def _forms(self) -> Iterator[Form]:
        """As exported, then as ONNX Runtime made it its own."""
        graphs, built = self.bundle.path / GRAPHS, self.bundle.path / ENGINES / "ort"
        names = [graph.name for graph in self.bundle.spec.graphs]
        paths = {name: ort.source(graphs, built, name) for name in names}
        yield Form("the graph as exported", paths, graphs)
        packed = ort.packed(built)
        if self.engine == "ort" and packed is not None:
            yield Form("the graph as ONNX Runtime optimised it", {n: packed / f"{n}.onnx" for n in names}, packed)

    def _in_form(self, form: Form, failure: _Failure) -> tuple[Located, Evidence] | None:
        """The first tensor of the failing call that this form gets wrong; None where it gets all right."""
        departing = []
        for graph, given, results in self._replayed(form, failure, failure.tokens.shape[1]).calls:
            if not self.exported.has(graph, given):
                continue  # the fault of the contract
            wanted = self.exported.evaluate(graph, given)
            worst = max((relative_error(value, wanted[name]) for name, value in results.items()), default=0.0)
            if worst > ROUNDING:
                departing.append((graph, given, wanted, worst))
        if not departing:
            return None
        far = [each for each in departing if each[-1] > self.limit]
        graph, given, wanted, worst = (far or departing)[0]
        limit = min(self.limit, worst / 4)
        located = Located(self.exported, self.bundle.spec.graph(graph), form, given, wanted, limit)
        return located, self._evidence(located, failure)

    def _replayed(self, form: Form, failure: _Failure, at_once: int) -> _Tap:
        """The failing call once more, from what the engine remembered before it, or token by token."""
        tap = _Tap(form)
        session = StreamSession(self.bundle.spec, tap, failure.tokens.shape[0], self.exported.sources)
        session.restore(failure.snapshot)
        for start in range(0, failure.tokens.shape[1], at_once):
            session.step(failure.tokens[:, start : start + at_once])
        return tap

    def _evidence(self, located: Located, failure: _Failure) -> Evidence:
        spec, name = self.bundle.spec, located.name
        state = name.removesuffix(".out")
        same = located.wanted[name].shape
        outputs = [tensor.name for tensor in located.spec.outputs if tensor.name != name]
        others = {other: located.wanted[other] for other in outputs if located.wanted[other].shape == same}
        alone = None
        if failure.tokens.shape[1] > 1 and located.spec.tokens not in (0, 1):
            alone = self._right_one_by_one(located.form, failure)
        before = located.given.get(f"{state}.in") if name in (each.output_name for each in spec.states) else None
        return replace(
            located.evidence(self.precision, self.differences),
            before=before,
            others=others,
            tokens_alone_right=alone,
            on_gpu=self.engine != "ort",
        )

    def _right_one_by_one(self, form: Form, failure: _Failure) -> bool:
        calls = self._replayed(form, failure, 1).calls
        logits = [results["logits"] for _, _, results in calls if "logits" in results]
        if len(logits) != failure.expected.shape[1]:
            return False  # rows out of phase take several calls a token
        return not self._left("logits", np.concatenate(logits, 1), failure.expected, 1.0)

    # What to say

    def _told(self, about: Report, located: Located, evidence: Evidence) -> Report:
        tensor = located.tensor()
        place = f"layer {tensor.module}" if tensor.module else f"the {tensor.module_class} itself"
        step = about.step
        assert step is not None
        verdict = f"{tensor.name} leaves the reference first: {tensor.operator} of {place} ({tensor.module_class}), "
        verdict += f"in graph {tensor.graph}, at token {step.position}"
        verdict += "" if step.segment is None else f" of segment {step.segment}"
        return replace(about, verdict=verdict, tensor=tensor, found_by=located.found_by(), suspects=suspects(evidence))

    def _outside(self, about: Report, failure: _Failure) -> Report:
        """Every graph is right by itself: the contract is wrong, or what the engine does around the graphs."""
        shows = failure.step.shows_in
        if self.differences:
            cause = Suspect("changed since the export", "; ".join(self.differences))
            text = f"the graphs are right and the contract is not: {self.differences[0]}"
            return replace(about, verdict=text, suspects=(cause,))
        found, wanted = failure.found[shows], failure.wanted[shows]
        before = failure.snapshot.states.get(shows)
        others = {
            name: value for name, value in failure.wanted.items() if name != shows and value.shape == wanted.shape
        }
        evidence = Evidence(found, wanted, self.limit, precision=self.precision, before=before, others=others)
        verdict = f"every graph is right on what {self.engine} had remembered, and {shows} is not: "
        verdict += "the fault is in the engine's own form of the graphs, or in how its session keeps states"
        return replace(about, verdict=verdict, suspects=suspects(evidence))


def _calls(spec: StreamSpec, session: Session, start: int, end: int) -> Iterator[slice]:
    """The tokens from `start` to `end` in parts that the session runs in one call of the schedule."""
    while start < end:
        phases = session.position % spec.schedule.period
        together = bool((phases == phases[0]).all())
        count = spec.schedule.next_call(int(phases[0]), end - start).tokens if together else 1
        yield slice(start, start + count)
        start += count
