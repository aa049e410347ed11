"""lucidrains/compressive-transformer-pytorch (PyPI, 0.4.0): a state dict of its `CompressiveTransformer`.

Most settings follow from the shapes of tensors. The others are arguments of its constructor: `seq_len` must be
stored with the tensors; `mem_len`, `cmem_len`, `memory_layers` and `enhanced_recurrence` have its defaults where they
are not. The `net.` that its `AutoregressiveWrapper` puts before every name is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mscompile.conversion.base import Converted, Foreign, Source
from mscompile.conversion.rename import Target, renamed
from mscompile.errors import CheckpointError

_WRAPPER = "net."
_ATTENTION, _FEED_FORWARD = "attn_layers.{}.", "ff_layers.{}."
_CONV = _ATTENTION + "fn.fn.compress_mem_fn.conv."
_MARKS = ("pos_emb", "token_emb.weight", _CONV.format(0) + "weight")

# theirs -> ours
_GATE = {
    "gru.weight_ih": "new.weight",
    "gru.bias_ih": "new.bias",
    "gru.weight_hh": "old.weight",
    "gru.bias_hh": "old.bias",
}
_MOGRIFIER = {
    f"mogrify.{theirs}.0.{part}.{kind}": f"mogrifier.{ours}.{part}.{kind}"
    for theirs, ours in (("Q", "of_new"), ("R", "of_old"))
    for part in (0, 1)
    for kind in ("weight", "bias")
}
_RESIDUALS = {
    below + old: f"layers.{{}}.{residual}.{new}"
    for below, residual in ((_ATTENTION, "attention_residual"), (_FEED_FORWARD, "feed_forward_residual"))
    for old, new in (_GATE | _MOGRIFIER).items()
}
_NAMES: dict[str, Target] = {
    "pos_emb": "position_table",
    "token_emb.weight": "embedding.weight",
    "to_model_dim.weight": "widen.weight",
    "to_model_dim.bias": "widen.bias",
    "to_logits.0.weight": "narrow.weight",
    "to_logits.0.bias": "narrow.bias",
    "to_logits.1.weight": "head.weight",
    "to_logits.1.bias": "head.bias",
    _ATTENTION + "fn.norm.weight": "layers.{}.attention_norm.weight",
    _ATTENTION + "fn.norm.bias": "layers.{}.attention_norm.bias",
    _ATTENTION + "fn.fn.to_q.weight": "layers.{}.attention.query.weight",
    _ATTENTION + "fn.fn.to_kv.weight": ("layers.{}.attention.key.weight", "layers.{}.attention.value.weight"),
    _ATTENTION + "fn.fn.to_out.weight": "layers.{}.attention.output.weight",
    _ATTENTION + "fn.fn.to_out.bias": "layers.{}.attention.output.bias",
    _CONV + "weight": "layers.{}.compression.linear.weight",
    _CONV + "bias": "layers.{}.compression.linear.bias",
    _FEED_FORWARD + "fn.norm.weight": "layers.{}.feed_forward_norm.weight",
    _FEED_FORWARD + "fn.norm.bias": "layers.{}.feed_forward_norm.bias",
    _FEED_FORWARD + "fn.fn.w1.weight": "layers.{}.feed_forward.inner.weight",
    _FEED_FORWARD + "fn.fn.w1.bias": "layers.{}.feed_forward.inner.bias",
    _FEED_FORWARD + "fn.fn.w2.weight": "layers.{}.feed_forward.outer.weight",
    _FEED_FORWARD + "fn.fn.w2.bias": "layers.{}.feed_forward.outer.bias",
    **_RESIDUALS,
}


def recognises(foreign: Foreign) -> bool:
    return all(mark in _unwrapped(foreign).tensors for mark in _MARKS)


def convert(foreign: Foreign) -> Converted:
    foreign = _unwrapped(foreign)
    config = _config(foreign)
    tensors = renamed(foreign, _NAMES)
    for number in range(config["n_layer"]):
        linear = f"layers.{number}.compression.linear."
        weight, bias = tensors.pop(linear + "weight"), tensors.pop(linear + "bias")
        if config["memory_layers"] is None or number in config["memory_layers"]:  # the others never use theirs
            tensors |= {linear + "weight": weight.transpose(1, 2).flatten(1), linear + "bias": bias}
    return Converted("compressive", config, tensors)


def _unwrapped(foreign: Foreign) -> Foreign:
    if not all(name.startswith(_WRAPPER) for name in foreign.tensors):
        return foreign
    return replace(foreign, tensors={name.removeprefix(_WRAPPER): tensor for name, tensor in foreign.tensors.items()})


def _config(foreign: Foreign) -> dict[str, Any]:
    tensors = foreign.tensors
    vocab_size, d_embedding = tensors["token_emb.weight"].shape
    d_model, _, rate = tensors[_CONV.format(0) + "weight"].shape
    inner = tensors[_FEED_FORWARD.format(0) + "fn.fn.w1.weight"].shape[0]
    d_ff = tensors[_FEED_FORWARD.format(0) + "fn.fn.w2.weight"].shape[1]
    layers = foreign.config.get("memory_layers")  # theirs count from 1
    return {
        "vocab_size": vocab_size,
        "n_layer": foreign.layers(_ATTENTION),
        "d_model": d_model,
        "n_head": tensors["pos_emb"].shape[0],
        "d_ff": d_ff,
        **_lengths(foreign, rate),
        "compression_rate": rate,
        "compression": "conv",
        "positions": "table",
        "feed_forward": "gelu" if inner == d_ff else "geglu",
        "residual": _residual(tensors),
        "pre_norm": True,
        "enhanced_recurrence": foreign.config.get("enhanced_recurrence", True),
        "memory_layers": None if layers is None else sorted(layer - 1 for layer in layers),
        "d_embedding": d_embedding if "to_model_dim.weight" in tensors else None,
    }


def _lengths(foreign: Foreign, rate: int) -> dict[str, int]:
    """Of a segment, memory and compressed memory; the table of positions has a row for each."""
    tgt_len, total = foreign.setting("seq_len"), foreign.tensors["pos_emb"].shape[1]
    mem_len, cmem_len = foreign.config.get("mem_len"), foreign.config.get("cmem_len")
    mem_len = tgt_len if mem_len is None else mem_len
    cmem_len = mem_len // rate if cmem_len is None else cmem_len
    if tgt_len + mem_len + cmem_len != total:
        raise CheckpointError(
            f"{foreign.path}: pos_emb has {total} positions, but seq_len {tgt_len}, mem_len {mem_len} and cmem_len "
            f"{cmem_len} make {tgt_len + mem_len + cmem_len}; store the settings that the model was built with"
        )
    return {"tgt_len": tgt_len, "mem_len": mem_len, "cmem_len": cmem_len}


def _residual(tensors: Mapping[str, Tensor]) -> str:
    if _ATTENTION.format(0) + "mogrify.Q.0.0.weight" in tensors:
        return "mogrified-gru"
    return "gru" if _ATTENTION.format(0) + "gru.weight_ih" in tensors else "sum"


SOURCE = Source("lucidrains/compressive-transformer-pytorch", recognises, convert)
