"""The whole flow, top to bottom: checkpoint -> model -> graphs -> engines -> bundle -> parity."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from engines import registry
from engines.session import StreamSession
from engines.torch_eager import original
from exporters import adapter, check, cost, derived, export, program, streaming, weights
from exporters.passes import append, table
from exporters.passes.base import Outcome
from exporters.precision import asked, half
from exporters.precision import table as precisions
from exporters.precision.base import Request
from exporters.precision.rounding import Scheme
from mscompile import adapters, bundle, calibration, checkpoint
from mscompile.atomic import writing
from mscompile.contracts import Array, Engine, Profile, Snapshot, StreamSpec
from mscompile.errors import EngineUnavailable, GateFailed, MsCompileError, UsageError
from mscompile.golden import Golden
from mscompile.golden import Rollout as GoldenRollout
from mscompile.runtime import Bundle, open_bundle
from mscompile.tokenizer import Tokenizer
from validation import invariants, rollouts, sources
from validation.parity import TOLERANCES

GOLDEN_TOKENS = 192
GOLDEN_LOGITS = 4_000_000  # numbers a golden rollout may hold, which shortens it for large vocabularies
TOOLS = ("mscompile", "torch", "onnx", "onnxscript", "onnx-ir")

MEMORIES = {"append": (), "replace": (append.NAME,)}  # passes left out, for hosts that can only replace states

Progress = Callable[[str, int, int], None]  # what begins now, steps done, steps in all


@dataclass(frozen=True)
class Options:
    """What a user decides about an export."""

    family: str = "auto"
    precision: str = "fp32"
    profile: Profile = Profile()
    context: int | None = None  # tokens, for models whose memory grows with the stream
    text: Path | None = None  # real text for the parity rollouts
    steps: int = 2048  # tokens a row in the long rollouts
    validate: bool = True
    force: bool = False
    memory: str = "append"  # how memories that roll are kept: one of MEMORIES
    adapter: str | None = None  # of a user's own module: a Python file, or an installed one
    rounding: Scheme | None = None  # how weights are rounded, where the precision rounds them; None: its usual way


def compile_checkpoint(
    model: str | Path,
    targets: Sequence[str] = ("ort",),
    out: str | Path | None = None,
    options: Options | None = None,
    progress: Progress = lambda *_: None,
) -> Bundle:
    """Compile a trained checkpoint into the bundle `out` (`<model>.msc` by default) and verify it.

    `targets` are engine names, or "onnx" for graphs only. Every engine that runs on this machine is rolled out
    against the original in a fresh process; if one fails, GateFailed is raised and nothing is left at `out`.
    """
    options = options or Options()
    path = Path(model)
    target = Path(out) if out is not None else _beside(path)
    chosen = _engines(targets, options)
    track = _Track(progress)
    with writing(target, options.force) as directory:
        track("reading the checkpoint")
        trained = adapters.trained(path, options.family, options.adapter, options.context)
        trained.model.sources = sources.pseudo(trained.model.inputs)
        track("making the streaming form")
        stream = streaming.build(trained.model, options.profile, options.context)
        track.expect(2 * len(stream.graphs) + (2 if options.validate else 1) * len(chosen) + 2)
        models = traced(stream, track)
        text = read_text(options.text, trained.vocab)
        nodes = [_counted("tracing", models)]
        passed = table.run(
            models, stream.spec, MEMORIES[options.memory], lambda name: nodes.append(_counted(name, models))
        )
        passed = _with_starts(stream, passed, trained)
        passed = _lowered(models, passed, text, options)
        nodes.append(_counted(options.precision, models))
        graphs = _made(directory / bundle.GRAPHS)
        weights.save({**models, **derived.models(passed.derived)}, graphs)
        for name in models:
            track(f"checking {name}")
            check.check_file(graphs / f"{name}.onnx")
        track("recording golden rollouts")
        _golden(stream, passed.spec, graphs, trained, text).save(directory / bundle.GOLDEN)
        if tokenizer := tokenizer_of(trained.vocab):
            tokenizer.save(directory / bundle.TOKENIZER)
        manifest = _manifest(path, trained, stream, models, passed, options, nodes)
        del trained, stream  # engines need their memory
        facts = {engine.name: _build(engine, directory, passed.spec, models, options, track) for engine in chosen}
        manifest = bundle.seal(directory, replace(manifest, engines=facts))
        if options.validate:
            with _explained(passed, options.precision):
                parity = _verify(chosen, directory, path, options, track)
            bundle.seal(directory, replace(manifest, parity=parity, verified=bool(parity)))
        track("done")
    return open_bundle(target)


class _Track:
    """Counts the steps of an export for a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self._total = progress, -1, 2

    def expect(self, more: int) -> None:
        self._total += more

    def __call__(self, what: str) -> None:
        self._done += 1
        self._progress(what, self._done, self._total)


