"""One tiny model, or several, of every family: what every family is tested with."""

from __future__ import annotations

from functools import cache
from typing import Any

import cases
import torch

from mscompile.models import families
from mscompile.models.family import ReferenceModel
from validation import sources

Settings = dict[str, Any]

VOCAB = cases.VOCAB
CONTEXT = cases.CONTEXT  # tokens after which a stream of a model whose memory grows must be reset

# family -> name of a variant -> settings. The first variant of each family is the one that engines are built of.
TINY: dict[str, dict[str, Settings]] = {
    "transformer-xl": {
        "rolling": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 5, "tgt_len": 4,
                    "same_length": True},
        "segments": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 5, "tgt_len": 4},
        "adaptive": {"n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 3, "tgt_len": 2,
                     "cutoffs": [4, 7], "div_val": 2, "tie_projections": True,
                     "untie_biases": True},
    },
    "xlnet": {
        "gelu": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "mem_len": 4},
        "clamp": {"n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 1, "clamp_len": 2,
                  "activation": "relu", "tie_embedding": False, "norm_eps": 1e-5},
    },
    "hourglass-pytorch": {
        "attention": {"d_model": 8, "n_head": 2, "d_head": 3, "pre_layers": [1], "middle_layers": 1, "post_layers": [1],
                      "shorten_factors": [3], "context": CONTEXT},
        "nested-linear": {"d_model": 8, "n_head": 2, "d_head": 4, "pre_layers": [0, 1], "middle_layers": 1,
                          "post_layers": [1, 0], "shorten_factors": [2, 2], "context": CONTEXT, "linear": True},
        "plain": {"d_model": 8, "n_head": 1, "d_head": 8, "pre_layers": [1], "middle_layers": 1, "post_layers": [0],
                  "shorten_factors": [2], "context": CONTEXT, "attention": False},
    },
    "hourglass": {
        "attention": {"d_model": 8, "d_ff": 12, "n_head": 2, "hierarchy": "1@1 1@3 1@1", "context": CONTEXT},
    },
    "memory-transformer": {
        "memory": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "num_mem_tokens": 3, "context": CONTEXT},
        "learned-positions": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 1, "num_mem_tokens": 1,
                              "positions": "learned", "context": CONTEXT},
        "controller": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "num_mem_tokens": 2,
                       "variant": "controller", "context": CONTEXT},
    },
    "compressive": {
        "conv": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "tgt_len": 4, "mem_len": 4, "cmem_len": 3,
                 "compression_rate": 2},
        "mean-pool": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "tgt_len": 3, "mem_len": 5, "cmem_len": 2,
                      "compression_rate": 2, "compression": "mean-pool", "residual": "gru"},
        "max-pool": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "tgt_len": 1, "mem_len": 3, "cmem_len": 4,
                     "compression_rate": 1, "compression": "max-pool", "pre_norm": True, "feed_forward": "gelu"},
        "table": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 3, "tgt_len": 3, "mem_len": 4, "cmem_len": 3,
                  "compression_rate": 2, "positions": "table", "pre_norm": True, "residual": "gru",
                  "feed_forward": "geglu", "enhanced_recurrence": True},
        "few-memories": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 3, "tgt_len": 2, "mem_len": 3,
                         "cmem_len": 2, "compression_rate": 2, "positions": "table", "pre_norm": True,
                         "enhanced_recurrence": True, "memory_layers": [0, 2], "residual": "mogrified-gru",
                         "d_embedding": 6},
    },
    "recurrent-memory-wrapper": {
        "wrapper": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_ff": 12, "num_mem_tokens": 3, "segment_size": 4,
                    "n_positions": 10},
        "untied-segment-of-one": {"n_layer": 1, "d_model": 8, "n_head": 2, "d_ff": 12, "num_mem_tokens": 2,
                                  "segment_size": 1, "n_positions": 16, "tie_embedding": False},
    },
    "retro": {
        "two-crosses": {"n_layer": 3, "d_model": 8, "n_head": 2, "d_ff": 12, "cross_layers": [1, 2], "chunk": 4,
                        "neighbours": 2, "neighbour_length": 3, "n_encoder_layer": 1, "d_encoder": 12,
                        "d_encoder_ff": 10, "null_key": True, "cross_rotary": True, "context": CONTEXT},
        "first-layer": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_ff": 12, "cross_layers": [0], "chunk": 3,
                        "neighbours": 1, "neighbour_length": 5, "n_encoder_layer": 2, "d_encoder": 8,
                        "d_encoder_ff": 12, "context": CONTEXT},
        "chunk-of-two": {"n_layer": 1, "d_model": 8, "n_head": 2, "d_ff": 12, "cross_layers": [0], "chunk": 2,
                         "neighbours": 3, "neighbour_length": 1, "n_encoder_layer": 1, "d_encoder": 4,
                         "d_encoder_ff": 8, "null_key": True, "context": CONTEXT},
    },
    "product-key-memory": {
        "memory+": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 3, "memory_layers": [0, 2], "mem_n_keys": 6,
                    "mem_k_dim": 6, "mem_heads": 2, "mem_knn": 3, "context": CONTEXT},
        "pkm-batch-norm": {"kind": "pkm", "d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "memory_layers": [1],
                           "mem_n_keys": 5, "mem_k_dim": 4, "mem_heads": 3, "mem_knn": 5, "query_norm": "batch",
                           "context": CONTEXT},
        "peer-layer-norm": {"kind": "peer", "d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2,
                            "memory_layers": [0, 1], "mem_n_keys": 4, "mem_k_dim": 8, "mem_heads": 1, "mem_knn": 1,
                            "query_norm": "layer", "mem_share_values": False, "context": CONTEXT},
    },
    "skip-cross-head": {
        "released": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "mem_len": 5, "tgt_len": 4},
        "released-pre-norm": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "mem_len": 3,
                              "tgt_len": 4, "pre_norm": True, "clamp_len": 4},
        "released-shifted": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "mem_len": 5,
                             "tgt_len": 3, "pre_norm": True, "rel_shift": "txl"},
        "as-trained": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "mem_len": 3, "tgt_len": 3,
                       "same_length": False, "attend_empty": False},
        "rolling": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "mem_len": 5, "tgt_len": 4,
                    "rel_shift": "txl"},
        "rolling-pre-norm": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "mem_len": 4,
                             "tgt_len": 3, "rel_shift": "txl", "pre_norm": True, "normed_residual": False},
    },
    "long-short": {
        "published": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_inner": 12, "window_len": 3, "chunk_size": 2,
                      "mem_len": 6, "tgt_len": 4},
        "every-option": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_inner": 12, "window_len": 5, "chunk_size": 3,
                         "mem_len": 6, "tgt_len": 9, "chunk_rank": 2, "clamp_len": 3, "cpos_clamp_len": 4,
                         "pre_norm": False, "gelu": False, "bias": True},
        "block-of-one-chunk": {"n_layer": 1, "d_model": 8, "n_head": 2, "d_inner": 12, "window_len": 2,
                               "chunk_size": 4, "mem_len": 4, "tgt_len": 4, "chunk_rank": 3},
        "project-first": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_inner": 12, "window_len": 4, "chunk_size": 2,
                          "mem_len": 4, "tgt_len": 8, "project_first": True},
    },
    "megabyte": {
        "patches-of-three": {"patch_size": 3, "d_global": 4, "n_layer_global": 2, "n_head_global": 2,
                             "d_ff_global": 16, "d_local": 8, "n_layer_local": 2, "n_head_local": 2,
                             "d_ff_local": 12, "context": CONTEXT},
        "rotary": {"patch_size": 4, "d_global": 2, "n_layer_global": 1, "n_head_global": 2, "d_ff_global": 12,
                   "d_local": 8, "n_layer_local": 2, "n_head_local": 2, "d_ff_local": 12, "context": CONTEXT,
                   "rotary": True},
    },
    "megabyte-pytorch": {
        "two-stages": {"dim": [8, 6], "depth": [2, 2], "max_seq_len": [8, 3], "dim_head": 4, "heads": 2, "ff_mult": 2},
        "three-stages": {"dim": [8, 5, 7], "depth": [1, 2, 1], "max_seq_len": [4, 2, 3], "dim_head": 4, "heads": 2,
                         "ff_mult": 1, "rel_pos": True, "pos_emb": True},
        "four-stages": {"dim": [6, 8, 4, 6], "depth": [1, 1, 1, 2], "max_seq_len": [3, 2, 2, 2], "dim_head": 3,
                        "heads": 1, "ff_mult": 2, "pos_emb": True},
    },
    "recurrent-memory": {
        "cache": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "num_mem_tokens": 3,
                  "tgt_len": 4, "mem_len": 14},
        "no-cache": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "num_mem_tokens": 4,
                     "tgt_len": 3, "pre_norm": True},
        "read-cache-clamp": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "num_mem_tokens": 3,
                             "tgt_len": 4, "mem_len": 5, "read_mem_from_cache": True, "clamp_len": 6,
                             "tie_embedding": False},
        "segment-of-one": {"n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "num_mem_tokens": 1,
                           "tgt_len": 1},
    },
    "multiscale-top-down": {
        "three-scales": {"d_model": 8, "d_ff": 12, "n_head": 2, "scales": "1@1 1@2 1@4", "context": CONTEXT},
        "uneven": {"d_model": 8, "d_ff": 12, "n_head": 2, "scales": "2@1 1@2 2@6", "context": 23},
        "one-scale": {"d_model": 8, "d_ff": 12, "n_head": 2, "scales": "1@1", "context": CONTEXT},
    },
    "multiscale-bottom-up": {
        "three-scales": {"d_model": 8, "d_ff": 12, "n_head": 2, "scales": "1@1 1@2 1@4", "post_layers": 1,
                         "context": CONTEXT},
        "uneven": {"d_model": 8, "d_ff": 12, "n_head": 2, "scales": "1@1 2@2 1@6", "post_layers": 2, "context": 23},
        "one-scale": {"d_model": 8, "d_ff": 12, "n_head": 2, "scales": "1@1", "post_layers": 1, "context": CONTEXT},
    },
    "multiscale-retina": {
        "three-resolutions": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "resolutions": "3@1 5@2 0@4",
                              "context": CONTEXT},
        "two-resolutions": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "resolutions": "4@1 0@3",
                            "context": 23},
        "narrow": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 1, "resolutions": "1@1 1@2 0@6",
                   "context": CONTEXT},
        "one-resolution": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 1, "resolutions": "0@1",
                           "context": CONTEXT},
    },
    "multiscale-heads": {
        "mixed": {"d_model": 16, "d_ff": 12, "windows": [[1, 3, 0, 3], [0, 2, 5, 1]], "context": CONTEXT},
        "endless": {"d_model": 8, "d_ff": 12, "windows": [[2, 4], [4, 3]]},
        "unplaced": {"d_model": 8, "d_ff": 12, "windows": [[3, 0]], "rotary": False, "context": CONTEXT},
    },
    "chapters": {
        "rolling": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_kv_head": 1, "n_layer": 2, "memory_layers": [1],
                    "num_memory_tokens": 18, "num_chapters": 6, "top_k_chapters": 2, "memory_n_head": 4,
                    "memory_n_kv_head": 2, "routing_window_size": 5, "context": CONTEXT},
        "all-routed": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_kv_head": 2, "n_layer": 2, "memory_layers": [0, 1],
                       "num_memory_tokens": 10, "num_chapters": 5, "num_shared_chapters": 0, "top_k_chapters": 3,
                       "memory_n_head": 1, "memory_n_kv_head": 1, "routing_window_size": 1, "context": CONTEXT},
        "long-window": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_kv_head": 1, "n_layer": 1, "memory_layers": [0],
                        "num_memory_tokens": 8, "num_chapters": 8, "num_shared_chapters": 2, "top_k_chapters": 4,
                        "memory_n_head": 2, "memory_n_kv_head": 2, "routing_window_size": 30,
                        "normalize_memory": False, "context": CONTEXT},
    },
    "feedback": {
        "post-norm": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "mem_len": 5},
        "pre-norm": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "mem_len": 6, "d_head": 3,
                     "pre_norm": True},
        "shared": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 3, "mem_len": 12, "pre_norm": True,
                   "share_kv": True, "span_ramp": 3},
        "spans": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 2, "mem_len": 12, "pre_norm": True,
                  "span_ramp": 4},
        "one-step": {"d_model": 8, "d_ff": 12, "n_head": 2, "n_layer": 1, "mem_len": 1, "share_kv": True},
    },
    "segatron-xl": {
        "same-length": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 5, "tgt_len": 4,
                        "same_length": True, "sentence_end": [2, 3], "paragraph_end": [3, 4]},
        "segments": {"n_layer": 2, "d_model": 14, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 3, "tgt_len": 4,
                     "pre_norm": True, "sentence_end": [0, 1, 2, 5], "paragraph_end": [4], "clamp_len": 3},
        "no-paragraphs": {"n_layer": 1, "d_model": 6, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 2,
                          "tgt_len": 3, "same_length": True, "sentence_end": [1, 2, 3, 4], "tie_embedding": False},
    },
    "hm-lstm": {
        "three-layers": {"hidden_sizes": [7, 8, 5], "d_embedding": 5, "d_output": 7, "linear_sizes": [8]},
        "layer-norm": {"hidden_sizes": [6, 6, 5], "d_embedding": 5, "d_output": 7, "linear_sizes": [9, 8],
                       "layer_norm": True, "slope": 5.0},
        "no-top-boundary": {"hidden_sizes": [9, 7, 5], "d_embedding": 4, "d_output": 7, "top_boundary": False},
        "one-layer": {"hidden_sizes": [8], "d_embedding": 4, "d_output": 6, "top_boundary": False},
    },
    "dynamic-pooling": {
        "gelu": {"d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "pre_layers": 1, "shortened_layers": 2,
                 "post_layers": 1, "context": CONTEXT},
        "no-group-ends": {"d_model": 8, "n_head": 1, "d_head": 4, "d_inner": 16, "pre_layers": 2, "shortened_layers": 1,
                 "post_layers": 1, "activation_function": "relu", "context": CONTEXT},
    },
    "recurrent-memory-pytorch": {
        # One layer: with random weights, rounding errors of more grow from segment to segment, in PyTorch too.
        "one-layer": {"n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 4, "d_ff": 12, "num_mem_tokens": 3,
                      "seq_len": 4, "rotary_pos_emb": True},
        "rotary": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_ff": 12, "num_mem_tokens": 3,
                   "seq_len": 4, "rotary_pos_emb": True},
        "written-on": {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_ff": 12, "num_mem_tokens": 2,
                       "seq_len": 3, "num_residual_streams": 1, "add_write_to_next_write_mem": True},
        "no-first-memory": {"n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 4, "d_ff": 12, "num_mem_tokens": 2,
                            "seq_len": 5, "abs_pos_emb": False, "rotary_pos_emb": True, "num_residual_streams": 2,
                            "always_have_read_memories": False, "add_write_to_next_write_mem": True},
    },
}  # fmt: skip

VARIANTS = [(family, variant) for family, variants in TINY.items() for variant in variants]


@cache
def model(family: str, variant: str, dtype: torch.dtype = torch.float64, vocab_size: int = VOCAB) -> ReferenceModel:
    """The tiny model in eval mode with seeded weights; shared, so leave it unchanged."""
    row = families.find(family)
    config = row.parse_config({"vocab_size": vocab_size, **TINY[family][variant]})
    made = cases.seeded(row.model(config), dtype)
    made.sources = sources.pseudo(made.inputs)
    return made
