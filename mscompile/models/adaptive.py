"""Adaptive embedding and adaptive softmax: rare tokens get narrower vectors (Baevski and Auli, arXiv 1809.10853;
Grave et al., arXiv 1609.04309), as Transformer-XL uses them.

`cutoffs` split the ids, which are sorted by frequency, into clusters; cluster c has vectors of d_embed // div_val^c
numbers and, where widths differ from d_model, a projection P_c (d_model, width):

    embedding(id in cluster c) = P_c E_c[id]
    log p(id in cluster 0)     = log_softmax([W_0 ; K] P_0^T h)[id]
    log p(id in cluster c)     = log_softmax([W_0 ; K] P_0^T h)[cluster c] + log_softmax(W_c P_c^T h)[id]

K (clusters - 1, width of cluster 0) scores the clusters after the first, in their order. With one cluster the head
gives plain logits, not log-probabilities. Nothing here depends on which tokens occur: every cluster looks up every
token, with ids that are clamped to its own, and the others' are not counted.

Axes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Clusters:
    vocab_size: int
    d_model: int
    d_embed: int
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """First id of each cluster and the one after its last."""
        return tuple(pairwise((0, *self.cutoffs, self.vocab_size)))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.d_embed // self.div_val**cluster for cluster in range(len(self.bounds)))

    @property
    def projected(self) -> bool:
        return self.div_val != 1 or self.d_embed != self.d_model

    def tables(self) -> nn.ParameterList:
        """A row for every token, cluster by cluster: (ids, width) each."""
        shapes = zip(self.bounds, self.widths, strict=True)
        return nn.ParameterList(torch.zeros(last - first, width) for (first, last), width in shapes)

    def projections(self, count: int) -> nn.ParameterList:
        """(d_model, width) of the first `count` clusters, where there are any."""
        widths = self.widths[:count] if self.projected else ()
        return nn.ParameterList(torch.zeros(self.d_model, width) for width in widths)


class Adaptive(nn.Module):
    """Embedding and head. `tie_embedding`: one table of rows serves both. `tie_projections`: so do the projections
    of all clusters but the first."""

    def __init__(self, clusters: Clusters, tie_embedding: bool, tie_projections: bool) -> None:
        super().__init__()
        self.clusters = clusters
        count = len(clusters.bounds)
        self.tables = clusters.tables()
        self.projections = clusters.projections(count)
        self.head_tables = None if tie_embedding else clusters.tables()
        self.head_projections = clusters.projections(1 if tie_projections else count)
        self.head_biases = nn.ParameterList(torch.zeros(last - first) for first, last in clusters.bounds)
        if count > 1:
            self.cluster_weight = nn.Parameter(torch.zeros(count - 1, clusters.widths[0]))
            self.cluster_bias = nn.Parameter(torch.zeros(count - 1))

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, d_model)."""
        if len(self.tables) == 1:
            return self._rows(0, tokens)
        found = []
        for cluster, (first, last) in enumerate(self.clusters.bounds):
            inside = (tokens >= first) & (tokens < last)
            rows = self._rows(cluster, (tokens - first).clamp(0, last - first - 1))
            found.append(rows * inside[..., None].to(rows.dtype))
        return torch.stack(found).sum(dim=0)

    def _rows(self, cluster: int, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.tables[cluster])
        return nn.functional.linear(rows, self.projections[cluster]) if self.clusters.projected else rows

    def head(self, h: Tensor) -> Tensor:
        """(B, T, d_model) -> log-probabilities (B, T, V), or logits where there is one cluster."""
        narrow = self._narrow(h, 0)
        first = self._scores(narrow, 0)
        if len(self.tables) == 1:
            return first
        clusters = nn.functional.linear(narrow, self.cluster_weight, self.cluster_bias)
        head = torch.cat([first, clusters], dim=-1).log_softmax(dim=-1)
        shortlist, *columns = head.split([first.shape[-1], *[1] * clusters.shape[-1]], dim=-1)
        tails = [
            column + self._scores(self._narrow(h, cluster), cluster).log_softmax(dim=-1)
            for cluster, column in enumerate(columns, start=1)
        ]
        return torch.cat([shortlist, *tails], dim=-1)

    def _scores(self, narrow: Tensor, cluster: int) -> Tensor:
        tables = self.tables if self.head_tables is None else self.head_tables
        return nn.functional.linear(narrow, tables[cluster], self.head_biases[cluster])

    def _narrow(self, h: Tensor, cluster: int) -> Tensor:
        """P_c^T h."""
        if not self.clusters.projected:
            return h
        own = cluster < len(self.head_projections)
        return h @ (self.head_projections[cluster] if own else self.projections[cluster])
