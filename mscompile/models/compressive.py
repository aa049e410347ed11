"""Compressive Transformer (Rae et al., arXiv 1911.05507): memory that is compressed instead of forgotten.

One layer on a segment of T rows, with the rows of its memory before them, c = [cmem ; mem ; x]:

    x    = h                                      LN(h) with `pre_norm`
    h'   = LN(h (+) W_o attention(x, c))          q from x; k, v from c; only W_o has a bias
    out  = LN(h' (+) feed_forward(h'))            with `pre_norm` LN stands before the feed-forward, and nowhere else
    mem  = [mem ; x], of which the oldest rows beyond M fall out
    cmem = [cmem ; compress(the rows that fell out)][-C:]        `compression_rate` rows become one

Memory is what keys and values are made of; it changes when a segment is complete, and starts empty. (+) is a sum or
a gate. With `enhanced_recurrence` (Ding et al., arXiv 2012.15688) a layer reads the memory of the next one, and the
last that of the first. Positions are relative and count the rows of c as one axis:

    sinusoid    as Transformer-XL: u, v and W_r sinusoid(distance)
    table       a learned row a head for each place, q_i . p_n with n = T - 1 + |cmem| + |mem| - distance: the table
                begins at the oldest row that there is, so what a distance means changes until memory is full

The settings that name no paper are those of lucidrains/compressive-transformer-pytorch 0.4.0, whose semantics the
rule for odd lengths follows too: zeros are put in front of rows that are compressed, as many as the rest of their
number divided by the rate, and what then lacks rows at the end is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mscompile.errors import ConfigError
from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive, require_switch
from mscompile.models.relative import Biases, Keys, Sight, attend, sinusoid

COMPRESSIONS = ("conv", "mean-pool", "max-pool")
NOT_COMPRESSIONS = {
    "most-used": "which rows it keeps hangs on the order of nearly equal attention weights, so rounding would decide",
    "dilated-conv": "the paper gives neither its kernel nor its dilation",
}
POSITIONS = ("sinusoid", "table")
FEED_FORWARDS = ("relu", "gelu", "geglu")
RESIDUALS = ("sum", "gru", "mogrified-gru")


@dataclass(frozen=True)
class CompressiveConfig:
    vocab_size: int
    n_layer: int
    d_model: int
    n_head: int
    d_ff: int
    tgt_len: int  # tokens of a segment
    mem_len: int  # rows of memory, M
    cmem_len: int  # rows of compressed memory, C
    compression_rate: int = 4
    compression: str = "conv"
    positions: str = "sinusoid"
    feed_forward: str = "relu"
    residual: str = "sum"
    pre_norm: bool = False
    enhanced_recurrence: bool = False
    memory_layers: Sequence[int] | None = None  # the layers that have memory, from 0; all where not given
    d_embedding: int | None = None  # d_model where not given
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "n_layer", "d_model", "n_head", "d_ff", "tgt_len", "mem_len", "cmem_len")
        require_positive(self, "compression_rate")
        require_switch(self, "pre_norm", "enhanced_recurrence")
        require_dropout(self.dropout)
        _require_one_of("compression", self.compression, COMPRESSIONS, NOT_COMPRESSIONS)
        _require_one_of("positions", self.positions, POSITIONS)
        _require_one_of("feed_forward", self.feed_forward, FEED_FORWARDS)
        _require_one_of("residual", self.residual, RESIDUALS)
        require(self.d_model % self.n_head == 0, f"{self.n_head} heads do not divide d_model {self.d_model}")
        require(self.d_model % 2 == 0, f"d_model must be even, not {self.d_model}")
        require(
            self.residual != "mogrified-gru" or self.d_model >= 8,
            f"a mogrified-gru residual needs d_model of at least 8, not {self.d_model}",
        )
        if self.d_embedding is not None:
            require_positive(self, "d_embedding")
        self._require_layers()
        self._require_lengths()

    def _require_layers(self) -> None:
        given = self.memory_layers
        if given is None:
            return
        known = isinstance(given, list | tuple) and all(type(layer) is int for layer in given)
        require(
            known and len(given) > 0 and list(given) == [layer for layer in range(self.n_layer) if layer in given],
            f"memory_layers must be numbers from 0 to {self.n_layer - 1} in rising order, not {given!r}",
        )

    def _require_lengths(self) -> None:
        require(
            self.mem_len >= self.tgt_len,
            f"mem_len must be at least the {self.tgt_len} tokens of a segment, not {self.mem_len}",
        )
        for rows in (self.tgt_len, self.first_dropped):
            require(
                self.compressed(rows) > 0,
                f"{rows} rows fall out of memory at once, too few to compress at a rate of {self.compression_rate}",
            )

    def compressed(self, rows: int) -> int:
        """What is left of `rows`, once they are compressed."""
        return (rows + rows % self.compression_rate) // self.compression_rate

    @property
    def first_dropped(self) -> int:
        """Rows that fall out of memory the first time; after that they are always `tgt_len`."""
        return self.tgt_len - self.mem_len % self.tgt_len

    @property
    def reach(self) -> int:
        """Distances that there are: 0 is the row itself."""
        return self.tgt_len + self.mem_len + self.cmem_len

    @property
    def remembering(self) -> tuple[int, ...]:
        """The layers that have memory."""
        return tuple(range(self.n_layer) if self.memory_layers is None else self.memory_layers)


def _require_one_of(name: str, value: Any, known: Sequence[str], refused: dict[str, str] | None = None) -> None:
    if refused and value in refused:
        raise ConfigError(f"{name} {value!r} is not offered: {refused[value]}; use one of {', '.join(known)}")
    require(value in known, f"{name} must be one of {', '.join(known)}, not {value!r}")


class Memory(NamedTuple):
    """What a layer remembers, each (B, rows, d_model), oldest first."""

    mem: Tensor
    cmem: Tensor

    @property
    def rows(self) -> Tensor:
        return torch.cat([self.cmem, self.mem], dim=1)


class Compression(nn.Module):
    """(B, S, d) -> (B, config.compressed(S), d)."""

    def __init__(self, config: CompressiveConfig) -> None:
        super().__init__()
        self.function, self.rate = config.compression, config.compression_rate
        if self.function == "conv":  # kernel and stride are the rate: a Dense layer over the rows of a group
            self.linear = nn.Linear(self.rate * config.d_model, config.d_model)

    def forward(self, rows: Tensor) -> Tensor:
        if rest := rows.shape[1] % self.rate:
            rows = nn.functional.pad(rows, (0, 0, rest, 0))
        whole = rows.shape[1] - rows.shape[1] % self.rate
        groups = rows[:, :whole].unflatten(1, (-1, self.rate))  # (B, S / rate, rate, d)
        if self.function == "conv":
            return self.linear(groups.flatten(2))
        return groups.mean(dim=2) if self.function == "mean-pool" else groups.amax(dim=2)


class CompressiveAttention(nn.Module):
    """The projections; how rows see one another is said by `relative.attend`."""

    def __init__(self, config: CompressiveConfig) -> None:
        super().__init__()
        self.n_head, self.d_head = config.n_head, config.d_model // config.n_head
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, config.d_model, bias=False)
        self.value = nn.Linear(config.d_model, config.d_model, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model)
        sinusoids = config.positions == "sinusoid"
        self.position = nn.Linear(config.d_model, config.d_model, bias=False) if sinusoids else None

    def heads(self, rows: Tensor) -> Tensor:
        """(B, S, d_model) -> (B, H, S, d_head)."""
        return rows.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)

    def merge(self, mixed: Tensor) -> Tensor:
        """(B, H, T, d_head) -> (B, T, d_model), projected."""
        return self.output(mixed.transpose(1, 2).flatten(-2))

    def table(self, encoded: Tensor) -> Tensor:
        """Position keys (H, d_head, reach), of the model's `encoded` positions."""
        keys = encoded if self.position is None else self.heads(self.position(encoded)[None])[0]
        return keys.transpose(-1, -2)


