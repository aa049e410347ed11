"""Runs engines on the current CUDA device, for a host whose states lie in ordinary memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from engines.tensorrt_library import Cuda, Native, boundary, refusal
from mscompile.contracts import Array
from mscompile.errors import EngineError


class DeviceExecutor:
    """An `Executor` on the current CUDA device: copies inputs there, runs, copies outputs back, and waits.

    One execution context a graph and one buffer a tensor, which grows to the largest call so far. For one
    session at a time.
    """

    def __init__(self, cuda: Cuda, log: Any, engines: Mapping[str, Native]) -> None:
        self._cuda, self._log = cuda, log
        self._stream = _checked(cuda, "cudaStreamCreate", cuda.cudaStreamCreate())
        self._buffers: dict[tuple[str, str], tuple[int, int]] = {}  # (graph, tensor): address, bytes
        weakref.finalize(self, _release, cuda, self._stream, self._buffers)
        self._contexts = {name: self._context(name, engine) for name, engine in engines.items()}

    def bind(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        for name, array in (*inputs.items(), *outputs.items()):
            if not array.flags.c_contiguous:
                raise EngineError(f"{graph}: {name} must be contiguous in memory")

        def run() -> None:
            with boundary(f"running {graph}"):
                self._run(graph, inputs, outputs)

        return run

    def _context(self, graph: str, engine: Native) -> Native:
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(f"no execution context for {graph}: the GPU has too little free memory")
        # The first context of an engine has profile 0 by itself, those of further sessions do not.
        self._accept(context.set_optimization_profile_async(0, int(self._stream)), graph, "its profile")
        self._wait()
        return context

    def _run(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        context: Native = self._contexts[graph]
        to_device = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        to_host = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for name, array in inputs.items():
            address = self._address(graph, name, array.nbytes)
            self._accept(context.set_input_shape(name, array.shape), graph, f"shape {array.shape} of {name}")
            self._accept(context.set_tensor_address(name, address), graph, f"the address of {name}")
            self._copy(address, array.ctypes.data, array.nbytes, to_device)
        for name, array in outputs.items():
            if (shape := tuple(context.get_tensor_shape(name))) != array.shape:
                raise EngineError(f"{graph}: {name} has shape {shape} where the spec says {array.shape}")
            address = self._address(graph, name, array.nbytes)
            self._accept(context.set_tensor_address(name, address), graph, f"the address of {name}")
        self._accept(context.execute_async_v3(int(self._stream)), graph, "the call")
        for name, array in outputs.items():
            address = self._address(graph, name, array.nbytes)
            self._copy(array.ctypes.data, address, array.nbytes, to_host)
        self._wait()

    def _address(self, graph: str, tensor: str, size: int) -> int:
        """A device buffer of at least `size` bytes; free to move, since no call is running."""
        address, room = self._buffers.get((graph, tensor), (0, 0))
        if room < size:
            if address:
                del self._buffers[graph, tensor]
                _checked(self._cuda, "cudaFree", self._cuda.cudaFree(address))
            address = int(_checked(self._cuda, "cudaMalloc", self._cuda.cudaMalloc(size)))
            self._buffers[graph, tensor] = (address, size)
        return address

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        done = self._cuda.cudaMemcpyAsync(target, source, size, kind, self._stream)
        _checked(self._cuda, "cudaMemcpyAsync", done)

    def _accept(self, answer: bool, graph: str, what: str) -> None:
        if not answer:
            raise EngineError(refusal(f"{graph}: the engine refuses {what}", self._log))

    def _wait(self) -> None:
        _checked(self._cuda, "cudaStreamSynchronize", self._cuda.cudaStreamSynchronize(self._stream))


def _checked(cuda: Cuda, call: str, answer: tuple[Any, ...]) -> Any:
    """The value of a CUDA call, which answers with (status, value) or (status,); EngineError if it failed."""
    status = answer[0]
    if int(status):
        _, text = cuda.cudaGetErrorString(status)
        raise EngineError(f"{call} failed: {text.decode() if isinstance(text, bytes) else status}")
    return answer[1] if len(answer) > 1 else None


def _release(cuda: Cuda, stream: Any, buffers: dict[tuple[str, str], tuple[int, int]]) -> None:
    """Give everything back; failures no longer matter."""
    for address, _ in buffers.values():
        cuda.cudaFree(address)
    cuda.cudaStreamDestroy(stream)
