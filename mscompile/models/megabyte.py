"""MEGABYTE (Yu et al., arXiv 2305.07185): a global model over patches of P bytes, a local model inside each patch.

    g_0     = pad_G                                                  (P d_global), what stands before the first patch
    g_k     = [E_G[x_t] + pos_t  for t in patch k - 1]               concatenated, for k > 0
    r_k     = Global(g)_k, cut into P rows of d_global               causal over patches
    l_k,0   = W_GL r_k,0 + pad_L                                     the first byte is predicted from no byte at all
    l_k,p   = W_GL r_k,p + E_L[x_(kP + p - 1)]                       p > 0
    logits that predict x_(kP + p) = E_L Local(l_k)_p                causal, inside the patch

Position t of the paper predicts x_t from what is before it. Here, as in every family, position t consumes x_t and
predicts x_(t + 1): the outputs of the paper from its position 1 on. So the last byte of a patch completes the next
row of the global model, and its logits come from the first row of the next patch.

The paper leaves the inside of both transformers open. Here they are pre-norm blocks with GELU and a LayerNorm after
the last one, with rotary positions where configured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mscompile.models.attention import Block, Stack
from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive, require_switch


@dataclass(frozen=True)
class MegabyteConfig:
    vocab_size: int
    patch_size: int
    d_global: int  # width of a byte in the global model, whose own width is patch_size * d_global
    n_layer_global: int
    n_head_global: int
    d_ff_global: int
    d_local: int
    n_layer_local: int
    n_head_local: int
    d_ff_local: int
    context: int  # longest stream, in bytes
    rotary: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "patch_size", "d_global", "n_layer_global", "n_head_global", "d_ff_global",
            "d_local", "n_layer_local", "n_head_local", "d_ff_local", "context",
        )  # fmt: skip
        require(self.patch_size >= 2, f"patch_size must be at least 2, not {self.patch_size}")
        require(
            self.context % self.patch_size == 0,
            f"context {self.context} must be divisible by patch_size {self.patch_size}",
        )
        require_switch(self, "rotary")
        for name, width, heads in (
            ("patch_size * d_global", self.patch_size * self.d_global, self.n_head_global),
            ("d_local", self.d_local, self.n_head_local),
        ):
            require(width % heads == 0, f"{name} = {width} must be divisible by its {heads} heads")
            require(
                not self.rotary or width // heads % 2 == 0,
                f"rotary positions need an even width of a head, not {name} / heads = {width // heads}",
            )
        require_dropout(self.dropout)


class Megabyte(ReferenceModel):
    def __init__(self, config: MegabyteConfig) -> None:
        super().__init__()
        self.config = config
        width = config.patch_size * config.d_global
        self.global_embedding = nn.Embedding(config.vocab_size, config.d_global)
        self.position = nn.Embedding(config.context, config.d_global)
        self.global_pad = nn.Parameter(torch.zeros(width))
        self.global_model = Stack(
            [
                Block(width, config.n_head_global, config.d_ff_global, rotary=config.rotary)
                for _ in range(config.n_layer_global)
            ]
        )
        self.global_norm = nn.LayerNorm(width)
        self.to_local = nn.Linear(config.d_global, config.d_local, bias=False)
        self.local_embedding = nn.Embedding(config.vocab_size, config.d_local)
        self.local_pad = nn.Parameter(torch.zeros(config.d_local))
        self.local_model = Stack(
            [
                Block(config.d_local, config.n_head_local, config.d_ff_local, rotary=config.rotary)
                for _ in range(config.n_layer_local)
            ]
        )
        self.local_norm = nn.LayerNorm(config.d_local)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.global_pad, std=0.02)
        nn.init.normal_(self.local_pad, std=0.02)

    def patches(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Whole patches (B, K P) at `positions` (1 or B, K P) -> rows of the global model (B, K, P d_global)."""
        rows = self.dropout(self.global_embedding(tokens) + self.position(positions))
        return rows.unflatten(1, (-1, self.config.patch_size)).flatten(2)

    def spread(self, rows: Tensor) -> Tensor:
        """Outputs of the global blocks (B, K, P d_global) -> what each local row gets of them, (B, K, P, d_local)."""
        rows = self.global_norm(rows).unflatten(2, (self.config.patch_size, -1))
        spread: Tensor = self.to_local(rows)
        return spread

    def head(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(self.local_norm(rows), self.local_embedding.weight)

    def local_rows(self, tokens: Tensor, spread: Tensor) -> Tensor:
        """Whole patches (B, K P) and their `spread` (B, K, P, d_local) -> rows of the local model, one patch each."""
        before = self.local_embedding(tokens.unflatten(1, (-1, self.config.patch_size))[:, :, :-1])
        first = self.local_pad.expand(*before.shape[:2], 1, -1)
        return (self.dropout(torch.cat([first, before], dim=2)) + spread).flatten(0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), T <= context -> logits (B, T, V).

        The last patch is filled up on the right, where nothing that is kept can see.
        """
        size, length = self.config.patch_size, tokens.shape[1]
        whole = length - length % size
        pad = self.global_pad.expand(tokens.shape[0], 1, -1)
        patches = self.patches(tokens[:, :whole], torch.arange(whole, device=tokens.device)[None])
        spread = self.spread(self.global_model(torch.cat([pad, patches], dim=1)))
        filled = nn.functional.pad(tokens, (0, whole + size - length))
        rows = self.local_model(self.local_rows(filled, spread))
        return self.head(rows.reshape(*filled.shape, -1))[:, 1 : length + 1]

    def full(self, tokens: Tensor) -> Tensor:
        return self(tokens)


FAMILY = Family(
    name="megabyte",
    title="MEGABYTE",
    source="Yu et al., arXiv 2305.07185",
    config=MegabyteConfig,
    model=Megabyte,
)