def _engines(targets: Sequence[str], options: Options) -> tuple[Engine, ...]:
    """The engines asked for; refused before any work where one cannot be built here."""
    if options.precision not in precisions.PRECISIONS:
        raise UsageError(f"unknown precision {options.precision!r}; known: {', '.join(precisions.PRECISIONS)}")
    profile = options.profile
    if not 1 <= profile.min_batch <= profile.max_batch:
        raise UsageError(f"batch range {profile.min_batch}:{profile.max_batch} must be 1 <= least <= most")
    if profile.max_chunk < 1:
        raise UsageError(f"max chunk must be at least 1, not {profile.max_chunk}")
    if options.memory not in MEMORIES:
        raise UsageError(f"unknown form of memory {options.memory!r}; known: {', '.join(MEMORIES)}")
    if options.context is not None and options.context < 2:
        raise UsageError(f"context must be at least 2 tokens, not {options.context}")
    rollouts.require_steps(options.steps)
    chosen = tuple(registry.find(name) for name in dict.fromkeys(targets) if name != "onnx")
    refused_by = precisions.PRECISIONS[options.precision].refused_by
    for engine in chosen:
        if reason := engine.cannot_build():
            raise EngineUnavailable(reason)
        if reason := refused_by.get(engine.name):
            raise EngineUnavailable(f"{engine.name} cannot be built in {options.precision}: {reason}")
    return chosen


def traced(stream: program.Streaming, track: Callable[[str], None]) -> dict[str, ir.Model]:
    """Every graph, held against its GraphSpec."""
    with adapter.advising() if isinstance(stream, adapter.AdaptedProgram) else nullcontext():
        models = export.export_graphs(stream, lambda name: track(f"tracing {name}"))
        for spec in stream.spec.graphs:
            check.check_interface(models[spec.name], spec, "export")
    return models


def _counted(stage: str, models: dict[str, ir.Model]) -> dict[str, Any]:
    """How many nodes each graph has after a stage of the export."""
    return {"after": stage, "graphs": {name: len(model.graph) for name, model in models.items()}}


def _with_starts(stream: program.Streaming, passed: Outcome, trained: checkpoint.Checkpoint) -> Outcome:
    """The spec, saying of which rings the original reads slots that were not written yet.

    It is the stream program that is tried, with the states that they were made from.
    """
    made_from = {name: row.source for name, row in passed.derived.items()}
    source = {name: made_from.get(name, name) for name in invariants.rings(passed.spec)}
    if not source:
        return passed
    executor = program.EagerExecutor(stream)
    read = invariants.starts_read(
        stream.spec,
        lambda batch: StreamSession(stream.spec, executor, batch, trained.model.sources),
        set(source.values()),
        TOLERANCES["fp32"].logit_outlier_above,
    )
    states = [replace(state, reads_initial=source.get(state.name) in read) for state in passed.spec.states]
    return replace(passed, spec=replace(passed.spec, states=tuple(states)))


def _lowered(models: dict[str, ir.Model], passed: Outcome, text: Array | None, options: Options) -> Outcome:
    """The graphs in the precision asked for."""
    seen = {}
    if precisions.PRECISIONS[options.precision].needs_ranges:
        seen = calibration.ranges(models, passed.spec, text)
    spec, hits = precisions.run(options.precision, models, Request(passed.spec, seen), options.rounding)
    return replace(passed, spec=spec, hits=(*passed.hits, *hits))


