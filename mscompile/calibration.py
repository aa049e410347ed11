"""How large the numbers of a model get: its FP32 graphs, rolled out on ONNX Runtime over real text with resets."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.session import StreamSession
from exporters import weights
from exporters.passes.base import Graphs
from exporters.precision.ranges import SUFFIX, probed
from mscompile.contracts import Array, StreamSpec
from mscompile.errors import EngineUnavailable
from validation import rollouts, sources

STEPS = 384  # tokens a row of the long rollouts


def ranges(models: Graphs, spec: StreamSpec, text: Array | None) -> dict[str, dict[str, float]]:
    """Graph -> value -> largest finite magnitude in chained rollouts, on `text` where there is some."""
    with tempfile.TemporaryDirectory() as scratch:
        weights.save({name: probed(models[name]) for name in models}, Path(scratch))
        executor = _Recorder(Path(scratch), tuple(models))
        for rollout in rollouts.standard(spec, text, STEPS, seed=2):
            session = StreamSession(spec, executor, rollout.tokens.shape[0], sources.pseudo(spec.inputs))
            resets, done = dict(rollout.resets), 0
            for number, chunk in enumerate(rollout.chunks):
                if number in resets:
                    session.reset(resets[number])
                session.step(rollout.tokens[:, done : done + chunk])
                done += chunk
    return executor.seen


class _Recorder:
    """An executor that keeps the largest value of every `.largest` output."""

    def __init__(self, graphs: Path, names: tuple[str, ...]) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineUnavailable(
                "fp16 and bf16 are calibrated on ONNX Runtime, which is not installed; pip install 'mscompile[ort]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self.seen: dict[str, dict[str, float]] = {name: {} for name in names}
        self._sessions = {
            name: onnxruntime.InferenceSession(str(graphs / f"{name}.onnx"), options, providers=providers)
            for name in names
        }

    def bind(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        session, seen = self._sessions[graph], self.seen[graph]
        names = [output.name for output in session.get_outputs()]

        def run() -> None:
            found: list[Any] = session.run(names, dict(inputs))
            for name, value in zip(names, found, strict=True):
                if name in outputs:
                    outputs[name][...] = value
                else:
                    of = name.removesuffix(SUFFIX)
                    seen[of] = max(seen.get(of, 0.0), float(value))

        return run
