"""The targets and what was measured for each: one row a requirement, computed from the sections of a result.

Sections are the JSON objects that the other files here produce; a section that is missing leaves its rows without a
figure and says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

Section = Mapping[str, Any]

TXL, HOURGLASS, VANILLA = "transformer-xl-41m", "hourglass-12", "vanilla-12"
MULTISCALE, SHORTER = "multiscale-30", "vanilla-14"
MEMORY_PAIRS = {
    "Hourglass to vanilla": (HOURGLASS, VANILLA),
    "30-layer multi-scale to 14-layer vanilla": (MULTISCALE, SHORTER),
}
DECODE, PREFILL = "decode@1024", "prefill:128@1024"
PLAIN = ("onnx-plain", "openvino")
PREDICTED = (4 + 8 / 3) / 12  # layers a token of `2@1 8@3 2@1`, to those of 12 layers at every token


@dataclass(frozen=True)
class Row:
    """One requirement: `measured` has to be at most, or at least, `limit`. No limit: for information."""

    target: int
    what: str
    measured: float | None
    sense: Literal["<=", ">=", ""]
    limit: float | None
    unit: str = "x"
    spread: tuple[float, float] | None = None  # of the middle 80 % of rounds
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing was measured or nothing is required."""
        if self.measured is None or self.limit is None:
            return None
        return self.measured <= self.limit if self.sense == "<=" else self.measured >= self.limit


def rows(sections: Mapping[str, Section]) -> list[Row]:
    """Every row of targets 1 to 7."""
    speed = sections.get("speed", {})
    found = [
        *_decode(speed),
        *_prefill(speed),
        *_precision(speed, sections.get("precision", {})),
        *_multi_rate(speed),
        *_memory(sections.get("memory", {})),
        *_cost_of_use(sections.get("cost", {})),
        *_streams(speed, sections.get("soak", {})),
    ]
    return sorted(found, key=lambda row: row.target)


def timing(speed: Section, engine: str, workload: str, batch: int = 1) -> Section:
    """The timing of an engine on a workload; empty where it was not measured."""
    for found in speed.get("timings", ()):
        if (found["engine"], found["workload"], found["batch"]) == (engine, workload, batch):
            return dict(found)
    return {}


def _reason(speed: Section, *names: str) -> str:
    skipped = speed.get("skipped", {})
    return "; ".join(f"{name}: {skipped[name]}" for name in names if name in skipped)


def _row(
    target: int, what: str, ratio: Mapping[str, float] | None, sense: Literal["<=", ">="], limit: float, note: str = ""
) -> Row:
    if not ratio:
        return Row(target, what, None, sense, limit, note=note or "not measured")
    return Row(target, what, ratio["median"], sense, limit, spread=(ratio["low"], ratio["high"]), note=note)


def _best_plain(versus: Mapping[str, Mapping[str, float]]) -> tuple[Mapping[str, float] | None, str]:
    """The faster plain export: that which takes the fewest times as long."""
    found = [(versus[f"{TXL} {name}"], name) for name in PLAIN if f"{TXL} {name}" in versus]
    return min(found, key=lambda pair: pair[0]["median"], default=(None, ""))


def _against(target: int, speed: Section, workload: str, limits: tuple[float, float, float], ceiling: str) -> list[Row]:
    engine = f"{TXL} fp32"
    found = timing(speed, engine, workload)
    versus = found.get("versus", {})
    plain, name = _best_plain(versus)
    missing = _reason(speed, engine, *(f"{TXL} {peer}" for peer in PLAIN))
    return [
        _row(target, f"FP32 {workload}: time to the {ceiling} ceiling", found.get("of_ceiling"), "<=", limits[0]),
        _row(target, f"FP32 {workload}: original eager to ours", versus.get(f"{TXL} torch"), ">=", limits[1]),
        _row(target, f"FP32 {workload}: best plain export to ours", plain, ">=", limits[2], name or missing),
    ]


def _decode(speed: Section) -> list[Row]:
    return _against(1, speed, DECODE, (1.15, 18.0, 6.5), "byte")


def _prefill(speed: Section) -> list[Row]:
    return _against(2, speed, PREFILL, (1.4, 5.0, 2.8), "operation")


