"""Dynamic pooling: groups end where the model says so, which no schedule can know.

Graphs have no control flow, so every token computes the row of the group that would end with it, and most are never
looked at:

Given                                              Becomes
  rows of the groups that ended                      a candidate row at every token: the mean since the last end
  keys of G rows                (B, H, G, d_head)    keys of all candidates (B, H, context, d_head), append
  causal attention over them                         only candidates that ended a group are seen, and the own one
  distance in rows                                   difference of how many groups had ended before each
  token t receives the newest group's row            its candidate where it ends a group, else the row remembered

States: `group` (B, context) int64, append: how many groups had ended before a candidate that ended one itself, else
-1; `ended` (B,) int64, how many ended so far; `sum` (B, d) and `count` (B,) of the unfinished group; `newest` (B, d).
What ends a group differs between batch rows, and nothing depends on the other rows, so they stay independent; all of
it is sums and masks over the tokens of a call, so many tokens go at once. The null row sees itself only: its keys are
constants. Exact, but the shortened layers run for every token, and their memory holds every token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.models.dynamic_pooling import DynamicPooling, Groups, Layer, Layers
from mscompile.models.relative import Keys, Sight, attend


class StreamLayer(StreamModule):
    def __init__(self, layer: Layer, scope: Scope) -> None:
        super().__init__()
        self.layer = layer
        self.attention = scope.stream(layer.attention, "attention")

    def forward(self, h: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.layer.finish(h, self.attention(h, h, call))


class StreamLayers(StreamModule):
    def __init__(self, layers: Layers, scope: Scope) -> None:
        super().__init__()
        self.layers = nn.ModuleList(scope.stream(layer, f"layer{i:02}") for i, layer in enumerate(layers.layers))

    def forward(self, h: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        for layer in self.layers:
            h = layer(h, call)
        return h


@dataclass(frozen=True)
class Candidates:
    """How the candidates of a call see the null row, remembered candidates and one another, and position keys."""

    null: Sight
    remembered: Sight
    new: Sight
    encoded: Tensor  # (D, d_model)
    reach: int  # entries of it that this call can look at


class CandidateLayer(StreamModule):
    """A shortened layer over candidate rows."""

    null_key: Tensor
    null_value: Tensor

    def __init__(self, layer: Layer, null: Tensor, capacity: int, scope: Scope) -> None:
        super().__init__()
        self.layer, attention = layer, layer.attention
        shape = (attention.n_head, capacity, attention.d_head)
        self.key = scope.state("key", *shape, update="append", time_axis=2)
        self.value = scope.state("value", *shape, update="append", time_axis=2)
        self.own_states = (self.key, self.value)
        self.register_buffer("null_key", attention.heads(attention.key(null)))
        self.register_buffer("null_value", attention.heads(attention.value(null)))

    def after_null(self, null: Tensor) -> Tensor:
        """What becomes of the null row (1, 1, d), which sees itself only."""
        return self.layer.finish(null, self.layer.attention.merge(self.null_value))

    def forward(self, h: Tensor, candidates: Candidates, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        attention = self.layer.attention
        key, value = attention.heads(attention.key(h)), attention.heads(attention.value(h))
        runs = [
            Keys(self.null_key, self.null_value, candidates.null),
            Keys(call.read(self.key), call.read(self.value), candidates.remembered),
            Keys(key, value, candidates.new),
        ]
        call.write(self.key, key)
        call.write(self.value, value)
        table = attention.table(candidates.encoded)[:, :, : candidates.reach]
        return self.layer.finish(
            h, attention.merge(attend(attention.heads(attention.query(h)), runs, table, call.biases))
        )


class StreamGroups(StreamModule):
    null: Tensor

    def __init__(self, groups: Groups, scope: Scope) -> None:
        super().__init__()
        self.groups, self.capacity = groups, scope.rows(1)
        d_model = groups.null.shape[0]
        self.group = scope.state("group", self.capacity, update="append", dtype=torch.int64)
        self.ended = scope.state("ended", dtype=torch.int64)
        self.sum = scope.state("sum", d_model)
        self.count = scope.state("count", dtype=torch.int64)
        self.newest = scope.state("newest", d_model)
        self.own_states = (self.group, self.ended, self.sum, self.count, self.newest)
        row, self.layers = groups.norm(groups.null)[None, None], nn.ModuleList()
        for i, layer in enumerate(cast(Iterable[Layer], groups.layers.layers)):
            candidates = CandidateLayer(layer, row, self.capacity, scope.child(f"layer{i:02}"))
            row = candidates.after_null(row)
            self.layers.append(candidates)
        self.register_buffer("null", row[0])  # (1, d)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        ends = self.groups.ends(x)
        upto = ends.cumsum(dim=1)  # groups of this call that ended with a token or before it
        before = upto - ends.long()
        call.write(self.ended, call.read(self.ended) + upto[:, -1])
        rows = self.groups.norm(self._means(x, ends, before, call))
        candidates = self._candidates(x, ends, before, call)
        for layer in self.layers:
            rows = layer(rows, candidates, call)
        return x + self._received(rows, ends, upto, call)

    def _means(self, x: Tensor, ends: Tensor, before: Tensor, call: Call) -> Tensor:
        """The mean of each token's group so far, (B, T, d)."""
        begun = before == 0  # groups that began before this call
        own = torch.arange(x.shape[1], device=x.device)
        member = (own[None, :] <= own[:, None]) & (before[:, None, :] == before[:, :, None])  # (B, T, T)
        total = member.to(x.dtype) @ x + begun[..., None] * call.read(self.sum)[:, None]
        count = member.sum(dim=-1) + begun * call.read(self.count)[:, None]
        goes_on = ~ends[:, -1]
        call.write(self.sum, total[:, -1] * goes_on[:, None])
        call.write(self.count, count[:, -1] * goes_on)
        return total / count[..., None]

    def _candidates(self, x: Tensor, ends: Tensor, before: Tensor, call: Call) -> Candidates:
        """The candidates of a call; `ends`, and how many groups of it had ended `before` each, are (B, T)."""
        group, ended = call.read(self.group), before + call.read(self.ended)[:, None]
        call.write(self.group, torch.where(ends, ended, -1))
        slots, own = group.shape[1], torch.arange(x.shape[1], device=x.device)
        written = torch.arange(slots, device=x.device) < call.position[:, None]  # (B, slots)
        whole = self.capacity + 1
        reach = whole if call.single else slots + x.shape[1] + 1

        def sight(index: Tensor, visible: Tensor) -> Sight:
            return Sight.of(index.clamp(max=whole - 1), visible, reach)

        earlier = own[None, :] < own[:, None]
        visible = (earlier & ends[:, None, :]) | (own[None, :] == own[:, None])
        remembered = (written & (group >= 0))[:, None, :].expand(-1, x.shape[1], -1)
        attention = cast(CandidateLayer, self.layers[0]).layer.attention
        return Candidates(
            null=sight(ended[..., None] + 1, torch.ones_like(ended, dtype=torch.bool)[..., None]),
            remembered=sight(ended[..., None] - group[:, None], remembered),
            new=sight(ended[..., None] - ended[:, None], visible),
            encoded=attention.encode(attention.geometry.distances(whole, x.device)),
            reach=reach,
        )

    def _received(self, rows: Tensor, ends: Tensor, upto: Tensor, call: Call) -> Tensor:
        """The row of the newest group that ended, at each token, (B, T, d)."""
        started = (call.position > 0)[:, None]
        remembered = torch.where(started, call.read(self.newest), self.null)  # (B, d)
        newest = ends[:, None, :] & (upto[:, None, :] == upto[:, :, None])  # (B, T, T), at most one of each row
        received = newest.to(rows.dtype) @ rows + (upto == 0)[..., None] * remembered[:, None]
        call.write(self.newest, received[:, -1])
        return received


class StreamDynamicPooling(Root):
    bounded = True

    def __init__(self, model: DynamicPooling, scope: Scope) -> None:
        super().__init__()
        self.model, self.biases = model, model.biases
        self.pre = scope.stream(model.pre, "pre")
        self.groups = scope.stream(model.groups, "groups")
        self.post = scope.stream(model.post, "post")

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        x = self.pre(self.model.embedding(tokens), call)
        return self.model.head(self.post(self.groups(x, call), call))


_WHY = "composes the streaming forms of its parts"
RULES = (
    TypeRule("dynamic-pooling", "embedding, streaming body, head", DynamicPooling, StreamDynamicPooling),
    TypeRule("dynamic-groups", "every token computes the group that would end with it", Groups, StreamGroups),
    TypeRule("pooling-layers", _WHY, Layers, StreamLayers),
    TypeRule("pooling-layer", _WHY, Layer, StreamLayer),
)
