"""Parity as pytest items, in any repository: `pytest --mscompile-bundle model.msc`.

Each engine and rollout of the bundle becomes one test: the golden rollouts, or with --mscompile-reference CHECKPOINT
the full ones against the original model. Tests of your own step a bundle through the fixture `mscompile_bundle`:

    def test_it_steps(mscompile_bundle):
        session = mscompile_bundle.session(batch=1)
        assert session.step([[1, 2, 3]]).shape[:2] == (1, 3)

pytest loads this file in every run where mscompile is installed, so it imports nothing of mscompile before a bundle is
named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mscompile.runtime import Bundle
    from validation.parity import ParityReport
    from validation.thresholds import Limits, Thresholds

BUNDLE, REFERENCE, THRESHOLDS, STEPS = (
    f"--mscompile-{name}" for name in ("bundle", "reference", "thresholds", "steps")
)
FIXTURE = "mscompile_bundle"
OPENED = pytest.StashKey[dict[Path, "Bundle"]]()
WHOLE = "whole streams"  # snapshot, greedy continuation, perplexity: what is about no one rollout


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mscompile", "parity of mscompile bundles")
    group.addoption(
        BUNDLE, action="append", type=Path, default=[], metavar="DIR",
        help="A bundle: adds a test for each of its engines and rollouts, and feeds the fixture mscompile_bundle; "
        "may be repeated.",
    )  # fmt: skip
    group.addoption(
        REFERENCE, type=Path, metavar="CKPT", help="The original checkpoint to roll the bundle out against."
    )
    group.addoption(THRESHOLDS, type=Path, metavar="TOML", help="A file of stricter limits, as of mscompile validate.")
    group.addoption(STEPS, type=int, default=2048, metavar="N", help="Tokens a row in the long rollouts.  [2048]")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mscompile: parity of a bundle, added by --mscompile-bundle")
    config.stash[OPENED] = {}
    for option in (REFERENCE, THRESHOLDS):
        if config.getoption(option) and not config.getoption(BUNDLE):
            raise pytest.UsageError(f"{option} says how a bundle is checked; name it with {BUNDLE} DIR")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a collector for each bundle, before -k and -m select among the items."""
    for path in config.getoption(BUNDLE):
        collector = BundleCollector.from_parent(session, name=path.name, path=path.absolute(), nodeid=path.as_posix())
        collector.bundle_path = path
        items.extend(session.genitems(collector))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    paths = metafunc.config.getoption(BUNDLE)
    if FIXTURE in metafunc.fixturenames and paths:
        metafunc.parametrize(FIXTURE, paths, indirect=True, ids=lambda path: path.name, scope="session")


@pytest.fixture(scope="session")
def mscompile_bundle(request: pytest.FixtureRequest) -> Bundle:
    """The opened bundle of --mscompile-bundle, every file held against its hash; once for each that is named."""
    if not hasattr(request, "param"):
        pytest.fail(f"this test steps a bundle; name it: pytest {BUNDLE} DIR", pytrace=False)
    return _opened(request.config, request.param)


def _opened(config: pytest.Config, path: Path) -> Bundle:
    from mscompile.runtime import open_bundle

    opened = config.stash[OPENED]
    if path not in opened:
        opened[path] = open_bundle(path)
    return opened[path]


class BundleCollector(pytest.Collector):
    """The tests of one bundle."""

    bundle_path: Path

    def collect(self) -> Iterator[ParityItem]:
        from mscompile import gate
        from mscompile.errors import MsCompileError

        option = self.config.getoption
        try:
            opened = _opened(self.config, self.bundle_path)
            own, limits = gate.read_limits(opened, option(THRESHOLDS))
            engines, skipped = gate.runnable(opened)
            checks = _Checks(opened, own, limits, option(REFERENCE), option(STEPS))
            names = checks.names()
        except MsCompileError as error:
            raise self.CollectError(str(error)) from error
        if own is not None and own.checkpoint_sha256:
            yield ParityItem.of(self, "checkpoint", checks.pin)
        for engine in engines:
            for name in names:
                yield ParityItem.of(self, f"{engine}[{name}]", partial(checks.rollout, engine, name))
        for engine, reason in skipped.items():
            item = ParityItem.of(self, engine, lambda _: None)
            item.add_marker(pytest.mark.skip(reason=reason))
            yield item


