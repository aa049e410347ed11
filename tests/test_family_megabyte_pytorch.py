"""MEGABYTE-pytorch: against an oracle that runs group by group, its states, its schedule, what is refused."""

from __future__ import annotations

import math
from typing import Any

import cases
import numpy as np
import pytest
import tiny

from exporters import program
from mscompile.contracts import Array, Profile
from mscompile.errors import ConfigError, Refusal
from mscompile.models.megabyte_pytorch import MegabytePytorch, MegabytePytorchConfig

FAMILY = "megabyte-pytorch"
VARIANTS = list(tiny.TINY[FAMILY])
SIZES: dict[str, Any] = {"vocab_size": cases.VOCAB, "dim": (8, 5, 7), "depth": (1, 1, 2), "max_seq_len": (4, 2, 3),
                         "dim_head": 4, "heads": 2}  # fmt: skip


def built(**settings: Any) -> MegabytePytorch:
    return cases.seeded(MegabytePytorch(MegabytePytorchConfig(**{**SIZES, **settings})))


class Oracle:
    """Logits after one prefix at a time, stage by stage; nothing is shared with the model but weights."""

    def __init__(self, model: MegabytePytorch) -> None:
        self.config = model.config
        self.weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def logits(self, tokens: Array) -> Array:
        return np.stack([self.after(tokens[: t + 1]) for t in range(len(tokens))])

    def after(self, tokens: Array) -> Array:
        """Of the token that follows these: walk down to the group that the last one is in, stage by stage."""
        config, above = self.config, None
        begin, last = 0, len(tokens) - 1
        for stage, size in enumerate(config.max_seq_len):
            factor, finest = math.prod(config.max_seq_len[stage + 1 :]), stage == len(config.dim) - 1
            place = (last - begin) // factor  # of the row that the last token is in
            rows = [self.weights[f"stages.{stage}.start"]]
            for number in range(place + finest):  # the row of the last token counts only where a row is a token
                at = begin + number * factor
                row = self.embedded(stage, tokens[at : at + factor], number)
                rows.append(row if above is None else row + above[number])
            out = self.transformer(stage, rows)
            if finest:
                return self.linear("head", out)
            above = self.linear(f"stages.{stage}.spread", out).reshape(config.max_seq_len[stage + 1], -1)
            begin += place * factor
            assert place < size
        raise AssertionError("a model has a finest stage")

    def embedded(self, stage: int, tokens: Array, place: int) -> Array:
        name = f"stages.{stage}"
        row = np.concatenate([self.weights[f"{name}.embedding.weight"][token] for token in tokens])
        if stage < len(self.config.dim) - 1:
            row = self.layer_norm(
                f"{name}.row_norm", self.linear(f"{name}.patch", self.layer_norm(f"{name}.patch_norm", row))
            )
        return row + self.weights[f"{name}.position.weight"][place] if self.config.pos_emb else row

    def transformer(self, stage: int, rows: list[Array]) -> Array:
        """The last row of a group."""
        for number in range(self.config.depth[stage]):
            name = f"stages.{stage}.layers.{number}"
            rows = [row + self.attend(name, self.shifted(rows)[: i + 1]) for i, row in enumerate(rows)]
            rows = [row + self.feed_forward(name, moved) for row, moved in zip(rows, self.shifted(rows), strict=True)]
        return self.norm(f"stages.{stage}.norm", rows[-1])

    def shifted(self, rows: list[Array]) -> list[Array]:
        kept = math.ceil(len(rows[0]) / 2)
        before = [np.zeros(len(rows[0])), *rows]
        return [np.concatenate([row[:kept], before[i][kept:]]) for i, row in enumerate(rows)]

    def attend(self, name: str, rows: list[Array]) -> Array:
        """What the last row gets."""
        normed = [self.norm(f"{name}.attention_norm", row) for row in rows]
        width, mixed = self.config.dim_head, []
        for head in range(self.config.heads):
            part = slice(head * width, (head + 1) * width)
            query, keys, values = (
                [self.linear(f"{name}.attention.{kind}", row)[part] for row in normed]
                for kind in ("query", "key", "value")
            )
            if self.config.rel_pos:
                query, keys = ([self.turned(row, i) for i, row in enumerate(given)] for given in (query, keys))
            scores = np.array([query[-1] @ key for key in keys]) / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            mixed.append(weights / weights.sum() @ np.stack(values))
        return self.linear(f"{name}.attention.output", np.concatenate(mixed))

    def turned(self, row: Array, place: int) -> Array:
        half = len(row) // 2
        pairs = [complex(row[i], row[half + i]) * np.exp(1j * place * 10000.0 ** (-i / half)) for i in range(half)]
        return np.array([pair.real for pair in pairs] + [pair.imag for pair in pairs])

    def feed_forward(self, name: str, row: Array) -> Array:
        inner = self.linear(f"{name}.feed_forward.0", self.norm(f"{name}.feed_forward_norm", row))
        active = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in inner])
        return self.linear(f"{name}.feed_forward.2", active)

    def linear(self, name: str, x: Array) -> Array:
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Array) -> Array:
        return x / max(np.linalg.norm(x) / math.sqrt(len(x)), 1e-8) * self.weights[f"{name}.weight"]

    def layer_norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean()
        scaled = centred / math.sqrt((centred**2).mean() + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_is_what_the_equations_say(variant: str) -> None:
    model = tiny.model(FAMILY, variant)
    assert isinstance(model, MegabytePytorch)
    tokens = cases.tokens(1, 17)
    assert cases.worst(cases.full(model, tokens)[0], Oracle(model).logits(tokens[0])) <= 1e-10


def test_the_first_token_of_a_patch_is_predicted_from_the_patch_before_it() -> None:
    """Its logits come from the local model's last row there, which sees the bytes of that patch one by one."""
    model = built(dim=(6, 6), depth=(1, 1), max_seq_len=(4, 3))
    model.stages[0].spread.weight.zero_()
    model.stages[0].spread.bias.zero_()
    tokens = cases.tokens(1, 6)
    other = tokens.copy()
    other[0, 3] = (other[0, 3] + 1) % cases.VOCAB
    assert cases.worst(cases.full(model, tokens)[:, 5], cases.full(model, other)[:, 5]) > 1e-4


def test_rows_of_zeros_do_not_break_the_norm() -> None:
    model = built()
    model.stages[2].start.zero_()
    assert np.isfinite(cases.full(model, cases.tokens(1, 7))).all()


def test_states_hold_the_groups_of_every_stage() -> None:
    spec = cases.build(built(depth=(1, 1, 1))).spec
    assert {state.name: (state.shape[1:], state.update) for state in spec.states} == {
        "stage0.tokens": ((6,), "append"),
        "stage0.spread": ((2, 5), "replace"),
        "stage0.layer00.key": ((2, 4, 4), "append"),
        "stage0.layer00.value": ((2, 4, 4), "append"),
        "stage0.layer00.shift.attention": ((1, 4), "replace"),
        "stage0.layer00.shift.feed_forward": ((1, 4), "replace"),
        "stage1.tokens": ((3,), "append"),
        "stage1.spread": ((3, 7), "replace"),
        "stage1.layer00.key": ((2, 2, 4), "append"),
        "stage1.layer00.value": ((2, 2, 4), "append"),
        "stage1.layer00.shift.attention": ((1, 2), "replace"),
        "stage1.layer00.shift.feed_forward": ((1, 2), "replace"),
        "stage2.layer00.key": ((2, 3, 4), "append"),
        "stage2.layer00.value": ((2, 3, 4), "append"),
        "stage2.layer00.shift.attention": ((1, 3), "replace"),
        "stage2.layer00.shift.feed_forward": ((1, 3), "replace"),
    }
    assert spec.max_context == 24


def test_a_stage_runs_at_the_last_token_of_its_rows() -> None:
    spec = cases.build(built(), max_chunk=16).spec
    graphs = [spec.schedule.next_call(position, 1).graphs for position in range(6)]
    assert graphs == [("decode_1",), ("decode_1",), ("decode_3",), ("decode_1",), ("decode_1",), ("decode_6",)]
    assert (spec.schedule.period, spec.schedule.chunk_multiple, spec.schedule.max_chunk) == (6, 6, 12)
    assert not any(name.startswith("stage1.layer") for name in spec.graph("decode_1").reads)
    assert not any(name.startswith("stage0.layer") for name in spec.graph("decode_3").reads)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 3, 6, 13, 24])
