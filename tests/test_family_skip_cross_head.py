"""Skip Cross-Head Transformer-XL: the released forward written down slot by slot, its quirks, and its streams."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import tiny
import torch
from cases import TOLERANCE, build, eager_session, edited, full, seeded, transformer_xl, worst

from mscompile import checkpoint
from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.skip_cross_head import SkipCrossHead, SkipCrossHeadConfig
from mscompile.pipeline import compile_checkpoint

FAMILY = "skip-cross-head"
VARIANTS = tuple(tiny.TINY[FAMILY])
EXACT = TOLERANCE[torch.float64]
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "mem_len": 5,
    "tgt_len": 4,
}  # fmt: skip


def tokens(length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, tiny.VOCAB, (1, length))


def made(**settings: Any) -> SkipCrossHead:
    return seeded(SkipCrossHead(SkipCrossHeadConfig(**{**SIZES, **settings})))


def norm(x: Array, weights: dict[str, Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def sinusoid(distance: int, width: int) -> Array:
    angle = distance / 10000 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)])


def oracle(reference: Any, ids: Array) -> Array:
    """Logits (T, V): every layer, query, head and slot of [mems ; segment] in turn, with segments of `tgt_len`."""
    c = reference.config
    weights = {name: value.numpy() for name, value in reference.state_dict().items()}
    memory, filled, logits = [np.zeros((c.mem_len, c.d_model))] * c.n_layer, 0, []
    for begin in range(0, len(ids), c.tgt_len):
        h = weights["embedding.weight"][ids[begin : begin + c.tgt_len]]
        for number in range(c.n_layer):
            w = {
                name.removeprefix(f"layers.{number}."): value
                for name, value in weights.items()
                if name.startswith(f"layers.{number}.")
            }
            x = norm(h, w, "attention_norm") if c.pre_norm else h
            remembered = memory[number]
            if c.pre_norm and not c.normed_residual:
                remembered = norm(remembered, w, "attention_norm")
            rows = np.concatenate([remembered, x])
            attended = np.stack([attention(c, w, weights, rows, c.mem_len + i, filled) for i in range(len(h))])
            memory[number] = np.concatenate([memory[number], h])[-c.mem_len :]
            h = finish(c, w, h, x, attended)
        filled = min(filled + c.tgt_len, c.mem_len)
        logits.append(h @ weights["head_weight"].T + weights["head_bias"])
    return np.concatenate(logits)


def attention(c: Any, w: dict[str, Array], model: dict[str, Array], rows: Array, query: int, filled: int) -> Array:
    """What slot `query` of [mems ; segment] attends to, (d_model,)."""
    heads = []
    for head in range(c.n_head):
        part = slice(head * c.d_head, (head + 1) * c.d_head)
        q = w["attention.query.weight"][part] @ rows[query]
        scores, values = [], []
        for slot in range(query + 1):
            if (c.same_length and slot <= query - c.mem_len) or (not c.attend_empty and slot < c.mem_len - filled):
                continue
            distance = query - slot if c.rel_shift == "txl" else c.mem_len + c.tgt_len - 1 - slot
            if c.clamp_len is not None:
                distance = min(distance, c.clamp_len)
            position = w["attention.position.weight"][part] @ sinusoid(distance, c.d_model)
            key = w["attention.key.weight"][part] @ rows[slot]
            scores.append((q + model["content_bias"][head]) @ key + (q + model["position_bias"][head]) @ position)
            values.append(w["attention.value.weight"][part] @ rows[slot])
        weight = np.exp(np.array(scores) / np.sqrt(c.d_head))
        heads.append((weight / weight.sum()) @ np.array(values))
    return w["attention.output.weight"] @ np.concatenate(heads)


def finish(c: Any, w: dict[str, Array], h: Array, x: Array, attended: Array) -> Array:
    def feed_forward(y: Array) -> Array:
        inner = np.maximum(y @ w["feed_forward.0.weight"].T + w["feed_forward.0.bias"], 0)
        return inner @ w["feed_forward.3.weight"].T + w["feed_forward.3.bias"]

    if not c.pre_norm:
        y = norm(h + attended, w, "attention_norm")
        return norm(y + feed_forward(y), w, "feed_forward_norm")
    y = (x if c.normed_residual else h) + attended
    normed = norm(y, w, "feed_forward_norm")
    return (normed if c.normed_residual else y) + feed_forward(normed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_is_the_released_forward(variant: str) -> None:
    reference, ids = tiny.model(FAMILY, variant), tokens(14)
    assert worst(full(reference, ids)[0], oracle(reference, ids[0])) <= EXACT


def test_without_the_shift_only_the_last_token_of_a_segment_has_true_distances() -> None:
    ids = tokens(4)
    released, shifted = (full(made(rel_shift=shift), ids)[0] for shift in ("none", "txl"))
    assert worst(released[3], shifted[3]) <= EXACT
    assert worst(released[2], shifted[2]) > 1e-3


def test_a_short_last_segment_is_the_beginning_of_a_whole_one() -> None:
    reference, ids = made(tgt_len=6), tokens(12)
    assert worst(full(reference, ids[:, :8]), full(reference, ids)[:, :8]) <= EXACT


def test_zeros_count_until_memory_is_full() -> None:
    """One layer, window of 5: from token 4 on, no zeros are in sight."""
    ids = tokens(12)
    attended, masked = (full(made(rel_shift="txl", attend_empty=empty), ids)[0] for empty in (True, False))
    assert min(np.abs(attended[:4] - masked[:4]).max(axis=-1)) > 1e-4
    assert worst(attended[4:], masked[4:]) <= EXACT


@pytest.mark.parametrize("same_length", [True, False])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_without_quirks_it_is_transformer_xl(same_length: bool, pre_norm: bool) -> None:
    shared = {"n_layer": 2, "same_length": same_length, "pre_norm": pre_norm, "tie_embedding": False, "d_head": 4}
    plain = transformer_xl(**shared)
    model = made(**shared, rel_shift="txl", attend_empty=False, normed_residual=False)
    model.load_state_dict(plain.state_dict())
    model.embedding.weight.mul_(np.sqrt(8))
    ids = tokens(11)
    assert worst(full(model, ids), full(plain, ids)) <= EXACT


def test_what_rolls_and_what_is_frozen() -> None:
    rolling = build(tiny.model(FAMILY, "rolling"))
    assert [hit.name for hit in rolling.hits] == ["rolling-memory", "rolling-memory", "skip-cross-head"]
    assert [(state.name, state.shape, state.update) for state in rolling.spec.states] == [
        ("layer00.mems", ("batch", 4, 8), "replace"),
        ("layer01.mems", ("batch", 4, 8), "replace"),
    ]
    assert rolling.spec.schedule == Schedule((Tick(("decode",)),), "prefill", 1, 8)
    frozen = build(tiny.model(FAMILY, "released"))
    assert [hit.name for hit in frozen.hits] == ["segment-memory", "segment-memory", "skip-cross-head-segments"]
    assert [(state.name, state.shape, state.update) for state in frozen.spec.states][:2] == [
        ("layer00.mems", ("batch", 5, 8), "replace"),
        ("layer00.segment", ("batch", 4, 8), "append"),
    ]
    assert frozen.spec.schedule.ticks == (Tick(("decode",), repeat=3), Tick(("decode",), closing=("close",)))
    assert build(tiny.model(FAMILY, "released-shifted")).spec.schedule.period == 3, "rows change where segments end"


@pytest.mark.parametrize(("variant", "seen"), [("rolling", True), ("released", True), ("as-trained", False)])
def test_memory_that_was_never_filled_is_seen_where_it_is_attended_to(variant: str, seen: bool) -> None:
    ids = tokens(1)
    session = eager_session(tiny.model(FAMILY, variant))
    want, start = session.step(ids), eager_session(tiny.model(FAMILY, variant)).state()
    mems = {name: np.ones_like(value) for name, value in start.states.items() if name.endswith("mems")}
    session.restore(edited(start, mems))
    assert (worst(session.step(ids), want) > 1e-3) == seen


def test_evaluation_needs_no_other_weights() -> None:
    """Trained without same_length, evaluated with it, a longer memory and shorter segments."""
    trained = made(same_length=False)
    evaluated = SkipCrossHead(replace(trained.config, same_length=True, mem_len=9, tgt_len=2, clamp_len=6)).double()
    evaluated.load_state_dict(trained.state_dict())
    ids = tokens(9)
    assert worst(full(evaluated.eval(), ids)[0], oracle(evaluated, ids[0])) <= EXACT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rel_shift": "left"}, "rel_shift must be one of ('txl', 'none'), not 'left'"),
        ({"attend_empty": 1}, "attend_empty must be true or false, not 1"),
        ({"normed_residual": "no"}, "normed_residual must be true or false, not 'no'"),
        ({"mem_len": 1}, "same_length needs mem_len of at least 2, not 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SkipCrossHeadConfig(**{**SIZES, **settings})
    assert str(refused.value) == message


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["released-pre-norm", "rolling-pre-norm"])
def test_passes_keep_rows_that_change_when_they_become_memory(variant: str, tmp_path: Path) -> None:
    source, size = tmp_path / "tiny.pt", len(bundles.VOCAB)
    checkpoint.save(source, FAMILY, tiny.model(FAMILY, variant, torch.float32, size), bundles.VOCAB)
    manifest = compile_checkpoint(source, ["ort"], tmp_path / "tiny.msc", bundles.options()).manifest
    assert (manifest.parity or {})["ort"]["failures"] == []
    rings = [state for state in manifest.spec.states if state.update == "append"]
    assert {state.reads_initial for state in rings} == {variant == "rolling-pre-norm"}, "these zeros are attended to"
