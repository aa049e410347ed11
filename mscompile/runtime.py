"""Open a bundle, check it, run it. Needs numpy and one engine, never torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines import registry
from mscompile import bundle
from mscompile.contracts import Plan, Session, Sources, StreamSpec
from mscompile.errors import BundleError, EngineUnavailable, InputError, UsageError
from mscompile.golden import Golden
from mscompile.tokenizer import Tokenizer

if TYPE_CHECKING:
    from validation.parity import ParityReport


class Bundle:
    """An opened bundle: every file was held against its hash. Engines are loaded when first asked for."""

    def __init__(self, path: Path, manifest: bundle.Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._plans: dict[str, Plan] = {}

    @property
    def spec(self) -> StreamSpec:
        return self.manifest.spec

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that were built into this bundle."""
        return tuple(self.manifest.engines)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises BundleError where the vocabulary was not known at export."""
        path = self.path / bundle.TOKENIZER
        if not path.is_file():
            raise BundleError(
                f"{self.path} has no tokenizer: its vocabulary was not known at export; use token ids, as --ids 1,2,3"
            )
        return Tokenizer.load(path)

    @cached_property
    def golden(self) -> Golden:
        return Golden.load(self.path / bundle.GOLDEN)

    def plan(self, engine: str | None = None) -> Plan:
        """The loaded engine, one a process; the first built engine that runs here where none is named.

        Raises UsageError for an engine this bundle lacks, EngineUnavailable where it cannot run here.
        """
        name = engine or self._default_engine()
        if name not in self.manifest.engines:
            registry.find(name)
            raise UsageError(f"{self.path} was not built for {name}; it has {', '.join(self.engines) or 'no engine'}")
        if name not in self._plans:
            row = registry.find(name)
            if reason := row.cannot_run():
                raise EngineUnavailable(reason)
            self._plans[name] = row.load(self.path / bundle.GRAPHS, self.path / bundle.ENGINES / name, self.spec)
        return self._plans[name]

    def session(self, engine: str | None = None, batch: int = 1, sources: Sources | None = None) -> Session:
        """A new group of `batch` streams at position 0.

        A model with host inputs (`spec.inputs`) needs a source for each: a function from the tokens (N, every) of
        chunks that were completed to what the model takes for them, (N, *shape).
        """
        return self.plan(engine).session(batch, sources)

    def verify(self, engine: str | None = None) -> ParityReport:
        """Replay the golden rollouts on this machine."""
        from validation.parity import check_golden

        plan = self.plan(engine)
        name, sources = engine or self._default_engine(), self.golden.sources(self.spec.inputs)
        new_session = partial(plan.session, sources=sources)
        return check_golden(name, self.manifest.precision, self.spec, new_session, self.golden.rollouts)

    def _default_engine(self) -> str:
        reasons = {name: registry.find(name).cannot_run() for name in self.engines}
        runnable = [name for name, reason in reasons.items() if reason is None]
        if runnable:
            return runnable[0]
        if not reasons:
            raise UsageError(f"{self.path} holds graphs only; export again with --target ort to run it")
        raise EngineUnavailable("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def open_bundle(path: str | Path, *, hash_files: bool = True, unfinished: bool = False) -> Bundle:
    """Open and verify the bundle at `path`; `hash_files=False` skips the hashes of files over 64 MiB.

    Raises BundleError, in one sentence, for anything that is not exactly what its manifest says.
    """
    path = Path(path)
    return Bundle(path, bundle.read(path, hash_files=hash_files, unfinished=unfinished))


def generate(
    session: Session, prompt: Any, count: int, temperature: float = 0.0, seed: int | None = None
) -> Iterator[int]:
    """Token ids that continue `prompt` (T,) on a session of one stream: greedy, or sampled with a seed.

    Sampling draws from softmax(logits / temperature) by inverting its distribution function at one uniform
    number a token, so that a seed gives the same text wherever the logits agree.
    """
    if temperature < 0 or not np.isfinite(temperature):
        raise InputError(f"temperature must be 0 (greedy) or more, not {temperature}")
    random = np.random.default_rng(seed)
    logits = session.step(np.asarray(prompt, dtype=np.int64)[None, :])[0, -1]
    for number in range(count):
        token = int(logits.argmax()) if temperature == 0 else _sample(logits, temperature, random.random())
        yield token
        if number + 1 < count:
            logits = session.step([[token]])[0, -1]


def _sample(logits: Any, temperature: float, uniform: float) -> int:
    scaled = logits.astype(np.float64) / temperature
    cumulative = np.exp(scaled - scaled.max()).cumsum()
    return min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(logits) - 1)
