"""Recurrent Memory Transformer as in lucidrains/recurrent-memory-transformer-pytorch (PyPI, 0.7.0).

Segments of T tokens between memory rows, as in `recurrent_memory.py`, in another transformer:

    rows   = [M + R ; E[x] + P ; W]        R, W (n, d) learned; with `add_write_to_next_write_mem` W + M
    next M = N(last layer's rows of the write rows);   logits = W_o N(rows of tokens) + b

The first segment has M = 0, or no read rows at all without `always_have_read_memories`. Read rows see read rows,
tokens see read rows and the tokens up to their own, write rows see everything. N is RMSNorm.

One layer, on s residual streams (hyper-connections, Zhu et al., arXiv 2409.19606, `num_residual_streams`):

    attention       q, k, v from N(x), no biases; a learned null key and value that every row sees
                    after the first layer v = v + sigmoid(W_m N(x)) (v_0 - v), v_0 the first layer's values
    feed-forward    W_2 (a * gelu(g)),  [a ; g] = W_1 N(x)

`rotary_pos_emb` turns queries and keys: memory rows stand at 0, the null key at 9999, token t at 10000 + t.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mscompile.models.attention import Run, attend, later
from mscompile.models.family import Family, require, require_dropout, require_positive, require_switch
from mscompile.models.recurrent_memory_segments import Memory, SegmentModel, repeated, split_rows

FIRST_TOKEN = 10000  # rotary position of a segment's first token; the null key stands before it
ROTARY_BASE = 32768


@dataclass(frozen=True)
class RecurrentMemoryPytorchConfig:
    vocab_size: int
    d_model: int
    n_layer: int
    num_mem_tokens: int
    seq_len: int
    n_head: int = 8
    d_head: int = 64
    d_ff: int = 1365  # inner width of the feed-forward, behind its gate
    abs_pos_emb: bool = True
    rotary_pos_emb: bool = False
    num_residual_streams: int = 4
    add_write_to_next_write_mem: bool = False
    always_have_read_memories: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "d_model", "n_layer", "num_mem_tokens", "seq_len", "n_head", "d_head", "d_ff",
            "num_residual_streams",
        )  # fmt: skip
        require_switch(
            self, "abs_pos_emb", "rotary_pos_emb", "add_write_to_next_write_mem", "always_have_read_memories"
        )
        require(self.abs_pos_emb or self.rotary_pos_emb, "one of abs_pos_emb and rotary_pos_emb must be true")
        even = self.d_head % 2 == 0
        require(even or not self.rotary_pos_emb, f"d_head must be even for rotary_pos_emb, not {self.d_head}")
        require_dropout(self.dropout)


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2 + the smallest step of its dtype), times a weight."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.square().mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(mean + torch.finfo(x.dtype).eps) * self.weight


class HyperConnection(nn.Module):
    """How a sub-layer reads the residual streams (B, S, s, d) and writes to them.

    With n_i = x_i / |x_i| * sqrt(d) * (gamma + 1), for streams i and j = 1 .. s:

        a_ij = static_alpha_ij + alpha_scale * tanh(n_i dynamic_alpha)_j       j = 0 .. s
        b_i  = static_beta_i + beta_scale * tanh(n_i . dynamic_beta)

        input of the sub-layer = sum over i of a_i0 x_i;     x_j' = sum over i of a_ij x_i + b_j output
    """

    def __init__(self, streams: int, d_model: int, first: int) -> None:
        super().__init__()
        reading = torch.zeros(streams, 1)
        reading[first % streams] = 1.0
        self.gamma = nn.Parameter(torch.zeros(d_model))
        self.static_alpha = nn.Parameter(torch.cat([reading, torch.eye(streams)], dim=1))
        self.dynamic_alpha = nn.Parameter(torch.zeros(d_model, streams + 1))
        self.alpha_scale = nn.Parameter(torch.tensor(0.01))
        self.static_beta = nn.Parameter(torch.ones(streams))
        self.dynamic_beta = nn.Parameter(torch.zeros(d_model))
        self.beta_scale = nn.Parameter(torch.tensor(0.01))

    def split(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sub-layer's input (B, S, d), the streams mixed (B, S, s, d), and what its output weighs (B, S, s, 1)."""
        normed = nn.functional.normalize(streams, dim=-1) * streams.shape[-1] ** 0.5 * (self.gamma + 1.0)
        alpha = (normed @ self.dynamic_alpha).tanh() * self.alpha_scale + self.static_alpha  # (B, S, s, 1 + s)
        beta = (normed @ self.dynamic_beta).tanh() * self.beta_scale + self.static_beta
        mixed = alpha.transpose(-1, -2) @ streams
        return mixed[:, :, 0], mixed[:, :, 1:], beta[..., None]

    def join(self, mixed: Tensor, beta: Tensor, output: Tensor) -> Tensor:
        return mixed + beta * output[:, :, None]


