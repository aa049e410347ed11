"""TensorRT and TensorRT for RTX: one builder and one loader, which take the runtime's Python module as an argument.

An engine directory holds, for every graph of the spec:

    <graph>.engine   the serialized engine; only a machine with a matching GPU can read it
    engine.json      what it was built from and for, so that everything else can be checked anywhere

Names, types and shapes are those of the network definition before the build, checked against the GraphSpec.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.session import StreamSession
from mscompile.contracts import BATCH, CHUNK, Array, GraphSpec, Profile, Session, StreamSpec, TensorSpec
from mscompile.errors import EngineError, EngineUnavailable, InputError

Runtime = Any  # the module tensorrt or tensorrt_rtx; neither has type information
Native = Any  # an object that such a module made
Cuda = Any  # the module cuda.bindings.runtime

SIDECAR = "engine.json"
SCHEMA = 1
STEPS = ("min", "opt", "max")
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}

_INSTEAD = "the engine 'ort' runs on this machine"
_log = logging.getLogger(__name__)


# ---- The library and the machine --------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """One of the two runtimes."""

    module: str  # to import
    title: str  # in messages
    extra: str  # of mscompile, which installs it

    def load(self) -> Runtime:
        """The runtime's module; EngineUnavailable where it does not import."""
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as cause:
            if cause.name != self.module:
                raise EngineUnavailable(f"{self.title} is installed but does not import: {cause}") from cause
            raise EngineUnavailable(f"{self.title} is not installed: pip install 'mscompile[{self.extra}]'") from cause
        except (ImportError, OSError) as cause:
            raise EngineUnavailable(f"{self.title} is installed but does not import: {cause}") from cause

    def missing(self) -> str | None:
        """Why `load` would fail."""
        try:
            self.load()
        except EngineUnavailable as error:
            return str(error)
        return None

    def cuda(self) -> Cuda:
        """The CUDA runtime's bindings, which the executor needs; EngineUnavailable where they are not installed."""
        try:
            return importlib.import_module("cuda.bindings.runtime")
        except ImportError as cause:
            raise EngineUnavailable(f"cuda-bindings is not installed: pip install 'mscompile[{self.extra}]'") from cause

    def cannot_run(self) -> str | None:
        """What is missing here to run its engines, and what works instead."""
        try:
            cuda_devices()
        except EngineUnavailable as error:
            return f"{self.title} engines run on an NVIDIA GPU only: {error}; {_INSTEAD}"
        try:
            self.load()
            self.cuda()
        except EngineUnavailable as error:
            return f"{error}; {_INSTEAD}"
        return None


_CUDA_ERROR_NO_DEVICE = 100
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def cuda_devices() -> tuple[str, ...]:
    """Compute capabilities of the GPUs here, as "SM89", from the driver alone; EngineUnavailable without one."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as cause:
        raise EngineUnavailable(f"no NVIDIA driver is installed ({name} was not found)") from cause

    def ask(function: str, *arguments: int) -> int:
        answer = ctypes.c_int()
        status = getattr(driver, function)(ctypes.byref(answer), *arguments)
        if status:
            raise EngineUnavailable(f"the NVIDIA driver's {function} answers with error {status}")
        return answer.value

    if status := driver.cuInit(0):
        reason = "sees no GPU" if status == _CUDA_ERROR_NO_DEVICE else f"does not start (error {status})"
        raise EngineUnavailable(f"the NVIDIA driver {reason}")
    devices = [ask("cuDeviceGet", ordinal) for ordinal in range(ask("cuDeviceGetCount"))]
    if not devices:
        raise EngineUnavailable("the NVIDIA driver sees no GPU")
    pairs = [(ask("cuDeviceGetAttribute", _MAJOR, d), ask("cuDeviceGetAttribute", _MINOR, d)) for d in devices]
    return tuple(f"SM{major}{minor}" for major, minor in pairs)


# The parser says this of every INT64 input, as advice to hosts that would bind INT32 buffers. Tokens and
# positions are int64 in the spec, and the executor binds them as that, so it is no news.
_EXPECTED = re.compile(r"Make sure input \S+ has Int64 binding")
_LOGS: dict[str, Any] = {}
_LOG_IN_USE = threading.RLock()  # the log is shared: without this, messages of two threads would mix


def _messages(runtime: Runtime) -> Any:
    """The one log of a runtime module: it ignores a second one while objects of the first are alive.

    `take()` returns the errors and the unexpected warnings since the last call.
    """
    if runtime.__name__ in _LOGS:
        return _LOGS[runtime.__name__]

    class Log(runtime.ILogger):  # type: ignore[misc]  # its base has no type information
        def __init__(self) -> None:
            runtime.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity == runtime.ILogger.Severity.WARNING and not _EXPECTED.search(msg):
                _log.warning("%s: %s", runtime.__name__, msg)
                self.warnings.append(msg.strip())
            elif severity in (runtime.ILogger.Severity.ERROR, runtime.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg.strip())

        def take(self) -> tuple[list[str], list[str]]:
            taken = (self.errors, self.warnings)
            self.errors, self.warnings = [], []
            return taken

    _LOGS[runtime.__name__] = Log()
    return _LOGS[runtime.__name__]


@contextmanager
def _boundary(doing: str) -> Iterator[None]:
    """What the bindings raise, as an EngineError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, OSError) as cause:
        raise EngineError(f"{doing}: {cause}") from cause


