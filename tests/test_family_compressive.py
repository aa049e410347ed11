"""Compressive Transformer: against its equations, position by position; what is stored, when, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import cases
import numpy as np
import pytest
import tiny
import torch

from exporters.families.compressive import remembered_rows
from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.compressive import Compression, CompressiveConfig

erf = np.vectorize(math.erf)
Rows = list[Array]
VARIANTS = tuple(tiny.TINY["compressive"])
SMALL: dict[str, Any] = {"vocab_size": 5, "n_layer": 2, "d_model": 8, "n_head": 2, "d_ff": 12, "tgt_len": 4,
                         "mem_len": 4, "cmem_len": 3, "compression_rate": 2}  # fmt: skip


class Oracle:
    """The equations on lists of rows, one row and one key at a time."""

    def __init__(self, variant: str) -> None:
        model = tiny.model("compressive", variant)
        self.config: CompressiveConfig = model.config
        self.weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def logits(self, tokens: Array) -> Array:
        """(T,) -> (T, V)."""
        config, out = self.config, []
        layers = list(range(config.n_layer)) if config.memory_layers is None else list(config.memory_layers)
        mem: dict[int, Rows] = {layer: [] for layer in layers}
        cmem: dict[int, Rows] = {layer: [] for layer in layers}
        for start in range(0, len(tokens), config.tgt_len):
            segment = tokens[start : start + config.tgt_len]
            h = [self.maybe("widen", self.weights["embedding.weight"][token]) for token in segment]
            remembered = len(mem[layers[0]]) + len(cmem[layers[0]])
            new_mem, new_cmem = dict(mem), dict(cmem)
            for layer in range(config.n_layer):
                old, squeezed = ([], []) if layer not in layers else (mem[layer], cmem[layer])
                rows = [self.norm(layer, "attention_norm", row) if config.pre_norm else row for row in h]
                context = [*squeezed, *old, *rows]
                h = [
                    self.block(layer, row, self.attention(layer, rows[i], context[: len(context) - len(rows) + i + 1],
                                                          remembered))
                    for i, row in enumerate(h)
                ]  # fmt: skip
                if layer in layers and len(segment) == config.tgt_len:
                    whole = [*old, *rows]
                    fallen = whole[: max(0, len(whole) - config.mem_len)]
                    new_mem[layer] = whole[len(fallen) :]
                    new_cmem[layer] = [*squeezed, *self.compressed(layer, fallen)][-config.cmem_len :]
            readers = [*layers[-1:], *layers[:-1]] if config.enhanced_recurrence else layers  # of what each one left
            mem = {reader: new_mem[layer] for reader, layer in zip(readers, layers, strict=True)}
            cmem = {reader: new_cmem[layer] for reader, layer in zip(readers, layers, strict=True)}
            out += [self.linear("head", self.maybe("narrow", row)) for row in h]
        return np.array(out)

    def linear(self, name: str, row: Array) -> Array:
        return self.weights[f"{name}.weight"] @ row + self.weights.get(f"{name}.bias", 0.0)

    def maybe(self, name: str, row: Array) -> Array:
        return self.linear(name, row) if f"{name}.weight" in self.weights else row

    def norm(self, layer: int, name: str, row: Array) -> Array:
        scaled = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
        return scaled * self.weights[f"layers.{layer}.{name}.weight"] + self.weights[f"layers.{layer}.{name}.bias"]

    def attention(self, layer: int, row: Array, context: Rows, remembered: int) -> Array:
        """What a row sees of all rows up to itself."""
        config, at = self.config, f"layers.{layer}.attention"
        width, heads = config.d_model // config.n_head, []
        for head in range(config.n_head):
            own = slice(head * width, (head + 1) * width)
            query = self.linear(f"{at}.query", row)[own]
            scores = []
            for distance, key_row in zip(range(len(context) - 1, -1, -1), context, strict=True):
                key = self.linear(f"{at}.key", key_row)[own]
                if config.positions == "table":
                    entry = config.tgt_len - 1 + remembered - distance
                    score = query @ key + query @ self.weights["position_table"][head, entry]
                else:
                    half = np.arange(0, config.d_model, 2) / config.d_model
                    angle = distance / 10000**half
                    place = self.linear(f"{at}.position", np.concatenate([np.sin(angle), np.cos(angle)]))[own]
                    score = (query + self.weights["content_bias"][head]) @ key
                    score += (query + self.weights["position_bias"][head]) @ place
                scores.append(score / math.sqrt(width))
            weights = np.exp(np.array(scores) - max(scores))
            values = [self.linear(f"{at}.value", row)[own] for row in context]
            heads.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
        return self.linear(f"{at}.output", np.concatenate(heads))

    def block(self, layer: int, row: Array, attended: Array) -> Array:
        def feed_forward(x: Array) -> Array:
            inner = self.linear(f"layers.{layer}.feed_forward.inner", x)
            if self.config.feed_forward == "relu":
                inner = np.maximum(inner, 0)
            elif self.config.feed_forward == "gelu":
                inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
            else:
                gate, inner = inner[: len(inner) // 2], inner[len(inner) // 2 :]
                inner = gate * (1 + erf(gate / math.sqrt(2))) / 2 * inner
            return self.linear(f"layers.{layer}.feed_forward.outer", inner)

        row = self.residual(f"layers.{layer}.attention_residual", row, attended)
        if self.config.pre_norm:
            new = feed_forward(self.norm(layer, "feed_forward_norm", row))
            return self.residual(f"layers.{layer}.feed_forward_residual", row, new)
        row = self.norm(layer, "attention_norm", row)
        row = self.residual(f"layers.{layer}.feed_forward_residual", row, feed_forward(row))
        return self.norm(layer, "feed_forward_norm", row)

    def residual(self, at: str, x: Array, new: Array) -> Array:
        def sigmoid(a: Array) -> Array:
            return 1 / (1 + np.exp(-a))

        def scale(name: str, by: Array) -> Array:
            return 2 * sigmoid(self.linear(f"{at}.mogrifier.{name}.1", self.linear(f"{at}.mogrifier.{name}.0", by)))

        if self.config.residual == "sum":
            return x + new
        if self.config.residual == "mogrified-gru":
            new = scale("of_new", x) * new
            x = scale("of_old", new) * x
            new = scale("of_new", x) * new
            x = scale("of_old", new) * x
            new = scale("of_new", x) * new
        i_r, i_z, i_n = np.split(self.linear(f"{at}.new", new), 3)
        h_r, h_z, h_n = np.split(self.linear(f"{at}.old", x), 3)
        z = sigmoid(i_z + h_z)
        return (1 - z) * np.tanh(i_n + sigmoid(i_r + h_r) * h_n) + z * x

    def compressed(self, layer: int, rows: Rows) -> Rows:
        rate = self.config.compression_rate
        rows = [np.zeros(self.config.d_model)] * (len(rows) % rate) + rows
        groups = [np.array(rows[i : i + rate]) for i in range(0, len(rows) - rate + 1, rate)]
        if self.config.compression == "conv":
            return [self.linear(f"layers.{layer}.compression.linear", group.reshape(-1)) for group in groups]
        return [group.mean(axis=0) if self.config.compression == "mean-pool" else group.max(axis=0) for group in groups]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_follows_its_equations(variant: str) -> None:
    tokens = cases.tokens(1, 21)
    want = Oracle(variant).logits(tokens[0])
    assert cases.worst(cases.full(tiny.model("compressive", variant), tokens)[0], want) <= 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_going_on_equals_running_whole(variant: str) -> None:
    model, tokens = tiny.model("compressive", variant), torch.from_numpy(cases.tokens(3, 20))
    parts, carry = [], None
    with torch.inference_mode():
        for start, stop in pairwise((0, 1, 7, 9, 20)):
            logits, carry = model.advance(tokens[:, start:stop], carry)
            parts.append(logits)
            carry = model.select(carry, [0, 1, 2])
        assert (torch.cat(parts, dim=1) - model.full(tokens)).abs().max() <= 1e-10


@pytest.mark.parametrize("compression", ["conv", "mean-pool", "max-pool"])
@pytest.mark.parametrize("rows", range(2, 12))
def test_rows_that_the_rate_does_not_divide_get_zeros_in_front(compression: str, rows: int) -> None:
    """With kernel and stride of the rate, as torch convolves and pools; 5 rows at a rate of 4 lose the newest two."""
    config = CompressiveConfig(**{**SMALL, "compression_rate": 4, "compression": compression, "tgt_len": 6,
                                  "mem_len": 6})  # fmt: skip
    module, values = cases.seeded(Compression(config)), torch.randn(2, rows, 8, dtype=torch.float64)
    padded = torch.cat([values.new_zeros(2, rows % 4, 8), values], dim=1).transpose(1, 2)
    kernel = {"mean-pool": torch.nn.functional.avg_pool1d, "max-pool": torch.nn.functional.max_pool1d}
    if compression == "conv":
        weight = module.linear.weight.unflatten(1, (4, 8)).transpose(1, 2)  # (out, in, kernel)
        want = torch.nn.functional.conv1d(padded, weight, module.linear.bias, stride=4)
    else:
        want = kernel[compression](padded, 4)
    assert want.shape[2] == config.compressed(rows)
    assert torch.allclose(module(values), want.transpose(1, 2), atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_how_much_is_remembered_follows_from_the_position(variant: str) -> None:
    """The rows of the reference's growing memory, after every token."""
    model, carry = tiny.model("compressive", variant), None
    for position in range(30):
        filled = 0 if carry is None else carry[0][0].rows.shape[1]
        assert remembered_rows(model.config, torch.tensor([position])).tolist() == [filled]
        with torch.inference_mode():
            _, carry = model.advance(torch.tensor([[position % cases.VOCAB]]), carry)


