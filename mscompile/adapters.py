"""Finding and running a user's adapter: a Python file, or an entry point of the group `mscompile.adapters`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from mscompile import checkpoint
from mscompile.checkpoint import Checkpoint
from mscompile.errors import CheckpointError, MsCompileError, UsageError
from mscompile.models.family import Family
from mscompile.models.own import Adapter, OwnConfig, OwnModule

GROUP = "mscompile.adapters"


def trained(path: Path, family: str = "auto", adapter: str | None = None, context: int | None = None) -> Checkpoint:
    """The checkpoint at `path`: what the adapter builds from it, where there is one."""
    return checkpoint.load(path, family) if adapter is None else load(adapter, path, context)


def load(adapter: str, weights: Path, context: int | None = None) -> Checkpoint:
    """The module that `adapter` builds from `weights`, as a checkpoint.

    `adapter` is the path of a Python file, which is run, or the name of an entry point. Raises UsageError where
    there is no such adapter or it has no `build`, CheckpointError where `build` fails, Refusal for what it declares.
    """
    if not weights.exists():
        raise CheckpointError(f"{weights}: no such file")
    build = _build(adapter)
    with _explained(CheckpointError, f"build of {adapter} failed for {weights}"):
        built = build(weights)
    if not isinstance(built, nn.Module | Adapter):
        raise UsageError(
            f"build of {adapter} returned a {type(built).__name__}; wanted a torch module, or an Adapter around one"
        )
    with _explained(UsageError, f"what {adapter} declares cannot be used"):
        declared = built if isinstance(built, Adapter) else Adapter(built)
        model = OwnModule(declared, context)
        vocab = tuple(declared.vocab)
    if not all(isinstance(token, str) for token in vocab):
        raise UsageError(f"{adapter}: vocab must be the text of every token")
    if vocab and len(vocab) != model.config.vocab_size:
        raise CheckpointError(f"{adapter}: vocab has {len(vocab)} tokens, the logits {model.config.vocab_size}")
    name, source = Path(adapter).stem, f"adapter {Path(adapter).name}"
    files = sorted(file for file in weights.rglob("*") if file.is_file()) if weights.is_dir() else [weights]
    files += [Path(adapter)] if adapter.endswith(".py") else []
    return Checkpoint(Family(name, name, source, OwnConfig, OwnModule), model, vocab, source, tuple(files))


def _build(adapter: str) -> Callable[[Path], Any]:
    if adapter.endswith(".py"):
        build = getattr(_imported(Path(adapter)), "build", None)
        if not callable(build):
            raise UsageError(f"{adapter} has no function build(weights) that returns the module")
        return build  # type: ignore[no-any-return]
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if adapter not in found:
        installed = ", ".join(sorted(found)) or "none"
        raise UsageError(f"{adapter!r} is neither a .py file nor an installed adapter (installed: {installed})")
    with _explained(UsageError, f"the installed adapter {adapter!r} cannot be imported"):
        return found[adapter].load()  # type: ignore[no-any-return]


def _imported(path: Path) -> ModuleType:
    """The module of a file, which may import what lies beside it."""
    if not path.is_file():
        raise UsageError(f"{path}: no such adapter file")
    spec = importlib.util.spec_from_file_location(f"mscompile_adapter_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        with _explained(UsageError, f"{path} cannot be imported"):
            spec.loader.exec_module(module)
    finally:
        with suppress(ValueError):
            sys.path.remove(str(path.parent.resolve()))
    return module


@contextmanager
def _explained(kind: type[MsCompileError], what: str) -> Iterator[None]:
    """Whatever the user's code raises, an exit included, is one sentence that starts with `what`."""
    try:
        yield
    except MsCompileError:
        raise
    except (Exception, SystemExit) as error:
        raise kind(f"{what}: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """The first line of what went wrong, and where in the user's code."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        if "mscompile_adapter_" in str(trace.tb_frame.f_globals.get("__name__", "")):
            line = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}".splitlines()[0] + line
