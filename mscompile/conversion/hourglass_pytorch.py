"""State dicts of the package hourglass-transformer-pytorch (`HourglassTransformerLM`), with its arguments.

    torch.save({"state_dict": model.state_dict(), "kwargs": {"dim": 512, "heads": 8, ...}}, "weights.pt")

Given                                              Becomes
  to_kv (2 H d_head, d)                              key, value (H d_head, d) each
  attn_resampling_post_valley: to_q, keys, norm      nothing: attention to one row has no use for them

Depths, sizes and kinds of resampling are those of the tensors. `heads` is an argument, 8 where the arguments leave it
out; so is `shorten_factor`, unless resampling is linear.
"""

from __future__ import annotations

from dataclasses import replace

from mscompile.conversion.base import Converted, Foreign, Source
from mscompile.conversion.rename import Target, renamed
from mscompile.errors import CheckpointError

WRAPPER = "net."  # their AutoregressiveWrapper
VALLEY = "valley_transformer."
UNUSED = "unused"
DEFAULT_HEADS = 8
OUTER: dict[str, Target] = {
    "token_emb.weight": "embedding.weight",
    "pos_emb.weight": "positions.weight",
    "to_logits.weight": "head.weight",
    "to_logits.bias": "head.bias",
}


def recognises(foreign: Foreign) -> bool:
    names = {name.removeprefix(WRAPPER) for name in foreign.tensors}
    hourglass = any(name.startswith("transformer.pre_transformer.") or VALLEY in name for name in names)
    return set(OUTER) <= names and (hourglass or "transformer.layers.0.0.fn.to_kv.weight" in names)


def convert(foreign: Foreign) -> Converted:
    if all(name.startswith(WRAPPER) for name in foreign.tensors):
        tensors = {name.removeprefix(WRAPPER): tensor for name, tensor in foreign.tensors.items()}
        foreign = replace(foreign, tensors=tensors)
    if foreign.config.get("causal", True) is not True:
        raise CheckpointError(f"{foreign.path}: causal must be true: without it every token sees those after it")
    valleys = 0
    while any(name.startswith(_theirs(valleys + 1)) for name in foreign.tensors):
        valleys += 1
    linear = "transformer.downsample.proj.weight" in foreign.tensors
    found = renamed(foreign, _names(valleys, linear))
    vocab_size, d_model = found["embedding.weight"].shape
    query = next(name for name in found if name.endswith("attention.query.weight"))
    n_head, d_head = _heads(foreign, found[query].shape[0])
    config = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "n_head": n_head,
        "d_head": d_head,
        "pre_layers": [foreign.layers(f"{_theirs(n)}pre_transformer.layers.{{}}.") for n in range(valleys)],
        "middle_layers": foreign.layers(f"{_theirs(valleys)}layers.{{}}."),
        "post_layers": [foreign.layers(f"{_theirs(n)}post_transformer.layers.{{}}.") for n in range(valleys)],
        "shorten_factors": _factors(foreign, valleys, linear),
        "context": found["positions.weight"].shape[0],
        "linear": linear,
        "attention": any("attn_resampling_pre_valley" in name for name in foreign.tensors),
    }
    return Converted("hourglass-pytorch", config, {name: rows for name, rows in found.items() if UNUSED not in name})


def _theirs(level: int) -> str:
    return "transformer." + VALLEY * level


def _names(valleys: int, linear: bool) -> dict[str, Target]:
    names = dict(OUTER)
    for level in range(valleys):
        theirs, ours = _theirs(level), "level." + "valley.middle." * level
        names |= _blocks(f"{theirs}pre_transformer.layers.{{}}", f"{ours}pre.blocks.{{}}")
        names |= _blocks(f"{theirs}post_transformer.layers.{{}}", f"{ours}post.blocks.{{}}")
        names |= _blocks(f"{theirs}attn_resampling_pre_valley.layers.0", f"{ours}valley.shortening.block")
        names |= _one_row(f"{theirs}attn_resampling_post_valley.layers.0", f"{ours}valley.upsampling")
        if linear:
            names |= _linear(f"{theirs}downsample.proj", f"{ours}valley.shortening.pool.linear")
            names |= _linear(f"{theirs}upsample.proj", f"{ours}valley.upsampling.expansion.linear")
    names |= _blocks(f"{_theirs(valleys)}layers.{{}}", "level." + "valley.middle." * valleys + "pre.blocks.{}")
    return names | _linear("transformer.norm_out" if valleys else "transformer.norm", "norm")


def _blocks(theirs: str, ours: str) -> dict[str, Target]:
    return {
        **_linear(f"{theirs}.0.norm", f"{ours}.attention_norm"),
        f"{theirs}.0.fn.to_q.weight": f"{ours}.attention.query.weight",
        f"{theirs}.0.fn.to_kv.weight": (f"{ours}.attention.key.weight", f"{ours}.attention.value.weight"),
        **_linear(f"{theirs}.0.fn.to_out", f"{ours}.attention.output"),
        **_feed_forward(theirs, ours),
    }


def _one_row(theirs: str, ours: str) -> dict[str, Target]:
    return {
        f"{theirs}.0.norm.weight": None,
        f"{theirs}.0.norm.bias": None,
        f"{theirs}.0.fn.to_q.weight": None,
        f"{theirs}.0.fn.to_kv.weight": (f"{UNUSED}.{theirs}", f"{ours}.expansion.attention.value.weight"),
        **_linear(f"{theirs}.0.fn.to_out", f"{ours}.expansion.attention.output"),
        **_feed_forward(theirs, ours),
    }


def _feed_forward(theirs: str, ours: str) -> dict[str, Target]:
    return {
        **_linear(f"{theirs}.1.norm", f"{ours}.feed_forward_norm"),
        **_linear(f"{theirs}.1.fn.0", f"{ours}.feed_forward.0"),
        **_linear(f"{theirs}.1.fn.3", f"{ours}.feed_forward.2"),
    }


def _linear(theirs: str, ours: str) -> dict[str, Target]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def _heads(foreign: Foreign, width: int) -> tuple[int, int]:
    """How many heads there are, and the width of each; the package has 8 heads where its arguments say nothing."""
    n_head = foreign.config.get("heads", DEFAULT_HEADS) if foreign.config else foreign.setting("heads")
    d_head = foreign.config.get("dim_head", width // n_head)
    if n_head * d_head != width:
        raise CheckpointError(
            f"{foreign.path}: queries of width {width} are not {n_head} heads of {d_head}; "
            "give the arguments heads and dim_head that the model was made with"
        )
    return n_head, d_head


def _factors(foreign: Foreign, valleys: int, linear: bool) -> list[int]:
    """Rows that one row of each coarser level stands for."""
    if linear:
        shapes = [foreign.tensors[f"{_theirs(level)}downsample.proj.weight"].shape for level in range(valleys)]
        return [wide // narrow for narrow, wide in shapes]
    if not valleys:
        return []
    factor = foreign.setting("shorten_factor")
    return list(factor) if isinstance(factor, list | tuple) else [factor] * valleys


SOURCE = Source("lucidrains/hourglass-transformer-pytorch", recognises, convert)
