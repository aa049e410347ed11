"""Reference models against slow oracles written from the published equations, and the causality of both families."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cases import HOURGLASS, KINDS, NESTED, TRANSFORMER_XL, VOCAB, full, hourglass, model, tokens, transformer_xl, worst
from torch import Tensor

from mscompile.errors import CheckpointError, ConfigError
from mscompile.models import families
from mscompile.models import hourglass as hourglass_module
from mscompile.models import transformer_xl as transformer_xl_module
from mscompile.models.hourglass import parse_hierarchy
from mscompile.models.scale import Scale

EXACT = 1e-10
EPSILON = {"transformer-xl": 1e-5, "hourglass": 1e-6}  # of LayerNorm: torch's default, and Trax's
Weights = Mapping[str, Tensor]


def layer_norm(x: Tensor, weights: Weights, name: str, epsilon: float = EPSILON["transformer-xl"]) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def dense(x: Tensor, weights: Weights, name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return out if bias is None else out + bias


def encode(distance: Tensor, width: int) -> Tensor:
    """[sin | cos] of distance * 10000^(-2i / width)."""
    frequency = torch.tensor([10000 ** (-i / width) for i in range(0, width, 2)], dtype=torch.float64)
    angle = torch.outer(distance.double(), frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


# Properties of both families


@pytest.mark.parametrize("name", [*TRANSFORMER_XL, *HOURGLASS])
def test_a_token_changes_its_own_logits_and_none_before(name: str) -> None:
    reference, ids = model(name), tokens(1, 13)
    base = full(reference, ids)
    for position in range(ids.shape[1]):
        changed = ids.copy()
        changed[0, position] = (changed[0, position] + 1) % VOCAB
        difference = np.abs(full(reference, changed) - base)[0].max(axis=-1)  # (time,)
        assert difference[:position].max(initial=0.0) <= 1e-12, f"token {position} is seen too early"
        assert difference[position] > 1e-4, f"token {position} does not change its own logits"


@pytest.mark.parametrize("name", [*TRANSFORMER_XL, *HOURGLASS])
def test_every_prefix_has_the_logits_of_the_whole(name: str) -> None:
    reference, ids = model(name), tokens(2, 13)
    whole = full(reference, ids)
    for length in range(1, ids.shape[1]):
        assert worst(full(reference, ids[:, :length]), whole[:, :length]) <= 1e-12


@pytest.mark.parametrize("name", [*TRANSFORMER_XL, *HOURGLASS])
def test_batch_rows_do_not_influence_each_other(name: str) -> None:
    reference, ids = model(name), tokens(3, 11)
    together = full(reference, ids)
    for row in range(3):
        assert worst(full(reference, ids[row : row + 1]), together[row : row + 1]) <= 1e-12
    order = [2, 0, 1]
    assert worst(full(reference, ids[order]), together[order]) <= 1e-12


@pytest.mark.parametrize("name", [*TRANSFORMER_XL, "attention+attention"])
def test_going_on_in_any_chunks_equals_the_full_forward(name: str) -> None:
    reference, ids = model(name), torch.from_numpy(tokens(3, 16))
    carry, parts = None, []
    for part in ids.split((3, 1, 1, 6, 2, 3), dim=1):
        logits, carry = reference.advance(part, carry)
        parts.append(logits)
    wanted = full(reference, ids.numpy())
    assert worst(torch.cat(parts, dim=1).numpy(), wanted) <= EXACT
    more = torch.from_numpy(tokens(2, 5, seed=1))
    chosen = [2, 0]
    logits, _ = reference.advance(more, reference.select(carry, chosen))
    wanted = full(reference, torch.cat([ids[chosen], more], dim=1).numpy())[:, -5:]
    assert worst(logits.numpy(), wanted) <= EXACT


@pytest.mark.parametrize("name", [*TRANSFORMER_XL, *HOURGLASS])
def test_every_weight_matters(name: str) -> None:
    """A weight that does not reach the logits would let any test of it pass."""
    build = transformer_xl if name in TRANSFORMER_XL else hourglass
    reference: Any = build(**(TRANSFORMER_XL | HOURGLASS)[name])
    ids = torch.from_numpy(tokens(1, 13))
    reference.requires_grad_(True)
    reference.full(ids).square().sum().backward()
    dead = [name for name, weight in reference.named_parameters() if weight.grad is None or not weight.grad.any()]
    silent = [weight for weight in dead if not _invariant(weight)]
    assert not silent, f"the logits do not depend on {silent}"


def _invariant(weight: str) -> bool:
    """Adding a constant to every key or position score leaves a softmax as it is, so key biases may be silent."""
    return weight.endswith(("attention.key.bias", "attention.position.bias"))


# Transformer-XL


def shifted(x: Tensor) -> Tensor:
    """The published relative shift: pad a column, fold it into rows, drop the first row. x (T, S, B, H)."""
    queries, keys, *rest = x.shape
    padded = torch.cat([x.new_zeros(queries, 1, *rest), x], dim=1)
    return padded.reshape(keys + 1, queries, *rest)[1:].reshape(queries, keys, *rest)


def published_mask(queries: int, remembered: int, mem_len: int, same_length: bool) -> Tensor:
    """True where a key is hidden, (T, remembered + T), as the authors' code builds it."""
    keys = queries + remembered
    ones = torch.ones(queries, keys, dtype=torch.bool)
    hidden = ones.triu(1 + remembered)
    if same_length:
        too_many = keys - mem_len
        hidden = hidden | ones.tril(-(queries - too_many if too_many > 0 else queries))
    return hidden


