"""One torch thread, hypothesis profiles, and tests marked `slow` only with --slow."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # import-mode=importlib leaves it out; tests import `cases`
sys.path.append(str(HERE.parent / "benchmarks"))
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, also by children

from bundles import bundle_of, checkpoint_of, compiled, example, family, trained  # noqa: E402, F401 (fixtures)
from commands import run  # noqa: E402, F401 (a fixture)

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("quick", max_examples=15, **_COMMON)
settings.register_profile("ci", max_examples=15, derandomize=True, **_COMMON)
settings.register_profile("slow", max_examples=100, **_COMMON)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a file or directory once for all test processes: `made_once(name, make)`, where make(path) writes it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def get(name: str, make: Callable[[Path], object]) -> Path:
        path = shared / name
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(path)
        return path

    return get


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow, and more property examples")


def pytest_configure(config: pytest.Config) -> None:
    quick = "ci" if os.environ.get("CI") else "quick"
    settings.load_profile("slow" if config.getoption("--slow") else quick)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
