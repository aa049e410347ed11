"""Graphs in ONNX Runtime's own format, for phones and for builds of the runtime that know nothing else.

    graphs/<graph>.ort                     a graph, optimised as far as holds on every processor, with its weights
    manifest.json                          the bundle's own: states, graphs and schedule are what they were
    golden.npz, tokenizer.json             the bundle's own
    required_operators_and_types.config    what a minimal build of ONNX Runtime has to include
    sizes.json                             of every file and of the states, and the hashes of the .ort files

The format keeps every graph with all its weights: what graphs share is in each file that uses it, and ONNX Runtime
writes no external weights in it (tried with 1.31.1: the option for them is without effect), nor the same bytes twice:
the parts of a file come in another order each time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engines import ort
from engines.session import StreamSession
from mscompile.bundle import ENGINES, GOLDEN, GRAPHS, MANIFEST, TOKENIZER
from mscompile.contracts import Array, Sources, StreamSpec
from mscompile.errors import EngineError, EngineUnavailable, GateFailed
from mscompile.runtime import Bundle
from validation.parity import ParityReport, check_golden

MARKER = "sizes.json"
OPERATORS = "required_operators_and_types.config"
LEVEL = "ORT_ENABLE_EXTENDED"  # the next ones lay out tensors for one kind of processor

README = """\
# {name} in ORT format

The graphs of {title}, for builds of ONNX Runtime that load its own format only, as on phones. `manifest.json` is that
of the bundle they are from: a host walks its states, graphs and schedule as for the bundle, and opens
`graphs/<graph>.ort` instead of `graphs/<graph>.onnx`. The hashes of these files are in `sizes.json`.

| graph | file | of it weights |
| --- | --- | --- |
{rows}
| together | {total} | {weights} |

Weights are in every file that uses them: {distinct} of {weights} are distinct. A stream keeps {state} of states.

`{config}` lists the {operators} operators of the graphs with their types. A build of ONNX Runtime that has
nothing else is configured with:

```console
$ ./build.sh --config MinSizeRel --minimal_build --disable_ml_ops --disable_exceptions --disable_rtti \\
      --include_ops_by_config {config} --enable_reduced_operator_type_support
```

