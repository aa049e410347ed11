"""Many streams on one plan: python benchmarks/serving.py [--model NAME] [--rows 8] [--streams 48] [--rounds 3]

Streams arrive at random, ask for one token at a time, and leave. They are served in three ways by the same plan, one
after another in each round:

- `rows`: one session; a stream gets a row that is free, reset, where the rows are at the beginning of a period
- `sessions`: a session for each stream, up to as many at a time, in turn
- `sequential`: one session at a time, the others wait

Every way sees the same arrivals: a Poisson process whose rate asks for `--load` of the tokens that full rows give. The
last logits of each stream are compared with those of a session of its own.

Memory is that of a process of its own, before and after it has opened and used sessions, against what `mscompile
inspect` says of a stream: python benchmarks/serving.py memory BUNDLE STREAMS
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import models
import numpy as np
import typer
from cost_of_use import process_bytes
from targets import HOURGLASS, TXL

from mscompile import bench
from mscompile.contracts import Array
from mscompile.runtime import Bundle, open_bundle

HERE = Path(__file__).parent
RESULT = HERE / "results" / "serving.json"
SHORTEST, LONGEST = 32, 128  # tokens of a stream, all lengths alike likely
WARM_UP, SAMPLES = 8, 24  # steps of full rows, from which the rate of arrivals follows


@dataclass
class Stream:
    """One stream, and when it got what it asked for, in seconds since the run began."""

    arrives_s: float
    tokens: Array  # (T,) int64
    delivered_s: list[float] = field(default_factory=list)
    last: Array | None = None  # logits (vocab,)

    @property
    def next_token(self) -> int:
        return int(self.tokens[len(self.delivered_s)])

    @property
    def done(self) -> bool:
        return len(self.delivered_s) == len(self.tokens)

    def deliver(self, logits: Array, now_s: float) -> None:
        self.delivered_s.append(now_s)
        if self.done:
            self.last = logits.copy()


def traffic(count: int, vocab_size: int, tokens_per_second: float, seed: int) -> list[Stream]:
    """`count` streams that ask for so many tokens a second together."""
    random = np.random.default_rng(seed)
    lengths = random.integers(SHORTEST, LONGEST + 1, count)
    pauses = random.exponential((SHORTEST + LONGEST) / 2 / tokens_per_second, count)
    arrivals = np.cumsum(pauses) - pauses[0]
    return [
        Stream(float(arrives), random.integers(0, vocab_size, length))
        for arrives, length in zip(arrivals, lengths, strict=True)
    ]


# ---- The ways to serve -------------------------------------------------------------------------------------


class Clock:
    """Seconds since the run began, and the streams that have arrived by now."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._coming, self._begun = deque(streams), time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._begun

    def arrived(self, most: int) -> Iterator[Stream]:
        """The streams that are here, so many at most."""
        while most > 0 and self._coming and self._coming[0].arrives_s <= self.now():
            most -= 1
            yield self._coming.popleft()

    def wait(self) -> bool:
        """Sleep until the next stream is here; False where none is to come."""
        if self._coming:
            time.sleep(max(0.0, self._coming[0].arrives_s - self.now()))
        return bool(self._coming)


def serve_rows(opened: Bundle, streams: Sequence[Stream], rows: int) -> None:
    """One session of `rows`. Rows without a stream are stepped, too: their tokens are 0, their logits nobody's.

    Rows are reset at the beginning of a period only, so that they stay in phase.
    """
    session, clock, period = opened.session(batch=rows), Clock(streams), opened.spec.schedule.period
    serving: list[Stream | None] = [None] * rows
    tokens, steps = np.zeros((rows, 1), np.int64), 0
    while any(serving) or clock.wait():
        if steps % period == 0:
            free = [row for row, stream in enumerate(serving) if stream is None]
            placed = dict(zip(free, clock.arrived(len(free)), strict=False))
            serving = [placed.get(row, stream) for row, stream in enumerate(serving)]
            session.reset([*placed, *_at_their_end(opened, session.position, serving)])
        for row, stream in enumerate(serving):
            tokens[row] = stream.next_token if stream else 0
        logits, steps = session.step(tokens), steps + 1
        now_s = clock.now()
        for row, stream in enumerate(serving):
            if stream:
                stream.deliver(logits[row, -1], now_s)
                serving[row] = None if stream.done else stream


def _at_their_end(opened: Bundle, position: Array, serving: Sequence[Stream | None]) -> list[int]:
    """Rows without a stream that have no room for another period."""
    limit, period = opened.spec.max_context, opened.spec.schedule.period
    if limit is None:
        return []
    return [row for row, stream in enumerate(serving) if stream is None and position[row] + period > limit]


def serve_sessions(opened: Bundle, streams: Sequence[Stream], at_once: int) -> None:
    """A session for each stream, `at_once` at most; each gets one token in its turn."""
    clock, serving = Clock(streams), deque[tuple[Stream, Any]]()
    while serving or clock.wait():
        serving.extend((stream, opened.session()) for stream in clock.arrived(at_once - len(serving)))
        stream, session = serving.popleft()
        logits = session.step([[stream.next_token]])
        stream.deliver(logits[0, -1], clock.now())
        if not stream.done:
            serving.append((stream, session))


