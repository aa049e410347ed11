"""Modules of other people: what they become, and what is refused with what to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cases
import pytest
import torch
from torch import Tensor, nn

from engines.ort import CPU, OrtPlan
from engines.session import StreamSession
from exporters import adapter, derived, program, weights
from exporters.passes import fold, hoist
from mscompile.contracts import Array, Profile, StateSpec
from mscompile.errors import InputError, Refusal

WIDTH, MEMORY = 8, 5
PROFILE = Profile(1, 3, 8)
ROLLING = StateSpec("memory", "float32", (MEMORY, "batch", WIDTH), batch_axis=1, initial=0.25)


class Rolling(nn.Module):
    """Attention over the last rows, time first, with one product for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(cases.VOCAB, WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([memory, self.embedding(tokens.t())])  # (M + T, B, d)
        query, key, value = self.project(rows).chunk(3, dim=-1)
        length, total = tokens.shape[1], rows.shape[0]
        distance = torch.arange(total)[None, :] - torch.arange(length)[:, None]
        hidden = (distance < 1) | (distance > MEMORY)  # each token sees itself and the MEMORY - 1 rows before it
        scores = torch.einsum("ibd,jbd->bij", query[-length:], key).masked_fill(hidden, -torch.inf)
        mixed = torch.einsum("bij,jbd->bid", scores.softmax(-1), value)
        return mixed @ self.embedding.weight.t(), rows[-MEMORY:]


class Cell(nn.Module):
    """A recurrence: one row of state a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(cases.VOCAB, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.mix(torch.cat([self.embedding(tokens[:, -1]), state], -1)))
        return (state @ self.embedding.weight.t())[:, None], state


class Growing(nn.Module):
    """A cache that only gains rows: the host writes them, `position` says which are written."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(cases.VOCAB, WIDTH)

    def forward(self, tokens: Tensor, position: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        new = self.embedding(tokens)
        slots = torch.arange(cache.shape[1])
        written = (slots < position[:, None])[:, None, :].expand(-1, tokens.shape[1], -1)
        past = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        visible = torch.cat([written, past.expand(tokens.shape[0], -1, -1)], dim=-1)
        rows = torch.cat([cache, new], dim=1)
        scores = (new @ rows.mT).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1) @ rows) @ self.embedding.weight.t(), new


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def chained(module: nn.Module, tokens: Array, states: Sequence[StateSpec], chunks: Sequence[int]) -> Array:
    """The module's own forward, each call with the states of the last."""
    current = [torch.from_numpy(state.initial_value(len(tokens))) for state in states]
    logits = []
    with torch.inference_mode():
        for part in torch.from_numpy(tokens).split(list(chunks), dim=1):
            out, *current = module(part, *current)
            logits.append(out)
    return torch.cat(logits, dim=1).numpy()


def test_a_module_is_streamed_and_hoisted_as_its_own_forward(tmp_path: Path) -> None:
    module = seeded(Rolling())
    adapted = adapter.adapt(module, [ROLLING], PROFILE)
    assert [(hit.place, hit.applied) for hit in adapted.hits] == [("memory", True), ("prefill", True)]
    assert adapted.spec.schedule.max_chunk == 8
    fold.apply(adapted.models, adapted.spec)
    outcome = hoist.apply(adapted.models, adapted.spec)
    assert [hit.applied for hit in outcome.hits] == [True]
    weights.save({**adapted.models, **derived.models(outcome.derived)}, tmp_path)
    session = OrtPlan(outcome.spec, tmp_path, CPU).session(2)
    eager = StreamSession(adapted.spec, program.EagerExecutor(adapted), 2)
    tokens = cases.tokens(2, 3 * MEMORY + 5)
    wanted = chained(module, tokens, [ROLLING], [1] * tokens.shape[1])
    for chunks in ([1] * 20, [20], [3, 1, 7, 9]):
        session.reset()
        eager.reset()
        assert cases.worst(cases.stream(session, tokens, chunks), wanted) < 1e-4
        assert cases.worst(cases.stream(eager, tokens, chunks), wanted) < 1e-4
        expected = derived.DerivedStates(tmp_path, outcome.spec).of(eager.state()).states
        found = session.state().states
        assert all(cases.worst(found[name], expected[name]) < 1e-4 for name in expected)
    session.reset([1])
    assert cases.worst(session.step(tokens[:, :6])[1], wanted[1, :6]) < 1e-4