def test_memory_changes_at_the_end_of_a_segment_only() -> None:
    spec = cases.build(tiny.model("compressive", "conv"), max_chunk=16).spec
    ticks = (Tick(("decode",), repeat=3), Tick(("decode",), closing=("close",)))
    assert spec.schedule == Schedule(ticks, "prefill", chunk_multiple=1, max_chunk=4)
    assert spec.max_context is None
    kept = {name for layer in ("layer00", "layer01") for name in (f"{layer}.key", f"{layer}.value")}
    raw = {name for layer in ("layer00", "layer01") for name in (f"{layer}.mem", f"{layer}.cmem")}
    assert set(spec.graph("close").writes) == kept | raw
    for name in ("decode", "prefill"):
        assert all(".segment" in state for state in spec.graph(name).writes)
        assert kept <= set(spec.graph(name).reads), "a token reads keys and values"
        assert not raw & set(spec.graph(name).reads), "and no rows that it would have to project"


def test_states_have_their_full_size_from_the_start() -> None:
    spec = cases.build(tiny.model("compressive", "conv")).spec
    sizes = {state.name: (state.shape[1:], state.update) for state in spec.states if state.name.startswith("layer00")}
    assert sizes == {
        "layer00.key": ((2, 3 + 4, 4), "replace"),
        "layer00.value": ((2, 3 + 4, 4), "replace"),
        "layer00.mem": ((4, 8), "replace"),
        "layer00.cmem": ((3, 8), "replace"),
        "layer00.segment": ((4, 8), "append"),
        "layer00.segment_key": ((2, 4, 4), "append"),
        "layer00.segment_value": ((2, 4, 4), "append"),
    }


