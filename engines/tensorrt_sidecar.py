"""What an engine directory holds, for every graph of the spec:

    <graph>.engine   the serialized engine; only a machine with a matching GPU can read it
    engine.json      what it was built from and for, so that everything else can be checked anywhere

Names, types and shapes are those of the network definition before the build, checked against the GraphSpec.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engines.tensorrt_library import Library
from mscompile.contracts import BATCH, CHUNK, CONTEXT, GraphSpec, Profile, StreamSpec, TensorSpec
from mscompile.errors import EngineError

SIDECAR = "engine.json"
SCHEMA = 1
STEPS = ("min", "opt", "max")


@dataclass(frozen=True)
class Ranges:
    """Least, usual and greatest batch, chunk and context: what an engine's optimization profile says."""

    batch: tuple[int, int, int]
    chunk: tuple[int, int, int]
    context: tuple[int, int, int] = (1, 1, 1)  # tokens before a call, where memory grows with the stream

    @classmethod
    def of(cls, spec: StreamSpec, profile: Profile) -> Ranges:
        """The ranges that sessions of `spec` use; EngineError where they are impossible.

        Kernels are chosen for the usual sizes. That is the smallest batch, since a stream that someone waits
        for is most often alone, and the greatest chunk, since long inputs come in chunks as long as possible.
        """
        multiple, longest = spec.schedule.chunk_multiple, spec.schedule.max_chunk
        longest -= longest % multiple  # prefill calls take multiples only
        batch = (profile.min_batch, profile.min_batch, profile.max_batch)
        ranges = cls(batch, (multiple, longest, longest))
        if spec.max_context is not None:
            most = spec.max_context - spec.max_context % multiple
            ranges = replace(ranges, context=(multiple, most, most))
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
        words = (BATCH, CHUNK, CONTEXT)
        sizes = zip(STEPS, zip(self.batch, self.chunk, self.context, strict=True), strict=True)
        return {step: list(tensor.concrete(**dict(zip(words, size, strict=True)))) for step, size in sizes}


def _row(tensor: TensorSpec, ranges: Ranges | None = None) -> dict[str, Any]:
    row = {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    return row if ranges is None else row | {"profile": ranges.shapes(tensor)}


def described(graph: GraphSpec, ranges: Ranges) -> dict[str, Any]:
    """What engine.json says of a graph before it is built: written by `build`, expected by `read_sidecar`."""
    return {
        "file": f"{graph.name}.engine",
        "inputs": [_row(tensor, ranges) for tensor in graph.inputs],
        "outputs": [_row(tensor) for tensor in graph.outputs],
    }


def write_sidecar(built: Path, made: Mapping[str, Any], ranges: Ranges, rows: Mapping[str, Any]) -> None:
    """Write engine.json: `made` says by what and for which GPUs, `rows` has an entry for each graph."""
    content = {"schema": SCHEMA, **made, "ranges": asdict(ranges), "graphs": rows}
    (built / SIDECAR).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
        _expect("runtime", library.distribution, content["runtime"])
        names = {"schema", "runtime", "version", "compute_capabilities", "ranges", "graphs"}
        _expect("fields", sorted(names), sorted(content))
        ranges = Ranges(**{word: tuple(sizes) for word, sizes in content["ranges"].items()})
        promised = Ranges.of(spec, Profile(ranges.batch[0], ranges.batch[2]))
        _expect("ranges", promised, ranges)
        _expect("graphs", sorted(graph.name for graph in spec.graphs), sorted(content["graphs"]))
        for graph in spec.graphs:
            _check_row(content["graphs"][graph.name], graph, ranges, built)
        capabilities = tuple(str(name) for name in content["compute_capabilities"])
        return Sidecar(str(content["version"]), capabilities, ranges)
    except OSError as cause:
        raise EngineError(f"{path} cannot be read: {cause}") from cause
    except (EngineError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        reason = f"{cause} is missing" if isinstance(cause, KeyError) else str(cause)
        raise EngineError(f"{path} is damaged or of another version: {reason}; export again") from cause


def _check_row(row: Mapping[str, Any], graph: GraphSpec, ranges: Ranges, built: Path) -> None:
    wanted = described(graph, ranges)
    _expect(f"fields of graph {graph.name}", sorted({*wanted, "size_bytes", "layers", "warnings"}), sorted(row))
    for field, value in wanted.items():
        _expect(f"{field} of graph {graph.name}", value, row[field])
    _expect(f"size of {wanted['file']}", row["size_bytes"], (built / wanted["file"]).stat().st_size)


def _expect(what: str, wanted: Any, came: Any) -> None:
    if wanted != came:
        raise ValueError(f"{what}: wanted {wanted}, found {came}")