Serve = Callable[[Bundle, Sequence[Stream], int], None]
WAYS: dict[str, Serve] = {
    "rows": serve_rows,
    "sessions": serve_sessions,
    "sequential": lambda opened, streams, _: serve_sessions(opened, streams, 1),
}


# ---- What is measured --------------------------------------------------------------------------------------


def measure(opened: Bundle, rows: int, count: int, load: float, rounds: int) -> dict[str, Any]:
    """Each way's medians over the rounds, and how far its logits are from those of sessions of their own."""
    rate = load * full_rate(opened, rows)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(rounds):
        expected = None
        for way, serve in WAYS.items():
            streams = traffic(count, opened.spec.vocab_size, rate, seed)
            expected = alone(opened, streams) if expected is None else expected
            serve(opened, streams, rows)
            found[way].append(figures(streams, expected))
    return {
        "rows": rows,
        "streams": count,
        "tokens": [SHORTEST, LONGEST],
        "asked_tokens_per_second": rate,
        "ways": {way: {name: median(one[name] for one in each) for name in each[0]} for way, each in found.items()},
        "rows_to": {
            way: [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(found["rows"], each, strict=True)]
            for way, each in found.items()
            if way != "rows"
        },
    }


def full_rate(opened: Bundle, rows: int) -> float:
    """Tokens a second of a session whose rows all have a stream."""
    session, times = opened.session(batch=rows), []
    for _ in range(WARM_UP + SAMPLES):
        begun = time.perf_counter()
        session.step(np.ones((rows, 1), np.int64))
        times.append(time.perf_counter() - begun)
    return rows / median(times[WARM_UP:])


def alone(opened: Bundle, streams: Sequence[Stream]) -> list[Array]:
    """The last logits (vocab,) of each stream, from a session that has nothing else to do."""
    return [opened.session().step(stream.tokens[None])[0, -1] for stream in streams]


def figures(streams: Sequence[Stream], expected: Sequence[Array]) -> dict[str, float]:
    """Of one run: the time of a token is from when it could be asked for, of a first one from the arrival on."""
    gaps = [np.diff(stream.delivered_s) for stream in streams]
    first = [stream.delivered_s[0] - stream.arrives_s for stream in streams]
    token_ms = 1e3 * np.concatenate(gaps)
    tokens = sum(len(stream.tokens) for stream in streams)
    errors = [np.abs(stream.last - wanted).max() for stream, wanted in zip(streams, expected, strict=True)]
    return {
        "tokens_per_second": tokens / max(stream.delivered_s[-1] for stream in streams),
        "token_ms_p50": float(np.percentile(token_ms, 50)),
        "token_ms_p99": float(np.percentile(token_ms, 99)),
        "first_ms_p50": 1e3 * float(np.percentile(first, 50)),
        "first_ms_p99": 1e3 * float(np.percentile(first, 99)),
        "max_logit_difference": float(max(errors)),
    }


def memory(bundle: Path, streams: int) -> dict[str, float]:
    """Bytes that each of so many sessions adds to this process, and each row of a session, by resident memory.

    Every session takes a period of tokens one by one and a chunk, after one that made the runtime's own buffers.
    """
    opened = open_bundle(bundle, hash_files=False)
    rows = opened.spec.max_batch

    def used(batch: int) -> Any:
        session = opened.session(batch=batch)
        for count in (*[1] * opened.spec.schedule.period, opened.spec.schedule.chunk_multiple * 2):
            session.step(np.ones((batch, count), np.int64))
        return session

    kept = [used(1), used(rows)]
    before = process_bytes()
    kept += [used(1) for _ in range(streams)]
    between = process_bytes()
    sets = -(-streams // rows)
    kept += [used(rows) for _ in range(sets)]
    after = process_bytes()
    return {
        "streams": streams,
        "predicted_bytes": opened.spec.bytes_per_stream(),
        "session_bytes": (between - before) / streams,
        "row_bytes": (after - between) / (sets * rows),
    }


def main(
    model: Annotated[list[str] | None, typer.Option(help="Of models.py; may be repeated.")] = None,
    rows: Annotated[int, typer.Option(help="Streams served at a time.")] = 8,
    streams: Annotated[int, typer.Option(help="Streams of a run.")] = 48,
    load: Annotated[float, typer.Option(help="Tokens asked for, of those that full rows give.")] = 0.8,
    rounds: Annotated[int, typer.Option(help="Rounds of all ways.")] = 3,
    build: Annotated[Path, typer.Option(help="Where models are kept.")] = Path("build/bench"),
    out: Annotated[Path, typer.Option(help="The result.")] = RESULT,
) -> None:
    found = {}
    for name in model or [TXL, HOURGLASS]:
        bundle = models.compiled(models.saved(name, build), build)
        typer.echo(f"serving {name}", err=True)
        served = measure(open_bundle(bundle, hash_files=False), rows, streams, load, rounds)
        found[name] = {**served, "memory": in_a_process(bundle, streams)}
    result = {"models": found, "machine": bench.machine()}
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result, indent=2))


def in_a_process(bundle: Path, streams: int) -> dict[str, float]:
    """`memory` of a fresh process."""
    command = [sys.executable, __file__, "memory", str(bundle), str(streams)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print(json.dumps(memory(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        typer.run(main)
