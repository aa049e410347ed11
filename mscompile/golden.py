"""Tokens with the reference model's logits and final states, so that any machine can check what it runs.

`golden.npz` is a zip of uncompressed .npy members, in this order for every rollout:

    <rollout>/tokens.npy        int64 (batch, time)
    <rollout>/chunks.npy        int64 (calls,): how many tokens each call of the rollout took; they add up to time
    <rollout>/logits.npy        float32 (batch, time, vocab)
    <rollout>/state/<name>.npy  each state after the last token
    <rollout>/input/<name>.npy  each host input of the model: its entries (batch, time // every, ...) by chunk
"""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from mscompile.atomic import explained
from mscompile.contracts import Array, HostInput, Sources
from mscompile.errors import BundleError

SIZE_LIMIT_BYTES = 2**30
EPOCH = (1980, 1, 1, 0, 0, 0)  # zip members carry a time; a fixed one keeps the bytes the same
STATE, INPUT = "state/", "input/"
DTYPES = ("bool", *("int8", "int16", "int32", "int64", "uint8"), *("float16", "float32", "float64"))
DAMAGE = (  # all that zipfile and numpy raise for bytes that are not theirs
    *(zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError, MemoryError),
    *(ValueError, TypeError, KeyError, OverflowError, SyntaxError, tokenize.TokenError),
)


@dataclass(frozen=True)
class Rollout:
    """One seeded token stream through the reference model."""

    name: str
    tokens: Array  # (batch, time) int64
    chunks: Array  # (calls,) int64
    logits: Array  # (batch, time, vocab) float32
    states: dict[str, Array]
    inputs: dict[str, Array] = field(default_factory=dict)

    def members(self) -> dict[str, Array]:
        """The arrays by their name in the file, in its order."""
        own = {"tokens": self.tokens, "chunks": self.chunks, "logits": self.logits}
        states = {STATE + name: self.states[name] for name in sorted(self.states)}
        inputs = {INPUT + name: self.inputs[name] for name in sorted(self.inputs)}
        return {f"{self.name}/{key}": array for key, array in (own | states | inputs).items()}

    def fault(self) -> str | None:
        """What contradicts the layout above, None if nothing does."""
        for array, name, dtype, axes in (
            (self.tokens, "tokens", "int64", 2),
            (self.chunks, "chunks", "int64", 1),
            (self.logits, "logits", "float32", 3),
        ):
            if array.dtype != dtype or array.ndim != axes or 0 in array.shape:
                return f"{name} must be {dtype} with {axes} axes, not {array.dtype} {array.shape}"
        if self.logits.shape[:2] != self.tokens.shape:
            return f"logits {self.logits.shape} do not fit tokens {self.tokens.shape}"
        if self.chunks.min() < 1 or sum(map(int, self.chunks)) != self.tokens.shape[1]:
            return f"chunks {self.chunks.tolist()} do not add up to {self.tokens.shape[1]} tokens"
        if self.tokens.min() < 0 or self.tokens.max() >= self.logits.shape[2]:
            return f"tokens must be ids 0 to {self.logits.shape[2] - 1}"
        kept = {f"{kind} {name}": array for kind, of in self._kept for name, array in of.items()}
        return next(
            (f"{name} has dtype {array.dtype}" for name, array in kept.items() if not _plain(array.dtype)), None
        )

    @property
    def _kept(self) -> tuple[tuple[str, dict[str, Array]], ...]:
        return ("state", self.states), ("input", self.inputs)


