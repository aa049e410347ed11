"""Hierarchical multiscale LSTM (Chung, Ahn and Bengio, arXiv 1609.01704), with the arithmetic of clemens33/hmlstm.

Layer l holds h, c and a boundary z in {0, 1}. With the new state of the layer below (z_below = 1 below the first
layer) and the old one of the layer above:

    s = W (z_below * h_below) + R h + z U h_above + b         4 n + 1 values: i, g, o, f, z~
    FLUSH   z = 1                    c' = i * g
    UPDATE  z = 0, z_below = 1       c' = f * c + i * g
    COPY    z = 0, z_below = 0       c' = c,  h' = h
    h' = o * tanh(c')                                         sigmoid of i, o, f; tanh of g
    z' = 1 where clamp((slope z~ + 1) / 2, 0, 1) > 1/2        straight-through in training, `slope` annealed from 1 to 5

    logits = W_out fnn(relu(sum_l (E_l (gate_l h_l) + b_l))),   gate_l = sigmoid(w_l . [h_1 .. h_L])

All three operations are computed and one is selected, since a batch needs different ones. `layer_norm` is that of
HMLSTMCell4: of s before the bias, of every new c, of the embedding, of each linear layer; and of gate_l, one value,
whose norm is its bias: then output gates are learned constants, as in the public code. `top_boundary`: the last layer
has a boundary, too, which flushes it, as in the public code; without, it has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mscompile.models.family import Family, ReferenceModel, require, require_positive, require_switch


@dataclass(frozen=True)
class HMLSTMConfig:
    vocab_size: int
    hidden_sizes: Sequence[int] = (512, 512, 512)  # units of each layer, the finest first
    d_embedding: int = 128
    d_output: int = 512  # what the layers are summed up in
    linear_sizes: Sequence[int] = ()  # tanh layers between this and the logits
    slope: float = 1.0
    layer_norm: bool = False
    top_boundary: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "d_embedding", "d_output")
        for name in ("hidden_sizes", "linear_sizes"):
            sizes = getattr(self, name)
            known = isinstance(sizes, list | tuple) and all(type(size) is int and size >= 1 for size in sizes)
            require(known, f"{name} must be a list of whole numbers of at least 1, not {sizes!r}")
        require(len(self.hidden_sizes) >= 1, "hidden_sizes must name at least one layer")
        slope: Any = self.slope
        is_number = isinstance(slope, int | float) and not isinstance(slope, bool)
        require(is_number and slope > 0, f"slope must be a number above 0, not {slope!r}")
        require_switch(self, "layer_norm", "top_boundary")


class Layer(NamedTuple):
    """The state of one layer: h and c (B, n), z (B, 1)."""

    h: Tensor
    c: Tensor
    z: Tensor

    @classmethod
    def of(cls, h: Tensor, c: Tensor, z: Tensor | None = None) -> Layer:
        """With z = 0 where there is none."""
        return cls(h, c, torch.zeros_like(h[:, :1]) if z is None else z)


def _norm(width: int, config: HMLSTMConfig) -> nn.Module:
    return nn.LayerNorm(width) if config.layer_norm else nn.Identity()


class HMLSTMCell(nn.Module):
    def __init__(self, d_below: int, size: int, d_above: int | None, config: HMLSTMConfig) -> None:
        super().__init__()
        self.size, self.slope = size, config.slope
        self.has_boundary = d_above is not None or config.top_boundary
        gates = 4 * size + (1 if self.has_boundary else 0)
        self.below = nn.Linear(d_below, gates, bias=False)
        self.recurrent = nn.Linear(size, gates, bias=False)
        self.above = None if d_above is None else nn.Linear(d_above, gates, bias=False)
        self.bias = nn.Parameter(torch.zeros(gates))
        self.gates_norm, self.cell_norm = _norm(gates, config), _norm(size, config)

    def forward(self, below: Tensor, z_below: Tensor | None, old: Layer, above: Tensor | None) -> Layer:
        """`below` (B, d_below) is new, `above` (B, d_above) is old; no z_below (B, 1) means that it is 1 for ever."""
        h, c, z = old
        parts = self.gates(below if z_below is None else below * z_below, old, above).split(self.size, dim=1)
        i, g, o, f = parts[0].sigmoid(), parts[1].tanh(), parts[2].sigmoid(), parts[3].sigmoid()
        flush, copy = z == 1, torch.zeros_like(z, dtype=torch.bool) if z_below is None else (z == 0) & (z_below == 0)
        new_c = torch.where(copy, c, self.cell_norm(torch.where(flush, i * g, f * c + i * g)))
        new_h = torch.where(copy, h, o * new_c.tanh())
        return Layer(new_h, new_c, self.boundary(parts[4]) if self.has_boundary else torch.zeros_like(z))

    def gates(self, below: Tensor, old: Layer, above: Tensor | None) -> Tensor:
        """Before their activations: (B, 4 n + 1), or (B, 4 n) without a boundary."""
        total = self.below(below) + self.recurrent(old.h)
        if self.above is not None and above is not None:
            total = total + self.above(above * old.z)
        gates: Tensor = self.gates_norm(total) + self.bias
        return gates

    def boundary(self, gate: Tensor) -> Tensor:
        """(B, 1) -> 0 or 1; in training with the gradient of the hard sigmoid."""
        soft = (0.5 * (self.slope * gate + 1)).clamp(0, 1)
        hard = (soft > 0.5).to(soft.dtype)
        return hard + (soft - soft.detach()) if self.training else hard


class Output(nn.Module):
    """The layers, each behind its gate, summed up and classified."""

    def __init__(self, config: HMLSTMConfig) -> None:
        super().__init__()
        self.sizes, total = list(config.hidden_sizes), sum(config.hidden_sizes)
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(total, 1, bias=False), _norm(1, config)) for _ in self.sizes)
        self.embeddings = nn.ModuleList(nn.Linear(size, config.d_output) for size in self.sizes)
        self.norm = _norm(config.d_output, config)
        widths = [config.d_output, *config.linear_sizes]
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(before, after), _norm(after, config), nn.Tanh())
            for before, after in pairwise(widths)
        )
        self.output = nn.Linear(widths[-1], config.vocab_size)

    def forward(self, h: Tensor) -> Tensor:
        """(.., sum of hidden_sizes) -> (.., V)."""
        layers = zip(self.gates, self.embeddings, h.split(self.sizes, dim=-1), strict=True)
        x = self.norm(reduce(torch.add, (embed(gate(h).sigmoid() * own) for gate, embed, own in layers))).relu()
        for layer in self.hidden:
            x = layer(x)
        return self.output(x)


class HMLSTM(ReferenceModel):
    def __init__(self, config: HMLSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_embedding)
        below = [config.d_embedding, *config.hidden_sizes[:-1]]
        above = [*config.hidden_sizes[1:], None]
        self.cells = nn.ModuleList(
            HMLSTMCell(*sizes, config) for sizes in zip(below, config.hidden_sizes, above, strict=True)
        )
        self.output = Output(config)

    def start(self, batch: int) -> list[Layer]:
        """The state of new streams."""
        zeros = [self.embedding.weight.new_zeros(batch, size) for size in self.config.hidden_sizes]
        return [Layer.of(h=rows, c=rows) for rows in zeros]

    def step(self, tokens: Tensor, state: Sequence[Layer]) -> list[Layer]:
        """The state of every layer after one token, (B,)."""
        below, z_below, new = self.embedding(tokens), None, []
        above = [*(layer.h for layer in state[1:]), None]
        for cell, old, old_above in zip(cast(Iterable[HMLSTMCell], self.cells), state, above, strict=True):
            new.append(cell(below, z_below, old, old_above))
            below, z_below = new[-1].h, new[-1].z
        return new

    def forward(self, tokens: Tensor, state: Sequence[Layer]) -> tuple[Tensor, list[Layer]]:
        """Tokens (B, T) -> logits (B, T, V), and the state after them."""
        now, rows = list(state), []
        for token in tokens.unbind(dim=1):
            now = self.step(token, now)
            rows.append(torch.cat([layer.h for layer in now], dim=-1))
        return self.output(torch.stack(rows, dim=1)), now

    def full(self, tokens: Tensor) -> Tensor:
        logits, _ = self.advance(tokens)
        return logits

    def advance(self, tokens: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        logits, state = self(tokens, carry or self.start(tokens.shape[0]))
        return logits, state

    def select(self, carry: Any, rows: list[int]) -> Any:
        return [Layer(*(value[rows] for value in layer)) for layer in carry]


FAMILY = Family(
    name="hm-lstm",
    title="Hierarchical multiscale LSTM",
    source="Chung, Ahn and Bengio, arXiv 1609.01704; clemens33/hmlstm",
    config=HMLSTMConfig,
    model=HMLSTM,
)
