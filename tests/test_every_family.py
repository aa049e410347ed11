"""What holds for every family: causality, prefixes, any chunking, memory that was never written, built engines."""

from __future__ import annotations

from pathlib import Path

import bundles
import numpy as np
import pytest
import tiny
import torch
from cases import TOLERANCE, check_rollout, eager_session, full, plans, spoiled, stream, worst
from hypothesis import given

from engines import registry
from mscompile import checkpoint
from mscompile.models.families import FAMILIES
from mscompile.pipeline import compile_checkpoint
from mscompile.verification import verify_against

each = pytest.mark.parametrize(("family", "variant"), tiny.VARIANTS, ids=["-".join(names) for names in tiny.VARIANTS])
EXACT = TOLERANCE[torch.float64]
LENGTH = 19


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tiny.VOCAB, (batch, length))


def test_every_family_has_a_tiny_model_by_which_it_is_verified() -> None:
    assert set(tiny.TINY) == {family.name for family in FAMILIES if family.status == "verified"}
    assert {family.status for family in FAMILIES} == {"verified"}


@each
def test_a_token_changes_its_own_logits_and_none_before(family: str, variant: str) -> None:
    reference, ids = tiny.model(family, variant), tokens(1, LENGTH)
    base = full(reference, ids)
    for position in range(LENGTH):
        changed = ids.copy()
        changed[0, position] = (changed[0, position] + 1) % tiny.VOCAB
        difference = np.abs(full(reference, changed) - base)[0].max(axis=-1)  # (time,)
        assert difference[:position].max(initial=0.0) <= 1e-12, f"token {position} is seen too early"
        assert difference[position] > 1e-5, f"token {position} does not change its own logits"


@each
def test_a_longer_stream_begins_like_a_shorter_one(family: str, variant: str) -> None:
    reference, ids = tiny.model(family, variant), tokens(2, LENGTH)
    whole = full(reference, ids)
    for length in (1, 2, 5, 8, 13):
        assert worst(full(reference, ids[:, :length]), whole[:, :length]) <= EXACT


@each
@given(plan=plans())
def test_any_chunking_equals_the_full_forward(
    family: str, variant: str, plan: tuple[int, int, list[tuple[object, ...]]]
) -> None:
    check_rollout(tiny.model(family, variant), plan)


@each
def test_slots_that_were_never_written_do_not_matter(family: str, variant: str) -> None:
    reference, ids = tiny.model(family, variant), tokens(1, LENGTH)
    want = full(reference, ids)
    for before in (0, 1, 4, 7):
        session = eager_session(reference)
        if before:
            session.step(ids[:, :before])
        snapshot = session.state()
        for state in session.spec.states:
            if state.update == "append" and state.time_axis is not None and np.dtype(state.dtype).kind == "f":
                written = min(int(snapshot.cursors[state.name][0]), snapshot.states[state.name].shape[state.time_axis])
                snapshot = spoiled(snapshot, state.name, state.time_axis, [range(written)])
        session.restore(snapshot)
        rest = ids[:, before:]
        assert worst(stream(session, rest, [1] * (rest.shape[1] // 2) + [rest.shape[1] - rest.shape[1] // 2]),
                     want[:, before:]) <= EXACT  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.TINY)
def test_engines_of_every_family_are_verified(family: str, tmp_path: Path) -> None:
    """ONNX Runtime rolled out against the original; TensorRT for RTX built, and run where there is a device."""
    source, size = tmp_path / "tiny.pt", len(bundles.VOCAB)
    variant = next(iter(tiny.TINY[family]))
    checkpoint.save(source, family, tiny.model(family, variant, torch.float32, size), bundles.VOCAB)
    targets = ["ort", *(["trt-rtx"] if registry.find("trt-rtx").cannot_build() is None else [])]
    bundle = compile_checkpoint(source, targets, tmp_path / "tiny.msc", bundles.options(validate=False))
    assert set(bundle.manifest.engines) == set(targets)
    report = verify_against(bundle, "ort", source, steps=bundles.STEPS)  # as an export does in a process of its own
    assert report.failures == ()
    assert bundle.verify("ort").failures == ()
