"""Recurrent Memory Transformer: against the published equations step by step, the published code, and its states."""

from __future__ import annotations

import importlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from cases import build, eager_session, edited, full, seeded, stream, tokens, worst
from torch import Tensor

from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.recurrent_memory import FAMILY, RecurrentMemory

NAMES = list(tiny.TINY["recurrent-memory"])
LENGTHS = (1, 2, 7, 19)
SETTINGS = {"vocab_size": 11, "n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12}


def model(name: str) -> Any:
    return tiny.model("recurrent-memory", name)


# The oracle: numpy, one stream, the published passes over [cache ; memory ; tokens ; memory].


def weights(reference: RecurrentMemory) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in reference.state_dict().items()}


def layer_norm(x: Array, w: dict[str, Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def published_shift(scores: Array) -> Array:
    """(rows, columns): a zero before every row, then the whole read on in rows of one column less."""
    rows, columns = scores.shape
    padded = np.concatenate([np.zeros((rows, 1)), scores], axis=1)
    return padded.reshape(columns + 1, rows)[1:].reshape(rows, columns)


def sees(query: int, key: int, cached: int, count: int, total: int, from_cache: bool) -> bool:
    """Rows of a segment of `total`, counted with the cache before them."""
    reading, writing = query < count, query >= total - count
    if key < cached:
        return from_cache or not (reading or writing)
    key -= cached
    return key <= query or (reading and key < count) or writing


def attention(rows: Array, context: Array, w: dict[str, Array], prefix: str, config: Any) -> Array:
    columns, cached = len(context), len(context) - len(rows)
    half = config.d_model // 2
    distance = np.minimum(np.arange(columns - 1, -1, -1), config.clamp_len or columns)[:, None]
    angle = distance / 10000 ** (np.arange(half) / half)
    places = np.concatenate([np.sin(angle), np.cos(angle)], axis=1) @ w[f"{prefix}.position.weight"].T
    query, key, value = (
        x @ w[f"{prefix}.{part}.weight"].T for x, part in ((rows, "query"), (context, "key"), (context, "value"))
    )
    count, heads = config.num_mem_tokens, []
    hidden = np.array(
        [
            [not sees(i, j, cached, count, len(rows), config.read_mem_from_cache) for j in range(columns)]
            for i in range(len(rows))
        ]
    )
    for head in range(config.n_head):
        part = slice(head * config.d_head, (head + 1) * config.d_head)
        content = (query[:, part] + w["content_bias"][head]) @ key[:, part].T
        position = published_shift((query[:, part] + w["position_bias"][head]) @ places[:, part].T)
        scores = np.where(hidden, -np.inf, (content + position) / math.sqrt(config.d_head))
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weight / weight.sum(-1, keepdims=True) @ value[:, part])
    return np.concatenate(heads, axis=1) @ w[f"{prefix}.output.weight"].T


def layer(rows: Array, cache: Array, w: dict[str, Array], name: str, config: Any) -> Array:
    context = np.concatenate([cache, rows])
    if config.pre_norm:
        normed = layer_norm(context, w, f"{name}.attention_norm")
        rows = rows + attention(normed[len(cache) :], normed, w, f"{name}.attention", config)
        inner = layer_norm(rows, w, f"{name}.feed_forward_norm")
    else:
        rows = layer_norm(rows + attention(rows, context, w, f"{name}.attention", config), w, f"{name}.attention_norm")
        inner = rows
    inner = np.maximum(inner @ w[f"{name}.feed_forward.0.weight"].T + w[f"{name}.feed_forward.0.bias"], 0)
    rows = rows + inner @ w[f"{name}.feed_forward.3.weight"].T + w[f"{name}.feed_forward.3.bias"]
    return rows if config.pre_norm else layer_norm(rows, w, f"{name}.feed_forward_norm")


def by_segments(reference: RecurrentMemory, ids: Array) -> tuple[Array, Array]:
    """Logits (T, V) of one stream, and the memory after each segment; the last one is filled up with token 0."""
    config, w = reference.config, weights(reference)
    count, length = config.num_mem_tokens, config.tgt_len
    memory, caches = w["memory"], [np.zeros((0, config.d_model))] * config.n_layer
    logits, memories = [], []
    for start in range(0, len(ids), length):
        part = np.pad(ids[start : start + length], (0, max(0, start + length - len(ids))))
        rows = np.concatenate([memory, w["embedding.weight"][part] * math.sqrt(config.d_model), memory])
        for n in range(config.n_layer):
            cache = caches[n]
            caches[n] = np.concatenate([cache, rows])[max(0, len(cache) + len(rows) - config.mem_len) :]
            rows = layer(rows, cache, w, f"layers.{n}", config)
        head = w["embedding.weight"] if config.tie_embedding else w["head_weight"]
        logits.append(rows[count:-count] @ head.T + w["head_bias"])
        memory = rows[-count:]
        memories.append(memory)
    return np.concatenate(logits)[: len(ids)], np.stack(memories)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_model_equals_the_published_passes(name: str, length: int) -> None:
    ids = tokens(2, length)
    found = full(model(name), ids)
    for row in range(2):
        assert worst(found[row], by_segments(model(name), ids[row])[0]) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_hands_on_the_published_memory(name: str) -> None:
    reference, ids = model(name), tokens(1, 13)
    session, length = eager_session(reference), reference.config.tgt_len
    _, memories = by_segments(reference, ids[0])
    before = session.state().states["memory"]
    for position in range(13):
        session.step(ids[:, position : position + 1])
        now = session.state().states["memory"]
        if (position + 1) % length:
            assert worst(now, before) == 0.0, "memory moved within a segment"
        else:
            assert worst(now[0], memories[position // length]) <= 1e-10
        before = now


def test_later_memory_rows_are_scored_as_published() -> None:
    """Without the entries of the published shift, and with a zero for each of them, memory is another one."""
    reference, ids = model("no-cache"), tokens(1, 7)
    wanted = full(reference, ids)
    name = f"{RecurrentMemory.__module__}.shifted"
    with mock.patch(name, lambda scores: torch.nn.functional.pad(scores, (0, scores.shape[-1] + 1))):
        assert worst(full(reference, ids), wanted) > 1e-6


# The published code.


def published(settings: dict[str, Any]) -> Any:
    """`MemTransformerLM` of booydar/LM-RMT, imported from where it lies."""
    root = Path(os.environ.get("MSCOMPILE_PUBLIC_CODE", ""), "LM-RMT/pytorch")
    if not (root / "mem_transformer.py").is_file():
        pytest.skip("no published code: set MSCOMPILE_PUBLIC_CODE to a directory that holds LM-RMT")
    before = dict(sys.modules)
    sys.path[:0] = [str(root), str(root / "utils")]
    try:
        with warnings.catch_warnings(), mock.patch.object(torch.version, "cuda", "12.0"):
            warnings.simplefilter("ignore")
            source = importlib.import_module("mem_transformer")
    finally:
        del sys.path[:2]
        for name in set(sys.modules) - set(before):
            if str(root) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    return source.MemTransformerLM(
        n_token=settings["vocab_size"], n_layer=settings["n_layer"], n_head=settings["n_head"],
        d_model=settings["d_model"], d_head=settings["d_head"], d_inner=settings["d_inner"], dropout=0.0, dropatt=0.0,
        tie_weight=settings.get("tie_embedding", True), pre_lnorm=settings.get("pre_norm", False),
        tgt_len=settings["tgt_len"], ext_len=0, mem_len=settings.get("mem_len", 0),
        num_mem_tokens=settings["num_mem_tokens"], read_mem_from_cache=settings.get("read_mem_from_cache", False),
        clamp_len=settings.get("clamp_len") or -1,
    )  # fmt: skip


def theirs(w: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    """Our weights by their names."""
    yield "mem_tokens", w["memory"][:, None]
    yield "word_emb.emb_layers.0.weight", w["embedding.weight"]
    yield "crit.out_layers.0.weight", w["embedding.weight"] if config.tie_embedding else w["head_weight"]
    yield "crit.out_layers.0.bias", w["head_bias"]
    yield "r_w_bias", w["content_bias"]
    yield "r_r_bias", w["position_bias"]
    for n in range(config.n_layer):
        mine, yours = f"layers.{n}", f"layers.{n}"
        parts = [w[f"{mine}.attention.{part}.weight"] for part in ("query", "key", "value")]
        yield f"{yours}.dec_attn.qkv_net.weight", torch.cat(parts)
        yield f"{yours}.dec_attn.r_net.weight", w[f"{mine}.attention.position.weight"]
        yield f"{yours}.dec_attn.o_net.weight", w[f"{mine}.attention.output.weight"]
        for kind in ("weight", "bias"):
            yield f"{yours}.dec_attn.layer_norm.{kind}", w[f"{mine}.attention_norm.{kind}"]
            yield f"{yours}.pos_ff.layer_norm.{kind}", w[f"{mine}.feed_forward_norm.{kind}"]
            for index in (0, 3):
                yield f"{yours}.pos_ff.CoreNet.{index}.{kind}", w[f"{mine}.feed_forward.{index}.{kind}"]


@pytest.mark.parametrize("name", NAMES)
def test_the_published_code_computes_the_same(name: str) -> None:
    reference, segments = model(name), 4
    config = reference.config
    code = published({**SETTINGS, **tiny.TINY["recurrent-memory"][name]}).double().eval()
    loaded = code.load_state_dict(dict(theirs(reference.state_dict(), config)), strict=False)
    assert set(loaded.missing_keys) <= {"pos_emb.inv_freq"}
    assert not loaded.unexpected_keys
    code.pos_emb.inv_freq = 1 / (10000 ** (torch.arange(0.0, 8, 2.0).double() / 8))
    ids = tokens(2, segments * config.tgt_len)
    count, mems, logits = config.num_mem_tokens, code.init_mems("cpu"), []
    memory = code.mem_tokens.repeat(1, 2, 1)
    byte = mock.patch.object(Tensor, "byte", Tensor.int)  # their masks of bytes count down from 1
    with torch.inference_mode(), byte:
        mems = None if mems is None else [mem.double().reshape(0, 2, 8) for mem in mems]
        for part in torch.from_numpy(ids).split(config.tgt_len, dim=1):
            hidden, mems = code._forward(part.t(), mems=mems, mem_tokens=memory)
            memory = hidden[-count:]
            out = code.crit.out_layers[0]
            logits.append((hidden[count:-count] @ out.weight.t() + out.bias).transpose(0, 1))
    assert worst(full(reference, ids), torch.cat(logits, dim=1).numpy()) <= 1e-6  # they round scores to float32


# The stream.


def test_states_and_what_each_graph_writes() -> None:
    spec = build(model("cache")).spec
    shapes = {state.name: (state.shape, state.update) for state in spec.states if "layer01" not in state.name}
    assert shapes == {
        "memory": (("batch", 3, 8), "replace"),
        "layer00.cache.key": (("batch", 2, 14, 3), "replace"),
        "layer00.cache.value": (("batch", 2, 14, 3), "replace"),
        "layer00.read.key": (("batch", 2, 3, 3), "replace"),
        "layer00.read.value": (("batch", 2, 3, 3), "replace"),
        "layer00.key": (("batch", 2, 4, 3), "append"),
        "layer00.value": (("batch", 2, 4, 3), "append"),
    }
    appended = tuple(state.name for state in spec.states if state.update == "append")
    assert spec.graph("decode").writes == spec.graph("prefill").writes == appended
    assert set(spec.graph("close").writes) == {state.name for state in spec.states} - set(appended)
    assert "memory" not in spec.graph("decode").reads
    assert spec.max_context is None


def test_a_model_without_a_cache_has_no_state_for_it() -> None:
    assert not [state.name for state in build(model("no-cache")).spec.states if "cache" in state.name]


@pytest.mark.parametrize(("max_chunk", "longest"), [(16, 4), (3, 3)])
def test_segments_close_at_their_end(max_chunk: int, longest: int) -> None:
    ticks = (Tick(("decode",), repeat=3), Tick(("decode",), closing=("close",)))
    assert build(model("cache"), max_chunk=max_chunk).spec.schedule == Schedule(ticks, "prefill", 1, longest)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [0, 1, 3, 4, 9])
def test_what_a_first_segment_or_a_short_cache_lacks_is_not_read(name: str, before: int) -> None:
    reference, ids = model(name), tokens(1, before + 11)
    config = reference.config
    wanted = full(reference, ids)[:, before:]
    session = eager_session(reference)
    if before:
        session.step(ids[:, :before])
    snapshot, segment = session.state(), before // config.tgt_len
    garbage = {}
    for state, value in snapshot.states.items():
        unfilled = max(0, config.mem_len - segment * config.rows)
        if "cache" in state:
            garbage[state] = np.concatenate([np.full_like(value[:, :, :unfilled], 1e6), value[:, :, unfilled:]], axis=2)
        elif segment == 0 and ("read" in state or state == "memory"):
            garbage[state] = np.full_like(value, 1e6)
    session.restore(edited(snapshot, garbage))
    assert worst(stream(session, ids[:, before:], [1, 4, 1, 5]), wanted) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_the_published_carry_equals_the_full_forward(name: str) -> None:
    reference, ids = model(name), torch.from_numpy(tokens(3, 12))
    with torch.inference_mode():
        wanted = reference.full(ids)
        first, carry = reference.advance(ids[:, :5])
        second, carry = reference.advance(ids[:, 5:6], carry)
        third, _ = reference.advance(ids[[2, 0], 6:], reference.select(carry, [2, 0]))
    assert (torch.cat([first, second], dim=1) - wanted[:, :6]).abs().max() <= 1e-10
    assert (third - wanted[[2, 0], 6:]).abs().max() <= 1e-10


def test_memory_reaches_over_segments() -> None:
    """A token of the first segment changes logits of the third, without any cache: through memory alone."""
    reference, ids = model("no-cache"), tokens(1, 9)
    changed = ids.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 11
    assert worst(full(reference, changed)[:, 6:], full(reference, ids)[:, 6:]) > 1e-6


def test_a_new_model_starts_with_copies_of_one_memory_row() -> None:
    config = FAMILY.parse_config({**SETTINGS, "num_mem_tokens": 3, "tgt_len": 4})
    memory = RecurrentMemory(config).memory
    assert (memory == memory[0]).all()
    assert memory.std() > 0.1
    assert seeded(RecurrentMemory(config)).memory.shape == (3, 8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_mem_tokens": 0}, "num_mem_tokens must be a whole number of at least 1, not 0"),
        ({"tgt_len": 0}, "tgt_len must be a whole number of at least 1, not 0"),
        ({"mem_len": -1}, "mem_len must be a whole number of at least 1, not -1"),
        ({"d_model": 7}, "d_model must be even for sinusoid positions, not 7"),
        ({"read_mem_from_cache": True}, "read_mem_from_cache needs a cache: mem_len of at least 1, not 0"),
        ({"clamp_len": 0}, "clamp_len must be a whole number of at least 1, not 0"),
        ({"pre_norm": 1}, "pre_norm must be true or false, not 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FAMILY.parse_config({**SETTINGS, "num_mem_tokens": 3, "tgt_len": 4, **changes})
    assert str(caught.value) == sentence


def test_settings_of_the_published_code_that_are_not_there_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^recurrent-memory has no setting same_length; it has clamp_len, "):
        FAMILY.parse_config({**SETTINGS, "num_mem_tokens": 3, "tgt_len": 4, "same_length": True})
