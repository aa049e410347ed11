"""A recurrent language model: one row of state a stream, in the arguments of forward."""

import torch
from torch import Tensor, nn


class GruLanguageModel(nn.Module):
    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.cell = nn.GRUCell(width, width)

    def forward(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One token (B, 1) and hidden (B, width) -> logits (B, 1, V) and the new hidden."""
        hidden = self.cell(self.embedding(tokens[:, 0]), hidden)
        return (hidden @ self.embedding.weight.T)[:, None], hidden

    def over(self, tokens: Tensor) -> Tensor:
        """Whole streams (B, T) -> logits (B, T, V), as in training."""
        hidden, logits = torch.zeros(len(tokens), self.cell.hidden_size), []
        for token in tokens.unbind(dim=1):
            row, hidden = self(token[:, None], hidden)
            logits.append(row)
        return torch.cat(logits, dim=1)
