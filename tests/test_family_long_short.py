"""Long-Short Transformer: against an oracle that loops over positions, and against the authors' code where it is."""

from __future__ import annotations

import importlib
import math
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.long_short import LongShortConfig, LongShortTransformer

FAMILY = "long-short"
VARIANTS = list(tiny.TINY[FAMILY])
PUBLIC = Path(os.environ.get("MSCOMPILE_PUBLIC_CODE", ""), "transformer-ls/autoregressive/model_lib")
SIZES: dict[str, Any] = {"vocab_size": cases.VOCAB, "n_layer": 2, "d_model": 8, "n_head": 2, "d_inner": 12,
                         "window_len": 3, "chunk_size": 2, "mem_len": 6, "tgt_len": 4}  # fmt: skip


def built(**settings: Any) -> LongShortTransformer:
    return cases.seeded(LongShortTransformer(LongShortConfig(**{**SIZES, **settings})))


class Oracle:
    """One stream, token by token and key by key, from the equations; nothing is shared with the model but weights."""

    def __init__(self, model: LongShortTransformer) -> None:
        self.config = model.config
        self.weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def linear(self, name: str, x: Array) -> Array:
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean()
        scaled = centred / math.sqrt((centred**2).mean() + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def position(self, distance: int, clamp: int | None) -> Array:
        distance = distance if clamp is None else min(distance, clamp)
        width = self.config.d_model
        angles = [distance / 10000 ** (2 * m / width) for m in range(width // 2)]
        return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])

    def logits(self, tokens: Array) -> Array:
        config, table = self.config, self.weights["embedding.weight"]
        cache = [[np.zeros(config.d_model)] * config.mem_len for _ in range(config.n_layer)]
        out = []
        for start in range(0, len(tokens), config.tgt_len):
            x = [table[token] * math.sqrt(config.d_model) for token in tokens[start : start + config.tgt_len]]
            for number in range(config.n_layer):
                before, cache[number] = cache[number], [*cache[number], *x][-config.mem_len :]
                x = self.layer(f"layers.{number}", before, x)
            out += [table @ row + self.weights["head_bias"] for row in x]
        return np.stack(out)

    def layer(self, name: str, cache: list[Array], block: list[Array]) -> list[Array]:
        rows = [*cache, *block]
        if self.config.pre_norm:
            rows = [self.norm(f"{name}.attention_norm", row) for row in rows]
        out = []
        for i in range(len(cache), len(rows)):
            h = rows[i] + self.linear(f"{name}.attention.output", self.attend(f"{name}.attention", rows, i))
            h = self.norm(f"{name}.{'feed_forward_norm' if self.config.pre_norm else 'attention_norm'}", h)
            h = h + self.linear(f"{name}.feed_forward.3", self.active(self.linear(f"{name}.feed_forward.0", h)))
            out.append(h if self.config.pre_norm else self.norm(f"{name}.feed_forward_norm", h))
        return out

    def active(self, x: Array) -> Array:
        if not self.config.gelu:
            return np.maximum(x, 0.0)
        return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])

    def attend(self, name: str, rows: list[Array], i: int) -> Array:
        """The heads of row i, which sees the window up to itself and the chunks before its own."""
        config = self.config
        width = config.d_model // config.n_head
        chunks = [
            (self.chunk(name, rows, number, vector), i // config.chunk_size * config.chunk_rank - 1
             - (number * config.chunk_rank + vector))
            for number in range(i // config.chunk_size) for vector in range(config.chunk_rank)
        ]  # fmt: skip
        mixed = []
        for head in range(config.n_head):
            part = slice(head * width, (head + 1) * width)
            query = self.linear(f"{name}.query", rows[i])[part] / math.sqrt(width)
            content = query + self.weights[f"{name}.content_bias"][head, 0]
            place = query + self.weights[f"{name}.position_bias"][head, 0]
            scores, values = [], []
            for back in range(config.window_len):
                row = rows[i - back]
                where = self.linear(f"{name}.window_position", self.position(back, config.clamp_len))[part]
                key = self.norm(f"{name}.window_norm", self.linear(f"{name}.key", row))[part]
                scores.append(content @ key + place @ where)
                values.append(self.norm(f"{name}.window_norm", self.linear(f"{name}.value", row))[part])
            for (key, value), distance in chunks:
                where = self.linear(f"{name}.chunk_position", self.position(distance, config.cpos_clamp_len))[part]
                scores.append(query @ key[part] + query @ where)
                values.append(value[part])
            exponents = np.exp(np.array(scores) - max(scores))
            mixed.append(exponents / exponents.sum() @ np.stack(values))
        return np.concatenate(mixed)

    def chunk(self, name: str, rows: list[Array], number: int, vector: int) -> tuple[Array, Array]:
        """Key and value that a chunk's vector has for all heads."""
        config = self.config
        members = rows[number * config.chunk_size : (number + 1) * config.chunk_size]
        weights = np.stack([self.linear(f"{name}.weigh", row) for row in members])

        def compressed(given: list[Array]) -> Array:
            width, parts = config.d_model // config.n_head, []
            for head in range(config.n_head):
                column = np.exp(weights[:, head * config.chunk_rank + vector])
                stacked = np.stack([row[head * width : (head + 1) * width] for row in given])
                parts.append(column / column.sum() @ stacked)
            return np.concatenate(parts)

        def made(projection: str) -> Array:
            if config.project_first or number * config.chunk_size >= config.mem_len:  # a chunk of the block
                row = compressed([self.linear(f"{name}.{projection}", member) for member in members])
            else:
                row = self.linear(f"{name}.{projection}", compressed(members))
            return self.norm(f"{name}.chunk_norm", row)

        return made("key"), made("value")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_is_what_the_equations_say(variant: str) -> None:
    model = tiny.model(FAMILY, variant)
    assert isinstance(model, LongShortTransformer)
    tokens = cases.tokens(1, 15)
    assert cases.worst(cases.full(model, tokens)[0], Oracle(model).logits(tokens[0])) <= 1e-10


def test_a_call_may_run_past_the_end_of_blocks() -> None:
    model, tokens = built(), cases.tokens(2, 31)
    want = cases.full(model, tokens)
    for chunks in ([31], [2, 29], [6, 8, 17]):  # blocks of 4
        session = cases.eager_session(model, 2, max_chunk=16)
        assert cases.worst(cases.stream(session, tokens, chunks), want) <= 1e-10


@pytest.mark.parametrize("project_first", [False, True])
def test_where_blocks_end_is_part_of_the_model(project_first: bool) -> None:
    """Chunks change their form there, and the reach of the cache jumps; the latter with `project_first`, too."""
    tokens = cases.tokens(1, 12)
    short, long = (cases.full(built(tgt_len=length, project_first=project_first), tokens)[0] for length in (4, 6))
    assert cases.worst(short[:4], long[:4]) <= 1e-10
    assert cases.worst(short[4:6], long[4:6]) > 1e-4


def test_zeros_before_the_stream_are_attended_to() -> None:
    """A longer memory holds more of them, and takes more of the softmax."""
    tokens = cases.tokens(1, 1)
    short, long = (cases.full(built(mem_len=length), tokens) for length in (6, 60))
    assert cases.worst(short, long) > 1e-3


def test_the_two_orders_of_projection_and_compression_differ() -> None:
    tokens = cases.tokens(1, 12)
    ours, published = (cases.full(built(project_first=first), tokens)[0] for first in (True, False))
    assert cases.worst(ours[:4], published[:4]) <= 1e-10  # chunks of zeros are the same, the first block has no others
    assert np.abs(ours[4:] - published[4:]).max(axis=-1).min() > 1e-4


def test_states_hold_the_window_the_chunk_and_both_forms_of_chunks() -> None:
    spec = cases.build(built(n_layer=1, chunk_rank=3)).spec
    assert {state.name: (state.shape[1:], state.time_axis) for state in spec.states} == {
        "layer00.key": ((2, 2, 4), 2),
        "layer00.value": ((2, 2, 4), 2),
        "layer00.rows": ((2, 3 * 8 + 2 * 3), 1),
        "layer00.block.key": ((2, 2, 12), 2),
        "layer00.block.value": ((2, 2, 12), 2),
        "layer00.cache.key": ((2, 5, 12), 2),
        "layer00.cache.value": ((2, 5, 12), 2),
    }
    assert {state.update for state in spec.states} == {"append"}
    assert spec.max_context is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 4, 9, 22])
