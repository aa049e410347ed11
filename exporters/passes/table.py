"""The passes, in the order they run: fold first, so that the others see weights as constants; hoist before append,
so that rings hold what attention reads."""

from __future__ import annotations

from collections.abc import Callable, Collection

from exporters import check
from exporters.passes import append, dead, fold, hoist, layout, mask, merge, scale
from exporters.passes.base import Graphs, Outcome, Pass
from mscompile.contracts import StreamSpec

PASSES: tuple[Pass, ...] = (
    Pass(fold.NAME, fold.WHY, fold.apply),
    Pass(dead.NAME, dead.WHY, dead.apply),
    Pass(hoist.NAME, hoist.WHY, hoist.apply),
    Pass(append.NAME, append.WHY, append.apply),
    Pass(scale.NAME, scale.WHY, scale.apply),
    Pass(merge.NAME, merge.WHY, merge.apply),
    Pass(mask.NAME, mask.WHY, mask.apply),
    Pass(layout.NAME, layout.WHY, layout.apply),
)


def run(
    graphs: Graphs, spec: StreamSpec, without: Collection[str] = (), after: Callable[[str], None] = lambda _: None
) -> Outcome:
    """All passes but those named in `without`; every graph is held against its GraphSpec after each.

    `after` is told the name of each pass that has run.
    """
    outcome = Outcome(spec, ())
    for rewrite in (each for each in PASSES if each.name not in without):
        new = rewrite.apply(graphs, outcome.spec)
        for graph in new.spec.graphs:
            check.check_interface(graphs[graph.name], graph, rewrite.name)
        outcome = Outcome(new.spec, (*outcome.hits, *new.hits), {**outcome.derived, **new.derived})
        after(rewrite.name)
    return outcome
