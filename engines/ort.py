"""ONNX Runtime: the graphs as they are, on the CPU, or on a CUDA device where one is present.

A provider that cannot take a node is an error here, never a silent fallback: CUDA sessions are created with
`session.disable_cpu_ep_fallback`, and the provider of every session is checked against the one asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.session import StreamSession
from mscompile.contracts import Array, GraphSpec, Profile, StreamSpec, TensorSpec
from mscompile.errors import BundleError, EngineError, EngineUnavailable

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CONFIG = "engine.json"

_TYPES = {
    "int64": "tensor(int64)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "float16": "tensor(float16)",
}


class OrtPlan:
    """One inference session a graph, shared by all stream sessions."""

    def __init__(self, spec: StreamSpec, graphs: Path, provider: str) -> None:
        self.spec = spec
        self.provider = provider
        self.sessions = {graph.name: _open(graphs / f"{graph.name}.onnx", graph, provider) for graph in spec.graphs}

    def session(self, batch: int = 1) -> StreamSession:
        return StreamSession(self.spec, _OrtExecutor(self), batch)


class _OrtExecutor:
    def __init__(self, plan: OrtPlan) -> None:
        self.plan = plan

    def bind(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        session = self.plan.sessions[graph]
        binding = session.io_binding()

        def bind_inputs() -> None:
            for name, array in inputs.items():
                binding.bind_cpu_input(name, array)

        bind_inputs()
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        copies_inputs = self.plan.provider != CPU  # a device reads a copy made when bound

        def run() -> None:
            if copies_inputs:
                bind_inputs()
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise EngineError(f"ONNX Runtime failed in graph {graph}: {_first_line(error)}") from error

        return run


class OrtEngine:
    name = "ort"
    title = "ONNX Runtime"

    def cannot_build(self) -> str | None:
        try:
            import onnxruntime
        except ImportError:
            return "ONNX Runtime is not installed; pip install 'mscompile[ort]' (or 'mscompile[ort-gpu]' for CUDA)"
        if not hasattr(onnxruntime, "InferenceSession"):
            return (
                "the onnxruntime package is hollow, as it is after one of onnxruntime and onnxruntime-gpu was "
                "uninstalled; pip uninstall both, then pip install 'mscompile[ort]' or 'mscompile[ort-gpu]'"
            )
        return None

    def cannot_run(self) -> str | None:
        return self.cannot_build()

    def build(self, graphs: Path, out: Path, spec: StreamSpec, profile: Profile) -> dict[str, Any]:
        """Create every session once, which proves that the runtime takes the graphs, and record how."""
        del profile  # dynamic shapes need no profile here
        provider = _provider()
        OrtPlan(spec, graphs, provider)
        import onnxruntime

        facts = {"runtime": "onnxruntime", "version": onnxruntime.__version__, "built_on": provider}
        (out / CONFIG).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return facts

    def load(self, graphs: Path, built: Path, spec: StreamSpec) -> OrtPlan:
        if reason := self.cannot_run():
            raise EngineUnavailable(reason)
        if not (built / CONFIG).is_file():
            raise BundleError(f"{built / CONFIG} is missing: this bundle was not exported with --target ort")
        return OrtPlan(spec, graphs, _provider())


def _provider() -> str:
    """CUDA where this onnxruntime has it and a device answers, otherwise the CPU.

    The list of available providers says what was compiled in, not what works, so the driver is asked as well.
    """
    import onnxruntime

    from engines.cuda import device_count

    return CUDA if CUDA in onnxruntime.get_available_providers() and device_count() else CPU


def _open(path: Path, graph: GraphSpec, provider: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if provider == CUDA:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise EngineError(f"ONNX Runtime cannot load {path.name} on {provider}: {_first_line(error)}") from error
    if session.get_providers()[0] != provider:
        raise EngineError(f"{path.name} was placed on {session.get_providers()[0]}, not on {provider}")
    _check(path, "input", session.get_inputs(), graph.inputs)
    _check(path, "output", session.get_outputs(), graph.outputs)
    return session


def _check(path: Path, kind: str, found: Any, wanted: tuple[TensorSpec, ...]) -> None:
    interface = {argument.name: (argument.type, tuple(argument.shape)) for argument in found}
    contract = {tensor.name: (_TYPES[tensor.dtype], tensor.shape) for tensor in wanted}
    if interface != contract:
        differing = sorted(
            name for name in interface.keys() | contract.keys() if interface.get(name) != contract.get(name)
        )
        raise BundleError(f"{path.name}: {kind}s {', '.join(differing)} are not what the manifest says")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


ENGINE = OrtEngine()
