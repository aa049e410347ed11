"""lucidrains/recurrent-memory-transformer-pytorch (PyPI, 0.7.0): a state dict of its `RecurrentMemoryTransformer`.

Most settings follow from the shapes of tensors. The others are arguments of its constructor: `seq_len` must be stored
with the tensors where the model has no absolute positions; `add_write_to_next_write_mem` and
`always_have_read_memories` have its defaults where they are not. The `transformer.` that its
`RecurrentMemoryTransformerWrapper` puts before every name is taken off.

The model is what the wrapper's forward computes, which hands memory rows to the next segment and nothing else. Its
`generate` also hands on keys and values of the segment before (`use_xl_memories`), which training never did; here
settings of these (`xl_mem_len`, `enhanced_xl_recurrence`) have no effect, as in its forward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mscompile.conversion.base import Converted, Foreign, Source
from mscompile.conversion.rename import Target, renamed
from mscompile.errors import CheckpointError

_WRAPPER = "transformer."
_ATTENTION, _FEED_FORWARD = "layers.{}.0.", "layers.{}.1."
_MARKS = ("read_memory_emb", "memory_tokens", "token_emb.weight", _ATTENTION.format(0) + "branch.null_kv")
_REFUSED = {  # what these settings must be, and why
    "causal": (True, "tokens would see those after them"),
    "memory_not_causal": (True, "its causal mask leaves out the null key: a token would not see itself"),
}

# theirs -> ours
_CONNECTION = {
    "norm.gamma": "gamma",
    "static_alpha": "static_alpha",
    "dynamic_alpha_fn": "dynamic_alpha",
    "dynamic_alpha_scale": "alpha_scale",
    "static_beta": "static_beta",
    "dynamic_beta_fn": "dynamic_beta",
    "dynamic_beta_scale": "beta_scale",
}
_NAMES: dict[str, Target] = {
    "token_emb.weight": "embedding.weight",
    "pos_emb.weight": "position_embedding.weight",
    "rotary_pos_emb.inv_freq": "frequency",
    "read_memory_emb": "read_memory",
    "memory_tokens": "write_memory",
    "norm.weight": "norm.weight",
    "to_logits.weight": "output.weight",
    "to_logits.bias": "output.bias",
    _ATTENTION + "branch.norm.weight": "layers.{}.attention_norm.weight",
    _ATTENTION + "branch.null_kv": "layers.{}.null_key_value",
    _ATTENTION + "branch.to_q.weight": "layers.{}.query.weight",
    _ATTENTION + "branch.to_kv.weight": ("layers.{}.key.weight", "layers.{}.value.weight"),
    _ATTENTION + "branch.to_out.weight": "layers.{}.output.weight",
    _ATTENTION + "branch.learned_value_residual_mix.0.weight": "layers.{}.value_mix.weight",
    _FEED_FORWARD + "branch.0.weight": "layers.{}.feed_forward.norm.weight",
    _FEED_FORWARD + "branch.1.weight": "layers.{}.feed_forward.inner.weight",
    _FEED_FORWARD + "branch.4.weight": "layers.{}.feed_forward.outer.weight",
    **{
        below + old: f"layers.{{}}.{residual}.{new}"
        for below, residual in ((_ATTENTION, "attention_residual"), (_FEED_FORWARD, "feed_forward_residual"))
        for old, new in _CONNECTION.items()
    },
}


def recognises(foreign: Foreign) -> bool:
    return all(mark in _unwrapped(foreign).tensors for mark in _MARKS)


def convert(foreign: Foreign) -> Converted:
    foreign = _unwrapped(foreign)
    for name, (wanted, reason) in _REFUSED.items():
        if (found := foreign.config.get(name, wanted)) != wanted:
            raise CheckpointError(f"{foreign.path}: {name}={found} is not supported: {reason}")
    return Converted("recurrent-memory-pytorch", _config(foreign), renamed(foreign, _NAMES))


def _unwrapped(foreign: Foreign) -> Foreign:
    if not all(name.startswith(_WRAPPER) for name in foreign.tensors):
        return foreign
    return replace(foreign, tensors={name.removeprefix(_WRAPPER): tensor for name, tensor in foreign.tensors.items()})


def _config(foreign: Foreign) -> dict[str, Any]:
    tensors = foreign.tensors
    vocab_size, d_model = tensors["token_emb.weight"].shape
    _, n_head, d_head = tensors[_ATTENTION.format(0) + "branch.null_kv"].shape
    absolute = "pos_emb.weight" in tensors
    static_beta = _ATTENTION.format(0) + "static_beta"
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "n_layer": foreign.layers("layers.{}."),
        "num_mem_tokens": tensors["memory_tokens"].shape[0],
        "seq_len": tensors["pos_emb.weight"].shape[0] if absolute else foreign.setting("seq_len"),
        "n_head": n_head,
        "d_head": d_head,
        "d_ff": tensors[_FEED_FORWARD.format(0) + "branch.4.weight"].shape[1],
        "abs_pos_emb": absolute,
        "rotary_pos_emb": "rotary_pos_emb.inv_freq" in tensors,
        "num_residual_streams": tensors[static_beta].shape[0] if static_beta in tensors else 1,
        "add_write_to_next_write_mem": foreign.config.get("add_write_to_next_write_mem", False),
        "always_have_read_memories": foreign.config.get("always_have_read_memories", True),
    }


SOURCE = Source("lucidrains/recurrent-memory-transformer-pytorch", recognises, convert)
