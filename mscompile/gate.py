"""All that a bundle is held to, in one call: parity, the limits of a project, and the bundle of the last release."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engines import registry
from mscompile import bench, bundle, isolation
from mscompile.baseline import compare
from mscompile.runtime import Bundle, open_bundle
from validation import rollouts, thresholds
from validation.evidence import Subject, Validation
from validation.parity import ParityReport, tolerance_of
from validation.thresholds import Limits, Thresholds

Progress = Callable[[str, int, int], None]
NOTHING = "nothing was compared: the bundle has no golden rollouts; compare with the original by --reference"


@dataclass(frozen=True)
class Original:
    """The checkpoint that a bundle is compared with, and how long."""

    checkpoint: Path
    family: str = "auto"
    adapter: str | None = None
    text: Path | None = None
    steps: int = 2048

    def __post_init__(self) -> None:
        rollouts.require_steps(self.steps)


@dataclass(frozen=True)
class Release:
    """The bundle of the last release, and how much slower than it a bundle may be."""

    bundle: Path
    max_slowdown: float = 1.10
    rounds: int = 10


def validate(
    opened: Bundle,
    engines: Sequence[str] = (),
    original: Original | None = None,
    limits: Path | None = None,
    release: Release | None = None,
    progress: Progress = lambda *_: None,
    isolated: bool = False,
    command: str = "",
) -> Validation:
    """Hold a bundle to its golden rollouts, or to the original; to a file of limits; and to an older bundle.

    `engines` are those to run, all that can where none is named; `isolated` gives each a process of its own, so that
    one that crashes fails and the others go on. The file and the older bundle are read first, so that a fault in them
    ends the run before it begins. `command` is what a report says that was run.
    """
    manifest = opened.manifest
    own, allowed = read_limits(opened, limits)
    older = open_bundle(release.bundle) if release else None
    names, skipped = runnable(opened, engines)
    roll_out = rolled_out_alone if isolated else rolled_out
    reports = tuple(allowed.gate(roll_out(opened, name, original, progress)) for name in names)
    baseline = None
    if release and older:
        baseline = compare(opened, older, names, release.max_slowdown, release.rounds, progress)
    return Validation(
        bundle=manifest.name,
        title=manifest.title,
        precision=manifest.precision,
        checkpoint_sha256=manifest.source["sha256"],
        against=original.checkpoint.name if original else "its golden rollouts",
        machine=bench.machine(),
        reports=reports,
        skipped=skipped,
        limits=allowed,
        thresholds=str(limits) if limits else None,
        faults=tuple(pin_faults(opened, own)),
        baseline=baseline,
        subject=subject(opened, command),
    )


def subject(opened: Bundle, command: str = "") -> Subject:
    """What a bundle holds, from its manifest."""
    manifest, spec = opened.manifest, opened.spec
    sizes = {name: entry.size_bytes for name, entry in manifest.files.items()}
    engines = {name: _below(sizes, f"{bundle.ENGINES}/{name}/") for name in manifest.engines}
    return Subject(
        family=manifest.family,
        parameters=manifest.source.get("parameters"),
        versions=manifest.versions,
        graph_bytes=_below(sizes, f"{bundle.GRAPHS}/"),
        engine_bytes=engines,
        total_bytes=sum(sizes.values()),
        spec=spec,
        nodes=tuple(manifest.source.get("nodes", ())),
        operations=manifest.costs,
        verified_at_export=tuple(manifest.parity or ()),
        command=command,
    )


def _below(sizes: Mapping[str, int], folder: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(folder))


def read_limits(opened: Bundle, path: Path | None) -> tuple[Thresholds | None, Limits]:
    """The file of limits and what it says about this bundle; the defaults where there is none."""
    precision = opened.manifest.precision
    if path is None:
        return None, thresholds.defaults(precision)
    own = thresholds.load(path)
    return own, own.limits(precision, [state.name for state in opened.spec.states])


def pin_faults(opened: Bundle, own: Thresholds | None) -> list[str]:
    """A sentence where a bundle was made from another checkpoint than the file of limits names."""
    made_from = opened.manifest.source["sha256"]
    if own is None or own.checkpoint_sha256 in (None, made_from):
        return []
    sentence = (
        f"{opened.path} was made from the checkpoint {made_from[:12]}..., and {own.path} pins "
        f"{str(own.checkpoint_sha256)[:12]}...; restore that checkpoint, or review the new one and change the pin"
    )
    return [sentence]


def runnable(opened: Bundle, engines: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The bundle's engines to run, and those that cannot here, with the reason.

    Raises EngineUnavailable where none can.
    """
    if engines:
        return list(engines), {}
    reasons = {name: registry.find(name).cannot_run() for name in opened.engines}
    names = [name for name, reason in reasons.items() if reason is None]
    if not names:
        opened.plan()  # raises, with the reason
    return names, {name: reason for name, reason in reasons.items() if reason is not None}


def rolled_out(
    opened: Bundle,
    engine: str,
    original: Original | None,
    progress: Progress = lambda *_: None,
) -> ParityReport:
    """The parity of one engine, by the default limits; a comparison of nothing fails."""
    if original is None:
        report = opened.verify(engine)
    else:
        from mscompile.verification import verify_against

        one = original
        report = verify_against(opened, engine, one.checkpoint, one.family, one.text, one.steps, progress, one.adapter)
    if not report.tensors and not report.failures:
        return replace(report, failures=(NOTHING,))
    return report


def rolled_out_alone(opened: Bundle, engine: str, original: Original | None, progress: Progress) -> ParityReport:
    """The same in a process of its own; where that ends without an answer, a report which says so."""
    try:
        return isolation.call(_reopened_and_rolled_out, opened.path, engine, original, progress=progress)
    except isolation.ProcessEnded as ended:
        precision = opened.manifest.precision
        return ParityReport(engine, precision, tolerance_of(precision), (), (str(ended),))


def _reopened_and_rolled_out(path: Path, engine: str, original: Original | None, progress: Progress) -> ParityReport:
    """Its files were held against their hashes by the process that asks."""
    return rolled_out(open_bundle(path, hash_files=False), engine, original, progress)