def test_what_is_remembered_does_not_depend_on_how_the_tokens_came(variant: str, length: int) -> None:
    model, tokens = tiny.model(FAMILY, variant), cases.tokens(2, length)
    one, many = (cases.remembered(model, tokens, chunks) for chunks in ([1] * length, [length]))
    assert {name: cases.worst(one[name], many[name]) for name in one} == pytest.approx(
        dict.fromkeys(many, 0.0), abs=1e-10
    )


def test_projecting_first_needs_one_form_only() -> None:
    names = {
        state.name.removeprefix("layer00.") for state in cases.build(built(n_layer=1, project_first=True)).spec.states
    }
    assert names == {"key", "value", "rows", "cache.key", "cache.value"}


def test_chunks_are_compressed_at_their_last_token_and_nothing_else_has_a_tick() -> None:
    spec = cases.build(built(chunk_size=3, mem_len=6, tgt_len=12), max_chunk=8).spec
    assert spec.schedule == Schedule((Tick(("decode_1",), repeat=2), Tick(("decode_3",))), "prefill", 3, 6)
    assert not any("cache" in name or "block" in name for name in spec.graph("decode_1").writes)
    assert "layer00.cache.key" in spec.graph("decode_3").writes
    assert "layer00.rows" not in spec.graph("prefill").reads


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_head": 3}, "d_model 8 must be divisible by n_head 3"),
        ({"d_model": 9, "n_head": 3}, "d_model must be even for sinusoid positions, not 9"),
        ({"window_len": 1}, "window_len must be at least 2, not 1"),
        ({"chunk_size": 1}, "chunk_size must be at least 2, not 1"),
        ({"mem_len": 5}, "mem_len 5 must be divisible by chunk_size 2"),
        ({"tgt_len": 5}, "tgt_len 5 must be divisible by chunk_size 2"),
        ({"window_len": 8}, "mem_len 6 must be at least window_len 8: the window reaches into the cache"),
        ({"clamp_len": 0}, "clamp_len must be a whole number of at least 1, not 0"),
        ({"cpos_clamp_len": -1}, "cpos_clamp_len must be a whole number of at least 1, not -1"),
        ({"gelu": 1}, "gelu must be true or false, not 1"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), not 1.0"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LongShortConfig(**{**SIZES, **settings})
    assert str(caught.value) == message


