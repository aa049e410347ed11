"""What a file is: a checkpoint, a bundle or an ONNX graph. Each answer is plain data, for JSON or for a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mscompile import codec
from mscompile.bundle import MANIFEST
from mscompile.contracts import Hit, Profile, StreamSpec
from mscompile.errors import CheckpointError, UsageError
from mscompile.runtime import open_bundle


def inspect(path: Path, context: int | None = None, adapter: str | None = None) -> dict[str, Any]:
    """Facts about `path`, with "kind": "bundle", "checkpoint" or "graph". Raises for anything else."""
    if adapter is not None:
        if (path / MANIFEST).is_file():
            raise UsageError(f"{path} is a bundle, which needs no --adapter")
        return inspect_checkpoint(path, context, adapter)
    if path.is_dir() and not (path / "config.json").is_file():
        return inspect_bundle(path)
    if path.suffix == ".onnx":
        return inspect_graph(path)
    return inspect_checkpoint(path, context)


def inspect_bundle(path: Path) -> dict[str, Any]:
    manifest = open_bundle(path).manifest
    parity = manifest.parity or {}
    return {
        "kind": "bundle",
        "name": manifest.name,
        "family": manifest.family,
        "verified": manifest.verified,
        "precision": manifest.precision,
        "source": manifest.source,
        "engines": {
            name: "verified" if name in parity else "built, not run: it could not run where it was exported"
            for name in manifest.engines
        },
        "numerics": {name: _numerics(facts.get("numerics", {})) for name, facts in manifest.engines.items()},
        "size_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "versions": manifest.versions,
        "flops": manifest.costs,
        "rules": _hits(manifest.rules),
        "passes": _hits(manifest.passes),
        **_spec(manifest.spec),
    }


def _numerics(graphs: dict[str, Any]) -> dict[str, str]:
    """For each graph of an engine, how many products with weights run in which type."""
    told = {}
    for name, row in graphs.items():
        counts = [f"{count} {kind}" for kind, count in row["products"].items()]
        rounded = ", FP32 arithmetic rounded to half" if "emulated" in row else ""
        told[name] = (", ".join(counts) or "none") + rounded
    return told


def inspect_checkpoint(path: Path, context: int | None = None, adapter: str | None = None) -> dict[str, Any]:
    """What a checkpoint is and how it would stream, before anything is built."""
    from exporters import streaming
    from exporters.cost import eager_flops, per_token
    from mscompile import adapters

    trained = adapters.trained(path, adapter=adapter, context=context)
    stream = streaming.build(trained.model, Profile(), context)
    tensors, costs = trained.model.state_dict().values(), eager_flops(stream)
    return {
        "kind": "checkpoint",
        "source": trained.source,
        "family": trained.family.name,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "weights_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "config": asdict(trained.model.config),
        "flops": costs,
        "flops_per_token": round(per_token(costs, stream.spec.schedule)),
        "period_tokens": stream.spec.schedule.period,
        "rules": _hits(stream.hits),
        **_spec(stream.spec),
    }


def inspect_graph(path: Path) -> dict[str, Any]:
    """Interface and operators of one ONNX graph."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise CheckpointError(f"{path} is not an ONNX graph: {error}") from error
    operators = Counter(node.op_type for node in model.graph.node)
    return {
        "kind": "graph",
        "name": model.graph.name,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "operators": dict(operators.most_common()),
        "nodes": sum(operators.values()),
    }


def _value(value: Any) -> str:
    dims = [dim.dim_param or str(dim.dim_value) for dim in value.type.tensor_type.shape.dim]
    return f"{value.name} [{', '.join(dims)}]"


def _hits(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    return [asdict(hit) for hit in hits]


def _spec(spec: StreamSpec) -> dict[str, Any]:
    return {
        "max_batch": spec.max_batch,
        "context": spec.max_context or "endless",
        "state_bytes_per_stream": spec.bytes_per_stream(),
        "schedule": codec.encode(spec.schedule),
        "graphs": {graph.name: {"reads": graph.reads, "writes": graph.writes} for graph in spec.graphs},
        "states": [codec.encode(state) for state in spec.states],
        "host_inputs": [codec.encode(given) for given in spec.inputs],
    }