# ---- Shapes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranges:
    """Least, usual and greatest batch and chunk: what an engine's optimization profile says."""

    batch: tuple[int, int, int]
    chunk: tuple[int, int, int]

    @classmethod
    def of(cls, spec: StreamSpec, profile: Profile) -> Ranges:
        """The ranges that sessions of `spec` use; EngineError where they are impossible.

        Kernels are chosen for the usual sizes. That is the smallest batch, since a stream that someone waits
        for is most often alone, and the greatest chunk, since long inputs come in chunks as long as possible.
        """
        multiple, longest = spec.schedule.chunk_multiple, spec.schedule.max_chunk
        longest -= longest % multiple  # prefill calls take multiples only
        ranges = cls((profile.min_batch, profile.min_batch, profile.max_batch), (multiple, longest, longest))
        for word, (least, usual, greatest) in asdict(ranges).items():
            if not 1 <= least <= usual <= greatest:
                raise EngineError(
                    f"an engine needs 1 <= min <= opt <= max, but its {word} sizes are {least}, {usual}, {greatest}"
                )
        if profile.max_batch < spec.max_batch:
            raise EngineError(
                f"the model is exported for batches up to {spec.max_batch}, its engine profile ends at "
                f"{profile.max_batch}: give both the same --batch"
            )
        return ranges

    def shapes(self, tensor: TensorSpec) -> dict[str, list[int]]:
        """The tensor's shape at each step of the profile."""
        sizes = zip(STEPS, self.batch, self.chunk, strict=True)
        return {step: list(tensor.concrete(**{BATCH: batch, CHUNK: chunk})) for step, batch, chunk in sizes}


