"""Target 5: memory at inference, by stream length: multi-scale models against vanilla ones of the same width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
from targets import MEMORY_PAIRS

from mscompile import footprint
from mscompile.bench import Contestant, Field, Lane
from mscompile.runtime import open_bundle
from validation.latency import Workload

LENGTHS = (255, 510, 1023, 1398)  # tokens before the steps that are measured
STEPS = 12


def measure(build: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """By length and model: bytes of the state that a stream has filled, and the peak of the process that runs it.

    Processes only grow, so lengths are measured in rising order. A process holds runtime, graphs and the whole
    buffers of one stream; the state's share grows with the stream.
    """
    bundles = {}
    for name in dict.fromkeys(name for pair in MEMORY_PAIRS.values() for name in pair):
        say(f"memory of {name}")
        bundles[name] = open_bundle(models.compiled(models.saved(name, build), build), hash_files=False)
    lengths: dict[str, Any] = {}
    with Field([Contestant(name, "ort", bundle.path) for name, bundle in bundles.items()]) as field:
        for length in LENGTHS:
            workload = Workload("decode", 1, length)
            field.run([Lane(name, workload, STEPS) for name in bundles], rounds=1)
            lengths[str(length)] = {
                name: {
                    "state_bytes": sum(footprint.state_bytes(b.spec, state, length) for state in b.spec.states),
                    "resident_bytes": field.peak_bytes[name],
                }
                for name, b in bundles.items()
            }
    weights = {name: b.manifest.files["graphs/weights.bin"].size_bytes for name, b in bundles.items()}
    capacity = {name: b.spec.bytes_per_stream() for name, b in bundles.items()}
    return {"lengths": lengths, "weight_bytes": weights, "bytes_per_stream": capacity}
