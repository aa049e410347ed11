"""The wrapper form of the Recurrent Memory Transformer: against its equations, GPT-2 itself, and its states."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cases import build, eager_session, edited, full, stream, tokens, worst
from torch import Tensor

from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.recurrent_memory_wrapper import FAMILY

NAMES = list(tiny.TINY["recurrent-memory-wrapper"])
SETTINGS = {
    "vocab_size": 11, "num_mem_tokens": 3, "segment_size": 4, "n_layer": 2, "d_model": 8, "n_head": 2, "d_ff": 12,
    "n_positions": 10,
}  # fmt: skip


def model(name: str) -> Any:
    return tiny.model("recurrent-memory-wrapper", name)


# The oracle: numpy, one stream, row after row. Keys of earlier rows are kept in lists.


def norm(row: Array, w: dict[str, Array], name: str) -> Array:
    return (row - row.mean()) / np.sqrt(row.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(row: Array, w: dict[str, Array], name: str) -> Array:
    return w[f"{name}.weight"] @ row + w[f"{name}.bias"]


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def block(row: Array, seen: list[tuple[Array, Array]], w: dict[str, Array], name: str, heads: int) -> Array:
    """One row through one block; `seen` are keys and values of the rows before it, and gains its own."""
    normed = norm(row, w, f"{name}.attention_norm")
    query, key, value = (dense(normed, w, f"{name}.attention.{part}") for part in ("query", "key", "value"))
    seen.append((key, value))
    mixed, width = [], len(row) // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = np.array([query[part] @ key[part] for key, _ in seen]) / math.sqrt(width)
        weight = np.exp(scores - scores.max())
        mixed.append(sum(share * value[part] for share, (_, value) in zip(weight / weight.sum(), seen, strict=True)))
    row = row + dense(np.concatenate(mixed), w, f"{name}.attention.output")
    inner = gelu(dense(norm(row, w, f"{name}.feed_forward_norm"), w, f"{name}.feed_forward.0"))
    return row + dense(inner, w, f"{name}.feed_forward.2")


def by_rows(reference: Any, ids: Array) -> tuple[Array, list[Array]]:
    """Logits (T, V) of one stream, and the memory after each whole segment."""
    config, w = reference.config, {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    memory, logits, memories = w["memory"], [], []
    head = w["embedding.weight"] if config.tie_embedding else w["head_weight"]
    for start in range(0, len(ids), config.segment_size):
        part = ids[start : start + config.segment_size]
        rows = [*memory, *w["embedding.weight"][part], *memory]
        seen: list[list[tuple[Array, Array]]] = [[] for _ in range(config.n_layer)]
        out = []
        for place, entering in enumerate(rows):
            row = entering + w["position_embedding.weight"][place]
            for n in range(config.n_layer):
                row = block(row, seen[n], w, f"stack.blocks.{n}", config.n_head)
            out.append(norm(row, w, "norm"))
        count = config.num_mem_tokens
        logits += [head @ row for row in out[count:-count]]
        memory = np.stack(out[-count:])
        memories.append(memory)
    return np.stack(logits), memories[: len(ids) // config.segment_size]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 2, 7, 14])
def test_the_model_equals_the_equations_row_by_row(name: str, length: int) -> None:
    ids = tokens(2, length)
    found = full(model(name), ids)
    for row in range(2):
        assert worst(found[row], by_rows(model(name), ids[row])[0]) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_hands_on_the_last_rows_of_whole_segments(name: str) -> None:
    reference, ids = model(name), tokens(1, 10)
    session, length = eager_session(reference), reference.config.segment_size
    _, memories = by_rows(reference, ids[0])
    before = session.state().states["memory"]
    for position in range(10):
        session.step(ids[:, position : position + 1])
        now = session.state().states["memory"]
        closed = (position + 1) % length == 0
        assert worst(now[0], memories[position // length] if closed else before[0]) <= 1e-10
        before = now


# The decoder that it wraps, as published.


def theirs(w: dict[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    """Our weights by the names of GPT-2, whose matrices are transposed."""
    yield "transformer.wte.weight", w["embedding.weight"]
    yield "lm_head.weight", w["embedding.weight"]
    yield "transformer.wpe.weight", w["position_embedding.weight"]
    for n in range(layers):
        mine, yours = f"stack.blocks.{n}", f"transformer.h.{n}"
        for kind, turn in (("weight", True), ("bias", False)):
            parts = torch.cat([w[f"{mine}.attention.{part}.{kind}"] for part in ("query", "key", "value")])
            matrices = {
                "attn.c_attn": parts,
                "attn.c_proj": w[f"{mine}.attention.output.{kind}"],
                "mlp.c_fc": w[f"{mine}.feed_forward.0.{kind}"],
                "mlp.c_proj": w[f"{mine}.feed_forward.2.{kind}"],
            }
            for name, tensor in matrices.items():
                yield f"{yours}.{name}.{kind}", tensor.t() if turn else tensor
            yield f"{yours}.ln_1.{kind}", w[f"{mine}.attention_norm.{kind}"]
            yield f"{yours}.ln_2.{kind}", w[f"{mine}.feed_forward_norm.{kind}"]
    for kind in ("weight", "bias"):
        yield f"transformer.ln_f.{kind}", w[f"norm.{kind}"]


def test_a_published_gpt2_between_memory_rows_computes_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    reference, ids = model("wrapper"), tokens(2, 11)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=10, n_embd=8, n_layer=2, n_head=2, n_inner=12,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    gpt2 = transformers.GPT2LMHeadModel(config).double().eval()
    gpt2.load_state_dict(dict(theirs(reference.state_dict(), 2)))
    memory, logits = reference.memory.expand(2, -1, -1), []
    with torch.inference_mode():
        for part in torch.from_numpy(ids).split(4, dim=1):
            rows = torch.cat([memory, gpt2.get_input_embeddings()(part), memory], dim=1)
            out = gpt2(inputs_embeds=rows, output_hidden_states=True)
            memory = out.hidden_states[-1][:, -3:]
            logits.append(out.logits[:, 3:-3])
    assert worst(full(reference, ids), torch.cat(logits, dim=1).numpy()) <= 1e-10


# The stream.


def test_states_and_what_each_graph_writes() -> None:
    spec = build(model("wrapper")).spec
    shapes = {state.name: (state.shape, state.update) for state in spec.states if "layer01" not in state.name}
    assert shapes == {
        "memory": (("batch", 3, 8), "replace"),
        "layer00.read.key": (("batch", 2, 3, 4), "replace"),
        "layer00.read.value": (("batch", 2, 3, 4), "replace"),
        "layer00.key": (("batch", 2, 4, 4), "append"),
        "layer00.value": (("batch", 2, 4, 4), "append"),
    }
    appended = {state.name for state in spec.states if state.update == "append"}
    assert set(spec.graph("decode").writes) == set(spec.graph("prefill").writes) == appended
    assert set(spec.graph("close").writes) == {state.name for state in spec.states} - appended
    assert spec.max_context is None
    ticks = (Tick(("decode",), repeat=3), Tick(("decode",), closing=("close",)))
    assert spec.schedule == Schedule(ticks, "prefill", chunk_multiple=1, max_chunk=4)


def test_a_segment_of_one_token_closes_after_each_and_has_no_prefill() -> None:
    spec = build(model("untied-segment-of-one")).spec
    assert spec.schedule == Schedule((Tick(("decode",), closing=("close",)),), None, 1, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_the_first_segment_reads_constants_whatever_its_states_hold(name: str, before: int) -> None:
    reference, ids = model(name), tokens(1, before + 9)
    session = eager_session(reference)
    if before:
        session.step(ids[:, :before])
    snapshot = session.state()
    garbage = {
        state: np.full_like(value, 1e6)
        for state, value in snapshot.states.items()
        if ("read" in state or state == "memory") and before < reference.config.segment_size
    }
    session.restore(edited(snapshot, garbage))
    assert worst(stream(session, ids[:, before:], [1, 4, 4]), full(reference, ids)[:, before:]) <= 1e-10


def test_memory_reaches_over_segments() -> None:
    reference, ids = model("wrapper"), tokens(1, 12)
    changed = ids.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 11
    assert worst(full(reference, changed)[:, 8:], full(reference, ids)[:, 8:]) > 1e-6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_mem_tokens": 0}, "num_mem_tokens must be a whole number of at least 1, not 0"),
        ({"n_head": 3}, "d_model 8 must be a multiple of n_head 3"),
        ({"tie_embedding": "yes"}, "tie_embedding must be true or false, not 'yes'"),
        (
            {"segment_alignment": "right"},
            (
                "segment_alignment must be 'left', not 'right': otherwise where the first segment ends depends on how "
                "many tokens will follow, which a stream cannot know"
            ),
        ),
        (
            {"n_positions": 9},
            "a segment of 4 tokens between 2 x 3 memory rows needs n_positions of at least 10, not 9",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FAMILY.parse_config({**SETTINGS, **changes})
    assert str(caught.value) == sentence
