"""Why is a tensor wrong? Likely causes, each with what speaks for it, from the two values and a few experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mscompile.contracts import Array

MASKED = -1e4  # scores below this were masked; those that a model computes lie far above
LARGEST_HALF = 65504.0
PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum", "FusedMatMul")
INTEGERS = ("MatMulNBits", "MatMulInteger", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")
TF32_ERRORS = (2.0**-14, 2.0**-9)  # 10 bits of mantissa in each factor, against 23


@dataclass(frozen=True)
class Evidence:
    """A tensor of the engine and of the reference, and what was tried. None: not tried, or of no meaning here."""

    found: Array
    wanted: Array
    limit: float  # relative error that is allowed
    operators: tuple[str, ...] = ()  # that may have made the tensor, in the engine's form of the graph
    precision: str = "fp32"
    on_gpu: bool = False
    before: Array | None = None  # of a state: what it was before the call
    others: Mapping[str, Array] = field(default_factory=dict)  # what the reference has in other states and outputs
    differences: tuple[str, ...] = ()  # between the bundle and an export of the checkpoint as it is now
    rows_alone_right: bool | None = None  # each row of the batch by itself
    tokens_alone_right: bool | None = None  # the tokens of the call one by one
    unoptimised_right: bool | None = None  # the same graph with the runtime's optimisations off


@dataclass(frozen=True)
class Suspect:
    """A likely cause, and why it is one."""

    cause: str
    evidence: str


def suspects(evidence: Evidence) -> tuple[Suspect, ...]:
    """The likely causes, those that explain the most first; "unknown" where nothing speaks for any."""
    found = [Suspect(cause, told) for cause, look in CAUSES.items() if (told := look(evidence)) is not None]
    return tuple(found) or (Suspect("unknown", "the values differ in no way that a known cause has"),)


def error(found: Array, wanted: Array) -> Array:
    """|found - wanted| in float64: 0 where both are the same infinity or masked, infinite where one is not finite."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    gap = np.where(np.isnan(gap) | np.isinf(gap), np.inf, gap)
    huge = (a < -1e30) & (b < -1e30)  # the lowest number, or minus infinity: masked either way
    same: Array = np.where((a == b) | huge, 0.0, gap)
    return same


def relative_error(found: Array, wanted: Array) -> float:
    """The largest error, in terms of the largest magnitude wanted. Any difference of whole numbers is infinite."""
    if found.shape != wanted.shape:
        return np.inf
    if wanted.dtype.kind in "biu" or found.dtype.kind in "biu":
        return 0.0 if np.array_equal(found, wanted) else np.inf
    largest = float(error(found, wanted).max(initial=0.0))
    return largest / max(scale(wanted), float(np.finfo(np.float32).tiny))


def scale(wanted: Array) -> float:
    """The largest magnitude of a tensor, masked places left out."""
    magnitudes = np.abs(wanted.astype(np.float64))
    return float(np.max(magnitudes, initial=0.0, where=magnitudes < 1e30))


def _close(evidence: Evidence, found: Array, wanted: Array) -> bool:
    return relative_error(found, wanted) <= evidence.limit


def _changed(evidence: Evidence) -> str | None:
    return "; ".join(evidence.differences) or None


def _overflow(evidence: Evidence) -> str | None:
    found, wanted = evidence.found, evidence.wanted
    if found.dtype.kind != "f" or found.shape != wanted.shape:
        return None
    lost = ~np.isfinite(found) & np.isfinite(wanted)
    if not lost.any():
        return None
    kind = "nan" if np.isnan(found[lost]).any() else "inf"
    past = float(np.abs(wanted[lost]).max())
    half = f", past the {LARGEST_HALF:.0f} of fp16" if past > LARGEST_HALF else ""
    return f"{int(lost.sum())} numbers are {kind} where the reference is finite, {past:.3g} at most{half}"


