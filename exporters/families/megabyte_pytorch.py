"""MEGABYTE-pytorch: every stage runs once for each of its rows, when the row's tokens are there.

Given                                              Becomes
  a group [start ; rows]     (N, size + 1, d)        one row a call, at the last token of the row
  keys and values of the group                       states stageN.layerNN.key, .value (B, H, size, dim_head),
                                                     append, see exporters/groups.py; the start's are constants
  channels of the row before                         states stageN.layerNN.shift.attention, .feed_forward
                                                     (B, 1, d // 2), replace; the start's where a group begins
  what a row gives to a group below                  state stageN.spread (B, size below, d below), replace: for the
                                                     group to come; the start's where a group of this stage begins

A row's own group below was over when the row was complete, so stages do not wait for each other within a call. A call
of many tokens takes whole rows of the first stage, and below it whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from exporters.groups import GroupKeys, GroupTokens, in_streams, row_of
from exporters.kv_cache import KeyCache
from exporters.root import Root
from exporters.stream import Call, Scope, StreamModule, TypeRule
from mscompile.errors import Refusal
from mscompile.models.attention import Run, attend, later, row_numbers
from mscompile.models.megabyte_pytorch import MegabytePytorch, ShiftedLayer, Stage, second_half, shifted


class StreamShift(StreamModule):
    """Shifts the rows of groups; `start` (1, 1, d) is the row before the first one."""

    start: Tensor  # (1, 1, d // 2)

    def __init__(self, start: Tensor, name: str, scope: Scope) -> None:
        super().__init__()
        self.register_buffer("start", second_half(start).detach(), persistent=False)
        self.before = scope.state(f"shift.{name}", 1, self.start.shape[2])
        self.own_states = (self.before,)

    def forward(self, x: Tensor, index: Tensor, call: Call) -> Tensor:
        """x (B, T, d), rows from `index` (B,) of their group on."""
        call.write(self.before, second_half(x)[:, -1:])
        return shifted(x, torch.where((index == 0)[:, None, None], self.start, call.read(self.before)))

    def groups(self, x: Tensor, count: int, call: Call) -> Tensor:
        """x (B count, size + 1, d), groups with their starts."""
        call.write(self.before, second_half(x).unflatten(0, (-1, count))[:, -1, -1:])
        return shifted(x, torch.zeros_like(second_half(x)[:, :1]))


class StreamLayer(StreamModule):
    start_key: Tensor  # (1, H, 1, dim_head)
    start_value: Tensor

    def __init__(self, layer: ShiftedLayer, start: Tensor, keys: KeyCache | GroupKeys, scope: Scope) -> None:
        super().__init__()
        self.layer, self.attention, self.keys = layer, layer.attention, keys
        rows = layer.attention_norm(shifted(start, torch.zeros_like(second_half(start))))
        key, value = layer.attention.keys(rows, row_numbers(rows))
        self.register_buffer("start_key", key.detach(), persistent=False)
        self.register_buffer("start_value", value.detach(), persistent=False)
        self.attention_shift = StreamShift(start, "attention", scope)
        self.feed_forward_shift = StreamShift(start + layer.attention(rows), "feed_forward", scope)
        self.after_start = layer(start).detach()

    def forward(self, x: Tensor, index: Tensor, call: Call) -> Tensor:
        """x (B, T, d), rows from `index` (B,) of their group on -> (B, T, d)."""
        rows = self.layer.attention_norm(self.attention_shift(x, index, call))
        numbers = index[:, None] + row_numbers(rows) + 1
        key, value = self.attention.keys(rows, numbers)
        start = Run(self.start_key, self.start_value)
        if isinstance(self.keys, KeyCache):
            runs = [start, *self.keys.runs(key, value, call)]
        else:
            runs = [start, self.keys.remembered(call), Run(key, value)]
            self.keys.remember(key, value, call)
        x = self._attend(x, rows, numbers, runs)
        return self._feed_forward(x, self.feed_forward_shift(x, index, call))

    def groups(self, x: Tensor, count: int, call: Call) -> Tensor:
        """`count` groups a stream with their starts, (B count, size + 1, d) -> the same."""
        rows, numbers = self.layer.attention_norm(self.attention_shift.groups(x, count, call)), row_numbers(x)
        key, value = self.attention.keys(rows, numbers)
        self.keys.remember(in_streams(key[:, :, 1:], count), in_streams(value[:, :, 1:], count), call)
        x = self._attend(x, rows, numbers, [Run(key, value, later(x.shape[1], device=x.device))])
        return self._feed_forward(x, self.feed_forward_shift.groups(x, count, call))

    def _attend(self, x: Tensor, rows: Tensor, numbers: Tensor, runs: list[Run]) -> Tensor:
        return x + self.attention.merge(attend(self.attention.queries(rows, numbers), runs))

    def _feed_forward(self, x: Tensor, rows: Tensor) -> Tensor:
        added: Tensor = self.layer.feed_forward(self.layer.feed_forward_norm(rows))
        return x + added


class StreamStage(StreamModule):
    first_spread: Tensor  # (1, size below, d below), for the first group below

    def __init__(self, stage: Stage, outermost: bool, scope: Scope) -> None:
        super().__init__()
        self.stage, self.outermost = stage, outermost
        self.factor, self.size = stage.factor, stage.size
        row, layers = stage.start[None, None], []
        for i, layer in enumerate(stage.layers):
            layers.append(self._layer(layer, row, scope.child(f"layer{i:02}")))  # type: ignore[arg-type]
            row = layers[-1].after_start
        self.layers = nn.ModuleList(layers)
        if not stage.finest:
            self.factors = (self.factor,)
            self.tokens = GroupTokens(self.factor, scope)
            first = stage.above(stage.norm(row))[:, 0]
            self.register_buffer("first_spread", first.detach(), persistent=False)
            self.spread = scope.state("spread", *first.shape[1:])
            self.own_states = (self.spread,)

    def _layer(self, layer: ShiftedLayer, start: Tensor, scope: Scope) -> StreamLayer:
        shape = (layer.attention.n_head, layer.attention.d_head)
        keys = KeyCache(*shape, None, scope) if self.outermost else GroupKeys(*shape, self.size, scope)
        return StreamLayer(layer, start, keys, scope)

    def index(self, call: Call) -> Tensor:
        """Rows of its group before this call, (B,)."""
        return call.once(("index", self.factor), lambda: call.rows_before(self.factor) % self.size)

    def above(self, call: Call) -> Tensor:
        """What the group below that this call is in got, (B, size below, d below)."""
        return torch.where((self.index(call) == 0)[:, None, None], self.first_spread, call.read(self.spread))

    def row(self, tokens: Tensor, parent: StreamStage | None, call: Call) -> Tensor | None:
        """The row that ends with this token (B, 1), where there is one: (B, 1, d)."""
        patch = tokens if self.stage.finest else self.tokens(tokens, call)
        if patch is None:
            return None
        x = self.stage.embed(patch, self.index(call)[:, None])
        if parent is not None:
            x = x + row_of(parent.above(call), self.index(call))
        for layer in self.layers:
            x = layer(x, self.index(call), call)
        x = self.stage.norm(x)
        if not self.stage.finest:
            call.write(self.spread, self.stage.above(x)[:, -1])
        return x

    def rows(self, tokens: Tensor, call: Call) -> Tensor:
        """The outermost stage on whole rows (B, G factor): what the groups of these rows below get, one row late."""
        self.tokens(tokens, call)
        rows = torch.arange(tokens.shape[1] // self.factor, device=tokens.device)
        x = self.stage.embed(tokens, self.index(call)[:, None] + rows[None])
        for layer in self.layers:
            x = layer(x, self.index(call), call)
        new = self.stage.above(self.stage.norm(x))
        call.write(self.spread, new[:, -1])
        return torch.cat([self.above(call)[:, None], new[:, :-1]], dim=1).flatten(0, 1)

    def groups(self, tokens: Tensor, above: Tensor, call: Call) -> Tensor:
        """A lower stage on whole groups, as `Stage.started`: what the groups below get, or the finest stage's rows."""
        count = tokens.shape[1] // (self.factor * self.size)
        x = self.stage.started(tokens, above)
        for layer in self.layers:
            x = layer.groups(x, count, call)  # type: ignore[operator]
        x = self.stage.norm(x)
        if self.stage.finest:
            return x[:, 1:]
        self.tokens(tokens, call)
        new = self.stage.above(x)
        call.write(self.spread, new.unflatten(0, (-1, count))[:, -1, -1])
        return new[:, :-1].flatten(0, 1)


class StreamMegabytePytorch(Root):
    ticks = "end"
    bounded = True

    def __init__(self, model: MegabytePytorch, scope: Scope) -> None:
        super().__init__()
        self.model = model
        if scope.context is not None and scope.context > model.config.context:
            raise Refusal(
                f"max_seq_len allows {model.config.context} tokens, so a stream of {scope.context} is too long; "
                f"export with --context {model.config.context} or less"
            )
        with torch.no_grad():
            self.stages = nn.ModuleList(
                StreamStage(stage, number == 0, scope.child(f"stage{number}", stage.factor))  # type: ignore[arg-type]
                for number, stage in enumerate(model.stages)
            )

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        outermost, *lower = cast(Sequence[StreamStage], self.stages)
        if call.single:
            x, parent = outermost.row(tokens, None, call), outermost
            for stage in lower:
                x, parent = stage.row(tokens, parent, call), stage
            return self.model.head(x)
        x = outermost.rows(tokens, call)
        for stage in lower:
            x = stage.groups(tokens, x, call)
        return self.model.head(x).reshape(*tokens.shape, -1)


RULES = (
    TypeRule(
        "megabyte-pytorch", "a stage runs when one of its rows is complete", MegabytePytorch, StreamMegabytePytorch
    ),
)