def test_what_is_remembered_does_not_depend_on_how_the_tokens_came(variant: str, length: int) -> None:
    model, tokens = tiny.model(FAMILY, variant), cases.tokens(2, length)
    one, many = (cases.remembered(model, tokens, chunks) for chunks in ([1] * length, [length]))
    assert {name: cases.worst(one[name], many[name]) for name in one} == pytest.approx(
        dict.fromkeys(many, 0.0), abs=1e-10
    )


def test_a_stream_beyond_the_last_patch_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        program.build(built(), Profile(1, 1, 8), context=25)
    assert str(caught.value) == (
        "max_seq_len allows 24 tokens, so a stream of 25 is too long; export with --context 24 or less"
    )
    assert program.build(built(), Profile(1, 1, 8), context=12).spec.max_context == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dim": (8, 6)},
            "dim, depth and max_seq_len must have one number a stage, of at least two stages, not 2, 3, 3",
        ),
        (
            {"dim": (8,), "depth": (1,), "max_seq_len": (4,)},
            "dim, depth and max_seq_len must have one number a stage, of at least two stages, not 1, 1, 1",
        ),
        ({"dim": 8}, "dim must be whole numbers of at least 1, one a stage, not 8"),
        ({"depth": (1, 0, 1)}, "depth must be whole numbers of at least 1, one a stage, not (1, 0, 1)"),
        ({"max_seq_len": (4, 1, 3)}, "max_seq_len must be at least 2 in every stage, not [4, 1, 3]"),
        ({"dim": (8, 1, 7)}, "dim must be at least 2 in every stage, not [8, 1, 7]"),
        ({"dim_head": 3, "rel_pos": True}, "rel_pos needs an even dim_head, not 3"),
        ({"pos_emb": 1}, "pos_emb must be true or false, not 1"),
        ({"heads": 0}, "heads must be a whole number of at least 1, not 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MegabytePytorchConfig(**{**SIZES, **settings})
    assert str(caught.value) == message
