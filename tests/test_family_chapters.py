"""Mixture of Chapters: against its equations token by token; routing, its memory and the bank as a constant."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from cases import build, eager_session, full, seeded, stream, tokens, worst

from exporters import export, weights
from exporters.families.chapters import AbsorbedChapterAttention
from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.attention import Attention
from mscompile.models.chapters import FAMILY, Chapters, ChaptersMemoryBlock, Router

NAMES = list(tiny.TINY["chapters"])


def new_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Chapters:
    values = {"vocab_size": tiny.VOCAB, **tiny.TINY["chapters"][name], **settings}
    return seeded(Chapters(FAMILY.parse_config(values)), dtype)


# The oracle: numpy, one token at a time, as the published code decodes: a list of the last inputs for each router,
# the chosen chapters weighted, joined, and attended to.


def norm(row: Array, weight: Array, eps: float) -> Array:
    return row / np.sqrt((row * row).mean(axis=-1, keepdims=True) + eps) * weight


def softmax(scores: Array) -> Array:
    share = np.exp(scores - np.max(scores))
    return share / share.sum()


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def turned(vector: Array, position: int, base: float) -> Array:
    """Rotary embedding as a product of complex numbers; number m is made of entries m and m + half."""
    half = len(vector) // 2
    numbers = vector[:half] + 1j * vector[half:]
    numbers = numbers * np.exp([1j * position / base ** (m / half) for m in range(half)])
    return np.concatenate([numbers.real, numbers.imag])


class Decoder:
    """Everything that decoding remembers."""

    def __init__(self, model: Chapters) -> None:
        self.config: Any = model.config
        self.w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        self.inputs: list[list[Array]] = [[] for _ in range(self.config.n_layer)]
        self.normed: list[list[Array]] = [[] for _ in range(self.config.n_layer)]
        self.chosen: list[list[int]] = []

    def step(self, token: int) -> Array:
        x = self.w["embedding.weight"][token]
        for layer in range(self.config.n_layer):
            x = self.layer(x, layer)
        return self.w["embedding.weight"] @ norm(x, self.w["norm.weight"], self.config.norm_eps)

    def layer(self, x: Array, layer: int) -> Array:
        name, w, config = f"blocks.{layer}", self.w, self.config
        self.inputs[layer] = [*self.inputs[layer], x][-config.routing_window_size :]
        self.normed[layer].append(norm(x, w[f"{name}.attention_norm.weight"], config.norm_eps))
        memory = self.memory(layer) if layer in config.memory_layers else None
        x = x + self.attended(self.normed[layer], f"{name}.attention")
        if memory is not None:
            rows = norm(x, w[f"{name}.memory_norm.weight"], config.norm_eps)
            x = x + self.read(rows, memory, f"{name}.memory")
        rows = norm(x, w[f"{name}.feed_forward_norm.weight"], config.norm_eps)
        gate, up = w[f"{name}.feed_forward.gate.weight"] @ rows, w[f"{name}.feed_forward.up.weight"] @ rows
        return x + w[f"{name}.feed_forward.down.weight"] @ (silu(gate) * up)

    def attended(self, rows: list[Array], name: str) -> Array:
        config, mixed = self.config, []
        width, group = config.d_model // config.n_head, config.n_head // config.n_kv_head
        query, last = self.w[f"{name}.query.weight"] @ rows[-1], len(rows) - 1
        for head in range(config.n_head):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head // group * width, (head // group + 1) * width)
            asked = turned(query[own], last, config.rope_theta)
            keys = [
                turned((self.w[f"{name}.key.weight"] @ row)[shared], place, config.rope_theta)
                for place, row in enumerate(rows)
            ]
            share = softmax(np.array([asked @ key / math.sqrt(width) for key in keys]))
            values = [(self.w[f"{name}.value.weight"] @ row)[shared] for row in rows]
            mixed.append(sum(a * value for a, value in zip(share, values, strict=True)))
        return self.w[f"{name}.output.weight"] @ np.concatenate(mixed)

    def memory(self, layer: int) -> Array:
        """The weighted rows of the chosen chapters."""
        config, name = self.config, f"blocks.{layer}.router.linear"
        pooled = np.mean(self.inputs[layer], axis=0)
        probability = softmax(self.w[f"{name}.weight"] @ pooled + self.w[f"{name}.bias"])
        shared = list(range(config.num_shared_chapters))
        probability[shared] = 0.0
        probability = probability / probability.sum()
        routed = sorted(range(config.num_chapters), key=lambda chapter: -probability[chapter])[: config.top_k_chapters]
        share = np.array([probability[chapter] for chapter in routed])
        share = share / share.sum()
        if shared:
            share = np.concatenate([np.ones(len(shared)), config.routed_scaling_factor * share])
            share = share / share.sum()
        self.chosen.append([*shared, *routed])
        bank = self.w["bank"].reshape(config.num_chapters, -1, config.d_model)
        if shared and config.normalize_memory:
            bank = norm(bank, np.ones(config.d_model), config.norm_eps)
        return np.concatenate([bank[chapter] * a for chapter, a in zip(self.chosen[-1], share, strict=True)])

    def read(self, row: Array, memory: Array, name: str) -> Array:
        config, mixed = self.config, []
        width, group = config.d_model // config.memory_n_head, config.memory_n_head // config.memory_n_kv_head
        query = self.w[f"{name}.query.weight"] @ row
        keys, values = memory @ self.w[f"{name}.key.weight"].T, memory @ self.w[f"{name}.value.weight"].T
        for head in range(config.memory_n_head):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head // group * width, (head // group + 1) * width)
            share = softmax(keys[:, shared] @ query[own] / math.sqrt(width))
            mixed.append(share @ values[:, shared])
        return self.w[f"{name}.output.weight"] @ np.concatenate(mixed)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_what_the_equations_say(name: str) -> None:
    model, ids = new_model(name), tokens(2, 11)
    logits = full(model, ids)
    for row in range(2):
        decoder = Decoder(model)
        assert worst(logits[row], np.array([decoder.step(token) for token in ids[row]])) < 1e-10


@pytest.mark.parametrize(
    "settings",
    [
        {"num_shared_chapters": 0},
        {"num_shared_chapters": 3, "top_k_chapters": 3},
        {"routed_scaling_factor": 0.5},
        {"memory_n_kv_head": 4},
        {"memory_n_head": 1, "memory_n_kv_head": 1},
        {"n_kv_head": 2},
        {"n_head": 4, "n_kv_head": 2},
        {"rope_theta": 7.0},
        {"norm_eps": 0.1},
    ],
    ids=str,
)
def test_streams_follow_every_setting(settings: dict[str, Any]) -> None:
    model, ids = new_model("rolling", **settings), tokens(1, 9)
    decoder = Decoder(model)
    want = np.array([decoder.step(token) for token in ids[0]])
    assert worst(want, full(new_model("rolling"), ids)[0]) > 1e-3  # the setting matters
    assert worst(stream(eager_session(model), ids, [1, 4, 3, 1])[0], want) < 1e-10


# Keys that are shared by groups of heads


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_shared_keys_are_repeated_ones(shared: int) -> None:
    few = seeded(Attention(8, 4, rotary=True, n_kv_head=shared, window=3))  # type: ignore[type-var]
    many = Attention(8, 4, rotary=True, window=3).double()
    with torch.no_grad():
        for name in ("query", "output"):
            getattr(many, name).load_state_dict(getattr(few, name).state_dict())
        for name in ("key", "value"):
            own, whole = getattr(few, name), getattr(many, name)
            whole.weight.copy_(own.weight.unflatten(0, (shared, 2)).repeat_interleave(4 // shared, dim=0).flatten(0, 1))
            whole.bias.copy_(own.bias.unflatten(0, (shared, 2)).repeat_interleave(4 // shared, dim=0).flatten())
    rows = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (few(rows) - many(rows)).abs().max() < 1e-12


# Routing


def test_a_token_routes_by_its_window_and_nothing_else() -> None:
    router = Router(new_model("rolling").config).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    pooled = router.pooled(x)
    for position in range(12):
        window = x[0, max(0, position - 4) : position + 1]
        assert (pooled[0, position] - window.mean(dim=0)).abs().max() < 1e-12


def test_weights_sum_to_one_and_shared_chapters_come_first() -> None:
    router = seeded(Router(new_model("long-window").config))
    ids, weights = router(torch.randn(2, 5, 8, dtype=torch.float64))
    assert (weights.sum(dim=-1) - 1).abs().max() < 1e-12
    assert (ids[..., :2] == torch.tensor([0, 1])).all()
    assert (ids[..., 2:] >= 2).all()
    assert (weights[..., :2] - 1 / 4.5).abs().max() < 1e-12


def test_training_with_the_whole_text_is_another_model() -> None:
    """Why "sequence" is refused: with it, the first token's chapters would change with the last token."""
    model = new_model("rolling", routing_window_size=30)
    block = model.blocks[1]
    assert isinstance(block, ChaptersMemoryBlock)
    ids = torch.from_numpy(tokens(1, 12))
    x = model.blocks[0](model.embedding(ids), model.chapters())
    first, whole = block.router.choose(x[:, :1]), block.router.choose(x.mean(dim=1, keepdim=True))
    assert (first[1] - whole[1]).abs().max() > 1e-3


