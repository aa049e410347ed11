"""Sizes that a graph computes, as expressions of its symbolic dimensions: `Shape`, arithmetic, and nothing else.

Shape(tokens)[1] -> Squeeze -> Neg        -chunk
Add(5, Shape(tokens)[1])                  chunk + 5
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import onnx_ir as ir

Size = int | ir.SymbolicDim
TO_THE_END = 2**31 - 1  # a Slice that ends here or later takes all that follows

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}
_CARRIERS = ("Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity")  # of one number


def size_of(value: ir.Value | None) -> Size | None:
    """The number that a tensor of one element holds; None where it is not known."""
    if value is None:
        return None
    if value.const_value is not None:
        return int(value.const_value.numpy().item()) if value.const_value.size == 1 else None
    node = value.producer()
    if node is None:
        return None
    if node.op_type in _CARRIERS:
        return size_of(node.inputs[0])
    if node.op_type == "Shape":
        return _dimension(node)
    if node.op_type == "Neg":
        return combined(operator.mul, size_of(node.inputs[0]), -1)
    if node.op_type in _ARITHMETIC:
        return combined(_ARITHMETIC[node.op_type], size_of(node.inputs[0]), size_of(node.inputs[1]))
    return None


def _dimension(node: ir.Node) -> Size | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(source.shape)
    dims = list(source.shape)[start:end]
    return dims[0] if len(dims) == 1 and known(dims[0]) else None


def known(size: Size | None) -> bool:
    return isinstance(size, int) or (size is not None and size.value is not None)


def combined(operation: Callable[[Any, Any], Any], left: Size | None, right: Size | None) -> Size | None:
    """`left` and `right` combined; None where one is unknown or too involved."""
    if left is None or right is None or not known(left) or not known(right):
        return None
    try:
        if isinstance(left, int) and not isinstance(right, int):
            left = ir.SymbolicDim(str(left))
        result = operation(left, right)
        return result if isinstance(result, int) else result.simplify()
    except (ValueError, TypeError):
        return None


def total(sizes: Iterable[Size | None]) -> Size | None:
    result: Size | None = 0
    for size in sizes:
        result = size if result == 0 else combined(operator.add, result, size)
    return result


def product(sizes: Iterable[Size]) -> tuple[int, list[str]] | None:
    """A number and the symbols it is multiplied by, in a form that can be compared; None where one is unknown."""
    listed = list(sizes)
    if not all(known(size) for size in listed):
        return None
    symbols = sorted(str(size) for size in listed if not isinstance(size, int))
    return math.prod(size for size in listed if isinstance(size, int)), symbols


def same(left: Size | None, right: Size | None) -> bool:
    """Are these the same size, whatever their symbols stand for?"""
    if left is None or right is None or not known(left) or not known(right):
        return False
    if left == right:
        return True
    difference = combined(operator.sub, left, right)
    return difference is not None and str(difference) == "0"
