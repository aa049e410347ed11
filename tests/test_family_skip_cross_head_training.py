"""Training of a Skip Cross-Head Transformer-XL: crossed heads, skipped layers, retained memories; none in eval mode."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import seeded
from torch import Tensor

from mscompile import checkpoint
from mscompile.models.relative import Sight
from mscompile.models.skip_cross_head import SkipCrossHead, SkipCrossHeadConfig

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import skip_cross_head as training
import train_skip_cross_head as script

LENGTH = 4


def model(**settings: Any) -> SkipCrossHead:
    sizes: dict[str, Any] = {
        "vocab_size": 11, "n_layer": 3, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 12, "mem_len": LENGTH,
        "tgt_len": LENGTH, "same_length": False,
    }  # fmt: skip
    return seeded(SkipCrossHead(SkipCrossHeadConfig(**{**sizes, **settings})))


def segments(count: int) -> list[Tensor]:
    return list(torch.randint(11, (count, 2, LENGTH), generator=torch.Generator().manual_seed(0)))


def run(trainer: training.SkipRetain, given: list[Tensor]) -> tuple[list[Tensor], training.Memories]:
    memories, logits = trainer.start(2), []
    for tokens in given:
        out, memories = trainer(tokens, memories)
        logits.append(out)
    return logits, memories


def test_in_eval_mode_nothing_is_crossed_and_nothing_skipped() -> None:
    reference, given = model(), segments(3)
    want = reference.full(torch.cat(given, dim=1))
    trainer = training.SkipRetain(model(), cross_heads=0.999, skip=0.999).eval()
    logits, memories = run(trainer, given)
    torch.testing.assert_close(torch.cat(logits, dim=1), want)
    assert [memory.segment for memory in memories.layers] == [3, 3, 3]
    assert set(trainer.model.state_dict()) == set(reference.state_dict())


def test_phase_2_trains_all_layers() -> None:
    reference, given = model(), segments(3)
    trainer = training.SkipRetain(model(), cross_heads=0.0, skip=1.0).train()
    trainer.skips = False
    logits, _ = run(trainer, given)
    torch.testing.assert_close(torch.cat(logits, dim=1), reference.full(torch.cat(given, dim=1)))


def test_later_layers_are_skipped_more_often_and_the_last_one_never() -> None:
    assert training.SkipRetain(model()).probabilities == [0.0, 0.5 / 3, 0.0]
    assert training.SkipRetain(model(n_layer=4)).probabilities == [0.0, 0.125, 0.25, 0.0]
    assert training.SkipRetain(model(), skip=0.3).probabilities == [0.3, 0.3, 0.3]


def test_a_skipped_layer_keeps_its_memory_and_changes_nothing() -> None:
    trainer = training.SkipRetain(model(n_layer=2), cross_heads=0.0).train()
    trainer.probabilities = [0.0, 1.0]
    first, second = segments(2)
    start = trainer.start(2)
    logits, memories = trainer(first, start)
    assert memories.layers[1] is start.layers[1]
    assert memories.layers[0].segment == memories.segments == 1
    h = trainer.model.embed(first)
    h = trainer.model.layers[0](h, start.layers[0].rows, trainer.model.biases)
    torch.testing.assert_close(logits, trainer.model.head(h))
    trainer.probabilities = [0.0, 0.0]
    _, memories = trainer(second, memories)
    assert [memory.segment for memory in memories.layers] == [2, 2]


@pytest.mark.parametrize("rel_shift", ["txl", "none"])
def test_a_retained_memory_is_as_far_away_as_the_segments_between(rel_shift: str) -> None:
    """As if the skipped segment stood between memory and segment, and could not be seen."""
    layer: Any = model(rel_shift=rel_shift, attend_empty=False).layers[0]
    memory, skipped, h = torch.randn(3, 2, LENGTH, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    biases = model().biases
    assert biases is not None
    got = layer(h, memory, biases, gap=LENGTH)
    rows, distant = torch.cat([memory, skipped, h], dim=1), torch.arange(3 * LENGTH)
    queries = torch.arange(2 * LENGTH, 3 * LENGTH)
    index = (queries[:, None] - distant) if rel_shift == "txl" else (3 * LENGTH - 1 - distant).expand(LENGTH, -1)
    unseen = (distant > queries[:, None]) | ((distant >= LENGTH) & (distant < 2 * LENGTH))
    sight = Sight(index.clamp(min=0)[None, None], unseen[None, None])
    want = layer.combine(h, layer.attention.mix(h, rows, sight, distant, biases))
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, layer(h, memory, biases))


def test_crossed_heads_are_another_models_heads() -> None:
    """Permuted keys, positions and values meet the queries: as if the rows of W_q, u, v and W_o were permuted back."""
    reference = model(n_layer=1)
    trainer = training.SkipRetain(model(n_layer=1), cross_heads=1.0 - 1e-9).train()
    tokens, crossed = segments(1)[0], 0
    plain = reference.full(tokens)
    with torch.no_grad():  # the other order of two heads
        attention: Any = reference.layers[0].attention
        for weight, axis in ((attention.query.weight, 0), (attention.output.weight, 1)):
            weight.copy_(weight.roll(4, dims=axis))
        for bias in (reference.content_bias, reference.position_bias):
            bias.copy_(bias.roll(1, dims=0))
    other = reference.full(tokens)
    for seed in range(8):
        torch.manual_seed(seed)
        logits, _ = trainer(tokens, trainer.start(2))
        is_other = torch.allclose(logits, other)
        assert is_other or torch.allclose(logits, plain)
        crossed += is_other
    assert 0 < crossed < 8
    assert not torch.allclose(plain, other)


def test_losses_are_finite_and_fall() -> None:
    torch.manual_seed(0)
    made = SkipCrossHead(model().config)
    trainer = training.SkipRetain(made, cross_heads=0.2, skip=0.3).train()
    ids = torch.arange(400) % 7
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    seen = []
    for loss in islice(training.losses(trainer, ids, batch=4, length=LENGTH), 60):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert all(map(torch.isfinite, map(torch.tensor, seen)))
    assert sum(seen[-10:]) < 0.7 * sum(seen[:10])


@pytest.mark.slow
def test_the_script_writes_a_checkpoint_for_evaluation(tmp_path: Path) -> None:
    lines = [f"verse {number} of {number % 7} and {number % 13}" for number in range(2600)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    script.main(tmp_path / "text.txt", tmp_path, steps=3, finetune=2)
    loaded = checkpoint.load(tmp_path / "skip-cross-head.pt")
    assert loaded.model.config.same_length
    assert loaded.model.config.rel_shift == "none"