# The exchange of projections


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_projections_are_exchanged_with_sums(heads: int, shared: int) -> None:
    model = new_model("rolling", memory_n_head=heads, memory_n_kv_head=shared)
    block = model.blocks[1]
    assert isinstance(block, ChaptersMemoryBlock)
    rows, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 7, 8, dtype=torch.float64)
    share = torch.rand(2, 3, 7, dtype=torch.float64)
    want = block.memory(rows, memory * share[..., None])
    assert (AbsorbedChapterAttention(block.memory)(rows, memory, share) - want).abs().max() < 1e-12


# The graphs


@cache
def exported() -> tuple[Chapters, Any]:
    model = new_model("rolling", torch.float32)
    return model, export.export_graph(build(model), "decode")


@pytest.mark.slow
def test_the_bank_is_one_constant() -> None:
    model, graph = exported()
    banks = [
        value for value in graph.graph.initializers.values() if math.prod(map(int, value.shape)) == model.bank.numel()
    ]
    assert [tuple(value.shape) for value in banks] == [(6, 24)]
    assert [node.op_type for node, _ in banks[0].uses()] == ["Gather"]
    assert worst(banks[0].const_value.numpy(), model.chapters().numpy()) == 0.0


@pytest.mark.slow
def test_graphs_choose_the_chapters_that_the_model_chooses(tmp_path: Path) -> None:
    _, graph = exported()
    weights.save({"decode": graph.clone()}, tmp_path)
    proto = onnx.load(tmp_path / "decode.onnx")
    bank = next(tensor.name for tensor in proto.graph.initializer if list(tensor.dims) == [6, 24])
    (ids,) = [node.input[1] for node in proto.graph.node if node.op_type == "Gather" and node.input[0] == bank]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(ids, onnx.TensorProto.INT64, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for token in range(tiny.VOCAB):
        decoder = Decoder(new_model("rolling"))
        decoder.step(token)
        inputs = {given.name: np.zeros([d if isinstance(d, int) else 1 for d in given.shape], dtype=np.float32)
                  for given in session.get_inputs()[2:]}  # fmt: skip
        inputs |= {"tokens": np.array([[token]]), "position": np.zeros(1, dtype=np.int64)}
        assert session.run([ids], inputs)[0].ravel().tolist() == decoder.chosen[0]


# Interface


def test_states_are_keys_of_few_heads_and_the_windows_of_memory_layers() -> None:
    spec = build(tiny.model("chapters", "rolling")).spec
    assert [(state.name, state.shape, state.update) for state in spec.states] == [
        ("layer00.attention.key", ("batch", 1, tiny.CONTEXT, 4), "append"),
        ("layer00.attention.value", ("batch", 1, tiny.CONTEXT, 4), "append"),
        ("layer01.attention.key", ("batch", 1, tiny.CONTEXT, 4), "append"),
        ("layer01.attention.value", ("batch", 1, tiny.CONTEXT, 4), "append"),
        ("layer01.routing.rows", ("batch", 4, 8), "append"),
    ]
    assert spec.schedule == Schedule((Tick(("decode",)),), "prefill", 1, 8)
    assert spec.max_context == tiny.CONTEXT


def test_a_window_of_one_remembers_no_inputs() -> None:
    spec = build(tiny.model("chapters", "all-routed")).spec
    assert not [state.name for state in spec.states if "routing" in state.name]


def test_memory_says_nothing_before_training() -> None:
    block = Chapters(FAMILY.parse_config({"vocab_size": tiny.VOCAB, **tiny.TINY["chapters"]["rolling"]})).blocks[1]
    assert isinstance(block, ChaptersMemoryBlock)
    assert not block.memory.output.weight.any()


POOLS = "pools the whole text, so that the chapters of a token depend on the tokens after it"
ROLLING = "the strategy that streams is 'rolling'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing_strategy": "sequence"}, f"routing_strategy 'sequence' {POOLS}; {ROLLING}"),
        ({"routing_strategy": "sequence-rolling"}, f"routing_strategy 'sequence-rolling' {POOLS}; {ROLLING}"),
        ({"routing_strategy": "hybrid"}, f"routing_strategy 'hybrid' {POOLS} within the prompt; {ROLLING}"),
        (
            {"routing_strategy": "token"},
            "routing_strategy 'token' attends to each chapter apart, which is another model and not offered here; "
            + ROLLING,
        ),
        ({"routing_strategy": "random"}, "routing_strategy must be 'rolling', not 'random'"),
        ({"num_memory_tokens": 19}, "num_memory_tokens 19 must be a multiple of num_chapters 6"),
        (
            {"top_k_chapters": 6},
            "num_shared_chapters 1 and top_k_chapters 6 must be chapters apart of the 6 there are",
        ),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor must be above 0, not 0"),
        ({"n_kv_head": 3}, "n_head 2 must be a multiple of n_kv_head 3"),
        ({"memory_n_kv_head": 3}, "memory_n_head 4 must be a multiple of memory_n_kv_head 3"),
        ({"memory_n_head": 3}, "d_model 8 must be a multiple of memory_n_head 3"),
        ({"n_head": 8}, "d_model 8 must be a multiple of twice n_head 8, for rotary positions"),
        ({"normalize_memory": 1}, "normalize_memory must be true or false, not 1"),
        ({"memory_layers": [2]}, "memory_layers must be numbers from 0 to 1 in rising order, not [2]"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        new_model("rolling", **settings)
    assert str(refused.value) == message
