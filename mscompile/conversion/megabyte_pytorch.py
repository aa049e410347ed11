"""lucidrains/MEGABYTE-pytorch (PyPI, 0.3.6): a state dict of its `MEGABYTE`.

Widths, depths and lengths follow from the shapes of tensors, but for the length of the first stage: that one follows
only where there are learned positions, and otherwise `max_seq_len` must be stored with the tensors. `dim_head` and
`heads` have its constructor's defaults where they are not stored.
"""

from __future__ import annotations

from typing import Any

from mscompile.conversion.base import Converted, Foreign, Source
from mscompile.conversion.rename import Target, renamed
from mscompile.errors import CheckpointError

_MARKS = ("start_tokens.0", "token_embs.1.3.weight", "transformers.0.layers.0.0.to_kv.weight", "to_logits.weight")
_LAYER, _OURS = "transformers.{}.layers.{}.", "stages.{}.layers.{}."

# theirs -> ours
_NAMES: dict[str, Target] = {
    "start_tokens.{}": "stages.{}.start",
    "pos_embs.{}.weight": "stages.{}.position.weight",
    "transformers.{}.rotary_emb.inv_freq": None,
    "transformers.{}.norm.g": "stages.{}.norm.weight",
    _LAYER + "0.norm.g": _OURS + "attention_norm.weight",
    _LAYER + "0.to_q.weight": _OURS + "attention.query.weight",
    _LAYER + "0.to_kv.weight": (_OURS + "attention.key.weight", _OURS + "attention.value.weight"),
    _LAYER + "0.to_out.weight": _OURS + "attention.output.weight",
    _LAYER + "1.0.g": _OURS + "feed_forward_norm.weight",
    _LAYER + "1.1.weight": _OURS + "feed_forward.0.weight",
    _LAYER + "1.1.bias": _OURS + "feed_forward.0.bias",
    _LAYER + "1.4.weight": _OURS + "feed_forward.2.weight",
    _LAYER + "1.4.bias": _OURS + "feed_forward.2.bias",
    "to_next_transformer_projections.{}.1.weight": "stages.{}.spread.weight",
    "to_next_transformer_projections.{}.1.bias": "stages.{}.spread.bias",
    "to_logits.weight": "head.weight",
    "to_logits.bias": "head.bias",
}
_PATCH = {"2": "patch_norm", "3": "patch", "4": "row_norm"}  # parts of the embedding of a patch


def recognises(foreign: Foreign) -> bool:
    return all(mark in foreign.tensors for mark in _MARKS)


def convert(foreign: Foreign) -> Converted:
    config = _config(foreign)
    return Converted("megabyte-pytorch", config, renamed(foreign, _NAMES | _embeddings(len(config["dim"]))))


def _embeddings(stages: int) -> dict[str, Target]:
    """Theirs are in the order fine to coarse."""
    names: dict[str, Target] = {"token_embs.0.weight": f"stages.{stages - 1}.embedding.weight"}
    for number in range(1, stages):
        ours = f"stages.{stages - 1 - number}."
        names[f"token_embs.{number}.0.weight"] = ours + "embedding.weight"
        for part, name in _PATCH.items():
            names |= {f"token_embs.{number}.{part}.{kind}": f"{ours}{name}.{kind}" for kind in ("weight", "bias")}
    return names


def _config(foreign: Foreign) -> dict[str, Any]:
    tensors, stages = foreign.tensors, foreign.layers("start_tokens.{}")
    vocab_size, finest = tensors["token_embs.0.weight"].shape
    inner, dim = tensors[_LAYER.format(0, 0) + "0.to_q.weight"].shape
    heads, dim_head = foreign.config.get("heads", 8), foreign.config.get("dim_head", 64)
    if heads * dim_head != inner:
        raise CheckpointError(
            f"{foreign.path}: to_q.weight has {inner} rows, but heads {heads} and dim_head {dim_head} make "
            f"{heads * dim_head}; store the settings that the model was built with"
        )
    return {
        "vocab_size": vocab_size,
        "dim": [tensors[f"start_tokens.{stage}"].shape[0] for stage in range(stages)],
        "depth": [foreign.layers(f"transformers.{stage}.layers.{{}}.") for stage in range(stages)],
        "max_seq_len": _lengths(foreign, stages, finest),
        "dim_head": dim_head,
        "heads": heads,
        "ff_mult": tensors[_LAYER.format(0, 0) + "1.1.weight"].shape[0] // dim,
        "rel_pos": "transformers.0.rotary_emb.inv_freq" in tensors,
        "pos_emb": "pos_embs.0.weight" in tensors,
    }


def _lengths(foreign: Foreign, stages: int, finest: int) -> list[int]:
    """Rows of a group of each stage: a row of a stage is as many tokens as its patch embedding takes."""
    tensors = foreign.tensors
    tokens = [tensors[f"token_embs.{number}.3.weight"].shape[1] // finest for number in range(stages - 1, 0, -1)]
    lengths = [above // below for above, below in zip(tokens, [*tokens[1:], 1], strict=True)]
    if "pos_embs.0.weight" in tensors:
        return [tensors["pos_embs.0.weight"].shape[0], *lengths]
    stored = list(foreign.setting("max_seq_len"))
    if stored[1:] != lengths:
        raise CheckpointError(
            f"{foreign.path}: max_seq_len {stored} does not fit the tensors, whose patches make "
            f"{[stored[0] if stored else 1, *lengths]}; store the settings that the model was built with"
        )
    return stored


SOURCE = Source("lucidrains/MEGABYTE-pytorch", recognises, convert)