def _precision(speed: Section, precision: Section) -> Iterable[Row]:
    for name, worst in (("int8", 0.5), ("int4", 2.0)):
        engine = f"{TXL} {name}"
        found, missing = timing(speed, engine, DECODE), _reason(speed, engine)
        yield _row(3, f"{name} decode: time to its byte ceiling", found.get("of_ceiling"), "<=", 2.0, missing)
        if name == "int4":
            ratio = found.get("versus", {}).get(f"{TXL} torch")
            yield _row(3, "int4 decode: original eager to ours", ratio, ">=", 35.0, missing)
        for model in ("transformer-xl", "hourglass"):
            lost = precision.get(f"{model} {name}", {})
            percent, why = lost.get("perplexity_loss_percent"), lost.get("reason", "not measured")
            note = "" if percent is not None else why
            yield Row(3, f"{name}: perplexity lost, trained {model}", percent, "<=", worst, "%", note=note)


def _multi_rate(speed: Section) -> list[Row]:
    found = timing(speed, f"{HOURGLASS} fp32", DECODE)
    versus = found.get("versus", {})
    vanilla = versus.get(f"{VANILLA} fp32")
    cost = None
    if vanilla:  # vanilla to ours, turned around and held against the prediction
        low, middle, high = (1 / vanilla[name] / PREDICTED for name in ("high", "median", "low"))
        cost = {"median": middle, "low": low, "high": high}
    peer = f"{HOURGLASS} hourglass-pytorch"
    return [
        _row(4, "Hourglass decode: time to what its layer counts predict from vanilla", cost, "<=", 1.15),
        _row(
            4, "Hourglass decode: public package, recomputing 1,024 tokens, to ours", versus.get(peer), ">=", 100.0,
            _reason(speed, peer),
        ),
        _row(
            4, "Hourglass decode: original eager, recomputing 1,024 tokens, to ours", versus.get(f"{HOURGLASS} torch"),
            ">=", 100.0,
        ),
    ]  # fmt: skip


def _memory(memory: Section) -> Iterable[Row]:
    kinds = {"state_bytes": "state of a stream", "resident_bytes": "memory of the process at its peak"}
    for title, (ours, theirs) in MEMORY_PAIRS.items():
        compared = [
            Row(5, f"{title} at {length} tokens: {what}", found[ours][kind] / found[theirs][kind], "", None)
            for length, found in memory.get("lengths", {}).items()
            for kind, what in kinds.items()
            if kind in found.get(ours, {}) and kind in found.get(theirs, {})
        ]
        yield from compared or [Row(5, f"{title}: memory", None, "", None, note="not measured")]


def _cost_of_use(cost: Section) -> Iterable[Row]:
    for key, what, limit, unit in (
        ("export_ratio", "export and ONNX Runtime build to a bare torch.onnx.export", 1.5, "x"),
        ("export_peak_ratio", "peak memory of an export to the weights, 1 B parameters", 2.5, "x"),
        ("help_seconds", "mscompile --help", 0.3, "s"),
        ("open_reads_ratio", "bytes read to open a bundle, to its size", 1.01, "x"),
        ("resident_ratio", "memory of all graphs to the weights", 1.3, "x"),
        ("overhead_percent", "session over the bare runtime call, a decode step", 5.0, "%"),
    ):
        value = cost.get(key)
        yield Row(6, what, value, "<=", limit, unit, note="" if value is not None else "not measured")


def _streams(speed: Section, soak: Section) -> Iterable[Row]:
    batches = [timing(speed, f"{TXL} fp32", DECODE, batch) for batch in (1, 2, 4, 8, 16)]
    batches = [found for found in batches if found]
    for fewer, more in pairwise(batches):
        gain = more["tokens_per_second"] / fewer["tokens_per_second"]
        note = f"{more['of_ceiling']['median']:.2f}x its ceiling" if more.get("of_ceiling") else ""
        yield Row(7, f"tokens/s of batch {more['batch']} to batch {fewer['batch']}", gain, ">=", 1.0, note=note)
    if len(batches) < 2:
        yield Row(7, "tokens/s of a batch to one stream", None, ">=", 1.0, note="not measured")
    steps = f"{soak['steps']:,} steps" if soak else "soak"
    for key, what, limit, unit in (
        ("latency_ratio", f"{steps}: a step of the second half to one of the first", 1.1, "x"),
        ("memory_growth_percent", f"{steps}: growth of memory after the first block", 1.0, "%"),
        ("final_error", f"{steps}: largest difference of the last logits to the original", 1e-3, ""),
    ):
        value = soak.get(key)
        yield Row(7, what, value, "<=", limit, unit, note="" if value is not None else "not measured")