class TransformerXLOracle:
    """One segment after the other in the authors' layout (time, batch, width)."""

    def __init__(self, reference: Any) -> None:
        self.config, self.weights = reference.config, dict(reference.state_dict())
        self.mems = [torch.zeros(0, 1, self.config.d_model, dtype=torch.float64)] * (self.config.n_layer + 1)

    def segment(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V)."""
        config, weights = self.config, self.weights
        queries, batch = ids.shape[1], ids.shape[0]
        self.mems = [mem if mem.shape[0] else mem.expand(0, batch, -1) for mem in self.mems]
        remembered = self.mems[0].shape[0]
        hidden = published_mask(queries, remembered, config.mem_len, config.same_length)
        distance = torch.arange(remembered + queries - 1, -1, -1)
        if config.clamp_len is not None:
            distance = distance.clamp(max=config.clamp_len)
        positions = encode(distance, config.d_model)  # (S, d_model)
        h = weights["embedding.weight"][ids.T] * math.sqrt(config.d_model)  # (T, B, d_model)
        inputs = [h]
        for number in range(config.n_layer):
            h = self._layer(h, self.mems[number], positions, hidden, f"layers.{number}")
            inputs.append(h)
        self.mems = [torch.cat(pair)[-config.mem_len :] for pair in zip(self.mems, inputs, strict=True)]
        weight = weights["embedding.weight" if config.tie_embedding else "head_weight"]
        return (h @ weight.T + weights["head_bias"]).transpose(0, 1)

    def _layer(self, h: Tensor, mem: Tensor, positions: Tensor, hidden: Tensor, name: str) -> Tensor:
        weights, pre_norm = self.weights, self.config.pre_norm
        context = torch.cat([mem, h])  # (S, B, d_model)
        if pre_norm:
            context = layer_norm(context, weights, f"{name}.attention_norm")
        attended = self._attention(context, len(h), positions, hidden, f"{name}.attention")
        h = h + attended
        if pre_norm:
            inner = layer_norm(h, weights, f"{name}.feed_forward_norm")
        else:
            h = inner = layer_norm(h, weights, f"{name}.attention_norm")
        out = h + dense(dense(inner, weights, f"{name}.feed_forward.0").relu(), weights, f"{name}.feed_forward.3")
        return out if pre_norm else layer_norm(out, weights, f"{name}.feed_forward_norm")

    def _attention(self, context: Tensor, queries: int, positions: Tensor, hidden: Tensor, name: str) -> Tensor:
        weights, heads = self.weights, (self.config.n_head, self.config.d_head)
        q = dense(context[-queries:], weights, f"{name}.query").unflatten(-1, heads)  # (T, B, H, d_head)
        k = dense(context, weights, f"{name}.key").unflatten(-1, heads)
        v = dense(context, weights, f"{name}.value").unflatten(-1, heads)
        r = dense(positions, weights, f"{name}.position").unflatten(-1, heads)  # (S, H, d_head)
        by_content = torch.einsum("ibhd,jbhd->ijbh", q + weights["content_bias"], k)
        by_position = shifted(torch.einsum("ibhd,jhd->ijbh", q + weights["position_bias"], r))
        scores = (by_content + by_position) / math.sqrt(self.config.d_head)
        scores = scores.masked_fill(hidden[:, :, None, None], -math.inf)
        mixed = torch.einsum("ijbh,jbhd->ibhd", scores.softmax(dim=1), v)
        return dense(mixed.flatten(2), weights, f"{name}.output")


@pytest.mark.parametrize("name", TRANSFORMER_XL)
def test_transformer_xl_equals_the_published_form_over_segments_of_odd_lengths(name: str) -> None:
    reference: Any = model(name)
    oracle = TransformerXLOracle(reference)
    mems = reference.empty_mems(2)
    for number, length in enumerate((3, 1, 5, 2, 7, 1)):
        ids = torch.from_numpy(tokens(2, length, seed=number))
        logits, mems = reference(ids, mems)
        assert worst(logits.numpy(), oracle.segment(ids).numpy()) <= EXACT, f"segment {number}"
        for mem, wanted in zip(mems, oracle.mems[:-1], strict=True):  # nothing reads the last one
            assert worst(mem.numpy(), wanted.transpose(0, 1).numpy()) <= EXACT, f"memory after segment {number}"


@pytest.mark.parametrize("name", TRANSFORMER_XL)
def test_transformer_xl_full_runs_segments_of_tgt_len(name: str) -> None:
    reference: Any = model(name)
    oracle, ids = TransformerXLOracle(reference), torch.from_numpy(tokens(2, 15))
    wanted = torch.cat([oracle.segment(part) for part in ids.split(reference.config.tgt_len, dim=1)], dim=1)
    assert worst(full(reference, ids.numpy()), wanted.numpy()) <= EXACT


@pytest.mark.parametrize("same_length", [False, True])
def test_transformer_xl_scores_equal_the_formula_position_by_position(same_length: bool) -> None:
    """One layer, one segment after a memory: ((q_i+u).k_j + (q_i+v).r_(i+M-j)) / sqrt(d_head), by loops."""
    reference = transformer_xl(n_layer=1, n_head=1, d_head=4, same_length=same_length, mem_len=3, clamp_len=2)
    weights: Weights = dict(reference.state_dict())
    ids, scale = torch.from_numpy(tokens(1, 6)), math.sqrt(8)
    rows = weights["embedding.weight"][ids[0]] * scale
    mem, h = rows[:3], rows[3:]
    attention = "layers.0.attention"
    mixed = []
    for i in range(3):
        query = dense(h[i], weights, f"{attention}.query")
        scores, values = [], []
        for j in range(6):
            distance = i + 3 - j
            if distance < 0 or (same_length and distance >= 3):
                continue
            key = dense(rows[j], weights, f"{attention}.key")
            position = dense(encode(torch.tensor([min(distance, 2)]), 8)[0], weights, f"{attention}.position")
            content = (query + weights["content_bias"][0]) @ key
            scores.append((content + (query + weights["position_bias"][0]) @ position) / math.sqrt(4))
            values.append(dense(rows[j], weights, f"{attention}.value"))
        if same_length:
            assert len(scores) == 3, "same_length: exactly mem_len keys, its own included"
        mixed.append(torch.stack(scores).softmax(0) @ torch.stack(values))
    wanted = dense(torch.stack(mixed), weights, f"{attention}.output")
    context = torch.cat([mem, h])[None]
    found = reference.layers[0].attention(h[None], context, reference.biases, query_start=3)[0]
    assert worst(found.numpy(), wanted.numpy()) <= EXACT


def test_transformer_xl_memory_starts_empty_grows_and_stays_at_mem_len() -> None:
    reference = transformer_xl(mem_len=5, tgt_len=3)
    mems = reference.empty_mems(2)
    assert [tuple(mem.shape) for mem in mems] == [(2, 0, 8)] * 2
    for seen in (3, 5, 5):
        _, mems = reference(torch.from_numpy(tokens(2, 3)), mems)
        assert [tuple(mem.shape) for mem in mems] == [(2, seen, 8)] * 2
    assert not any(mem.requires_grad for mem in mems)


def test_transformer_xl_memory_is_the_input_of_each_layer_before_its_norm() -> None:
    reference = transformer_xl(pre_norm=True, mem_len=4)
    ids = torch.from_numpy(tokens(1, 4))
    _, mems = reference(ids, reference.empty_mems(1))
    assert worst(mems[0].numpy(), reference.embed(ids).numpy()) == 0.0


@pytest.mark.parametrize("pre_norm", [False, True])
def test_with_same_length_any_segments_give_the_same_logits_and_without_it_they_do_not(pre_norm: bool) -> None:
    ids = torch.from_numpy(tokens(1, 16))
    for same_length in (True, False):
        short = transformer_xl(tgt_len=1, pre_norm=pre_norm, same_length=same_length)
        long = transformer_xl(tgt_len=6, pre_norm=pre_norm, same_length=same_length)
        difference = worst(short.full(ids).numpy(), long.full(ids).numpy())
        assert difference <= EXACT if same_length else difference > 1e-2


# Hourglass


class HourglassOracle:
    """One stream, one row at a time: loops over positions, no padding, no masks. Rows are lists of (d,) vectors."""

    def __init__(self, reference: Any) -> None:
        self.config, self.weights = reference.config, dict(reference.state_dict())
        self._positions: dict[tuple[str, int], Tensor] = {}

    def full(self, ids: list[int]) -> Tensor:
        rows = [self.weights["embedding.weight"][token] for token in ids]
        rows = self._level(rows, self.config.scales, "level")
        return torch.stack([dense(row, self.weights, "head") for row in rows])

    def _level(self, rows: list[Tensor], scales: tuple[Scale, ...], name: str) -> list[Tensor]:
        rows = self._stack(rows, scales[0], f"{name}.pre")
        if len(scales) > 1:
            rows = self._valley(rows, scales, f"{name}.valley")
            rows = self._stack(rows, scales[0], f"{name}.post")
        return rows

    def _stack(self, rows: list[Tensor], scale: Scale, name: str) -> list[Tensor]:
        for number in range(scale.layers):
            block = f"{name}.blocks.{number}"
            normed = [self._norm(row, f"{block}.attention_norm") for row in rows]
            rows = [
                row + self._attend(normed[i], normed[: i + 1], lambda j, i=i: scale.factor * (j - i), block)
                for i, row in enumerate(rows)
            ]
            rows = [self._feed_forward(row, block) for row in rows]
        return [self._norm(row, f"{name}.norm") for row in rows]

    def _valley(self, rows: list[Tensor], scales: tuple[Scale, ...], name: str) -> list[Tensor]:
        factor, group = scales[0].factor, scales[1].factor // scales[0].factor
        shifted_rows = [torch.zeros_like(rows[0])] * (group - 1) + rows  # index j holds row j - (k - 1)
        coarse = self._shorten(shifted_rows, group, factor, f"{name}.shortening")
        coarse = self._level(coarse, scales[1:], f"{name}.middle")
        up = self._upsample(coarse, rows, group, f"{name}.upsampling")
        return [row + self._norm(risen, f"{name}.norm") for row, risen in zip(rows, up, strict=True)]

    def _shorten(self, rows: list[Tensor], group: int, factor: int, name: str) -> list[Tensor]:
        refined = self.config.shortening.startswith("attention")
        if refined:
            rows = [self._norm(row, f"{name}.rows_norm") for row in rows]
        coarse = []
        for g in range(len(rows) // group):  # a group that is not complete has no row yet
            members = rows[g * group : (g + 1) * group]
            if self.config.shortening.endswith("linear"):
                pooled = dense(torch.cat(members), self.weights, f"{name}.pooling.linear")
            else:
                pooled = sum(members, torch.zeros_like(members[0])) / group
            if refined:
                query, block = self._norm(pooled, f"{name}.pooled_norm"), f"{name}.refinement"
                prefix = rows[: (g + 1) * group]
                attended = self._attend(query, prefix, lambda j, g=g: factor * (j - group * g), block)
                pooled = self._feed_forward(query + attended, block)
            coarse.append(pooled)
        return coarse

    def _upsample(self, coarse: list[Tensor], rows: list[Tensor], group: int, name: str) -> list[Tensor]:
        refined = self.config.upsampling == "attention"
        if refined:
            coarse = [self._norm(row, f"{name}.rows_norm") for row in coarse]
        out = []
        for i, row in enumerate(rows):
            newest = coarse[i // group]
            if self.config.upsampling != "repeat":
                width, slot = len(newest), i % group
                newest = dense(newest, self.weights, f"{name}.expansion.linear")[slot * width : (slot + 1) * width]
            if refined:
                query, block = self._norm(newest, f"{name}.expanded_norm") + row, f"{name}.refinement"
                seen = coarse[: i // group + 1]
                newest = query + self._attend(query, seen, lambda j, i=i: group * j - i, block)
                newest = self._feed_forward(newest, block)
            out.append(newest)
        return out

    def _attend(self, query: Tensor, rows: list[Tensor], distance: Callable[[int], int], name: str) -> Tensor:
        weights, heads = self.weights, (self.config.n_head, -1)
        name = f"{name}.attention"
        q = dense(query, weights, f"{name}.query").unflatten(0, heads)  # (H, d_head)
        scores, values = [], []
        for j, row in enumerate(rows):
            k = dense(row, weights, f"{name}.key").unflatten(0, heads)
            r = self._position(name, distance(j)).unflatten(0, heads)
            score = (q + weights["content_bias"]) * k + (q + weights["position_bias"]) * r
            scores.append(score.sum(-1) / math.sqrt(q.shape[-1]))  # (H,)
            values.append(dense(row, weights, f"{name}.value").unflatten(0, heads))
        shares = torch.stack(scores).softmax(0)  # (S, H)
        mixed = sum((share[:, None] * v for share, v in zip(shares, values, strict=True)), torch.zeros_like(q))
        return dense(mixed.flatten(), weights, f"{name}.output")

    def _position(self, name: str, distance: int) -> Tensor:
        if (name, distance) not in self._positions:
            encoded = encode(torch.tensor([distance]), self.config.d_model)[0]
            self._positions[name, distance] = dense(encoded, self.weights, f"{name}.position")
        return self._positions[name, distance]

    def _feed_forward(self, row: Tensor, name: str) -> Tensor:
        inner = dense(self._norm(row, f"{name}.feed_forward_norm"), self.weights, f"{name}.feed_forward.0")
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return row + dense(gelu, self.weights, f"{name}.feed_forward.3")

    def _norm(self, row: Tensor, name: str) -> Tensor:
        return layer_norm(row, self.weights, name, EPSILON["hourglass"])


def _check_hourglass(name: str, length: int) -> None:
    reference, ids = model(name), tokens(1, length)
    with torch.inference_mode():
        wanted = HourglassOracle(reference).full(ids[0].tolist())
    assert worst(full(reference, ids)[0], wanted.numpy()) <= EXACT


@pytest.mark.parametrize("name", KINDS)
def test_hourglass_equals_loops_over_positions(name: str) -> None:
    _check_hourglass(name, length=11)


@pytest.mark.parametrize("name", NESTED)
def test_nested_hourglass_equals_loops_over_positions(name: str) -> None:
    _check_hourglass(name, length=14)


# Configurations


def _xl(**settings: Any) -> tuple[str, dict[str, Any]]:
    values = {
        "vocab_size": 9, "n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 8, "mem_len": 4, "tgt_len": 4,
    }  # fmt: skip
    return "transformer-xl", values | settings


def _hourglass(**settings: Any) -> tuple[str, dict[str, Any]]:
    return "hourglass", {"vocab_size": 9, "d_model": 8, "n_head": 2} | settings


def _wrong_whole_numbers() -> Iterator[Any]:
    for name in ("vocab_size", "n_layer", "d_model", "n_head", "d_head", "d_inner", "mem_len", "tgt_len"):
        for value in (0, -1, 2.0, True, "4", None):
            yield _xl(**{name: value}), f"{name} must be a whole number of at least 1, not {value!r}"
    for name in ("vocab_size", "d_model", "d_ff", "n_head", "context"):
        for value in (0, True, 1.5):
            yield _hourglass(**{name: value}), f"{name} must be a whole number of at least 1, not {value!r}"


IMPOSSIBLE = [
    *_wrong_whole_numbers(),
    (_xl(d_model=7), "d_model must be even for sinusoid positions, not 7"),
    (_xl(clamp_len=0), "clamp_len must be a whole number of at least 1, not 0"),
    (_xl(mem_len=1, same_length=True), "same_length needs mem_len of at least 2, not 1"),
    (_xl(dropout=1.0), "dropout must lie in [0, 1), not 1.0"),
    (_xl(dropout=-0.1), "dropout must lie in [0, 1), not -0.1"),
    (_xl(dropout=float("nan")), "dropout must lie in [0, 1), not nan"),
    (_hourglass(d_model=9, n_head=2), "d_model 9 must be divisible by n_head 2"),
    (_hourglass(d_model=9, n_head=3), "d_model must be even for sinusoid positions, not 9"),
    (
        _hourglass(shortening="max"),
        "shortening must be one of ('average', 'linear', 'attention', 'attention-linear'), not 'max'",
    ),
    (_hourglass(upsampling="nearest"), "upsampling must be one of ('repeat', 'linear', 'attention'), not 'nearest'"),
    (_hourglass(dropout=1.5), "dropout must lie in [0, 1), not 1.5"),
    (_hourglass(hierarchy="2@1 x 2@1"), "hierarchy entry 'x' must read layers@factor, for example 2@1"),
    (_hourglass(hierarchy="2@1 -1@3 2@1"), "hierarchy entry '-1@3' must read layers@factor, for example 2@1"),
    (_hourglass(hierarchy="2@1 8@3"), "hierarchy '2@1 8@3' must be a palindrome of odd length"),
    (_hourglass(hierarchy="2@1 8@3 1@1"), "hierarchy '2@1 8@3 1@1' must be a palindrome of odd length"),
    (_hourglass(hierarchy="2@1 8@3 8@3 2@1"), "hierarchy '2@1 8@3 8@3 2@1' must be a palindrome of odd length"),
    (_hourglass(hierarchy=""), "hierarchy '' must be a palindrome of odd length"),
    (_hourglass(hierarchy="8@3"), "hierarchy '8@3' must start at factor 1"),
    (
        _hourglass(hierarchy="0@1 8@3 0@1"),
        "hierarchy '0@1 8@3 0@1' needs at least one layer at factor 1 on each side",
    ),
    (
        _hourglass(hierarchy="1@1 1@2 1@3 1@2 1@1"),
        "hierarchy '1@1 1@2 1@3 1@2 1@1': factor 3 must be a larger multiple of 2",
    ),
    (_hourglass(hierarchy="1@1 1@1 1@1"), "hierarchy '1@1 1@1 1@1': factor 1 must be a larger multiple of 1"),
    (_hourglass(hierarchy="1@1 1@0 1@1"), "hierarchy '1@1 1@0 1@1': factor 0 must be a larger multiple of 1"),
    (
        _xl(memlen=3),
        (
            "transformer-xl has no setting memlen; it has clamp_len, cutoffs, d_embed, d_head, d_inner, d_model, "
            "div_val, dropout, mem_len, n_head, n_layer, pre_norm, same_length, tgt_len, tie_embedding, "
            "tie_projections, untie_biases, vocab_size"
        ),
    ),
]


@pytest.mark.parametrize(("given", "sentence"), IMPOSSIBLE, ids=lambda value: str(value)[:60])
def test_impossible_settings_are_refused_with_the_reason(given: tuple[str, dict[str, Any]], sentence: str) -> None:
    name, values = given
    with pytest.raises(ConfigError) as caught:
        families.find(name).parse_config(values)
    assert str(caught.value) == sentence
    assert caught.value.exit_code == 2


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"transformer-xl configuration is incomplete: .*'mem_len' and 'tgt_len'"):
        families.find("transformer-xl").parse_config(
            {"vocab_size": 9, "n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 8}
        )


WRONG_TYPES = [
    ("hourglass", "hierarchy", 5),
    ("hourglass", "dropout", "high"),
    ("transformer-xl", "dropout", None),
    ("transformer-xl", "clamp_len", "long"),
    ("transformer-xl", "clamp_len", 2.5),
    ("transformer-xl", "same_length", "no"),
    ("transformer-xl", "pre_norm", 1),
    ("transformer-xl", "tie_embedding", "yes"),
]


@pytest.mark.parametrize(("family", "setting", "value"), WRONG_TYPES)
def test_settings_of_a_wrong_type_are_refused_by_name(family: str, setting: str, value: Any) -> None:
    _, usual = _xl() if family == "transformer-xl" else _hourglass()
    with pytest.raises(ConfigError, match=rf"^{setting} must .*{value!r}$"):
        families.find(family).parse_config(usual | {setting: value})


@pytest.mark.parametrize(
    ("setting", "value", "bits"),
    [("clamp_len", 2**31, 32), ("mem_len", -(10**5000), 16610), ("cutoffs", [3, 2**80], 81)],
    ids=["clamp_len", "mem_len", "cutoffs"],
)
def test_numbers_beyond_all_sizes_are_refused_by_name(setting: str, value: Any, bits: int) -> None:
    with pytest.raises(ConfigError) as caught:
        families.find("transformer-xl").parse_config(_xl()[1] | {setting: value})
    assert str(caught.value) == f"{setting} must be at most 2^31 - 1, not a number of {bits} bits"


def test_a_hierarchy_reads_as_its_descending_half() -> None:
    assert parse_hierarchy("2@1 8@3 2@1") == (Scale(2, 1), Scale(8, 3))
    assert parse_hierarchy("2@1 1@2 4@4 1@2 2@1") == (Scale(2, 1), Scale(1, 2), Scale(4, 4))
    assert parse_hierarchy("3@1") == (Scale(3, 1),)
    assert hourglass(hierarchy="1@1 1@2 1@6 1@2 1@1").config.period == 6


def test_the_family_table_lists_each_family_once_and_finds_the_nearest_name() -> None:
    names = [family.name for family in families.FAMILIES]
    assert len(names) == len(set(names))
    assert families.find("hourglass") is hourglass_module.FAMILY
    assert families.find("transformer-xl") is transformer_xl_module.FAMILY
    with pytest.raises(CheckpointError, match=r"^unknown family 'hour-glass'; did you mean hourglass\?$"):
        families.find("hour-glass")
    with pytest.raises(CheckpointError, match=r"^unknown family 'rnn'; known families: transformer-xl, "):
        families.find("rnn")
