"""ONNX graphs -> serialized engines, by either runtime; a network that is not its GraphSpec is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engines import tensorrt_numerics
from engines.tensorrt_library import LOG_IN_USE, Library, Native, Runtime, boundary, messages, refusal
from engines.tensorrt_numerics import DTYPES
from engines.tensorrt_sidecar import Ranges, described, write_sidecar
from mscompile.contracts import GraphSpec, Profile, StreamSpec, TensorSpec
from mscompile.errors import EngineError


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
    numerics: dict[str, dict[str, Any]] = {}
    for graph in spec.graphs:
        source = graphs / f"{graph.name}.onnx"
        with LOG_IN_USE, boundary(f"{library.title} cannot build {source.name}"):
            serialized, facts, numerics[graph.name] = _build_graph(runtime, source, graph, ranges, configure)
            (out / f"{graph.name}.engine").write_bytes(serialized)
        built[graph.name] = described(graph, ranges) | facts
    made = {
        "runtime": library.distribution,
        "version": runtime.__version__,
        "compute_capabilities": list(capabilities),
    }
    write_sidecar(out, made, ranges, built)
    return {
        **made,
        "size_bytes": {name: row["size_bytes"] for name, row in built.items()},
        "warnings": {name: row["warnings"] for name, row in built.items() if row["warnings"]},
        "numerics": numerics,
    }


def _build_graph(
    runtime: Runtime,
    source: Path,
    graph: GraphSpec,
    ranges: Ranges,
    configure: Callable[[Runtime, Native], None] | None,
) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """The serialized engine of one graph, what is known of it only after the build, and its types."""
    log = messages(runtime)
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
        raise EngineError(refusal(f"the optimization profile of {source.name} is refused", log))
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(refusal(f"{runtime.__name__} cannot build {source.name}", log))
    data = bytes(serialized)
    facts = {"size_bytes": len(data), "layers": network.num_layers, "warnings": log.take()[1]}
    return data, facts, tensorrt_numerics.inspected(network)


def _network_flags(runtime: Runtime) -> int:
    """Types are those of the graph, never chosen by the builder."""
    if hasattr(runtime.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return 1 << int(runtime.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


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
