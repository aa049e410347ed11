"""Sub-graphs of an ONNX graph: what computes some of its tensors, as a model of its own.

A *cut* of a graph of n nodes, in topological order, stands behind its first i nodes. Its *frontier* is every tensor
that crosses it: made before the cut, and read behind it or returned by the graph. The graph's outputs follow from the
frontier alone. So between a cut whose frontier is right and one whose frontier is wrong there is always a node that
makes a wrong tensor from right ones, and bisection finds one, whatever becomes of the error on its way.

A model made for a frontier returns nothing else. A runtime fuses its operators as it does those of the whole graph,
but for fusions that the cut itself goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import onnx

Frontier = tuple[str, ...]  # names of tensors, in the order of the nodes that make them


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, in its branches and loops, too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            made = {name for inner in graph.node for name in inner.output}
            made |= {value.name for value in (*graph.input, *graph.initializer)}
            used = [name for inner in graph.node for name in read_by(inner)]
            yield from (name for name in (*used, *(value.name for value in graph.output)) if name not in made)


def made_by(graph: onnx.GraphProto) -> dict[str, int]:
    """The index of the node that makes each tensor."""
    return {name: index for index, node in enumerate(graph.node) for name in node.output if name}


def frontiers(graph: onnx.GraphProto) -> list[Frontier]:
    """The frontier behind the first 1, 2, .. n nodes."""
    last = {name: index for index, node in enumerate(graph.node) for name in read_by(node)}
    last |= {value.name: len(graph.node) for value in graph.output}
    open_: list[str] = []
    found = []
    for index, node in enumerate(graph.node):
        open_ = [name for name in (*open_, *node.output) if last.get(name, -1) > index]
        found.append(tuple(open_))
    return found


def prefix(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The part of a model that computes `names`, which are its outputs, in this order. Inputs stay as they are."""
    graph, makers = model.graph, made_by(model.graph)
    needed: set[int] = set()
    wanted = list(names)
    while wanted:
        index = makers.get(wanted.pop())
        if index is not None and index not in needed:
            needed.add(index)
            wanted += read_by(graph.node[index])
    nodes = [graph.node[index] for index in sorted(needed)]
    used = {name for node in nodes for name in read_by(node)}
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    part.graph.name = graph.name
    part.graph.node.extend(nodes)
    part.graph.input.extend(graph.input)
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in used)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    part.graph.value_info.extend(value for value in graph.value_info if value.name in used)
    return part


def first_wrong(cuts: Sequence[Frontier], is_wrong: Callable[[Frontier], bool]) -> tuple[int, int]:
    """Numbers of two neighbouring cuts, the first right and the second wrong; -1 stands for the graph's inputs.

    The last of `cuts` is taken to be wrong. `is_wrong` is asked log2(len(cuts)) times.
    """
    right, wrong = -1, len(cuts) - 1
    while wrong - right > 1:
        middle = (right + wrong) // 2
        if is_wrong(cuts[middle]):
            wrong = middle
        else:
            right = middle
    return right, wrong


def module_of(graph: onnx.GraphProto, index: int) -> str | None:
    """The module that node `index` came from, or where a pass made it, that of the nearest node that has one.

    Nodes that read its results are asked before those that made what it reads.
    """
    makers = made_by(graph)
    before = [{makers[name] for name in read_by(node) if name in makers} for node in graph.node]
    behind = [{reader for reader, made in enumerate(before) if number in made} for number in range(len(graph.node))]
    for neighbours in (behind, before):
        seen, todo = {index}, [index]
        while todo:
            at = todo.pop(0)
            if (module := _module(graph.node[at])) is not None:
                return module
            todo += sorted(neighbours[at] - seen)
            seen |= neighbours[at]
    return None


def _module(node: onnx.NodeProto) -> str | None:
    return next((entry.value for entry in node.metadata_props if entry.key == "module"), None)


def present(cuts: Sequence[Frontier], tensors: Collection[str]) -> list[int]:
    """Which cuts another form of the graph can be compared at: those all of whose tensors it has."""
    known = set(tensors)
    return [number for number, names in enumerate(cuts) if known.issuperset(names)]
