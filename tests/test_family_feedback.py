"""Feedback Transformer: against its equations, step by step; what is remembered, and how far layers see."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import cases
import numpy as np
import pytest
import tiny
import torch

from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.feedback import FeedbackConfig, FeedbackTransformer

VARIANTS = tuple(tiny.TINY["feedback"])
SMALL: dict[str, Any] = {"vocab_size": 5, "n_layer": 2, "d_model": 8, "n_head": 2, "d_ff": 12, "mem_len": 4}


class Oracle:
    """The equations with memory as published: vectors m, oldest first, all of which every layer projects again."""

    def __init__(self, model: FeedbackTransformer) -> None:
        self.config: FeedbackConfig = model.config
        self.weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def logits(self, tokens: Array) -> Array:
        """(T,) -> (T, V)."""
        config, out = self.config, []
        memory = [np.zeros(config.d_model)] * config.mem_len
        share = np.exp(self.weights["layer_weights"])
        for token in tokens:
            h = [self.weights["embedding.weight"][token]]
            for layer in range(config.n_layer):
                h.append(self.layer(layer, h[-1], memory))
            merged = sum(w * row for w, row in zip(share / share.sum(), h, strict=True))
            memory = [*memory[1:], merged]
            out.append(self.linear("head", self.norm("norm", h[-1]) if config.pre_norm else h[-1]))
        return np.array(out)

    def layer(self, layer: int, h: Array, memory: list[Array]) -> Array:
        at, reader = f"layers.{layer}", f"readers.{0 if self.config.share_kv else layer}"
        if self.config.pre_norm:
            h = h + self.attention(at, reader, self.norm(f"{reader}.norm", h),
                                   [self.norm(f"{reader}.norm", row) for row in memory])  # fmt: skip
            return h + self.feed_forward(at, self.norm(f"{at}.feed_forward_norm", h))
        h = self.norm(f"{at}.attention_norm", h + self.attention(at, reader, h, memory))
        return self.norm(f"{at}.feed_forward_norm", h + self.feed_forward(at, h))

    def attention(self, at: str, reader: str, row: Array, memory: list[Array]) -> Array:
        config, width = self.config, self.weights["position_table"].shape[1]
        heads, seen = [], memory[len(memory) - self.reach(at) :]
        for head in range(config.n_head):
            own = slice(head * width, (head + 1) * width)
            query = self.linear(f"{at}.query", row)[own]
            scores = []
            for place, m in enumerate(seen, start=len(memory) - len(seen)):
                key = self.linear(f"{reader}.key", m)[own] + self.weights["position_table"][place]
                scores.append(query @ key / math.sqrt(width))
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            if config.span_ramp is not None:
                far = self.weights[f"{at}.span_ratio"][head] * config.mem_len
                ages = range(len(seen), 0, -1)
                weights *= [min(1, max(0, (far - (age - 1)) / config.span_ramp + 1)) for age in ages]
                weights /= weights.sum() + 1e-8
            values = [self.linear(f"{reader}.value", m)[own] for m in seen]
            heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        return self.linear(f"{at}.output", np.concatenate(heads))

    def reach(self, at: str) -> int:
        if self.config.span_ramp is None:
            return self.config.mem_len
        longest = self.weights[f"{at}.span_ratio"].max() * self.config.mem_len + self.config.span_ramp
        return max(1, min(self.config.mem_len, math.ceil(longest)))

    def feed_forward(self, at: str, row: Array) -> Array:
        return self.linear(f"{at}.feed_forward.2", np.maximum(self.linear(f"{at}.feed_forward.0", row), 0))

    def linear(self, name: str, row: Array) -> Array:
        return self.weights[f"{name}.weight"] @ row + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, row: Array) -> Array:
        scaled = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def tiny_model(variant: str) -> FeedbackTransformer:
    model = tiny.model("feedback", variant)
    assert isinstance(model, FeedbackTransformer)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_follows_its_equations(variant: str) -> None:
    tokens = cases.tokens(1, 16)
    model = tiny_model(variant)
    assert cases.worst(cases.full(model, tokens)[0], Oracle(model).logits(tokens[0])) <= 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_going_on_equals_running_whole(variant: str) -> None:
    model, tokens = tiny_model(variant), torch.from_numpy(cases.tokens(3, 16))
    parts, carry = [], None
    with torch.inference_mode():
        for start, stop in pairwise((0, 1, 7, 16)):
            logits, carry = model.advance(tokens[:, start:stop], carry)
            parts.append(logits)
            carry = model.select(carry, [0, 1, 2])
        assert (torch.cat(parts, dim=1) - model.full(tokens)).abs().max() <= 1e-10


def test_a_step_hears_the_highest_layer_of_the_step_before() -> None:
    """What a parallel transformer cannot do: the last layer's weights change the first layer's output a step later."""
    model, tokens = tiny_model("post-norm"), torch.from_numpy(cases.tokens(1, 2))
    changed = cases.seeded(FeedbackTransformer(model.config))
    changed.layers[1].feed_forward[2].bias[0] += 3
    first = []
    for each in (model, changed):
        _, after = each(tokens[:, :1], each.empty(1))
        first.append(model.layers[0](model.embedding(tokens[:, 1:]), model.readers[0], after[0], model.position_table))
    assert (first[0] - first[1]).abs().max() > 1e-4


def test_there_is_one_graph_and_it_takes_one_token() -> None:
    spec = cases.build(tiny_model("pre-norm")).spec
    assert spec.schedule == Schedule((Tick(("decode",)),), None)
    assert [graph.name for graph in spec.graphs] == ["decode"]
    assert spec.max_context is None


def test_every_layer_remembers_keys_and_values_unless_they_are_shared() -> None:
    sizes = {state.name: (state.shape, state.update) for state in cases.build(tiny_model("pre-norm")).spec.states}
    assert sizes == {
        f"memory{layer:02}.{kind}": (("batch", 2, 6, 3), "append") for layer in (0, 1) for kind in ("key", "value")
    }
    shared = cases.build(tiny_model("shared")).spec.states
    assert [state.name for state in shared] == ["memory00.key", "memory00.value"]


def test_a_layer_keeps_no_more_than_its_heads_have_learned_to_see() -> None:
    model = tiny_model("spans")
    ratios = [layer.span_ratio.max().item() for layer in model.layers]
    reaches = [math.ceil(12 * ratio + 4) for ratio in ratios]
    assert all(1 < reach < 12 for reach in reaches)
    states = {state.name: state.shape[2] for state in cases.build(model).spec.states}
    assert [states[f"memory{layer:02}.key"] for layer in (0, 1)] == reaches
    widest = max(layer.reach for layer in tiny_model("shared").layers)
    assert [state.shape[2] for state in cases.build(tiny_model("shared")).spec.states] == [widest, widest]


def test_what_is_left_out_has_no_weight() -> None:
    """The span of every memory behind the reach is 0, and of the last one within it is not."""
    for layer in tiny_model("spans").layers:
        span = layer.span(torch.arange(1, 13))
        assert (span[:, :, layer.reach :] == 0).all()
        assert span[:, :, layer.reach - 1].max() > 0


@pytest.mark.parametrize("variant", ["post-norm", "pre-norm"])
def test_a_new_stream_attends_to_memories_of_zeros(variant: str) -> None:
    """They weigh as much as any other, so what values they have is heard: W_v LN(0) is not 0."""
    model = tiny_model(variant)
    (key, value), *_ = model.empty(1)
    assert key.shape == value.shape == (1, 2, model.config.mem_len, model.config.head_width)
    assert bool(value.abs().max() > 0) == (variant == "pre-norm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_head": 3}, "3 heads do not divide d_model 8: set d_head"),
        ({"mem_len": 0}, "mem_len must be a whole number of at least 1, not 0"),
        ({"d_head": 0}, "d_head must be a whole number of at least 1, not 0"),
        ({"span_ramp": 0.5}, "span_ramp must be a whole number of at least 1, not 0.5"),
        ({"share_kv": 1}, "share_kv must be true or false, not 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FeedbackConfig(**{**SMALL, **settings})
    assert str(caught.value) == message
