"""A bundle's engine rolled out against the original checkpoint. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from engines import ort
from engines.session import StreamSession
from engines.torch_eager import original
from exporters import program, streaming
from exporters.derived import DerivedSession, DerivedStates
from exporters.precision import asked
from mscompile import adapters
from mscompile.bundle import ENGINES, GRAPHS
from mscompile.checkpoint import Checkpoint
from mscompile.errors import UsageError
from mscompile.pipeline import read_text, tokenizer_of
from mscompile.runtime import Bundle
from validation import parity, rollouts, sources
from validation.parity import ParityReport


def verify_against(
    bundle: Bundle,
    engine: str,
    reference: Path,
    family: str = "auto",
    text: Path | None = None,
    steps: int = 2048,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    adapter: str | None = None,
) -> ParityReport:
    """Chained rollouts of `engine` against the checkpoint the bundle was made from.

    Raises UsageError where `reference` is another checkpoint.
    """
    trained = adapters.trained(reference, family, adapter, bundle.spec.max_context)
    if trained.sha256() != bundle.manifest.source["sha256"]:
        files = " or ".join(file.name for file in trained.files)
        raise UsageError(
            f"{reference} is not the checkpoint that {bundle.path} was made from: its sha256 differs; "
            f"{files} is another one or was changed since: export again"
        )
    spec, profile = bundle.spec, bundle.manifest.profile
    supplied = trained.model.sources = sources.pseudo(spec.inputs)
    stream = streaming.build(trained.model, profile, spec.max_context)
    plan, executor = bundle.plan(engine), program.EagerExecutor(stream)
    derived = DerivedStates(bundle.path / GRAPHS, spec)
    chosen = rollouts.standard(spec, read_text(text, trained.vocab), steps)
    total, done = sum(rollout.tokens.size for rollout in chosen), 0

    def consumed(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(f"rolling out {engine}", done, total)

    report = parity.check(
        engine,
        bundle.manifest.precision,
        spec,
        partial(plan.session, sources=supplied),
        original(trained.model),
        lambda batch: DerivedSession(StreamSession(stream.spec, executor, batch, supplied), derived),
        chosen,
        consumed,
    )
    return replace(report, failures=(*report.failures, *_beside_rollouts(bundle, engine, trained)))


def _beside_rollouts(bundle: Bundle, engine: str, trained: Checkpoint) -> Iterator[str]:
    """What else a bundle promises: its precision, its golden rollouts, its graphs where engines run other forms of
    them, and its tokenizer."""
    manifest, spec = bundle.manifest, bundle.spec
    graphs, built = bundle.path / GRAPHS, bundle.path / ENGINES / engine
    kinds = {kind for graph in spec.graphs for kind in asked.products(ir.load(graphs / f"{graph.name}.onnx"))}
    if not asked.is_of(manifest.precision, kinds):
        found = ", ".join(sorted(kinds)) or "none"
        yield f"the manifest says {manifest.precision}, and the products of the graphs are in {found}"
    replayed = bundle.golden.sources(spec.inputs)
    plans = {"": bundle.plan(engine)}
    if engine == "ort" and ort.packed(built) is not None:
        plans["graphs as exported: "] = ort.unpacked(spec, graphs, built)
    if not bundle.golden.rollouts:
        yield "the bundle has no golden rollouts"
    for what, plan in plans.items():
        sessions = partial(plan.session, sources=replayed)
        report = parity.check_golden(engine, manifest.precision, spec, sessions, bundle.golden.rollouts)
        yield from (f"{what}{failure}" for failure in report.failures)
    known = tokenizer_of(trained.vocab)
    if known is not None and bundle.tokenizer != known:
        yield "the tokenizer is not the vocabulary of the checkpoint"
