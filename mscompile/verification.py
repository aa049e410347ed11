"""A bundle's engine rolled out against the original checkpoint. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from engines.session import StreamSession
from engines.torch_eager import original
from exporters import program, streaming
from exporters.derived import DerivedSession, DerivedStates
from mscompile import adapters
from mscompile.bundle import GRAPHS
from mscompile.errors import UsageError
from mscompile.pipeline import read_text
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
        raise UsageError(f"{reference} is not the checkpoint that {bundle.path} was made from: its sha256 differs")
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

    return parity.check(
        engine,
        bundle.manifest.precision,
        spec,
        partial(plan.session, sources=supplied),
        original(trained.model),
        lambda batch: DerivedSession(StreamSession(stream.spec, executor, batch, supplied), derived),
        chosen,
        consumed,
    )
