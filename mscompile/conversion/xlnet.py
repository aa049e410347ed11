"""XLNet directories of HuggingFace transformers (`XLNetLMHeadModel.save_pretrained`).

Given                                              Becomes
  rel_attn.q, k, v, r   (d, H, d_head)               query, key, value, position (H d_head, d)
  rel_attn.o            (d, H, d_head)               output (d, H d_head)
  r_s_bias, seg_embed, mask_emb                      nothing: of segment ids and permutations, which streams lack

Sizes are those of the tensors; memory, clamping and the kind of attention are settings.
"""

from __future__ import annotations

from mscompile.conversion.base import Converted, Foreign, Source
from mscompile.conversion.rename import Target, renamed
from mscompile.errors import CheckpointError

PROJECTIONS = {"q": "query", "k": "key", "v": "value", "r": "position", "o": "output"}
NAMES: dict[str, Target] = {
    "transformer.mask_emb": None,
    "transformer.word_embedding.weight": "embedding.weight",
    "lm_loss.weight": "head_weight",
    "lm_loss.bias": "head_bias",
    "transformer.layer.{}.rel_attn.seg_embed": None,
    "transformer.layer.{}.rel_attn.r_s_bias": None,
    "transformer.layer.{}.rel_attn.r_w_bias": "layers.{}.content_bias",
    "transformer.layer.{}.rel_attn.r_r_bias": "layers.{}.position_bias",
    "transformer.layer.{}.rel_attn.layer_norm.weight": "layers.{}.attention_norm.weight",
    "transformer.layer.{}.rel_attn.layer_norm.bias": "layers.{}.attention_norm.bias",
    "transformer.layer.{}.ff.layer_norm.weight": "layers.{}.feed_forward_norm.weight",
    "transformer.layer.{}.ff.layer_norm.bias": "layers.{}.feed_forward_norm.bias",
    "transformer.layer.{}.ff.layer_1.weight": "layers.{}.feed_forward.0.weight",
    "transformer.layer.{}.ff.layer_1.bias": "layers.{}.feed_forward.0.bias",
    "transformer.layer.{}.ff.layer_2.weight": "layers.{}.feed_forward.3.weight",
    "transformer.layer.{}.ff.layer_2.bias": "layers.{}.feed_forward.3.bias",
}
NAMES |= {
    f"transformer.layer.{{}}.rel_attn.{theirs}": f"layers.{{}}.attention.{ours}.weight"
    for theirs, ours in PROJECTIONS.items()
}


def recognises(foreign: Foreign) -> bool:
    return foreign.config.get("model_type") == "xlnet"


def convert(foreign: Foreign) -> Converted:
    _refuse(foreign)
    tensors = renamed(foreign, NAMES)
    d_model, n_head, d_head = tensors["layers.0.attention.query.weight"].shape
    for name in [name for name in tensors if ".attention." in name]:
        rows = tensors[name].flatten(1)
        tensors[name] = rows if name.endswith("output.weight") else rows.t()
    tied = foreign.config.get("tie_word_embeddings", True)
    if tied:
        tensors.pop("head_weight", None)
    clamp_len = foreign.setting("clamp_len")
    config = {
        "vocab_size": tensors["embedding.weight"].shape[0],
        "n_layer": foreign.layers("transformer.layer.{}."),
        "d_model": d_model,
        "n_head": n_head,
        "d_head": d_head,
        "d_inner": tensors["layers.0.feed_forward.0.weight"].shape[0],
        "mem_len": foreign.setting("mem_len"),
        "attn_type": foreign.setting("attn_type"),
        "clamp_len": clamp_len if clamp_len > 0 else None,
        "activation": foreign.setting("ff_activation"),
        "norm_eps": foreign.setting("layer_norm_eps"),
        "tie_embedding": tied,
    }
    return Converted("xlnet", config, tensors)


def _refuse(foreign: Foreign) -> None:
    if "lm_loss.bias" not in foreign.tensors:
        raise CheckpointError(f"{foreign.path}: this XLNet has no lm_loss, so it is no language model")
    if not foreign.setting("mem_len"):
        raise CheckpointError(
            f"{foreign.path}: mem_len is {foreign.config['mem_len']}, a memory without bound; "
            "set mem_len in config.json to the number of tokens to remember"
        )
    if foreign.config.get("bi_data"):
        raise CheckpointError(f"{foreign.path}: bi_data reads half of the batch backwards, which is no stream")


SOURCE = Source("huggingface/transformers XLNet", recognises, convert)
