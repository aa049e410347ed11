"""What a Skip Cross-Head Transformer-XL does in training only (Vishnu and Sekhar, arXiv 2311.08123).

Cross-head attention, a regularizer: with a small probability, a layer permutes the heads of its keys, position keys
and values in one call, so that its queries meet those of other heads.

Skip-retain: with probability p_l, layer l is skipped for a segment and retains its memory, which is then several
segments old. Its rows are that much farther away: each memory knows the number of its segment, and the distances to it
grow by the segments between. Phase 1 of training skips layers; phase 2 runs all of them. The authors' code counts one
segment for each that a layer ran instead of setting the number, so that after a skip its memory stays one too old for
the rest of a stream; here distances are those of the rows, exactly where `mem_len` is at most a segment, as published.

In eval mode nothing of this is left, and the logits are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mscompile.models.relative import Biases, Keys, RelativeAttention, Sight, attend
from mscompile.models.skip_cross_head import SkipCrossHead, SkipCrossHeadLayer


class CrossHeadAttention(RelativeAttention):
    """Attention that crosses its heads with a `probability` in each call, in training."""

    def __init__(self, attention: RelativeAttention, probability: float) -> None:
        super().__init__(
            attention.query.in_features, attention.n_head, attention.d_head, bias=False, geometry=attention.geometry
        )
        self.to(attention.query.weight).load_state_dict(attention.state_dict())
        self.probability = probability

    def mix(self, x: Tensor, context: Tensor, sight: Sight, distances: Tensor, biases: Biases) -> Tensor:
        if not self.training or torch.rand(()) >= self.probability:
            return super().mix(x, context, sight, distances, biases)
        order = torch.randperm(self.n_head, device=x.device)
        key, value = (self.heads(project(context))[:, order] for project in (self.key, self.value))
        table = self.table(self.encode(distances))[order]
        return self.merge(attend(self.heads(self.query(x)), [Keys(key, value, sight)], table, biases))


@dataclass(frozen=True)
class Memory:
    """The memory of one layer: rows (B, M, d_model), and the number of the segment that it was made in."""

    rows: Tensor
    segment: int


@dataclass(frozen=True)
class Memories:
    """The memories of all layers after so many segments."""

    segments: int
    layers: tuple[Memory, ...]


class SkipRetain(nn.Module):
    """Trains `model`: p_l = l / 2L for layer l of L, 0 for the last, or `skip` for every layer."""

    def __init__(self, model: SkipCrossHead, cross_heads: float = 0.1, skip: float | None = None) -> None:
        super().__init__()
        self.model, self.skips = model, True
        count = model.config.n_layer
        rising = [0.5 * number / count for number in range(count - 1)] + [0.0]
        self.probabilities = rising if skip is None else [skip] * count
        for layer in self.layers:
            layer.attention = CrossHeadAttention(layer.attention, cross_heads)

    @property
    def layers(self) -> Iterable[SkipCrossHeadLayer]:
        return cast(Iterable[SkipCrossHeadLayer], self.model.layers)

    def start(self, batch: int) -> Memories:
        return Memories(0, tuple(Memory(rows, 0) for rows in self.model.empty_mems(batch)))

    def forward(self, tokens: Tensor, memories: Memories) -> tuple[Tensor, Memories]:
        """One segment: tokens (B, T) -> logits (B, T, V), and the memories after it."""
        segment, h = memories.segments + 1, self.model.embed(tokens)
        kept = []
        for layer, memory, probability in zip(self.layers, memories.layers, self.probabilities, strict=True):
            if self.training and self.skips and torch.rand(()) < probability:
                kept.append(memory)
                continue
            rows = torch.cat([memory.rows, h], dim=1)[:, -layer.mem_len :].detach()
            kept.append(Memory(rows, segment))
            biases = layer.biases or self.model.biases
            assert biases is not None, "layers that share no biases have their own"
            h = layer(h, memory.rows, biases, gap=(segment - memory.segment - 1) * tokens.shape[1])
        return self.model.head(h), Memories(segment, tuple(kept))


def losses(trainer: SkipRetain, ids: Tensor, batch: int, length: int) -> Iterator[Tensor]:
    """An endless run of training losses over chained segments of `length` tokens, from `batch` places in `ids`."""
    width = len(ids) // batch
    streams = ids[: width * batch].view(batch, width)
    while True:
        memories = trainer.start(batch)
        for start in range(0, width - length, length):
            segment = streams[:, start : start + length + 1]
            logits, memories = trainer(segment[:, :-1], memories)
            yield nn.functional.cross_entropy(logits.flatten(0, 1), segment[:, 1:].flatten())
