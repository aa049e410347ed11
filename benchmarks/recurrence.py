"""The recurrence that the passes make of a rolling Transformer-XL, written in PyTorch for devices that the exported
graphs do not reach: memory as projected keys and values in a ring, position keys folded, scores of remembered and of
new rows computed apart and joined before the softmax. Every shape is static and the ring is written in place, so
that one step can be captured as a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mscompile.models.transformer_xl import TransformerXL, TransformerXLLayer


class Recurrence:
    """One group of streams of a model with `same_length`; L layers, B rows, M = mem_len - 1 remembered rows."""

    def __init__(self, model: TransformerXL, batch: int = 1) -> None:
        config = model.config
        if not config.same_length:
            raise ValueError("a ring needs a memory that rolls with every token: same_length")
        weight = model.embedding.weight
        self.model, self.window = model, config.mem_len
        rows = (config.n_layer, batch, config.n_head, config.mem_len - 1, config.d_head)
        self.keys, self.values = weight.new_zeros(rows), weight.new_zeros(rows)  # (L, B, H, M, d_head)
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.slots = torch.arange(rows[3], device=weight.device)
        self.tables = [self._table(layer) for layer in model.layers]  # (H, d_head, mem_len) each

    def _table(self, layer: TransformerXLLayer) -> Tensor:
        attention = layer.attention
        distances = attention.geometry.distances(self.window, self.position.device)
        return attention.table(attention.encode(distances)).contiguous()

    def reset(self) -> None:
        self.position.zero_()

    def step_bytes(self) -> int:
        """Bytes that one step must read: weights, position keys and memory, each once.

        The weights of the positions are folded; where embedding and output share their weights, these are read whole.
        """
        folded = {id(layer.attention.position.weight) for layer in self.model.layers}
        weights = [parameter for parameter in self.model.parameters() if id(parameter) not in folded]
        if not self.model.config.tie_embedding:
            weights = [parameter for parameter in weights if parameter is not self.model.embedding.weight]
        return sum(tensor.nbytes for tensor in (*weights, *self.tables, self.keys, self.values))

    def step(self, tokens: Tensor) -> Tensor:
        """Consume tokens (B, T), T up to M; logits (B, T, V)."""
        count, remembered = tokens.shape[1], self.slots.shape[0]
        new = torch.arange(count, device=tokens.device)
        # Slot s holds the newest row whose position is s modulo M: so many tokens before the first new one.
        age = (self.position - 1 - self.slots) % remembered + 1  # (M,)
        old_index = age[None, :] + new[:, None]  # distances (T, M)
        new_index = new[:, None] - new[None, :]  # (T, T)
        old_seen = (old_index < self.window) & (age <= self.position)[None, :]
        new_seen = (new_index >= 0) & (new_index < self.window)
        index = torch.cat([old_index, new_index], dim=1).clamp(0, self.window - 1)
        hidden = ~torch.cat([old_seen, new_seen], dim=1)
        places = (self.position + new) % remembered
        h = self.model.embed(tokens)
        for number, layer in enumerate(self.model.layers):
            h = self._layer(number, layer, h, index, hidden, places)
        self.position += count
        return self.model.head(h)

    def _layer(
        self, number: int, layer: TransformerXLLayer, h: Tensor, index: Tensor, hidden: Tensor, places: Tensor
    ) -> Tensor:
        attention, biases = layer.attention, self.model.biases
        rows = layer.attention_input(h)
        query, key, value = (attention.heads(p(rows)) for p in (attention.query, attention.key, attention.value))
        scale = query.shape[-1] ** -0.5
        by_content = (query + biases.content[:, None, :]) * scale
        by_position = (query + biases.position[:, None, :]) * scale @ self.tables[number]  # (B, H, T, mem_len)
        old_keys, old_values = self.keys[number], self.values[number]
        scores = torch.cat([by_content @ old_keys.mT, by_content @ key.mT], dim=-1)
        scores = scores + by_position.gather(3, index.expand(*scores.shape[:2], -1, -1))
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1)
        old, new = weights.split([old_keys.shape[2], key.shape[2]], dim=-1)
        mixed = old @ old_values + new @ value
        old_keys.index_copy_(2, places, key)
        old_values.index_copy_(2, places, value)
        return layer.combine(h, attention.merge(mixed))