class Residual(nn.Module):
    """The same for one stream: x' = x + output."""

    def split(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return streams[:, :, 0], streams, streams.new_ones(1)

    def join(self, mixed: Tensor, beta: Tensor, output: Tensor) -> Tensor:
        return mixed + output[:, :, None]


class GatedFeedForward(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.inner = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.outer = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(self.norm(x)).chunk(2, dim=-1)
        return self.outer(value * nn.functional.gelu(gate))


@dataclass(frozen=True)
class Turn:
    """Cosine and sine of the angles by which rotary embedding turns rows, (1 or B, S, d_head / 2)."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Rows:
    """What goes from layer to layer: residual streams (B, S, s, d), and the first layer's values (B, H, S, d_head)."""

    streams: Tensor
    values: Tensor | None = None


@dataclass(frozen=True)
class Projected:
    """A layer's queries, keys and values (B, H, S, d_head), and what is needed to finish its rows."""

    query: Tensor
    key: Tensor
    value: Tensor
    mixed: Tensor
    beta: Tensor
    values: Tensor


class RecurrentMemoryPytorchLayer(nn.Module):
    def __init__(self, config: RecurrentMemoryPytorchConfig, number: int) -> None:
        super().__init__()
        self.n_head, self.d_head = config.n_head, config.d_head
        d_model, width, streams = config.d_model, config.n_head * config.d_head, config.num_residual_streams
        self.attention_residual = HyperConnection(streams, d_model, 2 * number) if streams > 1 else Residual()
        self.attention_norm = RMSNorm(d_model)
        self.query = nn.Linear(d_model, width, bias=False)
        self.key = nn.Linear(d_model, width, bias=False)
        self.value = nn.Linear(d_model, width, bias=False)
        self.output = nn.Linear(width, d_model, bias=False)
        self.null_key_value = nn.Parameter(torch.randn(2, config.n_head, config.d_head))
        self.value_mix = nn.Linear(d_model, config.n_head, bias=False) if number else None
        self.feed_forward_residual = HyperConnection(streams, d_model, 2 * number + 1) if streams > 1 else Residual()
        self.feed_forward = GatedFeedForward(d_model, config.d_ff)

    def heads(self, rows: Tensor) -> Tensor:
        """(B, S, H * d_head) -> (B, H, S, d_head)."""
        return rows.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)

    def project(self, rows: Rows, turn: Turn | None) -> Projected:
        """`turn` is that of queries and keys; None leaves them."""
        entering, mixed, beta = self.attention_residual.split(rows.streams)
        x = self.attention_norm(entering)
        query, key, own = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        first, value = own if rows.values is None else rows.values, own
        if self.value_mix is not None:
            value = own + self.value_mix(x).sigmoid().transpose(1, 2)[..., None] * (first - own)
        return Projected(turned(query, turn), turned(key, turn), value, mixed, beta, first)

    def null(self, turn: Turn | None) -> Run:
        """The key and value that every row sees, (1, H, 1, d_head)."""
        key, value = self.null_key_value[:, None, :, None]
        return Run(turned(key, turn), value)

    def finish(self, projected: Projected, runs: list[Run]) -> Rows:
        attended = self.output(attend(projected.query, runs).transpose(1, 2).flatten(-2))
        streams = self.attention_residual.join(projected.mixed, projected.beta, attended)
        x, mixed, beta = self.feed_forward_residual.split(streams)
        return Rows(self.feed_forward_residual.join(mixed, beta, self.feed_forward(x)), projected.values)


class RecurrentMemoryPytorch(SegmentModel):
    frequency: Tensor

    def __init__(self, config: RecurrentMemoryPytorchConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.abs_pos_emb:
            self.position_embedding = nn.Embedding(config.seq_len, config.d_model)
        if config.rotary_pos_emb:
            steps = torch.arange(0, config.d_head, 2).float() / config.d_head
            self.register_buffer("frequency", 1.0 / ROTARY_BASE**steps)
        self.read_memory = nn.Parameter(0.02 * torch.randn(config.num_mem_tokens, config.d_model))
        self.write_memory = nn.Parameter(0.02 * torch.randn(config.num_mem_tokens, config.d_model))
        self.layers = nn.ModuleList(RecurrentMemoryPytorchLayer(config, n) for n in range(config.n_layer))
        self.norm = RMSNorm(config.d_model)
        self.output = nn.Linear(config.d_model, config.vocab_size)

    @property
    def segment(self) -> int:
        return self.config.seq_len

    def begin(self, batch: int) -> Memory:
        memory = torch.zeros_like(repeated(self.read_memory, batch))
        return (memory if self.config.always_have_read_memories else memory[:, :0],)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T) at positions (1 or B, T) within the segment -> (B, T, d)."""
        rows = self.embedding(tokens)
        return rows + self.position_embedding(positions) if self.config.abs_pos_emb else rows

    def turn(self, positions: Tensor) -> Turn | None:
        """Of rotary positions (1 or B, S); None where nothing turns."""
        if not self.config.rotary_pos_emb:
            return None
        angle = positions[..., None].to(self.frequency.dtype) * self.frequency
        return Turn(angle.cos(), angle.sin())

    def read_rows(self, memory: Tensor) -> Tensor:
        return memory + self.read_memory[: memory.shape[1]]

    def write_rows(self, memory: Tensor) -> Tensor:
        """Of memory (B, n, d), or (B, 0, d) where there is none yet."""
        write = repeated(self.write_memory, memory.shape[0])
        return write + memory if self.config.add_write_to_next_write_mem and memory.shape[1] else write

    def spread(self, rows: Tensor) -> Rows:
        """(B, S, d) as every residual stream."""
        return Rows(rows[:, :, None].expand(-1, -1, self.config.num_residual_streams, -1))

    def finish(self, rows: Rows) -> Tensor:
        """(B, S, d): memory as it is handed on, and what logits are made of."""
        return self.norm(rows.streams.sum(dim=2))

    def forward(self, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        (remembered,) = memory
        device, places = tokens.device, torch.arange(tokens.shape[1], device=tokens.device)[None]
        read, write = self.read_rows(remembered), self.write_rows(remembered)
        counts = (read.shape[1], tokens.shape[1], write.shape[1])
        rows = self.spread(torch.cat([read, self.embed(tokens, places), write], dim=1))
        before, after = torch.zeros(1, counts[0], device=device), torch.zeros(1, counts[2], device=device)
        turn = self.turn(torch.cat([before, places + FIRST_TOKEN, after], dim=1))
        null_turn = self.turn(torch.full((1, 1), FIRST_TOKEN - 1, device=device))
        hidden = _hidden(*counts, device)
        for layer in cast(Iterable[RecurrentMemoryPytorchLayer], self.layers):
            made = layer.project(rows, turn)
            rows = layer.finish(made, [layer.null(null_turn), Run(made.key, made.value, hidden)])
        _, seen, written = split_rows(self.finish(rows), counts)
        return self.output(seen), (written,)


def _hidden(read: int, count: int, write: int, device: torch.device) -> Tensor:
    """What rows of a segment do not see of each other, (1, 1, S, S)."""
    hidden = torch.ones(read + count + write, read + count + write, dtype=torch.bool, device=device)
    hidden[:, :read] = False
    hidden[read : read + count, read : read + count] = later(count, device=device)[0, 0]
    hidden[read + count :] = False
    return hidden[None, None]


def turned(rows: Tensor, turn: Turn | None) -> Tensor:
    """Rows (B, H, S, d_head) turned, halves as pairs."""
    if turn is None:
        return rows
    first, second = rows.chunk(2, dim=-1)
    cos, sin = turn.cos[:, None], turn.sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


FAMILY = Family(
    name="recurrent-memory-pytorch",
    title="Recurrent Memory Transformer of recurrent-memory-transformer-pytorch",
    source="Bulatov et al., arXiv 2207.06881; lucidrains/recurrent-memory-transformer-pytorch 0.7.0",
    config=RecurrentMemoryPytorchConfig,
    model=RecurrentMemoryPytorch,
)
