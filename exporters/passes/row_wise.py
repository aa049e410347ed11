"""Which nodes treat every remembered row by itself, and how to apply one of them to other rows.

A node is row-wise if it does the same to every row along the time axis and along the batch axis. What each
operator does with such an axis of its input is written below as one function an operator, `(node, index of the
input, axis) -> axis of the output`, or None where the operator mixes what lies along it.

    elementwise, bias, scale                                                  same axis
    product with a constant (MatMul, Einsum)                                  where the axis goes
    LayerNorm, Softmax, reductions of other axes                              same axis, or where it goes
    Split, Slice, Gather and Concat along other axes                          same axis
    Reshape that keeps the axis whole: (..., H * d_h) <-> (..., H, d_h)       where it goes
    Transpose, Squeeze, Unsqueeze                                             where it goes
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from exporters.passes import sizes
from exporters.passes.nodes import constant, normal

ELEMENTWISE = (
    "Relu", "Gelu", "Tanh", "Sigmoid", "Identity", "Cast", "Neg", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Abs",
    "Elu", "LeakyRelu", "Softplus", "Clip", "HardSigmoid", "HardSwish", "Mish", "Selu",
)  # fmt: skip
BROADCAST = ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max")
REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")
LAYOUT = frozenset(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice", "Concat", "Identity", "Gather"))
PRODUCTS = frozenset(("MatMul", "Einsum"))
COMPUTED = {"Reshape": 1}  # the input that may be computed: it only says sizes


@dataclass(frozen=True)
class Axes:
    """Where time and batch lie in a tensor of rows."""

    time: int
    batch: int


def mapped(node: ir.Node, rows: Mapping[int, Axes]) -> Axes | None:
    """The axes of the outputs of a node that reads rows as the inputs `rows`; None unless it is row-wise."""
    if node.domain or node.op_type not in _MAPS or not all(_constant(node, index) for index in _others(node, rows)):
        return None
    found = {_mapped(node, index, axes) for index, axes in rows.items()}
    axes = found.pop()
    if found or axes is None or axes.time == axes.batch:
        return None
    if node.op_type == "Reshape" and _target(node, rows[0].time, axes.time) is None:
        return None
    return axes


def _mapped(node: ir.Node, index: int, axes: Axes) -> Axes | None:
    if _shape(node, index) is None:
        return None
    time, batch = (_MAPS[node.op_type](node, index, axis) for axis in (axes.time, axes.batch))
    return None if time is None or batch is None else Axes(time, batch)


def _others(node: ir.Node, rows: Mapping[int, Axes]) -> Sequence[int]:
    return [index for index, value in enumerate(node.inputs) if value is not None and index not in rows]


def _constant(node: ir.Node, index: int) -> bool:
    value = node.inputs[index]
    return index == COMPUTED.get(node.op_type) or (value is not None and value.const_value is not None)


def _shape(node: ir.Node, index: int) -> list[sizes.Size] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.shape is None else list(value.shape)


def _rank(node: ir.Node, index: int) -> int:
    return len(_shape(node, index) or ())


def _integers(node: ir.Node, index: int) -> list[int] | None:
    """The numbers of a constant input."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().ravel()]


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


# ---- One function an operator: where an axis goes ---------------------------------------------------------


def _elementwise(_: ir.Node, index: int, axis: int) -> int | None:
    return axis if index == 0 else None


def _broadcast(node: ir.Node, index: int, axis: int) -> int | None:
    """Other operands may be rows, or constants that do not vary along the axis."""
    from_the_end = _rank(node, index) - axis
    for other, value in enumerate(node.inputs):
        shape = _shape(node, other)
        if shape is None or (other != index and len(shape) > _rank(node, index)):
            return None
        varies = len(shape) >= from_the_end and shape[-from_the_end] != 1
        if value is not None and value.const_value is not None and varies:
            return None
    return axis


def _matmul(node: ir.Node, index: int, axis: int) -> int | None:
    return axis if index == 0 and axis < _rank(node, 0) - 1 and _rank(node, 1) == 2 else None


