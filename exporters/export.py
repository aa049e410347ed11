"""Streaming modules -> ONNX graphs, one for each GraphSpec, as onnx-ir models in memory.

The weights of a graph are the module's own tensors, never copies. torch.onnx.export traces the modules as they are.
It can drop the constraints of a dynamic dimension or freeze it without an error, so `exporters.check` compares every
graph with its GraphSpec after each stage. The warnings it is known to give are listed below with the reason; any
other is passed on.
"""

from __future__ import annotations

import ast
import gc
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn

from exporters import forked
from exporters.lowerings import TRANSLATIONS
from exporters.program import Streaming
from mscompile.contracts import BATCH, CHUNK, CONTEXT, GraphSpec, TensorSpec
from mscompile.errors import ExportError

OPSET = 20

EXPECTED_WARNINGS = (
    (r"The axis name: \S+ will not be used", "several inputs share a symbol, which is what we ask for"),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", "torch's own use of its pytree module"),
    (r"torchvision is not installed", "no graph here uses torchvision"),
)

ELSEWHERE = "weights of the module"  # in graphs on their way between processes

SCOPES_KEY = "pkg.torch.onnx.name_scopes"

logger = logging.getLogger(__name__)


def export_graphs(program: Streaming, begins: Callable[[str], None] = lambda _: None) -> dict[str, ir.Model]:
    """Trace every graph of the program, several at once where that is possible; `begins` is told each name."""
    names = [graph.name for graph in program.spec.graphs]
    apart = forked.run(names, lambda name: _trace_apart(program, name), begins)
    models = {}
    for name in names:
        if name in apart:
            models[name] = _attached(apart[name], program.graphs[name])
        else:
            begins(name)
            models[name] = export_graph(program, name)
    return models


def export_graph(program: Streaming, name: str) -> ir.Model:
    """Trace one graph of the program. Raises ExportError naming the graph if the trace fails."""
    return export_module(program.graphs[name], program.spec.graph(name), program.spec.schedule.chunk_multiple)


def export_module(module: nn.Module, spec: GraphSpec, multiple: int = 1) -> ir.Model:
    """Trace a module whose arguments and results are those of the spec, in its order.

    Calls of many tokens take whole groups of `multiple` tokens. Raises ExportError naming the graph if the trace fails.
    """
    arguments = tuple(_example(tensor, multiple) for tensor in spec.inputs)
    dimensions = _dynamic_shapes(spec, multiple)
    try:
        with _explained_warnings():
            model = _trace(module, arguments, dimensions, spec)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"graph {spec.name} cannot be exported: {reason}") from error
    _name_dimensions(model, spec)
    _strip_provenance(model)
    model.graph.name = spec.name
    return model


def _trace_apart(program: Streaming, name: str) -> bytes:
    """What a forked process returns: the graph as a ModelProto that only names its weights."""
    torch.set_num_threads(1)  # its parent's threads are not there
    gc.disable()  # it ends with the trace
    model = export_graph(program, name)
    weights = _tensors(program.graphs[name])
    for key, value in model.graph.initializers.items():
        if value.const_value is not None and key in weights:
            shape, dtype = ir.Shape(weights[key].shape), value.const_value.dtype
            value.const_value = ir.ExternalTensor(ELSEWHERE, None, None, dtype, shape=shape, name=key)
    return ir.to_proto(model).SerializeToString()


def _attached(content: bytes, module: nn.Module) -> ir.Model:
    """That graph, with the tensors of the module."""
    model = ir.from_proto(onnx.load_from_string(content))
    weights = _tensors(module)
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = TorchTensor(weights[name], name=name)
    return model


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the names that torch.onnx gives their initializers."""
    named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return dict(named)


def _trace(module: nn.Module, arguments: tuple[Any, ...], dimensions: Any, spec: GraphSpec) -> ir.Model:
    program = torch.onnx.export(
        module,
        arguments,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        dynamic_shapes=(dimensions,),
        input_names=[tensor.name for tensor in spec.inputs],
        output_names=[tensor.name for tensor in spec.outputs],
        custom_translation_table=dict(TRANSLATIONS),
        optimize=False,  # the fold pass does this, with all weights at hand
    )
    assert program is not None
    return program.model


def _example(tensor: TensorSpec, multiple: int) -> torch.Tensor:
    """An input of sizes that no dimension is frozen to by chance: two streams, at least four groups."""
    sizes = tensor.concrete(batch=2, chunk=4 * multiple, context=6 * multiple)
    return torch.zeros(sizes, dtype=getattr(torch, tensor.dtype))


def _dynamic_shapes(spec: GraphSpec, multiple: int) -> tuple[dict[int, Any], ...]:
    """Dimensions by axis of each input. Calls of many tokens take whole groups of `multiple` tokens."""
    words = {name: torch.export.Dim(name, min=1) for name in (BATCH, CHUNK, CONTEXT)}

    def dimension(dim: str) -> Any:
        word, _, divisor = dim.partition("/")
        rows = 1 if word == BATCH else multiple // int(divisor or 1)
        return words[word] if rows == 1 else rows * words[word]

    return tuple(
        {axis: dimension(dim) for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}
        for tensor in spec.inputs
    )


def _name_dimensions(model: ir.Model, spec: GraphSpec) -> None:
    """Call the symbolic dimensions of inputs and outputs what the GraphSpec calls them; frozen ones stay frozen."""
    tensors = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        tensor = tensors.get(value.name or "")
        if tensor is None or value.shape is None or len(value.shape) != len(tensor.shape):
            continue
        named = [
            wanted if isinstance(wanted, str) and not isinstance(found, int) else found
            for found, wanted in zip(value.shape, tensor.shape, strict=True)
        ]
        value.shape = ir.Shape(named)


def _strip_provenance(model: ir.Model) -> None:
    """Drop what names this machine or run (stack traces, source paths); keep which module a node came from."""
    model.producer_name, model.producer_version, model.doc_string = "mscompile", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        module = _module_path(node)
        node.doc_string = None
        node.metadata_props.clear()
        node.metadata_props["module"] = module
        for output in node.outputs:
            output.metadata_props.clear()


def _module_path(node: ir.Node) -> str:
    """The innermost module whose forward made this node, as `level.pre.blocks.0.attention`."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "[]"))
    return str(scopes[-2]).removeprefix("root").removeprefix(".") if len(scopes) > 1 else ""


@contextmanager
def _explained_warnings() -> Iterator[None]:
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    registry.addFilter(_is_unexpected)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        registry.removeFilter(_is_unexpected)
    for message in {str(warning.message).splitlines()[0] for warning in caught}:
        if not _explained(message):
            logger.warning("while exporting: %s", message)


def _explained(message: str) -> bool:
    return any(re.search(pattern, message) for pattern, _ in EXPECTED_WARNINGS)


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not _explained(record.getMessage())