def _golden(
    stream: program.Streaming, spec: StreamSpec, graphs: Path, trained: checkpoint.Checkpoint, text: Array | None
) -> Golden:
    """Reference logits and final states of short rollouts, from the original and the stream program."""
    length = max(16, min(GOLDEN_TOKENS, GOLDEN_LOGITS // spec.vocab_size))
    states_of = derived.DerivedStates(graphs, spec).of
    full, recorded = original(trained.model), []
    for rollout in rollouts.golden(spec, text, length):
        batch, model = rollout.tokens.shape[0], trained.model
        supplied = {each.name: model.supplied(each, torch.from_numpy(rollout.tokens)).numpy() for each in model.inputs}
        stepped = StreamSession(stream.spec, program.EagerExecutor(stream), batch, model.sources)
        stepped.step(rollout.tokens)
        chunks = np.array(rollout.chunks, dtype=np.int64)
        states = _written(spec, states_of(stepped.state()))
        logits = full(rollout.tokens)
        recorded.append(GoldenRollout(rollout.name, rollout.tokens, chunks, logits, states, supplied))
    return Golden(tuple(recorded))


def _manifest(
    path: Path,
    trained: checkpoint.Checkpoint,
    stream: program.Streaming,
    models: dict[str, ir.Model],
    passed: Outcome,
    options: Options,
    nodes: list[dict[str, Any]],
) -> bundle.Manifest:
    """What is known before engines are built and verified."""
    single = [graph.name for graph in stream.spec.graphs if graph.tokens == 1]
    return bundle.Manifest(
        name=_beside(path).stem,
        title=trained.family.title,
        family=trained.family.name,
        precision=options.precision,
        verified=False,
        source={**_source(trained), "nodes": nodes},
        versions={tool: version(tool) for tool in TOOLS},
        profile=options.profile,
        engines={},
        costs={name: cost.flops(models[name]) for name in single},
        tolerances=TOLERANCES[options.precision].limits(),
        parity=None,
        rules=stream.hits,
        passes=passed.hits,
        spec=passed.spec,
    )


def _written(spec: StreamSpec, snapshot: Snapshot) -> dict[str, Array]:
    """The states, appended ones without the rows that were never written."""
    states = dict(snapshot.states)
    for state in spec.states:
        if state.update == "append" and state.time_axis is not None:
            rows = np.arange(min(int(snapshot.cursors[state.name].max()), states[state.name].shape[state.time_axis]))
            states[state.name] = states[state.name].take(rows, axis=state.time_axis)
    return states


def _build(
    engine: Engine, directory: Path, spec: StreamSpec, models: dict[str, ir.Model], options: Options, track: _Track
) -> dict[str, Any]:
    """Facts of the build; GateFailed where the runtime does not compute in the precision asked for."""
    track(f"building {engine.name}")
    out = _made(directory / bundle.ENGINES / engine.name)
    facts = engine.build(directory / bundle.GRAPHS, out, spec, options.profile)
    if fault := asked.fault(models, facts["numerics"]):
        raise GateFailed(f"{engine.name} does not run in {options.precision}: {fault}; no bundle was written")
    return facts


@contextmanager
def _explained(passed: Outcome, precision: str) -> Iterator[None]:
    """Say of a failed gate what is known of its cause."""
    try:
        yield
    except GateFailed as error:
        if not any(half.DECIDES in hit.reason for hit in passed.hits):
            raise
        told = f"this model makes hard decisions, and close ones fall otherwise in {precision}: export it in fp32"
        raise GateFailed(f"{error}; {told}") from error


def _verify(
    engines: Sequence[Engine], directory: Path, reference: Path, options: Options, track: _Track
) -> dict[str, dict[str, Any]]:
    """A parity report for each engine that runs on this machine."""
    reports = {}
    for engine in engines:
        track(f"verifying {engine.name}")
        if engine.cannot_run() is None:
            reports[engine.name] = _verify_in_fresh_process(directory, engine.name, reference, options)
    return reports


def _verify_in_fresh_process(directory: Path, engine: str, reference: Path, options: Options) -> dict[str, Any]:
    """The parity report of what was written, made by a process that has only what was written."""
    command = [sys.executable, "-m", "mscompile.cli", "validate", str(directory), "--engine", engine]
    command += ["--reference", str(reference), "--family", options.family, "--steps", str(options.steps)]
    command += ["--adapter", options.adapter] if options.adapter else []
    command += ["--json", "--unfinished"] + (["--tokens", str(options.text)] if options.text else [])
    # The pipe to its stdin ends when this process does, however it ends, and then so does the child.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        assert child.stdout is not None
        answer, code = child.stdout.read(), child.wait()
        errors.seek(0)
        said = errors.read().strip()[-500:]
    try:
        report: dict[str, Any] = json.loads(answer)["reports"][0]
    except (ValueError, KeyError, IndexError) as error:
        raise MsCompileError(f"the process that verifies {engine} ended with code {code}: {said}") from error
    if report["failures"]:
        raise GateFailed(f"{engine} is not the original model: {report['failures'][0]}; no bundle was written")
    for tensor in report["tensors"]:
        tensor["error_by_step"] = []  # curves are for pages; a manifest keeps figures
    report["step_times"] = []  # which differ from run to run, and a manifest does not
    return report


def read_text(path: Path | None, vocab: tuple[str, ...]) -> Array | None:
    """Token ids of a text file, for rollouts on real text."""
    tokenizer = tokenizer_of(vocab)
    if path is None:
        return None
    if tokenizer is None:
        raise UsageError("--tokens needs a model whose vocabulary is one character a token")
    try:
        return tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {path}: {error}") from error


def tokenizer_of(vocab: tuple[str, ...]) -> Tokenizer | None:
    return Tokenizer("char", vocab) if vocab and all(len(token) == 1 for token in vocab) else None


def _source(trained: checkpoint.Checkpoint) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    facts = {"format": trained.source, "sha256": trained.sha256(), "parameters": parameters}
    return {**facts, "config": asdict(trained.model.config)}


def _beside(path: Path) -> Path:
    """Where a bundle goes by default: beside the checkpoint, under its name."""
    return path.resolve().with_name(f"{path.resolve().name}.msc") if path.is_dir() else path.with_suffix(".msc")


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory
