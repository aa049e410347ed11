"""Tiny models with weights large enough that mistakes show, and helpers to run them whole and as streams.

Models and programs are cached and shared between tests: never change their weights in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from engines.session import StreamSession
from exporters import program
from mscompile.contracts import Array, Profile, Session, Snapshot
from mscompile.conversion.base import Converted, Foreign
from mscompile.models import families
from mscompile.models.family import ReferenceModel
from mscompile.models.hourglass import SHORTENINGS, UPSAMPLINGS, Hourglass, HourglassConfig
from mscompile.models.transformer_xl import TransformerXL, TransformerXLConfig

VOCAB = 11
CONTEXT = 24
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

Settings = dict[str, Any]
Model = TypeVar("Model", bound=ReferenceModel)

TRANSFORMER_XL: dict[str, Settings] = {
    f"{'pre' if pre_norm else 'post'}-norm{'-same-length' if same_length else ''}{'-clamp' if clamp_len else ''}": {
        "pre_norm": pre_norm,
        "same_length": same_length,
        "clamp_len": clamp_len,
    }
    for pre_norm, same_length, clamp_len in product((False, True), (False, True), (None, 3))
}
TRANSFORMER_XL |= {
    "segment-longer-than-memory": {"mem_len": 2, "tgt_len": 7},
    "segment-of-one": {"mem_len": 3, "tgt_len": 1},
    "window-of-two": {"mem_len": 2, "tgt_len": 5, "same_length": True},
    "untied": {"tie_embedding": False, "same_length": True, "mem_len": 4},
}

KINDS: dict[str, Settings] = {
    f"{shortening}+{upsampling}": {"shortening": shortening, "upsampling": upsampling}
    for shortening, upsampling in product(SHORTENINGS, UPSAMPLINGS)
}
NESTED: dict[str, Settings] = {
    "two-valleys": {"hierarchy": "1@1 1@2 1@4 1@2 1@1"},
    "uneven-valleys": {"hierarchy": "1@1 1@3 1@6 1@3 1@1", "shortening": "attention-linear"},
    "three-valleys": {"hierarchy": "1@1 1@2 0@4 1@8 0@4 1@2 1@1", "shortening": "average", "upsampling": "linear"},
    "two-blocks": {"hierarchy": "2@1 2@2 2@1", "upsampling": "repeat"},
    "one-scale": {"hierarchy": "2@1"},
}
HOURGLASS: dict[str, Settings] = {**KINDS, **NESTED}


def transformer_xl(dtype: torch.dtype = torch.float64, **settings: Any) -> TransformerXL:
    """A Transformer-XL of two layers; `settings` override its configuration."""
    values = {
        "vocab_size": VOCAB, "n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12,
        "mem_len": 5, "tgt_len": 4,
    }  # fmt: skip
    return seeded(TransformerXL(TransformerXLConfig(**values | settings)), dtype)


def hourglass(dtype: torch.dtype = torch.float64, **settings: Any) -> Hourglass:
    """An Hourglass of one block a stack; `settings` override its configuration."""
    values = {
        "vocab_size": VOCAB, "d_model": 8, "d_ff": 12, "n_head": 2, "hierarchy": "1@1 1@3 1@1", "context": CONTEXT,
    }  # fmt: skip
    return seeded(Hourglass(HourglassConfig(**values | settings)), dtype)


def seeded(model: Model, dtype: torch.dtype = torch.float64, seed: int = 0) -> Model:
    """The model in eval mode with weights of std 0.3, which depend on `seed` and hardly on `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        values = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        gain = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.copy_(values + gain)
    return model


@cache
def model(name: str, dtype: torch.dtype = torch.float64) -> ReferenceModel:
    """The model of a name in TRANSFORMER_XL or HOURGLASS; shared, so leave it unchanged."""
    if name in TRANSFORMER_XL:
        return transformer_xl(dtype, **TRANSFORMER_XL[name])
    return hourglass(dtype, **HOURGLASS[name])


def tokens(batch: int, length: int, seed: int = 0) -> Array:
    """Random token ids (batch, length)."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


def full(model: ReferenceModel, tokens: Array) -> Array:
    """The model's own forward: logits (batch, length, vocab)."""
    with torch.inference_mode():
        return model.full(torch.from_numpy(np.ascontiguousarray(tokens))).numpy()


def stream(session: Session, tokens: Array, chunks: Iterable[int]) -> Array:
    """Feed `tokens` (batch, length) in chunks, which must add up to length; the logits of all of them."""
    cuts = np.cumsum(list(chunks))
    assert cuts[-1] == tokens.shape[1]
    return np.concatenate([session.step(part) for part in np.split(tokens, cuts[:-1], axis=1)], axis=1)


@cache
def build(
    model: ReferenceModel, max_batch: int = 3, max_chunk: int = 8, context: int | None = None
) -> program.StreamProgram:
    """The stream program of a model, built once."""
    return program.build(model, Profile(1, max_batch, max_chunk), context)


def foreign(model: nn.Module, settings: Settings, prefix: str = "") -> Foreign:
    """What a file with a module's state dict and its settings is read as."""
    tensors = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    return Foreign(Path("model.pt"), tensors, settings)


def adopted(result: Converted) -> ReferenceModel:
    """Our model, in double precision, of what was converted."""
    row = families.find(result.family)
    ours = row.model(row.parse_config(dict(result.config))).to(torch.float64).eval().requires_grad_(False)
    ours.load_state_dict(dict(result.tensors))
    return ours


def eager_session(
    model: ReferenceModel, batch: int = 1, max_chunk: int = 8, context: int | None = None
) -> StreamSession:
    """A session that runs the model's streaming form in PyTorch."""
    built = build(model, max(batch, 3), max_chunk, context)
    return StreamSession(built.spec, program.EagerExecutor(built), batch, model.sources)


def worst(left: Array, right: Array) -> float:
    """Largest absolute difference; infinite where either is not finite."""
    assert left.shape == right.shape, f"{left.shape} is not {right.shape}"
    difference = np.abs(left.astype(np.float64) - right)
    return float(np.where(np.isfinite(difference), difference, np.inf).max(initial=0.0))


def remembered(model: ReferenceModel, tokens: Array, chunks: Iterable[int]) -> dict[str, Array]:
    """All states and cursors of a new stream after `tokens` in chunks, as float64."""
    session = eager_session(model, tokens.shape[0], max_chunk=16)
    stream(session, tokens, chunks)
    snapshot = session.state()
    cursors = {f"cursor of {name}": cursor for name, cursor in snapshot.cursors.items()}
    return {name: value.astype(np.float64) for name, value in (dict(snapshot.states) | cursors).items()}


def edited(snapshot: Snapshot, states: Mapping[str, Array]) -> Snapshot:
    """The snapshot with some states replaced."""
    assert set(states) <= set(snapshot.states)
    return Snapshot(snapshot.position, {**snapshot.states, **states}, snapshot.cursors)


def spoiled(snapshot: Snapshot, name: str, axis: int, kept: Sequence[range], garbage: float = 1e6) -> Snapshot:
    """The snapshot with garbage in a state, except in the rows `kept[b]` of batch row b along `axis`."""
    old = np.moveaxis(snapshot.states[name], axis, 1)  # (batch, rows, ...)
    new = garbage * np.random.default_rng(0).choice((-1.0, 1.0), old.shape).astype(old.dtype)
    for row, rows in enumerate(kept):
        new[row, list(rows)] = old[row, list(rows)]
    return edited(snapshot, {name: np.ascontiguousarray(np.moveaxis(new, 1, axis))})


def permuted(snapshot: Snapshot, order: Sequence[int]) -> Snapshot:
    """The snapshot with its batch rows in another order."""
    rows = list(order)
    states = {name: value[rows] for name, value in snapshot.states.items()}
    cursors = {name: value[rows] for name, value in snapshot.cursors.items()}
    return Snapshot(snapshot.position[rows], states, cursors)


class Rollout:
    """Streams with resets, snapshots and swapped rows in between; each is compared with its own full forward."""

    def __init__(self, model: ReferenceModel, session: StreamSession, seed: int = 0) -> None:
        self.model, self.session = model, session
        self.random = np.random.default_rng(seed)
        empty = np.zeros((0, session.spec.vocab_size))
        self._fresh = lambda: (np.zeros(0, dtype=np.int64), empty)
        self.rows = [self._fresh() for _ in range(session.batch)]  # tokens and logits since the row's reset
        self.ended: list[tuple[Array, Array]] = []
        self._saved: tuple[Snapshot, list[tuple[Array, Array]]] | None = None

    def step(self, count: int) -> None:
        """Feed `count` random tokens, fewer where the context ends."""
        limit = self.session.spec.max_context
        if limit is not None:
            count = min(count, limit - int(self.session.position.max()))
        if count < 1:
            self.reset(range(len(self.rows)))
            return
        tokens = self.random.integers(0, self.session.spec.vocab_size, (len(self.rows), count))
        logits = self.session.step(tokens)
        self.rows = [
            (np.concatenate([seen, new]), np.concatenate([before, after]))
            for (seen, before), new, after in zip(self.rows, tokens, logits, strict=True)
        ]
        assert self.session.position.tolist() == [len(seen) for seen, _ in self.rows]

    def reset(self, rows: Iterable[int]) -> None:
        chosen = [row for row in rows if row < len(self.rows)]
        self.session.reset(chosen)
        for row in chosen:
            self.ended.append(self.rows[row])
            self.rows[row] = self._fresh()

    def save(self) -> None:
        self._saved = (self.session.state(), list(self.rows))

    def back(self) -> None:
        """Go back to what was saved; what happened since counts as streams of its own."""
        if self._saved is not None:
            self.ended += self.rows
            snapshot, rows = self._saved
            self.session.restore(snapshot)
            self.rows = list(rows)

    def swap(self) -> None:
        """Rotate the batch rows by one."""
        order = [*range(1, len(self.rows)), 0]
        self.session.restore(permuted(self.session.state(), order))
        self.rows = [self.rows[row] for row in order]

    def run(self, actions: Iterable[tuple[Any, ...]]) -> float:
        """Do (name, *arguments) one after the other; the largest error of all streams."""
        for name, *arguments in actions:
            getattr(self, name)(*arguments)
        return self.error()

    def error(self) -> float:
        streams = [(seen, logits) for seen, logits in [*self.ended, *self.rows] if len(seen)]
        return max((worst(logits, full(self.model, seen[None])[0]) for seen, logits in streams), default=0.0)


def check_rollout(model: ReferenceModel, plan: tuple[int, int, list[tuple[Any, ...]]]) -> None:
    """A plan drawn from `plans()`, run on `model`, stays within the tolerance of the model's dtype."""
    batch, max_chunk, actions = plan
    error = Rollout(model, eager_session(model, batch, max_chunk)).run(actions)
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    assert error <= tolerance, f"the stream is {error:.2g} away from the full forward, more than {tolerance:g}"


_ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 11)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("reset"), st.sets(st.integers(0, 2), min_size=1).map(sorted)),
    st.tuples(st.sampled_from(("save", "back", "swap"))),
)


def plans(max_actions: int = 7) -> st.SearchStrategy[tuple[int, int, list[tuple[Any, ...]]]]:
    """(batch, max_chunk, actions) for `check_rollout`: chunks of any length, resets of any rows at any position."""
    actions = st.lists(_ACTIONS, max_size=max_actions)
    begun = st.builds(
        lambda first, middle, last: [("step", first), *middle, ("step", last)],
        st.integers(1, 11), actions, st.integers(1, 11),
    )  # fmt: skip
    return st.tuples(st.integers(1, 3), st.sampled_from((1, 4, 8, 16)), begun)
