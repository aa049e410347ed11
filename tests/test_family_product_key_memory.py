"""Memory layers: against their equations slot by slot; the folded BatchNorm; one table in the graphs; chosen slots."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
import torch
from cases import build, eager_session, full, seeded, stream, tokens, worst

from exporters import export, weights
from exporters.families.product_key_memory import folded
from exporters.passes import table
from mscompile import checkpoint
from mscompile.contracts import Array, Schedule, Tick
from mscompile.errors import ConfigError
from mscompile.models.product_key_memory import FAMILY, MemoryBlock, ProductKeyMemory, Queries

NAMES = list(tiny.TINY["product-key-memory"])


def new_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> ProductKeyMemory:
    """A tiny model whose BatchNorm has seen something."""
    values = {"vocab_size": tiny.VOCAB, **tiny.TINY["product-key-memory"][name], **settings}
    model = seeded(ProductKeyMemory(FAMILY.parse_config(values)), dtype)
    generator = torch.Generator().manual_seed(1)
    for buffer_name, buffer in model.named_buffers():
        noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
        buffer.copy_(noise + 0.5 if buffer_name.endswith("var") else noise - 0.5)
    return model


# The oracle: numpy, one row of the stream at a time. All n * n slots are scored and sorted, none is left out by halves.


def norm(row: Array, w: dict[str, Array], name: str) -> Array:
    return (row - row.mean()) / np.sqrt(row.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(row: Array, w: dict[str, Array], name: str) -> Array:
    return w[f"{name}.weight"] @ row + w[f"{name}.bias"]


def gelu(x: Array) -> Array:
    return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])


def turned(vector: Array, position: int) -> Array:
    """Rotary embedding as a product of complex numbers; number m is made of entries m and m + half."""
    half = len(vector) // 2
    numbers = vector[:half] + 1j * vector[half:]
    numbers = numbers * np.exp([1j * position / 10000 ** (m / half) for m in range(half)])
    return np.concatenate([numbers.real, numbers.imag])


def attended(rows: list[Array], w: dict[str, Array], name: str, heads: int) -> Array:
    """What the last of the rows gets from all of them."""
    width, mixed = len(rows[0]) // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        query = turned(dense(rows[-1], w, f"{name}.query")[part], len(rows) - 1)
        keys = [turned(dense(row, w, f"{name}.key")[part], place) for place, row in enumerate(rows)]
        share = np.exp([query @ key / math.sqrt(width) for key in keys])
        values = [dense(row, w, f"{name}.value")[part] for row in rows]
        mixed.append(sum(a * value for a, value in zip(share / share.sum(), values, strict=True)))
    return dense(np.concatenate(mixed), w, f"{name}.output")


def queries(row: Array, w: dict[str, Array], name: str, config: Any) -> Array:
    """(heads, 2, half)."""
    query = dense(row, w, f"{name}.linear")
    if config.query_norm == "batch":
        mean, variance = w[f"{name}.norm.running_mean"], w[f"{name}.norm.running_var"]
        query = (query - mean) / np.sqrt(variance + 1e-5) * w[f"{name}.norm.weight"] + w[f"{name}.norm.bias"]
    halves = query.reshape(config.mem_heads, 2, -1)
    if config.query_norm == "layer":
        halves = np.array([[norm(half, w, f"{name}.norm") for half in head] for head in halves])
    return halves


def slots(row: Array, w: dict[str, Array], name: str, config: Any) -> Iterator[tuple[int, float]]:
    """(slot, weight) of every head, best first."""
    n = config.mem_n_keys
    for head, (first, second) in enumerate(queries(row, w, f"{name}.queries", config)):
        keys = w[f"{name}.keys"][head]
        scores = {i * n + j: keys[0, i] @ first + keys[1, j] @ second for i in range(n) for j in range(n)}
        best = sorted(scores, key=lambda slot: -scores[slot])[: config.mem_knn]
        share = np.exp([scores[slot] - scores[best[0]] for slot in best])
        yield from zip(best, share / share.sum(), strict=True)


def memory(row: Array, w: dict[str, Array], name: str, values: str, config: Any) -> Array:
    found = np.zeros_like(row)
    for slot, weight in slots(row, w, f"{name}.lookup", config):
        if config.kind == "peer":
            weight = weight * gelu(np.array([row @ w[f"{values}.down"][slot]]))[0]
        found = found + weight * w[f"{values}.weight"][slot]
    if config.kind != "memory+":
        return found
    gate = dense(row, w, f"{name}.gate")
    return dense(found * gate / (1 + np.exp(-gate)), w, f"{name}.output")


def oracle(model: ProductKeyMemory, ids: Array) -> Array:
    """Logits (T, V) of tokens (T,)."""
    config = model.config
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    rows = [w["embedding.weight"][token] for token in ids]
    for layer in range(config.n_layer):
        name = f"blocks.{layer}"
        normed = [norm(row, w, f"{name}.attention_norm") for row in rows]
        rows = [row + attended(normed[: t + 1], w, f"{name}.attention", config.n_head) for t, row in enumerate(rows)]
        if layer in config.memory_layers:
            number = 0 if config.mem_share_values else list(config.memory_layers).index(layer)
            rows = [
                row + memory(norm(row, w, f"{name}.memory_norm"), w, name, f"values.{number}", config) for row in rows
            ]
        else:
            inner = [
                gelu(dense(norm(row, w, f"{name}.feed_forward_norm"), w, f"{name}.feed_forward.0")) for row in rows
            ]
            rows = [row + dense(i, w, f"{name}.feed_forward.2") for row, i in zip(rows, inner, strict=True)]
    return np.array([w["output.weight"] @ norm(row, w, "norm") for row in rows])


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_what_the_equations_say(name: str) -> None:
    model, ids = new_model(name), tokens(2, 9)
    logits = full(model, ids)
    for row in range(2):
        assert worst(logits[row], oracle(model, ids[row])) < 1e-10


@pytest.mark.parametrize("kind", ["pkm", "memory+", "peer"])
@pytest.mark.parametrize("query_norm", ["none", "batch", "layer"])
def test_every_kind_goes_with_every_norm(kind: str, query_norm: str) -> None:
    model, ids = new_model("memory+", kind=kind, query_norm=query_norm), tokens(1, 5)
    assert worst(full(model, ids)[0], oracle(model, ids[0])) < 1e-10
    assert worst(stream(eager_session(model), ids, [2, 1, 2])[0], oracle(model, ids[0])) < 1e-10


# The BatchNorm


def queries_of(name: str) -> tuple[Queries, torch.Tensor]:
    block = new_model(name).blocks[1]
    assert isinstance(block, MemoryBlock)
    return block.lookup.queries, torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_batch_norm_is_folded_into_the_projection() -> None:
    module, x = queries_of("pkm-batch-norm")
    linear = folded(module)
    assert linear is not module.linear
    assert (module.split(linear(x)) - module(x)).abs().max() < 1e-12
    assert (module.split(module.linear(x)) - module(x)).abs().max() > 0.1  # it does something


def test_a_layer_norm_stays() -> None:
    module, x = queries_of("peer-layer-norm")
    assert folded(module) is module.linear
    assert (module.split(module.linear(x)) - module(x)).abs().max() < 1e-12


def test_batch_statistics_survive_a_checkpoint(tmp_path: Path) -> None:
    model, ids = new_model("pkm-batch-norm", torch.float32), tokens(1, 4)
    checkpoint.save(tmp_path / "m.pt", FAMILY.name, model, tuple("abcdefghijk"))
    assert worst(full(checkpoint.load(tmp_path / "m.pt").model, ids), full(model, ids)) == 0.0


# The graphs


@cache
def prefill(name: str) -> ir.Model:
    """The graph of many tokens, after the passes."""
    program = build(new_model_once(name))
    spec = replace(program.spec, graphs=(program.spec.graph("prefill"),))
    graphs = {"prefill": export.export_graph(program, "prefill")}
    table.run(graphs, spec)
    return graphs["prefill"]


@cache
def new_model_once(name: str) -> ProductKeyMemory:
    return new_model(name, torch.float32)


TABLES = {"memory+": (1, 2), "pkm-batch-norm": (1, 1), "peer-layer-norm": (4, 4)}  # and how often they are read


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_shared_values_are_one_initializer_of_several_gathers(name: str) -> None:
    config, (tables, gathers) = new_model_once(name).config, TABLES[name]
    shape = (config.mem_n_keys**2, config.d_model)
    values = [value for value in prefill(name).graph.initializers.values() if tuple(value.shape or ()) == shape]
    assert len(values) == tables
    assert [node.op_type for value in values for node, _ in value.uses()] == ["Gather"] * gathers


def chosen(model: ProductKeyMemory, ids: Array) -> list[tuple[Array, Array]]:
    """Slots and weights (B, T, heads, knn) of every memory layer."""
    found: list[tuple[Array, Array]] = []
    shape = (*ids.shape, model.config.mem_heads, model.config.mem_knn)
    lookups = [block.lookup for block in model.blocks if isinstance(block, MemoryBlock)]
    hooks = [
        lookup.register_forward_hook(lambda _m, _i, out: found.append(tuple(x.numpy().reshape(shape) for x in out)))
        for lookup in lookups
    ]
    full(model, ids)
    for hook in hooks:
        hook.remove()
    return found


def chosen_by_graph(name: str, ids: Array, directory: Path) -> list[Array]:
    """The slots that the prefill graph gathers in ONNX Runtime, in the order of layers."""
    model = new_model_once(name)
    weights.save({"prefill": prefill(name).clone()}, directory)
    proto = onnx.load(directory / "prefill.onnx")
    shape = [model.config.mem_n_keys**2, model.config.d_model]
    values = {tensor.name for tensor in proto.graph.initializer if list(tensor.dims) == shape}
    read = [node.input[1] for node in proto.graph.node if node.op_type == "Gather" and node.input[0] in values]
    slots = list(dict.fromkeys(read))
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(slot, onnx.TensorProto.INT64, None) for slot in slots)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs: dict[str, Array] = {"tokens": ids, "position": np.zeros(len(ids), dtype=np.int64)}
    for given in session.get_inputs()[2:]:
        _, heads, _, width = given.shape
        inputs[given.name] = np.zeros((len(ids), heads, 0, width), dtype=np.float32)
    shape = [*ids.shape, model.config.mem_heads, model.config.mem_knn]
    return [found.reshape(shape) for found in session.run(slots, inputs)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_graphs_choose_the_slots_that_the_model_chooses(name: str, tmp_path: Path) -> None:
    """In FP32 slots may change places where their scores are equal but for rounding, and nowhere else."""
    ids = tokens(3, 7)
    wanted, found = chosen(new_model_once(name), ids), chosen_by_graph(name, ids, tmp_path)
    assert len(wanted) == len(found) == len(new_model_once(name).config.memory_layers)
    for (slots, shares), other in zip(wanted, found, strict=True):
        moved = slots != other
        gaps = -np.diff(shares, axis=-1, append=0.0)
        near = (gaps < 1e-5) | np.concatenate([np.ones_like(gaps[..., :1], bool), gaps[..., :-1] < 1e-5], axis=-1)
        assert not (moved & ~near).any()
        assert moved.mean() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_chooses_as_double_does(name: str) -> None:
    ids = tokens(3, 12)
    for (slots, shares), (other, rounded) in zip(
        chosen(new_model_once(name), ids), chosen(new_model(name), ids), strict=True
    ):
        same = (slots == other).all(axis=-1)
        assert same.mean() > 0.99
        assert np.abs(shares - rounded)[same].max() < 1e-4


# Interface


def test_states_are_keys_and_values_of_every_layer() -> None:
    spec = build(tiny.model("product-key-memory", "memory+")).spec
    layers = ("layer00", "layer01", "layer02")
    assert [(state.name, state.shape, state.update) for state in spec.states] == [
        (f"{layer}.attention.{part}", ("batch", 2, tiny.CONTEXT, 4), "append")
        for layer in layers
        for part in ("key", "value")
    ]
    assert spec.schedule == Schedule((Tick(("decode",)),), "prefill", 1, 8)
    assert spec.max_context == tiny.CONTEXT


def test_shared_values_are_one_tensor_of_a_checkpoint() -> None:
    names = [name for name in new_model("memory+").state_dict() if "values" in name]
    assert names == ["values.0.weight"]
    apart = [name for name in new_model("peer-layer-norm").state_dict() if "values" in name]
    assert apart == ["values.0.weight", "values.0.down", "values.1.weight", "values.1.down"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "pkm2"}, "kind must be one of pkm, memory+, peer, not 'pkm2'"),
        ({"query_norm": "rms"}, "query_norm must be one of none, batch, layer, not 'rms'"),
        ({"mem_k_dim": 5}, "mem_k_dim must be even, for two halves, not 5"),
        ({"mem_knn": 7}, "mem_knn 7 slots cannot be chosen among mem_n_keys 6 sub-keys"),
        ({"mem_heads": 0}, "mem_heads must be a whole number of at least 1, not 0"),
        ({"mem_share_values": 1}, "mem_share_values must be true or false, not 1"),
        ({"n_head": 8}, "d_model 8 must be a multiple of twice n_head 8, for rotary positions"),
        ({"memory_layers": [3]}, "memory_layers must be numbers from 0 to 2 in rising order, not [3]"),
        ({"memory_layers": [2, 0]}, "memory_layers must be numbers from 0 to 2 in rising order, not [2, 0]"),
        ({"memory_layers": []}, "memory_layers must be numbers from 0 to 2 in rising order, not []"),
        ({"memory_layers": "0,2"}, "memory_layers must be numbers from 0 to 2 in rising order, not '0,2'"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        new_model("memory+", **settings)
    assert str(refused.value) == message
