"""A prefill is given the rows of memory that can have been written, and no more: it costs what its context is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cases
import numpy as np
import pytest

from engines.session import StreamSession
from exporters.program import EagerExecutor
from mscompile.contracts import Array

MODEL = "attention+attention"  # period 3, context 24


class Watched(EagerExecutor):
    """Remembers the shapes of the states that each prefill was given."""

    def __init__(self, model: str = MODEL) -> None:
        super().__init__(cases.build(cases.model(model)))
        self.shapes: list[dict[str, tuple[int, ...]]] = []

    def bind(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        if graph == "prefill":
            self.shapes.append({name: array.shape for name, array in inputs.items()})
            assert all(array.flags.c_contiguous for array in inputs.values())
        return super().bind(graph, inputs, outputs)


def test_the_interface_says_so() -> None:
    spec = cases.build(cases.model(MODEL)).spec
    given = {tensor.name: tensor.shape for tensor in spec.graph("prefill").inputs}
    assert given["scale1.pre.block00.attention.key.in"] == ("batch", 2, "context", 4)
    assert given["scale1.valley.scale3.pre.block00.attention.value.in"] == ("batch", 2, "context/3", 4)
    assert given["scale1.valley.shortening.key.in"] == ("batch", 2, "context", 4)
    assert given["scale1.valley.upsampling.key.in"] == ("batch", 2, "context/3", 4)
    assert given["scale1.valley.shortening.rows.in"] == ("batch", 2, 8)
    decode = {tensor.name: tensor.shape for tensor in spec.graph("decode_3").inputs}
    assert decode["scale1.pre.block00.attention.key.in"] == ("batch", 2, 24, 4)


@pytest.mark.parametrize(("before", "context"), [(0, 3), (3, 3), (6, 6), (15, 15)])
def test_rows_are_those_of_the_longest_stream(before: int, context: int) -> None:
    executor = Watched()
    session = StreamSession(executor.program.spec, executor, 2)
    if before:
        session.step(cases.tokens(2, before))
    executor.shapes.clear()
    session.step(cases.tokens(2, 6))
    (shapes,) = executor.shapes
    assert shapes["scale1.pre.block00.attention.key.in"] == (2, 2, context, 4)
    assert shapes["scale1.valley.upsampling.value.in"] == (2, 2, context // 3, 4)


def test_rows_of_different_length_share_the_longest_context() -> None:
    model, executor = cases.model(MODEL), Watched()
    session = StreamSession(executor.program.spec, executor, 2)
    first, second = cases.tokens(2, 12), cases.tokens(2, 6, seed=1)
    session.step(first)
    session.reset([1])
    executor.shapes.clear()
    logits = session.step(second)
    assert executor.shapes[0]["scale1.pre.block00.attention.key.in"] == (2, 2, 12, 4)
    long = cases.full(model, np.concatenate([first[:1], second[:1]], axis=1))[:, 12:]
    assert cases.worst(logits[:1], long) < 1e-10
    assert cases.worst(logits[1:], cases.full(model, second[1:])) < 1e-10


def test_a_memory_that_does_not_grow_is_given_whole() -> None:
    executor = Watched("post-norm")
    session = StreamSession(executor.program.spec, executor, 1)
    session.step(cases.tokens(1, 3))
    assert executor.shapes[0]["layer00.segment.in"] == (1, 4, 8)
