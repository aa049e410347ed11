"""ONNX Runtime: the graphs as they are, on the CPU, or on a CUDA device where one is present.

Graphs in half precision are the exception: on a CPU they are rewritten to compute in FP32 and round every result
(ort_half.py). The rewritten graphs lie in the engine's directory.

A provider that cannot take a node is an error here, never a silent fallback: CUDA sessions are created with
`session.disable_cpu_ep_fallback`, and the provider of every session is checked against the one asked for.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines import ort_packed
from engines.session import StreamSession
from mscompile.contracts import Array, GraphSpec, Profile, Sources, StreamSpec, TensorSpec
from mscompile.errors import BundleError, EngineError, EngineUnavailable

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CONFIG = "engine.json"

# Products of integer weights take activations rounded to 8 bits in blocks; in FP32 they are up to 50 times slower.
ACCURACY_LEVEL = "4"

_TYPES = {
    "int64": "tensor(int64)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "float16": "tensor(float16)",
}


class OrtPlan:
    """One inference session a graph, shared by all stream sessions."""

    def __init__(
        self, spec: StreamSpec, graphs: Path, provider: str, built: Path | None = None, optimized: Path | None = None
    ) -> None:
        """`built` may hold rewritten graphs; `optimized` is where to keep what the runtime makes of each graph."""
        self.spec = spec
        self.provider = provider
        self.sessions = {
            graph.name: _open(source(graphs, built, graph.name), graphs, graph, provider, optimized)
            for graph in spec.graphs
        }

    def session(self, batch: int = 1, sources: Sources | None = None) -> StreamSession:
        return StreamSession(self.spec, _OrtExecutor(self), batch, sources)


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
        import onnxruntime

        from engines import ort_half, ort_numerics

        provider = best_provider()
        emulated = ort_half.rewrite(graphs, out, [graph.name for graph in spec.graphs]) if provider == CPU else {}
        facts: dict[str, Any] = {"runtime": "onnxruntime", "version": onnxruntime.__version__, "built_on": provider}
        numerics = {}
        with ort_packed.PackedGraphs(out) as packed:
            for graph in spec.graphs:  # one at a time: a session holds a copy of its weights
                with tempfile.TemporaryDirectory(dir=out) as scratch:
                    _open(source(graphs, out, graph.name), graphs, graph, provider, Path(scratch))
                    optimized = Path(scratch, f"{graph.name}.onnx")
                    numerics[graph.name] = ort_numerics.inspected(optimized)
                    if provider == CPU:
                        packed.add(optimized)
        facts["packed_for"] = ort_packed.environment() if provider == CPU else None
        facts["numerics"] = ort_half.relabelled(numerics, emulated)
        (out / CONFIG).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return facts

    def load(self, graphs: Path, built: Path, spec: StreamSpec) -> OrtPlan:
        if reason := self.cannot_run():
            raise EngineUnavailable(reason)
        if not (built / CONFIG).is_file():
            raise BundleError(f"{built / CONFIG} is missing: this bundle was not exported with --target ort")
        provider = best_provider()
        if provider == CPU and (optimised := packed(built)) is not None:
            return OrtPlan(spec, optimised, provider)
        return OrtPlan(spec, graphs, provider, built)


def best_provider() -> str:
    """CUDA where this onnxruntime has it and a device answers, otherwise the CPU.

    The list of available providers says what was compiled in, not what works, so the driver is asked as well.
    """
    import onnxruntime

    from engines.cuda import device_count

    return CUDA if CUDA in onnxruntime.get_available_providers() and device_count() else CPU


def _facts(path: Path) -> dict[str, Any]:
    """What the build recorded."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}; export the bundle again") from error
    return facts if isinstance(facts, dict) else {}


def source(graphs: Path, built: Path | None, name: str) -> Path:
    """The graph to run: the engine's own form of it where there is one."""
    own = None if built is None else built / f"{name}.onnx"
    return own if own is not None and own.is_file() else graphs / f"{name}.onnx"


def packed(built: Path) -> Path | None:
    """The folder of the graphs as this release optimised them for this kind of processor; None where there is none."""
    is_ours = (built / CONFIG).is_file() and _facts(built / CONFIG).get("packed_for") == ort_packed.environment()
    return built / ort_packed.FOLDER if is_ours else None


def unpacked(spec: StreamSpec, graphs: Path, built: Path) -> OrtPlan:
    """The graphs of a bundle as another machine would run them, on the CPU."""
    return OrtPlan(spec, graphs, CPU, built)


def part(model: bytes, weights: Path, optimised: bool = True) -> Any:
    """A session over a part of a graph, whose external data lies in the folder `weights`, where engines run here."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", ACCURACY_LEVEL)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model, options, providers=[best_provider()])
    except Exception as error:
        raise EngineError(f"ONNX Runtime cannot load a part of a graph: {_first_line(error)}") from error


def _open(path: Path, graphs: Path, graph: GraphSpec, provider: str, optimized: Path | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", ACCURACY_LEVEL)
    # Each session has its own threads: those that spin after a call would fight with the next graph's, or PyTorch's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        ort_packed.write_optimized(options, optimized / path.name)
    if provider == CUDA:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        given: str | bytes = str(path)
        if path.parent != graphs:
            given = path.read_bytes()
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graphs))
        session = onnxruntime.InferenceSession(given, options, providers=[provider])
    except Exception as error:
        if optimized is not None:
            _open(path, graphs, graph, provider, None)  # raises the error again, unless only saving failed
            raise OSError(errno.EIO, f"ONNX Runtime could not save what it made of {path.name}") from error
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