class Sum(nn.Module):
    def forward(self, x: Tensor, new: Tensor) -> Tensor:
        return x + new


class GruGate(nn.Module):
    """A GRU cell whose state is x and whose input is what is new (Parisotto et al., arXiv 1910.06764)."""

    def __init__(self, d_model: int, mogrified: bool) -> None:
        super().__init__()
        self.mogrifier = Mogrifier(d_model) if mogrified else None
        self.new = nn.Linear(d_model, 3 * d_model)
        self.old = nn.Linear(d_model, 3 * d_model)

    def forward(self, x: Tensor, new: Tensor) -> Tensor:
        """(B, T, d) each -> (B, T, d)."""
        if self.mogrifier is not None:
            x, new = self.mogrifier(x, new)
        reset, update, candidate = self.new(new).chunk(3, dim=-1)
        reset_old, update_old, candidate_old = self.old(x).chunk(3, dim=-1)
        update = (update + update_old).sigmoid()
        candidate = (candidate + (reset + reset_old).sigmoid() * candidate_old).tanh()
        return (1 - update) * candidate + update * x


class Mogrifier(nn.Module):
    """x and what is new scale each other in turn, five times (Melis et al., arXiv 1909.01792)."""

    ROUNDS = 5

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.of_new = nn.Sequential(nn.Linear(d_model, d_model // 4), nn.Linear(d_model // 4, d_model))
        self.of_old = nn.Sequential(nn.Linear(d_model, d_model // 4), nn.Linear(d_model // 4, d_model))

    def forward(self, x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        for number in range(self.ROUNDS):
            if number % 2 == 0:
                new = 2 * self.of_new(x).sigmoid() * new
            else:
                x = 2 * self.of_old(new).sigmoid() * x
        return x, new


class FeedForward(nn.Module):
    def __init__(self, config: CompressiveConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "geglu"
        self.inner = nn.Linear(config.d_model, config.d_ff * (2 if self.gated else 1))
        self.activation = nn.ReLU() if config.feed_forward == "relu" else nn.GELU()
        self.outer = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.outer(self.activation(self.inner(x)))
        gate, inner = self.inner(x).chunk(2, dim=-1)
        return self.outer(self.activation(gate) * inner)


class CompressiveLayer(nn.Module):
    def __init__(self, config: CompressiveConfig, remembers: bool) -> None:
        super().__init__()
        self.pre_norm, self.mem_len, self.cmem_len = config.pre_norm, config.mem_len, config.cmem_len
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = CompressiveAttention(config)
        self.attention_residual = _residual(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = _residual(config)
        self.compression = Compression(config) if remembers else None
        self.dropout = nn.Dropout(config.dropout)

    def rows(self, h: Tensor) -> Tensor:
        """What attention reads and memory keeps of h (B, T, d)."""
        return self.attention_norm(h) if self.pre_norm else h

    def finish(self, h: Tensor, attended: Tensor) -> Tensor:
        """Both residuals and the feed-forward: (B, T, d) each."""
        h = self.attention_residual(h, self.dropout(attended))
        if self.pre_norm:
            return self.feed_forward_residual(h, self.dropout(self.feed_forward(self.feed_forward_norm(h))))
        h = self.attention_norm(h)
        return self.feed_forward_norm(self.feed_forward_residual(h, self.dropout(self.feed_forward(h))))

    def remember(self, memory: Memory, rows: Tensor) -> Memory:
        """The memory once a segment of `rows` (B, tgt_len, d) is complete."""
        assert self.compression is not None
        mem, cmem = torch.cat([memory.mem, rows], dim=1), memory.cmem
        dropped = mem[:, : -self.mem_len]
        if dropped.shape[1]:
            cmem = torch.cat([cmem, self.compression(dropped)], dim=1)[:, -self.cmem_len :]
        return Memory(mem[:, -self.mem_len :], cmem)


def _residual(config: CompressiveConfig) -> nn.Module:
    if config.residual == "sum":
        return Sum()
    return GruGate(config.d_model, mogrified=config.residual == "mogrified-gru")


class CompressiveTransformer(ReferenceModel):
    def __init__(self, config: CompressiveConfig) -> None:
        super().__init__()
        self.config = config
        narrow, d_head = config.d_embedding, config.d_model // config.n_head
        self.embedding = nn.Embedding(config.vocab_size, narrow or config.d_model)
        self.widen = nn.Identity() if narrow is None else nn.Linear(narrow, config.d_model)
        if config.positions == "sinusoid":
            self.content_bias = nn.Parameter(torch.zeros(config.n_head, d_head))
            self.position_bias = nn.Parameter(torch.zeros(config.n_head, d_head))
        else:
            self.position_table = nn.Parameter(torch.zeros(config.n_head, config.reach, d_head))
        remembering = config.remembering
        self.layers = nn.ModuleList(CompressiveLayer(config, i in remembering) for i in range(config.n_layer))
        self.narrow = nn.Identity() if narrow is None else nn.Linear(config.d_model, narrow)
        self.head = nn.Linear(narrow or config.d_model, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)
        for name, parameter in self.named_parameters():
            if name in ("content_bias", "position_bias", "position_table"):
                nn.init.normal_(parameter, std=0.02)

    @property
    def biases(self) -> Biases | None:
        return Biases(self.content_bias, self.position_bias) if self.config.positions == "sinusoid" else None

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, d_model)."""
        return self.dropout(self.widen(self.embedding(tokens)))

    def logits(self, h: Tensor) -> Tensor:
        """(B, T, d_model) -> (B, T, V)."""
        return self.head(self.narrow(h))

    def encoded(self) -> Tensor:
        """What the layers make their tables of positions of: (reach, d_model), or the learned (H, reach, d_head)."""
        if self.config.positions == "table":
            return self.position_table
        weight = self.embedding.weight
        return sinusoid(torch.arange(self.config.reach, device=weight.device), self.config.d_model, weight.dtype)

    def entries(self, distance: Tensor, remembered: int | Tensor) -> Tensor:
        """Entries of that table for distances, where so many rows are remembered in all."""
        if self.config.positions == "sinusoid":
            return distance
        return self.config.tgt_len - 1 + remembered - distance

    def rolled(self, memories: Sequence[Memory]) -> list[Memory]:
        """The memories that layers read, of those that they left: with `enhanced_recurrence` the next layer's."""
        shift = 1 if self.config.enhanced_recurrence else 0
        return [*memories[shift:], *memories[:shift]]

    def empty_memories(self, batch: int) -> list[Memory]:
        empty = self.head.weight.new_zeros(batch, 0, self.config.d_model)
        return [Memory(empty, empty)] * len(self.config.remembering)

    def forward(self, tokens: Tensor, memories: Sequence[Memory]) -> tuple[Tensor, list[Memory]]:
        """One segment: tokens (B, T <= tgt_len) and one memory a remembering layer -> logits, and what these become."""
        h, encoded = self.embed(tokens), self.encoded()
        remembered = memories[0].rows.shape[1]
        nothing, waiting, left = h[:, :0], iter(self.rolled(memories)), []
        for layer in cast(Iterable[CompressiveLayer], self.layers):
            memory = Memory(nothing, nothing) if layer.compression is None else next(waiting)
            rows = layer.rows(h)
            h = layer.finish(h, self._attend(layer.attention, rows, memory.rows, encoded, remembered))
            if layer.compression is not None:
                left.append(layer.remember(memory, rows))
        return self.logits(h), left

    def _attend(
        self, attention: CompressiveAttention, rows: Tensor, before: Tensor, encoded: Tensor, remembered: int
    ) -> Tensor:
        context = torch.cat([before, rows], dim=1)
        queries = torch.arange(rows.shape[1], device=rows.device)[:, None] + before.shape[1]
        distance = queries - torch.arange(context.shape[1], device=rows.device)[None, :]  # (T, S)
        sight = Sight.of(self.entries(distance, remembered)[None], (distance >= 0)[None], self.config.reach)
        keys = Keys(attention.heads(attention.key(context)), attention.heads(attention.value(context)), sight)
        query = attention.heads(attention.query(rows))
        return attention.merge(attend(query, [keys], attention.table(encoded), self.biases))

    def full(self, tokens: Tensor) -> Tensor:
        logits, _ = self.advance(tokens)
        return logits

    def advance(self, tokens: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        """Segment by segment; a segment begun before is run again from its start."""
        memories, begun = carry or (self.empty_memories(tokens.shape[0]), tokens[:, :0])
        logits, rest = [], begun
        for segment in torch.cat([begun, tokens], dim=1).split(self.config.tgt_len, dim=1):
            segment_logits, left = self(segment, memories)
            logits.append(segment_logits)
            complete = segment.shape[1] == self.config.tgt_len
            memories, rest = (left, segment[:, :0]) if complete else (memories, segment)
        return torch.cat(logits, dim=1)[:, -tokens.shape[1] :], (memories, rest)

    def select(self, carry: Any, rows: list[int]) -> Any:
        memories, begun = carry
        return [Memory(mem[rows], cmem[rows]) for mem, cmem in memories], begun[rows]


FAMILY = Family(
    name="compressive",
    title="Compressive Transformer",
    source="Rae et al., arXiv 1911.05507; lucidrains/compressive-transformer-pytorch",
    config=CompressiveConfig,
    model=CompressiveTransformer,
)
