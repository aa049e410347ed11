"""Linear attention with a decay (fast weights): its memory is a matrix a stream, in a buffer that forward changes."""

import torch
from torch import Tensor, nn


class FastWeightLanguageModel(nn.Module):
    memory: Tensor

    def __init__(self, vocab_size: int, width: int, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.embedding = nn.Embedding(vocab_size, width)
        self.project = nn.Linear(width, 3 * width)
        self.register_buffer("memory", torch.zeros(1, width, width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """One token (B, 1) -> logits (B, 1, V); the memory goes on."""
        x = self.embedding(tokens[:, 0])
        query, key, value = self.project(x).chunk(3, dim=-1)
        self.memory = self.decay * self.memory + key[:, :, None] * value[:, None, :]
        read = (query[:, None, :] @ self.memory)[:, 0]
        logits: Tensor = (x + read) @ self.embedding.weight.T
        return logits[:, None]