class ParityItem(pytest.Item):
    """One engine on one rollout."""

    check: Callable[[pytest.Item], None]

    @classmethod
    def of(cls, parent: BundleCollector, name: str, check: Callable[[pytest.Item], None]) -> ParityItem:
        item: ParityItem = cls.from_parent(parent, name=name)
        item.check = check
        item.add_marker("mscompile")
        return item

    def runtest(self) -> None:
        self.check(self)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """One sentence for what mscompile expects to happen, a traceback for what it does not."""
        from mscompile.errors import MsCompileError

        if isinstance(excinfo.value, MsCompileError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


class _Checks:
    """What the items of one bundle run. A report against the original is made once an engine, by its first item."""

    def __init__(
        self, opened: Bundle, own: Thresholds | None, limits: Limits, reference: Path | None, steps: int
    ) -> None:
        self.opened, self.own, self.limits, self.reference, self.steps = opened, own, limits, reference, steps
        self._against_original = cache(self._roll_out)

    def names(self) -> list[str]:
        """Of the rollouts; against the original, one more for what is checked over all of them."""
        from mscompile.errors import BundleError
        from validation import rollouts

        if self.reference is None:
            if not self.opened.golden.rollouts:
                raise BundleError(f"{self.opened.path} has no golden rollouts; compare with {REFERENCE} CHECKPOINT")
            return [rollout.name for rollout in self.opened.golden.rollouts]
        return [rollout.name for rollout in rollouts.standard(self.opened.spec, None, self.steps)] + [WHOLE]

    def pin(self, _: pytest.Item) -> None:
        from mscompile import gate
        from mscompile.errors import GateFailed

        for fault in gate.pin_faults(self.opened, self.own):
            raise GateFailed(fault)

    def rollout(self, engine: str, name: str, item: pytest.Item) -> None:
        """GateFailed where the engine leaves the limits in this rollout."""
        report = self._golden(engine, name) if self.reference is None else self._part(engine, name)
        item.user_properties.append(("largest logit error", f"{report.logit_max_abs:.3g}"))
        report.raise_if_failed()

    def _golden(self, engine: str, name: str) -> ParityReport:
        from validation.parity import check_golden

        opened = self.opened
        new_session = partial(opened.plan(engine).session, sources=opened.golden.sources(opened.spec.inputs))
        chosen = [rollout for rollout in opened.golden.rollouts if rollout.name == name]
        return self.limits.gate(check_golden(engine, opened.manifest.precision, opened.spec, new_session, chosen))

    def _roll_out(self, engine: str) -> ParityReport:
        from mscompile import gate

        assert self.reference is not None
        original = gate.Original(self.reference, steps=self.steps)
        return self.limits.gate(gate.rolled_out(self.opened, engine, original))

    def _part(self, engine: str, name: str) -> ParityReport:
        """The part of the report against the original that is about one rollout, or about none."""
        report = self._against_original(engine)
        others = [other for other in self.names() if other != WHOLE]
        mine = _about(report.failures, name) if name != WHOLE else _about_none(report.failures, others)
        tensors = tuple(tensor for tensor in report.tensors if tensor.rollout == name)
        if name != WHOLE and not tensors and not mine:
            mine = (f"{name}: nothing was compared; the report has no such rollout",)
        return replace(report, tensors=tensors, failures=mine)


def _about(failures: Sequence[str], rollout: str) -> tuple[str, ...]:
    return tuple(failure for failure in failures if failure.startswith(f"{rollout}: "))


def _about_none(failures: Sequence[str], rollouts: Sequence[str]) -> tuple[str, ...]:
    return tuple(failure for failure in failures if not failure.startswith(tuple(f"{name}: " for name in rollouts)))