def test_a_layer_without_memory_keeps_its_segment_only() -> None:
    spec = cases.build(tiny.model("compressive", "few-memories")).spec
    assert [state.name for state in spec.states if state.name.startswith("layer01")] == [
        "layer01.segment_key",
        "layer01.segment_value",
    ]


def test_what_lies_behind_the_filled_memory_does_not_matter() -> None:
    """Memory is replaced, not appended: what stands where no row has been yet must be hidden all the same."""
    model, ids = tiny.model("compressive", "mean-pool"), cases.tokens(1, 17)
    want = cases.full(model, ids)
    for before in (0, 3, 6, 9):  # segments of 3 tokens, 5 rows of memory, 2 of compressed memory
        session = cases.eager_session(model)
        if before:
            session.step(ids[:, :before])
        snapshot, filled = session.state(), int(remembered_rows(model.config, torch.tensor([before]))[0])
        for state in ("layer00.key", "layer00.value", "layer01.key", "layer01.value"):
            snapshot = cases.spoiled(snapshot, state, 2, [range(7 - filled, 7)])
        session.restore(snapshot)
        assert cases.worst(session.step(ids[:, before:]), want[:, before:]) <= 1e-10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"compression": "most-used"},
            (
                "compression 'most-used' is not offered: which rows it keeps hangs on the order of nearly equal "
                "attention weights, so rounding would decide; use one of conv, mean-pool, max-pool"
            ),
        ),
        (
            {"compression": "dilated-conv"},
            (
                "compression 'dilated-conv' is not offered: the paper gives neither its kernel nor its dilation; "
                "use one of conv, mean-pool, max-pool"
            ),
        ),
        ({"compression": "mean"}, "compression must be one of conv, mean-pool, max-pool, not 'mean'"),
        ({"positions": "absolute"}, "positions must be one of sinusoid, table, not 'absolute'"),
        ({"feed_forward": "glu"}, "feed_forward must be one of relu, gelu, geglu, not 'glu'"),
        ({"residual": "lstm"}, "residual must be one of sum, gru, mogrified-gru, not 'lstm'"),
        ({"mem_len": 3}, "mem_len must be at least the 4 tokens of a segment, not 3"),
        ({"cmem_len": 0}, "cmem_len must be a whole number of at least 1, not 0"),
        ({"n_head": 3}, "3 heads do not divide d_model 8"),
        ({"d_model": 9, "n_head": 3}, "d_model must be even, not 9"),
        (
            {"d_model": 6, "residual": "mogrified-gru"},
            "a mogrified-gru residual needs d_model of at least 8, not 6",
        ),
        ({"memory_layers": [0, 2]}, "memory_layers must be numbers from 0 to 1 in rising order, not [0, 2]"),
        ({"memory_layers": [1, 0]}, "memory_layers must be numbers from 0 to 1 in rising order, not [1, 0]"),
        ({"memory_layers": []}, "memory_layers must be numbers from 0 to 1 in rising order, not []"),
        ({"memory_layers": 1}, "memory_layers must be numbers from 0 to 1 in rising order, not 1"),
        ({"d_embedding": 0}, "d_embedding must be a whole number of at least 1, not 0"),
        (
            {"compression_rate": 9},
            "4 rows fall out of memory at once, too few to compress at a rate of 9",
        ),
        (
            {"mem_len": 7, "compression_rate": 4},
            "1 rows fall out of memory at once, too few to compress at a rate of 4",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompressiveConfig(**{**SMALL, **settings})
    assert str(caught.value) == message
