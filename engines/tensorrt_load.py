"""Engine directory -> plan: what is checked before a GPU sees an engine, and what its sessions share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.cuda import devices
from engines.session import StreamSession
from engines.tensorrt_device import DeviceExecutor
from engines.tensorrt_library import LOG_IN_USE, Cuda, Library, Native, Runtime, boundary, messages, refusal
from engines.tensorrt_sidecar import Ranges, read_sidecar
from mscompile.contracts import GraphSpec, Session, Sources, StreamSpec
from mscompile.errors import EngineError, EngineUnavailable, InputError


def load(library: Library, built: Path, spec: StreamSpec, cannot_run: str | None) -> TensorRTPlan:
    """The plan in `built`. EngineError for damaged files, EngineUnavailable where this machine cannot run it."""
    sidecar = read_sidecar(library, built, spec)
    if cannot_run:
        raise EngineUnavailable(cannot_run)
    runtime: Runtime = library.load()
    cuda, here = library.cuda(), devices()[0]
    if runtime.__version__ != sidecar.version:
        raise EngineUnavailable(
            f"these engines were built by {library.title} {sidecar.version} and {runtime.__version__} is installed, "
            f"which does not read them: pip install '{library.distribution}=={sidecar.version}' "
            "or export again"
        )
    if here not in sidecar.compute_capabilities:
        raise EngineUnavailable(
            f"this GPU is {here} and these engines were built for {', '.join(sidecar.compute_capabilities)}: "
            "export again on this machine, or use the engine 'ort'"
        )
    log = messages(runtime)
    reader = runtime.Runtime(log)
    engines = {}
    for graph in spec.graphs:
        with LOG_IN_USE, boundary(f"{library.title} cannot read {graph.name}.engine"):
            engines[graph.name] = _deserialize(reader, built / f"{graph.name}.engine", graph, log)
    return TensorRTPlan(spec, sidecar.ranges, reader, log, cuda, engines)


def _deserialize(reader: Native, path: Path, graph: GraphSpec, log: Any) -> Native:
    log.take()
    engine = reader.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(refusal(f"{path.name} cannot be read on this GPU", log))
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if names != {tensor.name for tensor in (*graph.inputs, *graph.outputs)}:
        raise EngineError(f"{path.name} is of another graph: its tensors are {', '.join(sorted(names))}")
    return engine


class TensorRTPlan:
    """Deserialized engines. Each session gets its own execution contexts, stream and device buffers."""

    def __init__(
        self, spec: StreamSpec, ranges: Ranges, reader: Native, log: Any, cuda: Cuda, engines: Mapping[str, Native]
    ) -> None:
        self.spec = spec
        self._ranges = ranges
        self._reader = reader  # must outlive its engines
        self._log = log
        self._cuda = cuda
        self._engines = engines

    def session(self, batch: int = 1, sources: Sources | None = None) -> Session:
        if batch < self._ranges.batch[0]:
            raise InputError(f"batch {batch} is below this engine's least batch of {self._ranges.batch[0]}")
        return StreamSession(self.spec, DeviceExecutor(self._cuda, self._log, self._engines), batch, sources)
