"""Targets 1 to 4 and 7: decode and prefill of the measured models, of every peer, and of growing batches, each heat
in interleaved rounds with the machine's ceilings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import models
from targets import DECODE, HOURGLASS, PREFILL, TXL, VANILLA

from mscompile import footprint
from mscompile.bench import CEILING, Contestant, Field, Heat, Lane, Progress, typical
from mscompile.errors import MsCompileError
from mscompile.runtime import Bundle, open_bundle
from validation.latency import parse

PEERS = {
    TXL: ("torch", "torch-compile", "onnx-plain", "openvino"),
    HOURGLASS: ("torch", "hourglass-pytorch"),
    VANILLA: (),
}
PRECISIONS = {TXL: ("fp32", "int8", "int4"), HOURGLASS: ("fp32",), VANILLA: ("fp32",)}
BATCHES = (1, 2, 4, 8, 16)
POSITIONS = {TXL: (64, 256, 512), HOURGLASS: (63, 255, 510, 1401), VANILLA: (63, 255, 510, 1401)}
ENGINE_SAMPLES, PEER_SAMPLES = 12, 3  # a round, both multiples of Hourglass's period


@dataclass(frozen=True)
class Plan:
    """How long a run takes."""

    rounds: int
    positions: bool  # latency against position, too


SHORT, FULL = Plan(rounds=8, positions=False), Plan(rounds=24, positions=True)


class Entries:
    """The bundles of all models and the processes that run them; precisions that cannot be built are skipped."""

    def __init__(self, build: Path, say: Callable[[str], None]) -> None:
        self.contestants: list[Contestant] = []
        self.bundles: dict[str, Bundle] = {}  # by contestant
        self.skipped: dict[str, str] = {}
        for model, peers in PEERS.items():
            source = models.saved(model, build)
            for precision in PRECISIONS[model]:
                say(f"exporting {model} in {precision}")
                self._engine(model, precision, source, build)
            bundle = self.bundles[f"{model} fp32"].path
            self.contestants += [Contestant(f"{model} {peer}", peer, bundle, source) for peer in peers]
        path = self.bundles[f"{TXL} fp32"].path
        self.contestants.append(Contestant(CEILING, CEILING, path))

    def _engine(self, model: str, precision: str, source: Path, build: Path) -> None:
        name = f"{model} {precision}"
        try:
            path = models.compiled(source, build, precision)
        except MsCompileError as error:
            self.skipped[name] = str(error)
            return
        self.bundles[name] = open_bundle(path, hash_files=False)
        self.contestants.append(Contestant(name, "ort", path, source))


def measure(build: Path, plan: Plan, say: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    """The section: timings, what was skipped and why, and the machine's rates."""
    entries = Entries(build, say)
    timings: list[dict[str, Any]] = []
    rates = []
    with Field(entries.contestants) as field:
        for title, lanes in heats(plan):
            say(title)
            heat = field.run(lanes, plan.rounds, progress)
            rates += heat.rates
            timings += told(heat, entries.bundles)
        errors = field.errors()
    machine = typical(rates)
    return {
        "timings": timings,
        "skipped": {**entries.skipped, **field.skipped},
        "errors": errors,
        "rates": asdict(machine) if machine else None,
        "rounds": plan.rounds,
    }


def heats(plan: Plan) -> Iterable[tuple[str, list[Lane]]]:
    """What is measured together."""
    yield f"{TXL}, {DECODE}", _lanes((TXL,), DECODE)
    yield f"{TXL}, {PREFILL}", _lanes((TXL,), PREFILL)
    yield f"{HOURGLASS} and {VANILLA}, {DECODE}", _lanes((HOURGLASS, VANILLA), DECODE)
    decode = parse(DECODE)
    larger = [Lane(f"{TXL} fp32", decode, ENGINE_SAMPLES, batch) for batch in BATCHES if batch > 1]
    yield f"{TXL}, batches", larger
    if plan.positions:
        for group in ((TXL,), (HOURGLASS, VANILLA)):
            for position in POSITIONS[group[0]]:
                yield f"{', '.join(group)}, at {position}", _lanes(group, f"decode@{position}")


def _lanes(names: Sequence[str], workload: str) -> list[Lane]:
    parsed = parse(workload)
    samples = ENGINE_SAMPLES if parsed.kind == "decode" else PEER_SAMPLES
    return [
        *(Lane(f"{name} {peer}", parsed, PEER_SAMPLES) for name in names for peer in PEERS[name]),
        *(Lane(f"{name} {precision}", parsed, samples) for name in names for precision in PRECISIONS[name]),
    ]


def told(heat: Heat, bundles: Mapping[str, Bundle]) -> list[dict[str, Any]]:
    """One JSON object a lane; `versus` says how many times as long each other lane of the heat takes."""
    found = []
    for lane in heat.samples:
        opened = bundles.get(lane.contestant) or bundles[f"{lane.contestant.split()[0]} fp32"]
        schedule = opened.spec.schedule
        latency = asdict(heat.latency(lane, schedule))
        latency["tokens_per_second"] *= lane.batch
        others = [other for other in heat.samples if other.contestant != lane.contestant and other.batch == lane.batch]
        ceiling = None
        if heat.rates and lane.contestant in bundles:
            cost = footprint.decode(opened.path, opened.manifest, lane.workload.start)
            ceiling = asdict(heat.of_ceiling(lane, cost, schedule))
            rates = typical(heat.rates)
            assert rates is not None
            least = rates.least_ms(cost, lane.workload.tokens, lane.batch)
            ceiling |= {"ms": least, "bytes": cost.bytes(lane.batch), "flops": cost.flops * lane.batch}
        found.append(
            {
                **latency,
                "batch": lane.batch,
                "of_ceiling": ceiling,
                "versus": {other.contestant: asdict(heat.ratio(other, lane, schedule)) for other in others},
            }
        )
    return found
