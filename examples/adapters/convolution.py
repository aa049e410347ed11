"""A language model of dilated causal convolutions: it remembers nothing, and sees a fixed number of tokens."""

from torch import Tensor, nn
from torch.nn.functional import pad, relu


class CausalConvolution(nn.Module):
    """Every row and the one `dilation` rows before it: (B, width, T) -> (B, width, T)."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.convolution = nn.Conv1d(width, width, kernel_size=2, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.convolution(pad(x, (self.dilation, 0))))


class ConvolutionalLanguageModel(nn.Module):
    def __init__(self, vocab_size: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(CausalConvolution(width, 2**i) for i in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V)."""
        x = self.embedding(tokens).transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = x.transpose(1, 2) @ self.embedding.weight.T
        return logits
