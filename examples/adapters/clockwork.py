"""A two-speed recurrent model: a fast cell for every token, a slow one for every fourth (Koutnik et al., 1402.3511)."""

import torch
from torch import Tensor, nn

PERIOD = 4


class ClockworkLanguageModel(nn.Module):
    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.fast = nn.GRUCell(2 * width, width)
        self.slow = nn.GRUCell(width, width)

    def both(self, tokens: Tensor, fast: Tensor, slow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A token at which the slow cell is due: it reads the fast one's state, and then the fast one steps."""
        return self.only_fast(tokens, fast, self.slow(fast, slow))

    def only_fast(self, tokens: Tensor, fast: Tensor, slow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1), (B, width) twice -> logits (B, 1, V) and both states."""
        fast = self.fast(torch.cat([self.embedding(tokens[:, 0]), slow], dim=-1), fast)
        return (fast @ self.embedding.weight.T)[:, None], fast, slow

    def over(self, tokens: Tensor) -> Tensor:
        """Whole streams (B, T) -> logits (B, T, V), as in training."""
        fast = slow = torch.zeros(len(tokens), self.slow.hidden_size)
        logits = []
        for number, token in enumerate(tokens.unbind(dim=1)):
            if number % PERIOD == 0:
                slow = self.slow(fast, slow)
            fast = self.fast(torch.cat([self.embedding(token), slow], dim=-1), fast)
            logits.append(fast @ self.embedding.weight.T)
        return torch.stack(logits, dim=1)