def _mask(evidence: Evidence) -> str | None:
    found, wanted = evidence.found, evidence.wanted
    if found.shape != wanted.shape:
        return None
    if found.dtype == np.bool_:
        return f"a mask: {int((found != wanted).sum())} of {wanted.size} places differ"
    if found.dtype.kind != "f" or not (found < np.inf).all():
        return None  # a mask makes no nan and no positive infinity; overflow does
    hidden = int(((found < MASKED) & ~(wanted < MASKED)).sum())
    shown = int((~(found < MASKED) & (wanted < MASKED)).sum())
    if hidden or shown:
        return f"{shown} scores are not masked that should be, {hidden} are that should not"
    if "Softmax" in evidence.operators and (other := (found == 0) != (wanted == 0)).any():
        return f"{int(other.sum())} weights are zero in only one of the two, as where a mask differs"
    return None


def _shifted(evidence: Evidence) -> str | None:
    found, wanted = evidence.found, evidence.wanted
    if found.shape != wanted.shape:
        return None
    if found.dtype.kind in "iu" and found.size:
        first = int(found.flat[0]) - int(wanted.flat[0])
        if abs(first) == 1 and np.array_equal(found, wanted + first):
            return f"every index is {first:+d} from the right one"
    for axis, size in enumerate(wanted.shape):
        for by in (1, -1):
            if size > 1 and _close(evidence, found, np.roll(wanted, by, axis)):
                return f"it is the right tensor rolled by {by:+d} along axis {axis}"
            if size > 2 and _close(evidence, *_overlap(found, wanted, by, axis)):
                return f"it is the right tensor shifted by {by:+d} along axis {axis}"
    return None


def _overlap(found: Array, wanted: Array, by: int, axis: int) -> tuple[Array, Array]:
    """What stays inside when `wanted` is shifted by one row."""
    rows = np.arange(wanted.shape[axis] - 1)
    return found.take(rows + (by > 0), axis), wanted.take(rows + (by < 0), axis)


def _swapped(evidence: Evidence) -> str | None:
    same = [name for name, value in evidence.others.items() if _close(evidence, evidence.found, value)]
    return f"it is what {same[0]} should be" if same and np.any(evidence.found) else None


def _stale(evidence: Evidence) -> str | None:
    if evidence.before is None or not _close(evidence, evidence.found, evidence.before):
        return None
    return "it is the state from before the call: nothing was written"


def _shape(evidence: Evidence) -> str | None:
    told = []
    if evidence.rows_alone_right:
        told.append("each row of the batch is right by itself")
    if evidence.tokens_alone_right:
        told.append("the same tokens are right one by one, so only the graph for many is wrong")
    return "; ".join(told) or None


def _fusion(evidence: Evidence) -> str | None:
    return "with the runtime's optimisations off it is right" if evidence.unoptimised_right else None


def _quantized(evidence: Evidence) -> str | None:
    integers = [operator for operator in evidence.operators if operator in INTEGERS]
    if not integers and not evidence.precision.startswith("int"):
        return None
    return f"{integers[0] if integers else 'the bundle'} computes with weights in {evidence.precision}"


def _tf32(evidence: Evidence) -> str | None:
    size = relative_error(evidence.found, evidence.wanted)
    is_product = any(operator in PRODUCTS for operator in evidence.operators)
    if not (evidence.on_gpu and is_product and TF32_ERRORS[0] < size < TF32_ERRORS[1]):
        return None
    return f"a product in FP32 on a GPU is off by {size:.1e}, as with the 10 bits of TF32"


CAUSES: Mapping[str, Callable[[Evidence], str | None]] = {
    "changed since the export": _changed,
    "overflow": _overflow,
    "wrong mask": _mask,
    "off by one row": _shifted,
    "swapped": _swapped,
    "stale state": _stale,
    "shape specialisation": _shape,
    "runtime fusion": _fusion,
    "quantization": _quantized,
    "TF32": _tf32,
}
