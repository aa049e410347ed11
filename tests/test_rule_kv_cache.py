"""Plain cached attention: against the module's own forward, for any cut, window and scale."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cases import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exporters.kv_cache import CachedSelfAttention
from exporters.rules import RULES
from exporters.stream import Call, Scope
from mscompile.contracts import StateSpec
from mscompile.errors import Refusal
from mscompile.models.attention import Attention

LENGTH, WIDTH, BATCH = 17, 8, 2


def scope(context: int | None, factor: int = 1) -> Scope:
    return Scope("attention", factor, context, torch.float64, RULES, [])


def attention(window: int | None, rotary: bool) -> Attention:
    module = Attention(WIDTH, 2, window=window, rotary=rotary).double()
    return seeded(module)  # type: ignore[type-var]


def appended(state: StateSpec, old: Tensor, new: Tensor, before: int) -> Tensor:
    """What a host makes of new rows: each in the slot of its number, modulo the ring."""
    axis = state.time_axis
    assert axis is not None
    for i in range(new.shape[axis]):
        old = old.index_copy(axis, torch.tensor([(before + i) % old.shape[axis]]), new.narrow(axis, i, 1))
    return old


def streamed(streaming: CachedSelfAttention, rows: Tensor, cuts: list[int], factor: int) -> Tensor:
    states = {
        state.name: torch.full((BATCH, *state.shape[1:]), 1e3, dtype=rows.dtype) for state in streaming.own_states
    }
    out = []
    for start, end in pairwise([0, *cuts, LENGTH]):
        position = torch.full((BATCH,), start * factor)
        call = Call(position, states, single=end - start == 1, ticks="end")
        out.append(streaming(rows[:, start:end], call))
        for state in streaming.own_states:
            states[state.name] = appended(state, states[state.name], call.written[state.name], start)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
@given(cuts=st.lists(st.integers(1, LENGTH - 1), unique=True).map(sorted))
def test_any_cut_equals_the_full_forward(window: int | None, rotary: bool, factor: int, cuts: list[int]) -> None:
    module = attention(window, rotary)
    streaming = CachedSelfAttention(module, scope(LENGTH * factor, factor))
    rows = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (streamed(streaming, rows, cuts, factor) - module(rows)).abs().max() < 1e-10


def test_a_window_remembers_one_row_less_and_needs_no_context() -> None:
    streaming = CachedSelfAttention(attention(5, rotary=False), scope(None))
    assert [(state.name, state.shape, state.update) for state in streaming.states()] == [
        ("attention.key", ("batch", 2, 4, 4), "append"),
        ("attention.value", ("batch", 2, 4, 4), "append"),
    ]


def test_without_a_window_a_context_is_needed() -> None:
    with pytest.raises(Refusal, match=r"^attention: this memory grows with the stream, so a context length"):
        CachedSelfAttention(attention(None, rotary=False), scope(None))
