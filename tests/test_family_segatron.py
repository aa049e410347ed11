"""Segatron-XL: exact distances written down pair by pair, why the released ones look ahead, and its streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cases import TOLERANCE, build, eager_session, edited, full, seeded, stream, worst
from torch import Tensor

from mscompile import checkpoint
from mscompile.contracts import Array, Tick
from mscompile.errors import ConfigError
from mscompile.models.segatron import Boundaries, Segatron, SegatronConfig

FAMILY = "segatron-xl"
EXACT = TOLERANCE[torch.float64]
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 4,
    "tgt_len": 4, "sentence_end": (2, 3), "paragraph_end": (4,),
}  # fmt: skip

NOT_CAUSAL = (
    "exact_relative=False, the distances of the released code, cannot be streamed: within a segment, sentence and "
    "paragraph distances are measured from its last token, so that logits depend on later tokens; "
    "use exact_relative=True"
)


def tokens(length: int, seed: int = 0) -> Array:
    """Token ids (1, length), many of which end something."""
    return np.random.default_rng(seed).integers(0, 7, (1, length))


def made(**settings: Any) -> Segatron:
    return seeded(Segatron(SegatronConfig(**{**SIZES, **settings})))


def places(ids: Array, ends: set[int]) -> list[int]:
    """The number of the sentence or paragraph that each token stands in: a run of ends belongs to what it ends."""
    numbers, number = [], 0
    for before, token in zip([None, *ids[:-1]], ids, strict=True):
        if before in ends and token not in ends:
            number += 1
        numbers.append(number)
    return numbers


def sinusoid(distance: int, width: int) -> Array:
    angle = distance / 10000 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)])


def oracle(reference: Any, ids: Array) -> Array:
    """Logits (T, V), token by token over all that came before: no segments, no memory, no chunks."""
    c, weights = reference.config, {name: value.numpy() for name, value in reference.state_dict().items()}
    third = int(np.ceil(c.d_model // 3 / 2)) * 2
    indices = [range(len(ids)), places(ids, {*c.sentence_end, *c.paragraph_end}), places(ids, {*c.paragraph_end})]
    widths, limit = [third, third, c.d_model - 2 * third], c.clamp_len or len(ids)
    h = weights["embedding.weight"][ids] * np.sqrt(c.d_model)
    for number in range(c.n_layer):
        w = {name.partition(f"layers.{number}.")[2]: value for name, value in weights.items()}
        x = norm(h, w, "attention_norm") if c.pre_norm else h
        rows = []
        for i in range(len(ids)):
            first = i - c.mem_len + 1 if c.same_length else i - i % c.tgt_len - c.mem_len
            heads = []
            for head in range(c.n_head):
                part = slice(head * c.d_head, (head + 1) * c.d_head)
                q, u, v = (
                    w["attention.query.weight"][part] @ x[i],
                    weights["content_bias"][head],
                    weights["position_bias"][head],
                )
                scores, values = [], []
                for j in range(max(first, 0), i + 1):
                    encoded = [
                        sinusoid(min(index[i] - index[j], limit), width)
                        for index, width in zip(indices, widths, strict=True)
                    ]
                    position = w["attention.position.weight"][part] @ np.concatenate(encoded)
                    scores.append((q + u) @ (w["attention.key.weight"][part] @ x[j]) + (q + v) @ position)
                    values.append(w["attention.value.weight"][part] @ x[j])
                weight = np.exp(np.array(scores) / np.sqrt(c.d_head))
                heads.append((weight / weight.sum()) @ np.array(values))
            rows.append(w["attention.output.weight"] @ np.concatenate(heads))
        h = finish(c, w, h, np.stack(rows))
    return h @ weights["embedding.weight" if c.tie_embedding else "head_weight"].T + weights["head_bias"]


def norm(x: Array, weights: dict[str, Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def finish(c: Any, w: dict[str, Array], h: Array, attended: Array) -> Array:
    def feed_forward(y: Array) -> Array:
        inner = np.maximum(y @ w["feed_forward.0.weight"].T + w["feed_forward.0.bias"], 0)
        return inner @ w["feed_forward.3.weight"].T + w["feed_forward.3.bias"]

    y = h + attended
    if c.pre_norm:
        return y + feed_forward(norm(y, w, "feed_forward_norm"))
    y = norm(y, w, "attention_norm")
    return norm(y + feed_forward(y), w, "feed_forward_norm")


def released(reference: Segatron, ids: Array) -> Tensor:
    """Logits (T, V) of one segment without memory, with the distances of the released code: max - x_j, row-shifted."""
    length, attention = ids.shape[1], reference.layers[0].attention
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    found, _ = reference.boundaries(torch.from_numpy(ids), zeros, zeros)
    indices = torch.cat([torch.arange(length)[:, None], found[0]], dim=1)  # (S, 3)
    backwards = indices.max(dim=0).values - indices
    tables = attention.encode(torch.arange(length)).unflatten(0, (3, length))  # (3, D, d)
    encoded = sum(tables[kind, backwards[:, kind]] for kind in range(3))
    h = reference.embed(torch.from_numpy(ids))
    query, key, value = (attention.heads(f(h))[0] for f in (attention.query, attention.key, attention.value))
    biases = reference.biases
    assert biases is not None
    by_position = (query + biases.position[:, None]) @ attention.table(encoded)  # (H, T, S)
    padded = torch.cat([by_position.new_zeros(*by_position.shape[:2], 1), by_position], dim=2)
    shifted = padded.reshape(len(padded), length + 1, length)[:, 1:].reshape(by_position.shape)
    scores = ((query + biases.content[:, None]) @ key.transpose(1, 2) + shifted) / attention.d_head**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    attended = attention.merge((scores.masked_fill(future, -torch.inf).softmax(-1) @ value)[None])
    return reference.head(reference.layers[0].combine(h, attended))[0]


@pytest.mark.parametrize("variant", tiny.TINY[FAMILY])
def test_full_is_attention_with_exact_distances(variant: str) -> None:
    reference = tiny.model(FAMILY, variant)
    for seed in range(2):
        ids = tokens(17, seed)
        assert {2, 3, 4} <= set(ids[0])
        assert worst(full(reference, ids)[0], oracle(reference, ids[0])) <= EXACT


def test_distances_as_released_look_ahead() -> None:
    """A sentence that ends later in the segment changes what came before; with exact distances it does not."""
    reference = made(n_layer=1, tgt_len=6)
    calm, ended = np.array([[0, 2, 5, 1, 7, 8]]), np.array([[0, 2, 5, 1, 4, 8]])  # they differ at position 4
    before = slice(0, 4)
    with torch.inference_mode():
        ahead = (released(reference, calm)[before] - released(reference, ended)[before]).abs().amax(dim=-1)
    assert (ahead[1:] > 1e-4).all(), "tokens 1 to 3 have seen the boundary behind token 4"
    assert worst(full(reference, calm)[:, before], full(reference, ended)[:, before]) <= EXACT


def test_distances_as_released_are_exact_for_the_last_token_and_without_boundaries() -> None:
    """What is above is the released formula: it differs from the exact one only as it should."""
    reference, ids = made(n_layer=1, tgt_len=6), np.array([[0, 2, 5, 1, 4, 8]])
    with torch.inference_mode():
        got, want = released(reference, ids).numpy(), full(reference, ids)[0]
        assert worst(got[-1], want[-1]) <= EXACT
        assert np.abs(got[2:5] - want[2:5]).max(axis=-1).min() > 1e-4
        plain = made(n_layer=1, tgt_len=6, sentence_end=(), paragraph_end=())
        assert worst(released(plain, ids).numpy(), full(plain, ids)[0]) <= EXACT


@pytest.mark.parametrize(
    ("ids", "sentences", "paragraphs"),
    [
        ([0, 2, 1, 3, 5], [0, 0, 1, 1, 2], [0, 0, 0, 0, 0]),
        ([0, 2, 4, 1], [0, 0, 0, 1], [0, 0, 0, 1]),  # ". <eos>" ends one sentence and one paragraph
        ([4, 4, 4, 0], [0, 0, 0, 1], [0, 0, 0, 1]),
        ([4, 2, 4, 0], [0, 0, 0, 1], [0, 1, 1, 2]),
    ],
)
def test_tokens_end_sentences_and_paragraphs(ids: list[int], sentences: list[int], paragraphs: list[int]) -> None:
    boundaries = Boundaries(SegatronConfig(**SIZES))
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    found, _ = boundaries(torch.tensor([ids]), zeros, zeros)
    assert found[0].T.tolist() == [sentences, paragraphs]
    place = ended = zeros
    for token, want in zip(ids, zip(sentences, paragraphs, strict=True), strict=True):  # the same, one by one
        one, ends = boundaries(torch.tensor([[token]]), place, ended)
        place, ended = one[:, -1], ends[:, -1]
        assert place[0].tolist() == list(want)


def test_places_matter() -> None:
    ids = np.array([[9, 7, 4, 2, 3, 0, 5, 2, 1, 4, 8, 6]])
    plain = full(made(sentence_end=(), paragraph_end=()), ids)
    assert worst(full(made(paragraph_end=()), ids), plain) > 1e-3
    assert worst(full(made(), ids), full(made(paragraph_end=(), sentence_end=(2, 3, 4)), ids)) > 1e-3


@pytest.mark.parametrize(("same_length", "rows"), [(True, 3), (False, 7)])
def test_states_are_rings_and_no_graph_closes_a_segment(same_length: bool, rows: int) -> None:
    program = build(made(same_length=same_length, n_layer=1), max_chunk=16)
    assert [(state.name, state.dtype, state.shape, state.update) for state in program.spec.states] == [
        ("ended", "int64", ("batch", 2), "replace"),
        ("layer00.key", "float64", ("batch", 2, rows, 3), "append"),
        ("layer00.value", "float64", ("batch", 2, rows, 3), "append"),
        ("place", "int64", ("batch", 2), "replace"),
        ("places", "int64", ("batch", rows, 2), "append"),
    ]
    assert program.spec.schedule.ticks == (Tick(("decode",)),)
    assert program.spec.schedule.max_chunk == 16
    assert [hit.name for hit in program.hits] == ["segatron-ring", "segatron-xl"]


def test_places_that_were_never_written_do_not_matter() -> None:
    reference, ids = made(), tokens(10)
    session = eager_session(reference)
    session.step(ids[:, :3])
    snapshot = session.state()
    garbage = snapshot.states["places"].copy()
    garbage[:, 3:] = np.iinfo(np.int64).max // 2
    session.restore(edited(snapshot, {"places": garbage}))
    assert worst(stream(session, ids[:, 3:], [1, 6]), full(reference, ids)[:, 3:]) <= EXACT


def test_what_transformer_xl_can_do_it_can() -> None:
    """Adaptive embedding and softmax, and biases of its own in every layer."""
    settings = {"cutoffs": (4, 7), "div_val": 2, "d_embed": 8, "untie_biases": True, "same_length": True}
    reference, ids = made(**settings), tokens(12)
    assert worst(stream(eager_session(reference), ids, [1, 5, 1, 5]), full(reference, ids)) <= EXACT


def test_a_checkpoint_holds_no_boundaries(tmp_path: Path) -> None:
    reference = tiny.model(FAMILY, "same-length", torch.float32)
    checkpoint.save(tmp_path / "a.pt", FAMILY, reference, [str(token) for token in range(tiny.VOCAB)])
    loaded, ids = checkpoint.load(tmp_path / "a.pt").model, tokens(9)
    assert worst(full(loaded, ids), full(reference, ids)) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exact_relative": False}, NOT_CAUSAL),
        ({"sentence_end": [11]}, "sentence_end must be a list of token ids from 0 to 10, not [11]"),
        ({"paragraph_end": 4}, "paragraph_end must be a list of token ids from 0 to 10, not 4"),
        ({"d_model": 4}, "d_model must be at least 6 for three sinusoids, not 4"),
        ({"exact_relative": "yes"}, "exact_relative must be true or false, not 'yes'"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SegatronConfig(**{**SIZES, **settings})
    assert str(refused.value) == message