@dataclass(frozen=True)
class Golden:
    """All rollouts of a bundle; their names are distinct and have no slash."""

    rollouts: tuple[Rollout, ...]

    def check(self) -> None:
        """BundleError naming the rollout that is not as the layout says."""
        size_bytes = sum(array.nbytes for rollout in self.rollouts for array in rollout.members().values())
        if size_bytes > SIZE_LIMIT_BYTES:
            raise BundleError(f"golden rollouts have {size_bytes} bytes, over {SIZE_LIMIT_BYTES}; use fewer tokens")
        names = [rollout.name for rollout in self.rollouts]
        for index, rollout in enumerate(self.rollouts):
            fault = rollout.fault()
            if not rollout.name or "/" in rollout.name or rollout.name in names[:index]:
                fault = "a name must be distinct, not empty, and without a slash"
            if fault is not None:
                raise BundleError(f"golden rollout {rollout.name!r}: {fault}")

    def sources(self, inputs: Iterable[HostInput]) -> Sources:
        """Sources for a replay, that answer what was recorded; BundleError where something is missing."""
        return {given.name: partial(_answer, _recorded(self.rollouts, given)) for given in inputs}

    def save(self, path: Path) -> None:
        """Write golden.npz; the same arrays give the same bytes."""
        self.check()
        with explained(f"cannot write {path.name}"), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for rollout in self.rollouts:
                for key, array in rollout.members().items():
                    content = io.BytesIO()
                    npy.write_array(content, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
                    archive.writestr(zipfile.ZipInfo(f"{key}.npy", EPOCH), content.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read golden.npz without unpickling anything; BundleError in one sentence where it is not right."""
        try:
            arrays = _read_members(path)
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
        except DAMAGE as error:
            raise BundleError(f"{path} is damaged: {error}; export the bundle again") from error
        golden = cls(tuple(_rollout(name, arrays) for name in dict.fromkeys(key.partition("/")[0] for key in arrays)))
        golden.check()
        return golden


def _plain(dtype: np.dtype[Any]) -> bool:
    return dtype.name in DTYPES and dtype.byteorder != ">"


def _rollout(name: str, arrays: dict[str, Array]) -> Rollout:
    own = {key.partition("/")[2]: array for key, array in arrays.items() if key.partition("/")[0] == name}
    states, inputs = (
        {key.removeprefix(kind): own.pop(key) for key in list(own) if key.startswith(kind)} for kind in (STATE, INPUT)
    )
    wanted = ("tokens", "chunks", "logits")
    if missing := [key for key in wanted if key not in own]:
        raise BundleError(f"golden rollout {name!r}: {missing[0]} is missing")
    if extra := sorted(own.keys() - set(wanted)):
        raise BundleError(f"golden rollout {name!r}: {extra[0]!r} is neither {', '.join(wanted)} nor {STATE}<name>")
    return Rollout(name, own["tokens"], own["chunks"], own["logits"], states, inputs)


def _recorded(rollouts: Iterable[Rollout], given: HostInput) -> dict[bytes, Array]:
    """The entry of every whole chunk, by the bytes of its tokens."""
    entries: dict[bytes, Array] = {}
    for rollout in rollouts:
        batch, count = rollout.tokens.shape[0], rollout.tokens.shape[1] // given.every
        found, wanted = rollout.inputs.get(given.name), (batch, count, *given.shape)
        if found is None or found.shape != wanted or found.dtype != given.dtype:
            came = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise BundleError(
                f"golden rollout {rollout.name!r}: wanted {given.dtype} {wanted} of {given.name}, got {came}"
            )
        chunks = rollout.tokens[:, : count * given.every].reshape(batch * count, given.every)
        entries |= {
            chunk.tobytes(): entry for chunk, entry in zip(chunks, found.reshape(-1, *given.shape), strict=True)
        }
    return entries


def _answer(entries: dict[bytes, Array], chunks: Array) -> Array:
    """The source that knows these entries."""
    return np.stack([entries[chunk.tobytes()] for chunk in np.ascontiguousarray(chunks, np.int64)])


def _read_members(path: Path) -> dict[str, Array]:
    """All arrays by member name; nothing is read before all sizes are known to be within the limit."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size_bytes = sum(member.file_size for member in members)
        if size_bytes > SIZE_LIMIT_BYTES:
            raise ValueError(f"it claims {size_bytes} bytes of arrays, more than the limit of {SIZE_LIMIT_BYTES}")
        arrays: dict[str, Array] = {}
        for member in members:
            key = member.filename.removesuffix(".npy")
            if key == member.filename or key in arrays:
                raise ValueError(f"member {member.filename!r} is not an array or occurs twice")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"member {member.filename!r} is compressed, which golden files are not")
            with archive.open(member) as stream:
                arrays[key] = _read_array(stream, member)
    return arrays


def _read_array(stream: IO[bytes], member: zipfile.ZipInfo) -> Array:
    """One .npy member; its header is held against the size of the member before anything is allocated."""
    version = npy.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"member {member.filename!r} has .npy version {version}, not (1, 0)")
    shape, fortran_order, dtype = npy.read_array_header_1_0(stream)
    if not _plain(dtype) or fortran_order or min(shape, default=0) < 0:
        raise ValueError(f"member {member.filename!r} must be a plain array in C order, not {dtype} {shape}")
    content = stream.read()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"member {member.filename!r} has {len(content)} bytes, which do not fit {dtype} {shape}")
    return np.frombuffer(content, dtype).reshape(shape).copy()