def test_appended_rows_are_written_by_the_host(tmp_path: Path) -> None:
    cache = StateSpec("cache", "float32", ("batch", 16, WIDTH), update="append", time_axis=1)
    module = seeded(Growing())
    adapted = adapter.adapt(module, [cache], PROFILE, position=True, context=16)
    assert adapted.hits[1].applied
    weights.save(adapted.models, tmp_path)
    session = OrtPlan(adapted.spec, tmp_path, CPU).session(2)
    tokens = cases.tokens(2, 14)
    empty = torch.zeros(2, 0, WIDTH)
    with torch.inference_mode():
        wanted = module(torch.from_numpy(tokens), torch.zeros(2, dtype=torch.int64), empty)[0].numpy()
    for chunks in ([1] * 14, [14], [5, 1, 8]):
        session.reset()
        assert cases.worst(cases.stream(session, tokens, chunks), wanted) < 1e-4
    with pytest.raises(InputError, match="exceed the context of 16"):
        session.step(tokens[:, :3])


def test_a_recurrence_that_takes_one_token_has_no_prefill() -> None:
    state = StateSpec("state", "float32", ("batch", WIDTH))
    module = seeded(Cell())
    adapted = adapter.adapt(module, [state], PROFILE)
    _, hit = adapted.hits
    assert not hit.applied
    assert "a call of 5 tokens does not return logits for each of them" in hit.reason
    session = StreamSession(adapted.spec, program.EagerExecutor(adapted), 2)
    tokens = cases.tokens(2, 9)
    assert cases.worst(session.step(tokens), chained(module, tokens, [state], [1] * 9)) < 1e-5


# ---- Refusals ---------------------------------------------------------------------------------------------


class Counting(Rolling):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().forward(tokens, memory)


class Caching(Rolling):
    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        self.last = [self.embedding(tokens)]
        return super().forward(tokens, memory)


class Drawing(Rolling):
    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        logits, rows = super().forward(tokens, memory)
        return logits + torch.rand_like(logits), rows


class Forgetful(Rolling):
    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        logits, rows = super().forward(tokens, memory)
        return logits, rows[1:]


class Stateless(Rolling):
    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (super().forward(tokens, memory)[0],)


class Flat(Rolling):
    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        logits, rows = super().forward(tokens, memory)
        return logits[:, 0], rows


class Broken(Rolling):
    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(tokens, memory[0])


class FixedBatch(Rolling):
    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(tokens.view(int(tokens.shape[0]), -1), memory)


class FixedLength(Rolling):
    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(tokens.view(-1, int(tokens.shape[1])), memory)


class Segment(Rolling):
    """Every token of a call sees all rows of memory: its tokens see more in a longer call."""

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([memory, self.embedding(tokens.t())])
        query, key, value = self.project(rows).chunk(3, dim=-1)
        length = tokens.shape[1]
        hidden = torch.ones(length, rows.shape[0], dtype=torch.bool).triu(MEMORY + 1)
        scores = torch.einsum("ibd,jbd->bij", query[-length:], key).masked_fill(hidden, -torch.inf)
        mixed = torch.einsum("bij,jbd->bid", scores.softmax(-1), value)
        return mixed @ self.embedding.weight.t(), rows[-MEMORY:]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            Counting,
            "forward changes calls, which is no declared state: name it in the adapter's buffers, or take it",
        ),
        (Caching, "forward changes last, which is no declared state"),
        (Drawing, "two calls with the same tokens and states differ: forward draws random numbers"),
        (Forgetful, "returned memory as float32 (4, 2, 8), its StateSpec (replace) wants float32 (5, 2, 8)"),
        (Stateless, "forward returned 0 tensors behind the logits, wanted the new memory"),
        (Flat, "forward returned logits of shape (2, 11), wanted (2, 1, vocabulary)"),
        (Broken, "forward failed for tokens (1, 1) and states (5, 1, 8): RuntimeError"),
        (FixedBatch, "input tokens has shape (2, 1), wanted ('batch', 1)"),
    ],
)
def test_what_is_refused(module: type[nn.Module], reason: str) -> None:
    with pytest.raises(Refusal) as refused:
        adapter.adapt(seeded(module()), [ROLLING], PROFILE)
    assert reason in str(refused.value)


def test_a_module_without_states_is_refused() -> None:
    with pytest.raises(Refusal, match="remembers nothing: declare a StateSpec"):
        adapter.adapt(seeded(Rolling()), [], PROFILE)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Segment, "a call of 5 tokens differs from 5 calls of one by"),
        (FixedLength, "no int(), len(), .item(), branch or loop over a size"),
    ],
)
def test_what_has_no_prefill(module: type[nn.Module], reason: str) -> None:
    adapted = adapter.adapt(seeded(module()), [ROLLING], PROFILE)
    _, hit = adapted.hits
    assert not hit.applied
    assert reason in hit.reason
    assert [graph.name for graph in adapted.spec.graphs] == list(adapted.models) == ["decode"]
    assert adapted.spec.schedule.prefill is None