def _row(tensor: TensorSpec, ranges: Ranges | None = None) -> dict[str, Any]:
    row = {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    return row if ranges is None else row | {"profile": ranges.shapes(tensor)}


def _described(graph: GraphSpec, ranges: Ranges) -> dict[str, Any]:
    """What the sidecar says of a graph before it is built: written by `build`, expected by `read_sidecar`."""
    return {
        "file": f"{graph.name}.engine",
        "inputs": [_row(tensor, ranges) for tensor in graph.inputs],
        "outputs": [_row(tensor) for tensor in graph.outputs],
    }


# ---- Building ---------------------------------------------------------------------------------------------


def build(
    library: Library,
    graphs: Path,
    out: Path,
    spec: StreamSpec,
    profile: Profile,
    capabilities: Sequence[str],
    configure: Callable[[Runtime, Native], None] | None = None,
) -> dict[str, Any]:
    """Build every graph of `spec` from `graphs/<name>.onnx` into `out`, with a sidecar; returns facts for the manifest.

    `capabilities` are the GPUs that the engines are for; `configure` may set that in a builder's config.
    """
    runtime: Runtime = library.load()
    ranges = Ranges.of(spec, profile)
    built: dict[str, dict[str, Any]] = {}
    for graph in spec.graphs:
        source = graphs / f"{graph.name}.onnx"
        with _LOG_IN_USE, _boundary(f"{library.title} cannot build {source.name}"):
            serialized, facts = _build_graph(runtime, source, graph, ranges, configure)
            (out / f"{graph.name}.engine").write_bytes(serialized)
        built[graph.name] = _described(graph, ranges) | facts
    made = {"module": library.module, "version": runtime.__version__, "compute_capabilities": list(capabilities)}
    sidecar = {"schema": SCHEMA, **made, "ranges": asdict(ranges), "graphs": built}
    (out / SIDECAR).write_text(json.dumps(sidecar, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {
        **made,
        "size_bytes": {name: row["size_bytes"] for name, row in built.items()},
        "warnings": {name: row["warnings"] for name, row in built.items() if row["warnings"]},
    }


def _build_graph(
    runtime: Runtime,
    source: Path,
    graph: GraphSpec,
    ranges: Ranges,
    configure: Callable[[Runtime, Native], None] | None,
) -> tuple[bytes, dict[str, Any]]:
    """The serialized engine of one graph, and what is known of it only after the build."""
    log = _messages(runtime)
    log.take()
    builder = runtime.Builder(log)
    network = builder.create_network(_network_flags(runtime))
    parser = runtime.OnnxParser(network, log)  # owns the weights, so it lives until the engine is built
    _parse(parser, source)
    _check_interface(network, graph, source)
    config = builder.create_builder_config()
    if hasattr(runtime.BuilderFlag, "TF32"):
        config.clear_flag(runtime.BuilderFlag.TF32)  # 10 bits of mantissa: an FP32 engine would leave its reference
    if configure is not None:
        configure(runtime, config)
    shapes = builder.create_optimization_profile()
    for tensor in graph.inputs:
        shapes.set_shape(tensor.name, *ranges.shapes(tensor).values())
    if config.add_optimization_profile(shapes) < 0:
        raise EngineError(_refusal(f"the optimization profile of {source.name} is refused", log))
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(_refusal(f"{runtime.__name__} cannot build {source.name}", log))
    data = bytes(serialized)
    return data, {"size_bytes": len(data), "layers": network.num_layers, "warnings": log.take()[1]}


def _network_flags(runtime: Runtime) -> int:
    """Types are those of the graph, never chosen by the builder."""
    if hasattr(runtime.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return 1 << int(runtime.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


def _refusal(what: str, log: Any) -> str:
    """`what` with the errors that the runtime logged about it."""
    errors = log.take()[0]
    return f"{what}: {'; '.join(errors) if errors else 'it gives no reason'}"


def _parse(parser: Native, source: Path) -> None:
    if not source.is_file():
        raise EngineError(f"{source.name} is missing in {source.parent}")
    if parser.parse_from_file(str(source)):
        return
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
        reasons.append(where + error.desc())
    raise EngineError(f"the parser refuses {source.name}: {'; '.join(reasons) or 'it gives no reason'}")


def _check_interface(network: Native, graph: GraphSpec, source: Path) -> None:
    """Refuse a network whose inputs and outputs are not those of the spec."""
    inputs = [_found(network.get_input(index)) for index in range(network.num_inputs)]
    outputs = [_found(network.get_output(index)) for index in range(network.num_outputs)]
    problems = [*_differences("input", graph.inputs, inputs), *_differences("output", graph.outputs, outputs)]
    if problems:
        raise EngineError(f"{source.name} is not the graph that its spec describes: {'; '.join(problems)}")


def _found(tensor: Native) -> TensorSpec:
    """A network tensor as a spec; -1 stands for sizes that are not static."""
    kind: str = tensor.dtype.name
    return TensorSpec(tensor.name, DTYPES.get(kind, kind), tuple(tensor.shape))


def _differences(kind: str, wanted: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> Iterator[str]:
    by_name = {tensor.name: tensor for tensor in found}
    for tensor in wanted:
        other = by_name.pop(tensor.name, None)
        if other is None:
            yield f"{kind} {tensor.name} is missing"
        elif other.dtype != tensor.dtype:
            yield f"{kind} {tensor.name} is {other.dtype}, not {tensor.dtype}"
        elif not _shape_fits(kind, tensor, other):
            yield f"{kind} {tensor.name} has shape {_text(other)}, not {_text(tensor)}"
    yield from (f"{kind} {name} is not in the spec" for name in by_name)


def _shape_fits(kind: str, wanted: TensorSpec, found: TensorSpec) -> bool:
    """Words match -1 and sizes match themselves; an output's size may be known at run time only."""
    if len(wanted.shape) != len(found.shape):
        return False
    pairs = list(zip(wanted.shape, found.shape, strict=True))
    open_sizes = kind == "output"
    return all(got == -1 if isinstance(want, str) else got == want or (open_sizes and got == -1) for want, got in pairs)


def _text(tensor: TensorSpec) -> str:
    return f"({', '.join(str(dim) for dim in tensor.shape)})"


# ---- Loading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sidecar:
    """What engine.json says, checked against the spec."""

    version: str
    compute_capabilities: tuple[str, ...]
    ranges: Ranges


def read_sidecar(library: Library, built: Path, spec: StreamSpec) -> Sidecar:
    """The sidecar in `built`; EngineError where it, or the files beside it, are not what `build` writes for `spec`."""
    path = built / SIDECAR
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _expect("schema", SCHEMA, content["schema"])
        _expect("module", library.module, content["module"])
        names = {"schema", "module", "version", "compute_capabilities", "ranges", "graphs"}
        _expect("fields", sorted(names), sorted(content))
        ranges = Ranges(tuple(content["ranges"]["batch"]), tuple(content["ranges"]["chunk"]))
        promised = Ranges.of(spec, Profile(ranges.batch[0], ranges.batch[2]))
        _expect("ranges", promised, ranges)
        _expect("graphs", sorted(graph.name for graph in spec.graphs), sorted(content["graphs"]))
        for graph in spec.graphs:
            _check_row(content["graphs"][graph.name], graph, ranges, built)
        capabilities = tuple(str(name) for name in content["compute_capabilities"])
        return Sidecar(str(content["version"]), capabilities, ranges)
    except OSError as cause:
        raise EngineError(f"{path} cannot be read: {cause}") from cause
    except (EngineError, ValueError, KeyError, TypeError, AttributeError) as cause:
        reason = f"{cause} is missing" if isinstance(cause, KeyError) else str(cause)
        raise EngineError(f"{path} is damaged or of another version: {reason}; export again") from cause


def _check_row(row: Mapping[str, Any], graph: GraphSpec, ranges: Ranges, built: Path) -> None:
    wanted = _described(graph, ranges)
    _expect(f"fields of graph {graph.name}", sorted({*wanted, "size_bytes", "layers", "warnings"}), sorted(row))
    for field, value in wanted.items():
        _expect(f"{field} of graph {graph.name}", value, row[field])
    _expect(f"size of {wanted['file']}", row["size_bytes"], (built / wanted["file"]).stat().st_size)


def _expect(what: str, wanted: Any, came: Any) -> None:
    if wanted != came:
        raise ValueError(f"{what}: wanted {wanted}, found {came}")


def load(library: Library, built: Path, spec: StreamSpec, cannot_run: str | None) -> TensorRTPlan:
    """The plan in `built`. EngineError for damaged files, EngineUnavailable where this machine cannot run it."""
    sidecar = read_sidecar(library, built, spec)
    if cannot_run:
        raise EngineUnavailable(cannot_run)
    runtime: Runtime = library.load()
    cuda, here = library.cuda(), cuda_devices()[0]
    if runtime.__version__ != sidecar.version:
        raise EngineUnavailable(
            f"these engines were built by {library.title} {sidecar.version} and {runtime.__version__} is installed, "
            f"which does not read them: pip install '{library.module.replace('_', '-')}=={sidecar.version}' "
            "or export again"
        )
    if here not in sidecar.compute_capabilities:
        raise EngineUnavailable(
            f"this GPU is {here} and these engines were built for {', '.join(sidecar.compute_capabilities)}: "
            "export again on this machine, or use the engine 'ort'"
        )
    log = _messages(runtime)
    reader = runtime.Runtime(log)
    engines = {}
    for graph in spec.graphs:
        with _LOG_IN_USE, _boundary(f"{library.title} cannot read {graph.name}.engine"):
            engines[graph.name] = _deserialize(reader, built / f"{graph.name}.engine", graph, log)
    return TensorRTPlan(spec, sidecar.ranges, reader, log, cuda, engines)


def _deserialize(reader: Native, path: Path, graph: GraphSpec, log: Any) -> Native:
    log.take()
    engine = reader.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(_refusal(f"{path.name} cannot be read on this GPU", log))
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

    def session(self, batch: int = 1) -> Session:
        if batch < self._ranges.batch[0]:
            raise InputError(f"batch {batch} is below this engine's least batch of {self._ranges.batch[0]}")
        return StreamSession(self.spec, DeviceExecutor(self._cuda, self._log, self._engines), batch)


# ---- Running ----------------------------------------------------------------------------------------------


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
            with _boundary(f"running {graph}"):
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
            raise EngineError(_refusal(f"{graph}: the engine refuses {what}", self._log))

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
