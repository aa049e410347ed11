"""Parity and latency on a CUDA device, with what is installed there: torch is enough.

    benchmarks/gpu_check.sh [--out FILE] [--rounds N] [--bundle BUNDLE.msc]

Measures, on the Transformer-XL of 41 M parameters with random weights, memory full, batch 1, in float32 and bfloat16:
the original in eager mode and under torch.compile(mode="reduce-overhead"), which uses CUDA graphs; the recurrence
that our passes arrive at (recurrence.py), eager and as a CUDA graph; and, with --bundle, that bundle in ONNX Runtime
where it has a CUDA provider. Rounds are interleaved. The result says what share of the device's measured read
bandwidth a decode step reaches. Exit code 3: there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

PREFIX, PREFILL = 1024, 128  # tokens
WARM_UPS, SAMPLES = 5, 10  # steps; samples a round
LIMITS = {"float32": 1e-3, "bfloat16": 1.0}  # largest difference of logits, whose size is about 1
READ_BYTES = 2**31
NO_DEVICE = 3

Step = Callable[[], None]


@dataclass(frozen=True)
class Way:
    """One way to run a workload: a step that may be repeated, timed with the device idle before and after."""

    name: str
    workload: str
    dtype: str
    step: Step


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("no CUDA device can be used: PyTorch is not installed", file=sys.stderr)
        return NO_DEVICE
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return NO_DEVICE
    result = check(torch.device("cuda"), options.rounds, options.bundle)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if all(found["passed"] for found in result["parity"].values()) else 1


def check(device: Any, rounds: int, bundle: Path | None = None) -> dict[str, Any]:
    """Parity first, then latency."""
    import torch
    from shapes import transformer_xl

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    result: dict[str, Any] = {"machine": machine(device), "parity": {}, "latency": {}, "skipped": {}}
    ways: list[Way] = []
    step_bytes = {}
    for name in LIMITS:
        model = transformer_xl().to(device, getattr(torch, name)).eval().requires_grad_(False)
        result["parity"][name] = parity(model, name)
        made, step_bytes[name] = prepared(model, name, result["skipped"])
        ways += made
    ways += ort_ways(bundle, result["skipped"])
    samples = raced(ways, rounds, torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    bandwidth = read_bandwidth(device)
    result["read_bytes_per_second"] = bandwidth
    result["latency"] = summary(ways, samples, step_bytes, bandwidth)
    return result


def machine(device: Any) -> dict[str, Any]:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def parity(model: Any, name: str) -> dict[str, Any]:
    """Logits of the recurrence, in chunks and token by token, against the original's own forward."""
    import torch
    from recurrence import Recurrence

    config = model.config
    generator = torch.Generator().manual_seed(1)
    length = config.mem_len + config.mem_len // 2
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator).to(model.embedding.weight.device)
    recurrence = Recurrence(model, batch=2)
    chunk = max(config.mem_len // 4, 1)
    with torch.inference_mode():
        expected = model.full(tokens)
        parts = [*tokens[:, :-8].split(chunk, dim=1), *tokens[:, -8:].split(1, dim=1)]
        found = torch.cat([recurrence.step(part) for part in parts], dim=1)
    error = float((found.float() - expected.float()).abs().max())
    agree = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    return {"max_abs": error, "argmax_agreement": agree, "tokens": tokens.numel(), "passed": error <= LIMITS[name]}


def prepared(model: Any, dtype: str, skipped: dict[str, str]) -> tuple[list[Way], int]:
    """The ways to run a model, each with its memory full, and the bytes that a decode step must read."""
    import torch
    from recurrence import Recurrence

    device = model.embedding.weight.device
    prefix = torch.randint(model.config.vocab_size, (1, PREFIX), device=device)
    with torch.inference_mode():
        _, (mems, _) = model.advance(prefix)
    ways = []
    for workload, count in (("decode", 1), (f"prefill:{PREFILL}", PREFILL)):
        tokens = torch.randint(model.config.vocab_size, (1, count), device=device)
        ways.append(Way("original, eager", workload, dtype, eager(model, tokens, mems)))
        if device.type == "cuda":
            compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
            ways.append(Way("original, torch.compile reduce-overhead", workload, dtype, eager(compiled, tokens, mems)))
        recurrence = filled(Recurrence(model), prefix)
        ways.append(Way("recurrence, eager", workload, dtype, stepping(recurrence, tokens)))
        if device.type == "cuda":
            graph = filled(Recurrence(model), prefix)
            ways.append(Way("recurrence, CUDA graph", workload, dtype, captured(graph, tokens)))
    return attempted(ways, skipped), Recurrence(model).step_bytes()


def eager(model: Any, tokens: Any, mems: Any) -> Step:
    """One call of the published forward, its memories given back to it."""
    import torch

    carried = [mem.clone() for mem in mems]

    def step() -> None:
        if hasattr(model, "_orig_mod"):  # compiled: results of the last call may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode():
            _, new = model(tokens, carried)
            for old, mem in zip(carried, new, strict=True):
                old.copy_(mem)

    return step


def filled(recurrence: Any, prefix: Any) -> Any:
    import torch

    with torch.inference_mode():
        for part in prefix.split(PREFILL, dim=1):
            recurrence.step(part)
    return recurrence


def stepping(recurrence: Any, tokens: Any) -> Step:
    import torch

    def step() -> None:
        with torch.inference_mode():
            recurrence.step(tokens)

    return step


def captured(recurrence: Any, tokens: Any) -> Step:
    """The step as a CUDA graph, captured on a side stream after warming up, as PyTorch asks for."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(side):
            for _ in range(3):
                recurrence.step(tokens)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            recurrence.step(tokens)
    return graph.replay


def ort_ways(bundle: Path | None, skipped: dict[str, str]) -> list[Way]:
    """A bundle in ONNX Runtime on CUDA, logits and states copied through the host as its session does."""
    name = "bundle, ONNX Runtime CUDA"
    if bundle is None:
        skipped[name] = "no --bundle was given"
        return []
    try:
        import numpy as np
        import onnxruntime

        from mscompile.runtime import open_bundle

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise RuntimeError("this ONNX Runtime has no CUDA provider")
        opened = open_bundle(bundle)
        ways = []
        for workload, count in (("decode", 1), (f"prefill:{PREFILL}", PREFILL)):
            session = opened.session("ort")
            session.step(np.zeros((1, PREFIX), np.int64))
            tokens = np.zeros((1, count), np.int64)
            ways.append(Way(name, workload, "float32", lambda session=session, tokens=tokens: session.step(tokens)))
        return ways
    except Exception as error:  # noqa: BLE001 (whatever is missing there is a reason to report, not to stop)
        skipped[name] = first_line(error)
        return []


def attempted(ways: list[Way], skipped: dict[str, str]) -> list[Way]:
    """The ways that survive their warm-ups; torch.compile needs a compiler, for example."""
    kept = []
    for way in ways:
        try:
            for _ in range(WARM_UPS):
                way.step()
        except Exception as error:  # noqa: BLE001 (see above)
            skipped[f"{way.name}, {way.workload}, {way.dtype}"] = first_line(error)
        else:
            kept.append(way)
    return kept


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def raced(ways: list[Way], rounds: int, wait: Step) -> list[list[list[float]]]:
    """Milliseconds by way, round and sample."""
    taken: list[list[list[float]]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, found in zip(ways, taken, strict=True):
            found.append([timed(way.step, wait) for _ in range(SAMPLES)])
    return taken


def timed(step: Step, wait: Step) -> float:
    wait()
    begun = time.perf_counter()
    step()
    wait()
    return 1e3 * (time.perf_counter() - begun)


def read_bandwidth(device: Any, size_bytes: int = READ_BYTES) -> float:
    """Bytes a second of summing a large float32 tensor, the best of some passes."""
    import torch

    big = torch.ones(size_bytes // 4, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return big.nbytes / (1e-3 * min(timed(lambda: big.sum(), wait) for _ in range(10)))


def summary(
    ways: list[Way], samples: list[list[list[float]]], step_bytes: dict[str, int], bandwidth: float
) -> dict[str, Any]:
    """By "dtype workload way": times, the ratio to the original in the same rounds, the share of the ceiling."""
    found: dict[str, Any] = {}
    medians = {way: [median(taken) for taken in rounds] for way, rounds in zip(ways, samples, strict=True)}
    for way, rounds in zip(ways, samples, strict=True):
        times = sorted(ms for taken in rounds for ms in taken)
        base = next(
            (w for w in ways if (w.name, w.workload, w.dtype) == ("original, eager", way.workload, way.dtype)), way
        )
        ratios = sorted(first / own for first, own in zip(medians[base], medians[way], strict=True))
        ceiling_ms = 1e3 * step_bytes[way.dtype] / bandwidth
        row = {
            "ms": median(times),
            "p95_ms": times[int(0.95 * (len(times) - 1))],
            "min_ms": times[0],
            "samples": len(times),
            "times_as_fast_as_eager": median(ratios),
            "rounds_from_to": [ratios[0], ratios[-1]],
        }
        if way.workload == "decode":
            row |= {"ceiling_ms": ceiling_ms, "share_of_bandwidth": ceiling_ms / median(times)}
        found[f"{way.dtype} {way.workload} {way.name}"] = row
    return found


if __name__ == "__main__":
    raise SystemExit(main())
