"""Dynamic pooling (Nawrot et al., arXiv 2211.09761): an Hourglass whose groups end where a predictor says so.

    x = layers(embedding)                               pre layers
    b_t = sigmoid(W_2 act(W_1 x_t + c_1) + c_2) > 0.5   a group ends with token t, which belongs to it
    rows = LayerNorm([null ; mean of each group])       null is learned; tokens behind the last b are in no group
    rows = layers(rows)                                 shortened layers; distances count rows
    x_t = x_t + rows[b_0 + .. + b_t]                    so token t already receives the group that it ends
    logits = W layers(x) + c                            post layers

One layer, post-norm, with the relative attention of Transformer-XL, biases in all its projections, no memory:

    h' = LayerNorm(h + attention(h))        u, v shared by all layers, shortened ones too
    out = LayerNorm(h' + W_2 act(W_1 h' + b_1) + b_2)

The published code divides means by count + 1e-9, which float32 cannot tell from the count; here it is the count.
It needs a boundary somewhere in a batch; here there may be none, and every token receives the null row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mscompile.models.family import Family, ReferenceModel, require, require_dropout, require_positive
from mscompile.models.relative import Biases, Geometry, RelativeAttention

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
GIVEN = "takes its boundaries from outside, not from a predictor"
REFUSED = {
    "gumbel": "draws its boundaries at random even in evaluation; to stream such a checkpoint, set 'threshold'",
    "fixed": f"{GIVEN}; for groups of a fixed length there is the family hourglass",
    "whitespaces": GIVEN,
    "none": "has no groups",
}


@dataclass(frozen=True)
class DynamicPoolingConfig:
    vocab_size: int
    d_model: int = 512
    n_head: int = 8
    d_head: int = 64
    d_inner: int = 2048
    pre_layers: int = 2
    shortened_layers: int = 8
    post_layers: int = 2
    activation_function: str = "gelu"
    boundaries: str = "threshold"
    context: int = 512
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "d_model", "n_head", "d_head", "d_inner", "pre_layers", "shortened_layers",
            "post_layers", "context",
        )  # fmt: skip
        require(self.d_model % 2 == 0, f"d_model must be even for sinusoid positions, not {self.d_model}")
        require(
            self.activation_function in ACTIVATIONS,
            f"activation_function must be one of {', '.join(ACTIVATIONS)}, not {self.activation_function!r}",
        )
        why = REFUSED.get(self.boundaries)
        require(why is None, f"boundaries {self.boundaries!r} {why}")
        require(self.boundaries == "threshold", f"boundaries must be 'threshold', not {self.boundaries!r}")
        require_dropout(self.dropout)


def activation(config: DynamicPoolingConfig) -> nn.Module:
    return ACTIVATIONS[config.activation_function]()


class Layer(nn.Module):
    def __init__(self, config: DynamicPoolingConfig) -> None:
        super().__init__()
        self.attention = RelativeAttention(config.d_model, config.n_head, config.d_head, bias=True, geometry=Geometry())
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.d_model, config.d_inner),
            activation(config),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_inner, config.d_model),
            nn.Dropout(config.dropout),
        )
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def finish(self, h: Tensor, attended: Tensor) -> Tensor:
        """Both residuals, their norms and the feed-forward: (B, T, d) each."""
        h = self.attention_norm(h + self.dropout(attended))
        return self.feed_forward_norm(h + self.feed_forward(h))

    def forward(self, h: Tensor, biases: Biases) -> Tensor:
        """(B, T, d) -> (B, T, d), causal."""
        return self.finish(h, self.attention(h, h, biases))


class Layers(nn.Module):
    def __init__(self, config: DynamicPoolingConfig, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(count))

    def forward(self, h: Tensor, biases: Biases) -> Tensor:
        for layer in self.layers:
            h = layer(h, biases)
        return h


class Groups(nn.Module):
    """Pool groups that end where the predictor says so, run the shortened layers, give every token its row."""

    def __init__(self, config: DynamicPoolingConfig) -> None:
        super().__init__()
        self.predictor = nn.Sequential(
            nn.Linear(config.d_model, config.d_inner), activation(config), nn.Linear(config.d_inner, 1)
        )
        self.null = nn.Parameter(torch.randn(config.d_model))
        self.norm = nn.LayerNorm(config.d_model)
        self.layers = Layers(config, config.shortened_layers)

    def ends(self, x: Tensor) -> Tensor:
        """Which tokens end a group: (B, T, d) -> (B, T) bool."""
        return self.predictor(x).squeeze(-1).sigmoid() > 0.5

    def pooled(self, x: Tensor, ends: Tensor) -> Tensor:
        """Means of the groups, (B, G, d); a row with fewer than the batch's G groups has others behind them."""
        group = ends.cumsum(dim=1) - ends.long()  # of each token
        count = int(ends.sum(dim=1).max())
        member = (group[:, None, :] == torch.arange(count, device=x.device)[None, :, None]).to(x.dtype)  # (B, G, T)
        return member @ x / member.sum(dim=-1, keepdim=True).clamp(min=1)

    def forward(self, x: Tensor, biases: Biases) -> Tensor:
        """(B, T, d) -> (B, T, d), causal."""
        ends = self.ends(x)
        null = self.null.expand(x.shape[0], 1, -1)
        rows = self.layers(self.norm(torch.cat([null, self.pooled(x, ends)], dim=1)), biases)
        newest = ends.cumsum(dim=1)[..., None].expand(-1, -1, x.shape[-1])
        return x + rows.gather(1, newest)


class DynamicPooling(ReferenceModel):
    def __init__(self, config: DynamicPoolingConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.content_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))
        self.position_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))
        self.pre = Layers(config, config.pre_layers)
        self.groups = Groups(config)
        self.post = Layers(config, config.post_layers)
        self.head = nn.Linear(config.d_model, config.vocab_size)

    @property
    def biases(self) -> Biases:
        return Biases(self.content_bias, self.position_bias)

    def full(self, tokens: Tensor) -> Tensor:
        x = self.pre(self.dropout(self.embedding(tokens)), self.biases)
        return self.head(self.post(self.groups(x, self.biases), self.biases))


FAMILY = Family(
    name="dynamic-pooling",
    title="Dynamic pooling",
    source="Nawrot et al., arXiv 2211.09761; PiotrNawrot/dynamic-pooling",
    config=DynamicPoolingConfig,
    model=DynamicPooling,
)