# theirs -> ours
NAMES = {
    "attn.dconv_1": "attention.weigh", "attn.r_net_chunk": "attention.chunk_position",
    "attn.r_net": "attention.window_position", "attn.proj_query": "attention.query", "attn.proj_key": "attention.key",
    "attn.proj_val": "attention.value", "attn.proj_out": "attention.output",
    "attn.dual_ln_dproj": "attention.chunk_norm", "attn.dual_ln_win": "attention.window_norm",
    "norm1": "attention_norm", "norm2": "feed_forward_norm", "ff.fc1": "feed_forward.0", "ff.fc2": "feed_forward.3",
}  # fmt: skip


@pytest.fixture
def published() -> Iterator[Any]:
    """The authors' `TransformerLSModel`; of fairseq it needs no more than the names of a LayerNorm and of GELU."""
    if not (PUBLIC / "model.py").is_file():
        pytest.skip(
            "no published code: MSCOMPILE_PUBLIC_CODE must name a directory with a clone of NVIDIA/transformer-ls"
        )
    norm, gelu, package = (types.ModuleType(name) for name in ("layer_norm", "gelu", "transformer_ls"))
    norm.LayerNorm = lambda width, export=False: nn.LayerNorm(width)  # type: ignore[attr-defined]  # noqa: ARG005
    gelu.gelu = nn.functional.gelu  # type: ignore[attr-defined]
    package.__path__ = [str(PUBLIC)]
    absent = {"fairseq": types.ModuleType("fairseq"), "fairseq.modules": types.ModuleType("modules"),
              "fairseq.modules.layer_norm": norm, "fairseq.modules.gelu": gelu, "transformer_ls": package}  # fmt: skip
    with mock.patch.dict(sys.modules, absent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module("transformer_ls.model").TransformerLSModel


def translated(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if name in ("in_emb.weight", "out_emb.bias"):
        return {"in_emb.weight": "embedding.weight", "out_emb.bias": "head_bias"}[name], tensor
    layer, number, rest = name.split(".", 2)
    if rest in ("attn.r_r_bias", "attn.r_w_bias"):
        ours = {"attn.r_r_bias": "position_bias", "attn.r_w_bias": "content_bias"}[rest]
        return f"{layer}.{number}.attention.{ours}", tensor.reshape(tensor.shape[1], 1, tensor.shape[-1])
    module, kind = rest.rsplit(".", 1)
    return f"{layer}.{number}.{NAMES[module]}.{kind}", tensor


@pytest.mark.parametrize(
    "settings",
    [
        {"tgt_len": 8, "window_len": 4, "chunk_size": 4, "mem_len": 12},
        {"tgt_len": 8, "window_len": 4, "chunk_size": 2, "mem_len": 12, "chunk_rank": 2, "bias": True},
        {"tgt_len": 8, "window_len": 8, "chunk_size": 4, "mem_len": 8, "chunk_rank": 3, "pre_norm": False,
         "gelu": False},
        {"tgt_len": 4, "window_len": 8, "chunk_size": 4, "mem_len": 8, "chunk_rank": 2, "clamp_len": 3,
         "cpos_clamp_len": 2},
        {"tgt_len": 8, "window_len": 4, "chunk_size": 2, "mem_len": 4},
    ],
)  # fmt: skip
def test_the_forward_is_that_of_the_authors_code(published: Any, settings: dict[str, Any]) -> None:
    """In blocks with the cache that it returns; the last block is no whole number of chunks, so they pad it."""
    config = LongShortConfig(**{**SIZES, **settings})
    theirs = published(
        config.vocab_size, config.d_model, config.d_inner, config.n_head, config.n_layer, config.mem_len, 0.0,
        config.chunk_rank, config.chunk_size, config.window_len, 0.0, config.bias, config.pre_norm, config.gelu, False,
        config.clamp_len or -1, config.cpos_clamp_len or -1,
    )  # fmt: skip
    theirs = cases.seeded(theirs)
    ours = LongShortTransformer(config).double().eval()
    known = {
        name: tensor
        for name, tensor in theirs.state_dict().items()
        if name not in ("pos_emb.inv_freq", "out_emb.weight")
    }
    ours.load_state_dict(dict(translated(name, tensor) for name, tensor in known.items()))
    tokens = torch.from_numpy(cases.tokens(2, 3 * config.tgt_len + 3))
    theirs.pos_emb.inv_freq = 10000.0 ** (-torch.arange(0, config.d_model, 2, dtype=torch.float64) / config.d_model)
    cache = [torch.zeros(2, config.mem_len, config.d_model, dtype=torch.float64)] * config.n_layer
    logits = []
    with torch.inference_mode(), mock.patch.object(torch.Tensor, "float", lambda tensor: tensor):
        for block in tokens.split(config.tgt_len, dim=1):
            out, cache, _ = theirs(block, cache)
            logits.append(out)
        want = torch.cat(logits, dim=1).numpy()
        got = ours.full(tokens).log_softmax(dim=-1).numpy()
    assert cases.worst(got, want) <= 1e-10