ONNX Runtime {version} wrote the files, at the optimisation level {level}, which holds on every
processor. It replayed the golden rollouts with them: the largest difference of a logit is {worst:.1e}.
"""


@dataclass(frozen=True)
class Weights:
    """What a graph file holds: sizes of its weights by hash, and its operators as (domain, name)."""

    size_bytes: dict[str, int]
    operators: frozenset[tuple[str, str]]


def fill(bundle: Bundle, directory: Path) -> None:
    """The graphs in ORT format and what a host needs beside them.

    Raises EngineUnavailable without ONNX Runtime, GateFailed where the written graphs miss the golden rollouts.
    """
    if reason := ort.ENGINE.cannot_build():
        raise EngineUnavailable(reason)
    written = _write_graphs(bundle, directory / GRAPHS)
    report = verify(bundle, written)
    if not report.passed:
        raise GateFailed(f"the graphs in ORT format are not those of {bundle.path}: {report.failures[0]}")
    _write_operators(directory / OPERATORS, list(written.values()))
    for name in (MANIFEST, GOLDEN, TOKENIZER):
        if (bundle.path / name).is_file():
            shutil.copyfile(bundle.path / name, directory / name)
    facts = _facts(bundle.spec, written, report)
    (directory / MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(_readme(bundle, facts), encoding="utf-8")


def verify(bundle: Bundle, files: Mapping[str, Path]) -> ParityReport:
    """Replay the golden rollouts of a bundle in these .ort files, by graph."""
    opened = {name: _opened(file) for name, file in files.items()}
    sources = bundle.golden.sources(bundle.spec.inputs)
    new_session = partial(_session, bundle.spec, opened, sources)
    return check_golden("ort-mobile", bundle.manifest.precision, bundle.spec, new_session, bundle.golden.rollouts)


def _write_graphs(bundle: Bundle, folder: Path) -> dict[str, Path]:
    import onnxruntime

    folder.mkdir()
    graphs, built = bundle.path / GRAPHS, bundle.path / ENGINES / "ort"
    written = {}
    for graph in bundle.spec.graphs:
        written[graph.name] = folder / f"{graph.name}.ort"
        plain, saving, given = _options(graphs), _options(graphs), ort.source(graphs, built, graph.name)
        saving.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVEL)
        saving.optimized_model_filepath = str(written[graph.name])
        saving.add_session_config_entry("session.save_model_format", "ORT")
        try:
            _inference(given, saving)
        except EngineError as error:
            _inference(given, plain)  # raises the error again, unless only saving failed
            raise OSError(errno.EIO, f"ONNX Runtime could not save {graph.name}.ort") from error
    return written


def _opened(file: Path) -> Any:
    """Without further optimisation, as a minimal build runs it."""
    import onnxruntime

    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _inference(file, options)


def _options(weights: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", ort.ACCURACY_LEVEL)
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return options


def _inference(file: Path, options: Any) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(file.read_bytes(), options, providers=[ort.CPU])
    except Exception as error:
        raise EngineError(f"ONNX Runtime cannot load {file.name}: {str(error).splitlines()[0]}") from error


class _Executor:
    """Runs .ort files as a minimal build does: named arrays in, arrays out."""

    def __init__(self, sessions: Mapping[str, Any]) -> None:
        self._sessions = sessions

    def bind(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        def run() -> None:
            results = self._sessions[graph].run(list(outputs), dict(inputs))
            for output, result in zip(outputs.values(), results, strict=True):
                output[...] = result

        return run


def _session(spec: StreamSpec, sessions: Mapping[str, Any], sources: Sources, batch: int = 1) -> StreamSession:
    return StreamSession(spec, _Executor(sessions), batch, sources)


def _write_operators(path: Path, files: list[Path]) -> None:
    """The list of operators by ONNX Runtime's own tool, which names files by where they lie."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the tool leaves closing files to Python
        create_config_from_models(files, path, enable_type_reduction=True)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _facts(spec: StreamSpec, files: Mapping[str, Path], report: ParityReport) -> dict[str, Any]:
    import onnxruntime

    held = {name: _weights(file) for name, file in files.items()}
    distinct = {digest: size for weights in held.values() for digest, size in weights.size_bytes.items()}
    graphs = {
        name: {
            "file": f"{GRAPHS}/{file.name}",
            "size_bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "weights_bytes": sum(held[name].size_bytes.values()),
            "operators": len(held[name].operators),
        }
        for name, file in files.items()
    }
    return {
        "onnxruntime": onnxruntime.__version__,
        "optimization_level": LEVEL,
        "graphs": graphs,
        "graphs_bytes": sum(graph["size_bytes"] for graph in graphs.values()),
        "weights_bytes": sum(graph["weights_bytes"] for graph in graphs.values()),
        "distinct_weights_bytes": sum(distinct.values()),
        "state_bytes_per_stream": spec.bytes_per_stream(),
        "operators": len(frozenset().union(*(weights.operators for weights in held.values()))),
        "largest_logit_difference": report.logit_max_abs,
    }


def _weights(file: Path) -> Weights:
    """Read by the schema of the format that comes with ONNX Runtime."""
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    graph = InferenceSession.GetRootAs(file.read_bytes(), 0).Model().Graph()
    tensors = (graph.Initializers(index).RawDataAsNumpy() for index in range(graph.InitializersLength()))
    contents = [tensor.tobytes() for tensor in tensors if not isinstance(tensor, int)]  # 0: a text, which has none
    sizes = {hashlib.sha256(content).hexdigest(): len(content) for content in contents}
    return Weights(sizes, frozenset(_operators(graph)))


def _operators(graph: Any) -> Iterator[tuple[str, str]]:
    for index in range(graph.NodesLength()):
        node = graph.Nodes(index)
        yield node.Domain().decode(), node.OpType().decode()


def _readme(bundle: Bundle, facts: dict[str, Any]) -> str:
    rows = [
        f"| `{name}` | {_mb(graph['size_bytes'])} | {_mb(graph['weights_bytes'])} |"
        for name, graph in facts["graphs"].items()
    ]
    return README.format(
        name=bundle.manifest.name,
        title=bundle.manifest.title,
        rows="\n".join(rows),
        total=_mb(facts["graphs_bytes"]),
        weights=_mb(facts["weights_bytes"]),
        distinct=_mb(facts["distinct_weights_bytes"]),
        state=_mb(facts["state_bytes_per_stream"]),
        operators=facts["operators"],
        config=OPERATORS,
        version=facts["onnxruntime"],
        level=facts["optimization_level"],
        worst=facts["largest_logit_difference"],
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