def _einsum(node: ir.Node, index: int, axis: int) -> int | None:
    """The axis keeps its letter, and no other operand has it."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    given, arrow, result = equation.partition("->")
    operands = given.split(",")
    letter = operands[index][axis] if "." not in equation and arrow else ""
    elsewhere = [*operands[:index], *operands[index + 1 :], operands[index].replace(letter, "", 1)]
    alone = letter and not any(letter in operand for operand in elsewhere)
    return result.index(letter) if alone and letter in result else None


def _norm(node: ir.Node, index: int, axis: int) -> int | None:
    return axis if index == 0 and axis < normal(_attribute(node, "axis", -1), _rank(node, 0)) else None


def _softmax(node: ir.Node, _: int, axis: int) -> int | None:
    return axis if axis != normal(_attribute(node, "axis", -1), _rank(node, 0)) else None


def _reduction(node: ir.Node, index: int, axis: int) -> int | None:
    axes = _integers(node, 1)
    if index != 0 or axes is None:
        return None
    removed = [normal(number, _rank(node, 0)) for number in axes]
    return None if axis in removed else axis if _attribute(node, "keepdims", 1) else _without(axis, removed)


def _transpose(node: ir.Node, _: int, axis: int) -> int | None:
    default = list(reversed(range(_rank(node, 0))))
    perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else default
    return perm.index(axis)


def _squeeze(node: ir.Node, index: int, axis: int) -> int | None:
    axes = _integers(node, 1)
    if index != 0 or axes is None:
        return None
    removed = [normal(number, _rank(node, 0)) for number in axes]
    return None if axis in removed else _without(axis, removed)


def _unsqueeze(node: ir.Node, index: int, axis: int) -> int | None:
    axes = _integers(node, 1)
    if index != 0 or axes is None:
        return None
    rank = _rank(node, 0) + len(axes)
    inserted = [normal(number, rank) for number in axes]
    return [position for position in range(rank) if position not in inserted][axis]


def _without(axis: int, removed: Sequence[int]) -> int:
    return axis - sum(number < axis for number in removed)


def _split(node: ir.Node, index: int, axis: int) -> int | None:
    return axis if index == 0 and axis != normal(_attribute(node, "axis", 0), _rank(node, 0)) else None


def _slice(node: ir.Node, index: int, axis: int) -> int | None:
    axes = _integers(node, 3)
    cut = None if axes is None else [normal(number, _rank(node, 0)) for number in axes]
    return axis if index == 0 and cut is not None and axis not in cut else None


def _gather(node: ir.Node, index: int, axis: int) -> int | None:
    chosen = normal(_attribute(node, "axis", 0), _rank(node, 0))
    if index != 0 or axis == chosen:
        return None
    return axis if axis < chosen else axis - 1 + _rank(node, 1)


def _concat(node: ir.Node, _: int, axis: int) -> int | None:
    constants = any(value is None or value.const_value is not None for value in node.inputs)
    return axis if not constants and axis != normal(_attribute(node, "axis", 0), _rank(node, 0)) else None


def _reshape(node: ir.Node, index: int, axis: int) -> int | None:
    """The axis of the output that has this size and as many elements before it."""
    before, after = _shape(node, 0), node.outputs[0].shape
    if index != 0 or before is None or after is None:
        return None
    leading = sizes.product(before[:axis])
    kept = [n for n, dim in enumerate(after) if sizes.same(dim, before[axis]) and sizes.product(after[:n]) == leading]
    return kept[0] if kept and leading is not None else None


_MAPS: Mapping[str, Callable[[ir.Node, int, int], int | None]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "MatMul": _matmul,
    "Einsum": _einsum,
    "LayerNormalization": _norm,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Concat": _concat,
    "Reshape": _reshape,
}


# ---- Cuts along time --------------------------------------------------------------------------------------


def takes_last(node: ir.Node, index: int, axis: int, before: sizes.Size | None, rows: sizes.Size | None) -> bool:
    """Is this the Slice along `axis` of all rows but the first `before`, which leaves the last `rows`?"""
    if node.op_type != "Slice" or index != 0 or _integers(node, 3) is None or len(node.inputs) not in (4, 5):
        return False
    axes, steps = _integers(node, 3), [1] if len(node.inputs) == 4 else _integers(node, 4)
    if axes is None or [normal(number, _rank(node, 0)) for number in axes] != [axis] or steps != [1]:
        return False
    start, end = sizes.size_of(node.inputs[1]), sizes.size_of(node.inputs[2])
    all_rows = sizes.total([before, rows])
    if not (isinstance(end, int) and end >= sizes.TO_THE_END) and not sizes.same(end, all_rows):
        return False
    return sizes.same(start, before) or sizes.same(start, sizes.combined(operator.mul, rows, -1))


def slice_start(node: ir.Node, index: int, axis: int) -> int | None:
    """Where a Slice of rows with step 1 along `axis`, and no other, begins, if it takes all that follows."""
    if node.op_type != "Slice" or index != 0 or node.inputs[0] is None:
        return None
    starts, ends, axes = (_integers(node, number) for number in (1, 2, 3))
    steps = [1] if len(node.inputs) == 4 else _integers(node, 4)
    if starts is None or ends is None or axes is None or len(starts) != 1 or steps != [1]:
        return None
    along = normal(axes[0], len(node.inputs[0].shape or ())) == axis
    return starts[0] if along and ends[0] >= sizes.TO_THE_END else None


# ---- The same function of other rows ----------------------------------------------------------------------


def digest(node: ir.Node, output: int, axes: Axes, inputs: Sequence[bytes | None]) -> bytes:
    """Equal for values that are the same function of any rows; `inputs` has the digests of inputs that are rows."""
    found = hashlib.sha256(f"{node.op_type} {output} {axes}".encode())
    for name in sorted(node.attributes):
        if node.op_type != "Reshape":
            found.update(f"{name}={node.attributes[name].value}".encode())
    if node.op_type == "Reshape":
        kept = [dim for axis, dim in enumerate(node.outputs[0].shape or ()) if axis not in (axes.time, axes.batch)]
        found.update(str(kept).encode())
    for index, (value, known) in enumerate(zip(node.inputs, inputs, strict=True)):
        if known is not None:
            found.update(known)
        elif value is not None and value.const_value is not None and index != COMPUTED.get(node.op_type):
            found.update(f"{value.const_value.dtype}{value.const_value.shape}".encode())
            found.update(value.const_value.tobytes())
    return found.digest()


def copy_onto(
    graph: ir.Graph, node: ir.Node, given: Mapping[int, ir.Value], before: Axes, after: Axes, rows: sizes.Size | None
) -> Sequence[ir.Value]:
    """The outputs of the same function of other rows: `given` for the inputs that are rows, `rows` of them."""
    inputs = [given.get(index, value) for index, value in enumerate(node.inputs)]
    attributes = dict(node.attributes.items())
    if node.op_type == "Reshape":
        target = _target(node, before.time, after.time)
        assert target is not None, "mapped() refuses such a node"
        inputs, attributes = [given[0], constant(graph, target)], {}
    made = ir.node(node.op_type, inputs, num_outputs=len(node.outputs), metadata_props=dict(node.metadata_props))
    made.attributes.update(attributes)
    for old, new in zip(node.outputs, made.outputs, strict=True):
        shape = list(old.shape or ())
        new.type = old.type
        new.shape = ir.Shape([*shape[: after.time], rows, *shape[after.time + 1 :]])
    graph.append(made)
    return made.outputs


def _target(node: ir.Node, before: int, after: int) -> list[int] | None:
    """The sizes for a Reshape of any number of rows, time axis `before` -> `after`; None where none will do."""
    given, wanted = _shape(node, 0) or [], list(node.outputs[0].shape or ())

    def size(axis: int, dim: sizes.Size) -> int:
        if axis == after:
            return 0 if before == after else -1
        if isinstance(dim, int):
            return dim
        return 0 if axis < len(given) and sizes.same(dim, given[axis]) else -1

    target = [size(axis, dim) for axis, dim in enumerate(wanted)]
    return target if target.count(-1) <= 1 else None
