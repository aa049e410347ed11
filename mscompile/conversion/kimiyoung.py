"""The authors' Transformer-XL: github.com/kimiyoung/transformer-xl, `pytorch/mem_transformer.py`.

Their `model.pt` is the whole module, which only code can load; a state dict with the arguments is what is read here:

    torch.save({"state_dict": model.state_dict(), "args": args}, "weights.pt")

Given                                              Becomes
  dec_attn.qkv_net (3 H d_head, d)                   query, key, value (H d_head, d) each
  word_emb.emb_layers, emb_projs                     one table and one projection a cluster; without `div_val`
                                                     they have one for all, which is cut
  crit: cluster i at column -i of the head           cluster i at column i - 1 behind the shortlist
  same_length: every query sees mem_len keys         the same

`div_val`, the widths and the number of layers are those of the tensors. Cutoffs follow from them too, unless
`div_val` is 1; then they are a setting, or what their `train.py` has for the `dataset`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mscompile.conversion.base import Converted, Foreign, Source
from mscompile.conversion.rename import Target, renamed
from mscompile.errors import CheckpointError

Tensors = dict[str, Tensor]
Datasets = Mapping[str, Sequence[int]]  # cutoffs

DATASETS: Datasets = {"wt103": (20000, 40000, 200000), "lm1b": (60000, 100000, 640000)}
NAMES: dict[str, Target] = {
    "r_w_bias": "content_bias",
    "r_r_bias": "position_bias",
    "pos_emb.inv_freq": None,
    "layers.{}.dec_attn.r_w_bias": "layers.{}.content_bias",
    "layers.{}.dec_attn.r_r_bias": "layers.{}.position_bias",
    "layers.{}.dec_attn.qkv_net.weight": tuple(f"layers.{{}}.attention.{n}.weight" for n in ("query", "key", "value")),
    "layers.{}.dec_attn.r_net.weight": "layers.{}.attention.position.weight",
    "layers.{}.dec_attn.o_net.weight": "layers.{}.attention.output.weight",
    "layers.{}.dec_attn.layer_norm.weight": "layers.{}.attention_norm.weight",
    "layers.{}.dec_attn.layer_norm.bias": "layers.{}.attention_norm.bias",
    "layers.{}.pos_ff.CoreNet.0.weight": "layers.{}.feed_forward.0.weight",
    "layers.{}.pos_ff.CoreNet.0.bias": "layers.{}.feed_forward.0.bias",
    "layers.{}.pos_ff.CoreNet.3.weight": "layers.{}.feed_forward.3.weight",
    "layers.{}.pos_ff.CoreNet.3.bias": "layers.{}.feed_forward.3.bias",
    "layers.{}.pos_ff.layer_norm.weight": "layers.{}.feed_forward_norm.weight",
    "layers.{}.pos_ff.layer_norm.bias": "layers.{}.feed_forward_norm.bias",
    "word_emb.emb_layers.{}.weight": "adaptive.tables.{}",
    "word_emb.emb_projs.{}": "adaptive.projections.{}",
    "crit.out_projs.{}": "adaptive.head_projections.{}",
    "crit.out_layers.{}.weight": "adaptive.head_tables.{}",
    "crit.out_layers.{}.bias": "adaptive.head_biases.{}",
    "crit.out_layers_weights.{}": "adaptive.head_tables.{}",  # NVIDIA's names
    "crit.out_layers_biases.{}": "adaptive.head_biases.{}",
    "crit.shared_out_projs.{}": None,  # the same as word_emb.emb_projs
    "crit.cluster_weight": "adaptive.cluster_weight",
    "crit.cluster_bias": "adaptive.cluster_bias",
}
SHOWN = "word_emb.emb_layers.0.weight"


def recognises(foreign: Foreign) -> bool:
    return {SHOWN, "crit.out_layers.0.bias"} <= set(foreign.tensors)


def convert(foreign: Foreign) -> Converted:
    return converted(foreign, DATASETS)


def converted(foreign: Foreign, datasets: Datasets, own_key: bool = False, backwards: bool = True) -> Converted:
    """A checkpoint of ours.

    `own_key`: with `same_length` a query sees its own key besides mem_len others. `backwards`: clusters are scored by
    the head's columns from the last one on.
    """
    _refuse(foreign)
    tensors = renamed(foreign, NAMES)
    clusters = _clusters(foreign, tensors, datasets)
    count = len(clusters["cutoffs"]) + 1
    for name in ("adaptive.cluster_weight", "adaptive.cluster_bias"):
        if backwards and name in tensors:
            tensors[name] = tensors[name].flip(0)
    tied = _tied(tensors, "adaptive.tables", "adaptive.head_tables", range(count))
    tails = _tied(tensors, "adaptive.projections", "adaptive.head_projections", range(1, count))
    _tied(tensors, "adaptive.projections", "adaptive.head_projections", range(1), kept=True)
    untied = "layers.0.content_bias" in tensors
    n_head, d_head = tensors["layers.0.content_bias" if untied else "content_bias"].shape
    d_inner, d_model = tensors["layers.0.feed_forward.0.weight"].shape
    mem_len, same_length, clamp_len = (foreign.setting(name) for name in ("mem_len", "same_length", "clamp_len"))
    config = {
        **clusters,
        "n_layer": foreign.layers("layers.{}."),
        "d_model": d_model,
        "n_head": n_head,
        "d_head": d_head,
        "d_inner": d_inner,
        "mem_len": mem_len + (1 if own_key and same_length else 0),
        "tgt_len": foreign.config.get("tgt_len", mem_len) if same_length else foreign.setting("tgt_len"),
        "clamp_len": clamp_len if clamp_len > 0 else None,
        "same_length": same_length,
        "pre_norm": foreign.setting("pre_lnorm"),
        "tie_embedding": tied,
        "tie_projections": tails,
        "untie_biases": untied,
    }
    if count == 1 and "adaptive.projections.0" not in tensors:
        _without_clusters(tensors, config)
    return Converted("transformer-xl", config, tensors)


def _clusters(foreign: Foreign, tensors: Tensors, datasets: Datasets) -> dict[str, Any]:
    """The settings of clusters. Where there is one table for all of them, it is cut."""
    sizes, widths = zip(*(tensors[f"adaptive.tables.{n}"].shape for n in range(_tables(tensors))), strict=True)
    count = len(tensors["adaptive.cluster_bias"]) + 1 if "adaptive.cluster_bias" in tensors else 1
    if len(sizes) == count > 1:
        cutoffs, div_val = list(accumulate(sizes[:-1])), _divisor(foreign, widths)
    else:
        cutoffs, div_val = _cutoffs(foreign, count, datasets), 1
        _cut_tables(tensors, [0, *cutoffs, sum(sizes)])
    return {"vocab_size": sum(sizes), "cutoffs": cutoffs, "div_val": div_val, "d_embed": widths[0]}


def _tables(tensors: Tensors) -> int:
    return sum(name.startswith("adaptive.tables.") for name in tensors)


def _tied(tensors: Tensors, ours: str, heads: str, clusters: range, kept: bool = False) -> bool:
    """Has the head the tensors of the embedding, in these clusters? Then they are stored once, unless `kept`.

    What is tied may be stored under both names, or under that of the embedding alone.
    """
    for n in clusters:
        if f"{ours}.{n}" in tensors:
            tensors.setdefault(f"{heads}.{n}", tensors[f"{ours}.{n}"])
    pairs = [(tensors.get(f"{ours}.{n}"), tensors.get(f"{heads}.{n}")) for n in clusters]
    tied = bool(pairs) and all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)
    for n in clusters if tied and not kept else ():
        del tensors[f"{heads}.{n}"]
    return tied


def _refuse(foreign: Foreign) -> None:
    """CheckpointError for what neither of them shows in its evaluation, or what is another model."""
    attn_type = foreign.config.get("attn_type", 0)
    if attn_type != 0 or "r_emb" in foreign.tensors or "r_bias" in foreign.tensors:
        raise CheckpointError(
            f"{foreign.path}: attn_type {attn_type or 'with r_emb'} is not supported, only 0, the attention of the "
            "Transformer-XL paper: the others have learned or absolute positions"
        )
    if foreign.config.get("ext_len", 0):
        raise CheckpointError(f"{foreign.path}: ext_len must be 0, not {foreign.config['ext_len']!r}")
    if "out_layer.weight" in foreign.tensors:
        raise CheckpointError(
            f"{foreign.path}: sample_softmax has a head for training only; train with sample_softmax 0"
        )


def _cutoffs(foreign: Foreign, count: int, datasets: Datasets) -> list[int]:
    """First ids of the clusters after the first, where no tensor tells them."""
    if count == 1:
        return []
    known = datasets.get(str(foreign.config.get("dataset"))) if "cutoffs" not in foreign.config else None
    cutoffs = list(foreign.setting("cutoffs") if known is None else known)
    if len(cutoffs) != count - 1 or not all(isinstance(cut, int) for cut in cutoffs):
        raise CheckpointError(f"{foreign.path}: {count} clusters of tokens need {count - 1} cutoffs, not {cutoffs}")
    return cutoffs


def _divisor(foreign: Foreign, widths: tuple[int, ...]) -> int:
    """`div_val`, by which the vectors of each cluster are narrower than those of the one before."""
    for div_val in range(2, widths[0] + 1):
        if all(width == widths[0] // div_val**n for n, width in enumerate(widths)):
            return div_val
    raise CheckpointError(f"{foreign.path}: no div_val makes clusters of widths {widths}")


def _cut_tables(tensors: Tensors, bounds: list[int]) -> None:
    """One table, bias and projection for all clusters -> one for each."""
    for name in ("adaptive.tables", "adaptive.head_tables", "adaptive.head_biases"):
        whole = tensors.pop(f"{name}.0", None)
        if whole is not None:
            tensors |= {f"{name}.{n}": whole[first:last] for n, (first, last) in enumerate(pairwise(bounds))}
    if (shared := tensors.get("adaptive.projections.0")) is not None:
        tensors |= {f"adaptive.projections.{n}": shared for n in range(len(bounds) - 1)}


def _without_clusters(tensors: Tensors, config: dict[str, Any]) -> None:
    """An ordinary embedding and softmax."""
    tensors["embedding.weight"] = tensors.pop("adaptive.tables.0")
    tensors["head_bias"] = tensors.pop("adaptive.head_biases.0")
    if not config["tie_embedding"]:
        tensors["head_weight"] = tensors.pop("adaptive.head_tables.0")
    for name in ("cutoffs", "div_val", "d_embed"):
        del config[name]


SOURCE = Source("kimiyoung/transformer-xl", recognises, convert)
