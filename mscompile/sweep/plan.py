"""A plan file, and the cells that it spans: checkpoints x targets x precisions x shapes. See docs/sweep.md.

Everything that can be wrong with a plan is found here, before anything runs. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

from engines import registry
from mscompile.errors import UsageError
from validation import latency, thresholds
from validation.parity import TOLERANCES

MEMORIES = ("append", "replace")
GRAPHS_ONLY = "onnx"  # the target that builds no engine
TARGETS = (*registry.MODULES, GRAPHS_ONLY)
TOOLS = ("mscompile", "torch", "onnx", "onnxscript", "onnx-ir", "numpy")
RUNTIMES = {
    "ort": ("onnxruntime", "onnxruntime-gpu"),
    "trt-rtx": ("tensorrt-rtx",),
    "trt": ("tensorrt",),
}  # distributions of each engine: another version of one makes another cell
DAY_S = 24 * 3600


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and how it is read. Paths are absolute."""

    name: str
    path: str
    family: str = "auto"
    adapter: str | None = None
    tokens: str | None = None  # text for its rollouts


@dataclass(frozen=True)
class Shape:
    """What engines are built for."""

    name: str
    min_batch: int = 1
    max_batch: int = 8
    max_chunk: int = 512
    context: int | None = None  # tokens
    memory: str = "append"


@dataclass(frozen=True)
class Bench:
    """What is measured of each engine; no workloads: nothing is."""

    workloads: tuple[str, ...] = ("decode", "prefill:128")
    rounds: int = 8
    samples: int = 12
    batch: int = 1
    original: bool = True  # measured in the same rounds


@dataclass(frozen=True)
class Resources:
    """What a cell of one target asks of a Ray cluster."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    accelerator_type: str | None = None  # as Ray names GPU types
    custom: tuple[tuple[str, float], ...] = ()  # (name, amount) of resources of the cluster's own


@dataclass(frozen=True)
class Cell:
    """One export with its validation and its measurement."""

    checkpoint: Trained
    target: str
    precision: str
    shape: Shape
    bench: Bench
    steps: int
    thresholds: str | None
    timeout_s: int
    resources: Resources
    versions: tuple[tuple[str, str], ...] = ()  # of what exports and runs, where the plan was read
    key: str = ""  # of `key_of`, where the plan was read

    @property
    def label(self) -> str:
        return f"{self.checkpoint.name} {self.target} {self.precision} {self.shape.name}"

    @property
    def id(self) -> str:
        """A file name: the label, for people, and the beginning of the key."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.label).strip('-.')}-{self.key[:10]}"


def key_of(cell: Cell) -> str:
    """SHA-256 of all that decides the result: options, versions here, and the contents of files, not their paths."""
    facts = asdict(cell)
    for name in ("name", "path", "adapter", "tokens"):
        del facts["checkpoint"][name]
    del facts["shape"]["name"], facts["timeout_s"], facts["key"]
    one = cell.checkpoint
    read = {"path": one.path, "adapter": one.adapter, "tokens": one.tokens, "thresholds": cell.thresholds}
    facts["thresholds"] = None
    facts["contents"] = {name: path and _contents(path) for name, path in read.items()}
    facts["versions"] = versions(cell.target)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def planned(cell: Cell) -> Cell:
    """With its versions and its key."""
    return replace(cell, versions=tuple(versions(cell.target).items()), key=key_of(cell))


@dataclass(frozen=True)
class Plan:
    """The cells of a plan file, none of them twice."""

    path: Path
    cells: tuple[Cell, ...]


def versions(target: str) -> dict[str, str]:
    """Of what exports, and of the runtime of `target`, as installed here."""
    found = {name: _version(name) for name in (*TOOLS, *RUNTIMES.get(target, ()))}
    return {name: installed for name, installed in found.items() if installed is not None}


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _contents(path: str) -> str:
    """SHA-256 of a file, or of the list of digests and names in a directory; of the name of what is neither."""
    at = Path(path)
    if at.is_file():
        with at.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = sorted(file for file in at.rglob("*") if file.is_file()) if at.is_dir() else []
    listed = [f"{_contents(str(file))}  {file.relative_to(at)}\n" for file in files]
    return hashlib.sha256("".join(listed or [path]).encode()).hexdigest()


def load(path: Path) -> Plan:
    """Read a plan; UsageError, naming the key, for anything in it that cannot work."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the plan {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    try:
        return Plan(path, _cells(_Table(found, "the plan"), path.resolve().parent))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _cells(top: _Table, base: Path) -> tuple[Cell, ...]:
    trained = [_trained(each, base) for each in top.items("checkpoints")]
    targets = [_one_of("targets", name, TARGETS) for name in top.words("targets", ("ort",))]
    precisions = [_one_of("precisions", name, tuple(TOLERANCES)) for name in top.words("precisions", ("fp32",))]
    shapes = [_shape(_Table(each, "[[shape]]")) for each in top.items("shape", [{}])]
    bench = _bench(_Table(top.take("bench", {}), "[bench]"), shapes)
    asked = _resources(_Table(top.take("target", {}), "[target]"), targets)
    steps, timeout_s = top.whole("steps", 2048, least=32), top.whole("timeout_s", DAY_S)
    limits = top.file("thresholds", base)
    if limits is not None:
        thresholds.load(Path(limits))
    top.end()
    for what, names in (("checkpoints", [one.name for one in trained]), ("[[shape]]", [one.name for one in shapes])):
        _distinct(what, names)
    cells = tuple(
        planned(Cell(one, target, precision, shape, bench, steps, limits, timeout_s, asked.get(target, Resources())))
        for one, target, precision, shape in product(trained, targets, precisions, shapes)
    )
    _refuse_twins(cells)
    return cells


def _trained(value: Any, base: Path) -> Trained:
    table = _Table({"path": value} if isinstance(value, str) else value, "a table of checkpoints")
    at = table.file("path", base)
    if at is None:
        raise ValueError('a table of checkpoints needs path = "FILE"')
    adapter = table.text("adapter")
    if adapter is not None and adapter.endswith(".py"):
        adapter = _existing(base / adapter, "adapter")
    family, name = table.text("family") or "auto", table.text("name") or Path(at).stem
    one = Trained(name, at, family, adapter, table.file("tokens", base))
    table.end()
    return one


def _shape(table: _Table) -> Shape:
    least, most = _batch(table.take("batch", "1:8"))
    shape = Shape(
        "",
        least,
        most,
        table.whole("max_chunk", 512),
        table.whole("context", None, least=2),
        _one_of("memory", table.text("memory") or "append", MEMORIES),
    )
    name = table.text("name")
    table.end()
    context = f" context {shape.context}" if shape.context else ""
    memory = "" if shape.memory == "append" else f" {shape.memory}"
    return replace(shape, name=name or f"{least}:{most}/{shape.max_chunk}{context}{memory}")


def _batch(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", str(value))
    least, most = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f'[[shape]] batch must read "LEAST:MOST" or MOST, for example "1:8", not {value!r}')
    return least, most


def _bench(table: _Table, shapes: Sequence[Shape]) -> Bench:
    usual = Bench()
    bench = Bench(
        table.words("workloads", usual.workloads, may_be_empty=True),
        table.whole("rounds", usual.rounds),
        table.whole("samples", usual.samples),
        table.whole("batch", usual.batch),
        table.flag("original", usual.original),
    )
    table.end()
    for workload in bench.workloads:
        try:
            latency.parse(workload)
        except UsageError as error:
            raise ValueError(f"[bench] {error}") from error
    outside = [shape.name for shape in shapes if not shape.min_batch <= bench.batch <= shape.max_batch]
    if bench.workloads and outside:
        raise ValueError(f"[bench] batch {bench.batch} lies outside the batch range of the shape {outside[0]}")
    return bench


def _resources(table: _Table, targets: Sequence[str]) -> dict[str, Resources]:
    """Of the targets that have a table."""
    asked = {}
    for name in tuple(table.keys):
        if name not in targets:
            raise ValueError(f"[target.{name}] is not among the targets of the plan, {', '.join(targets)}")
        of_target = _Table(table.take(name), f"[target.{name}]")
        own = _Table(of_target.take("resources", {}), f"[target.{name}] resources")
        of_target.end()
        custom = _Table(own.take("custom", {}), f"[target.{name}] resources.custom")
        asked[name] = Resources(
            own.amount("num_cpus", 1),
            own.amount("num_gpus", 0),
            own.text("accelerator_type"),
            tuple((each, custom.amount(each, 0)) for each in tuple(custom.keys)),
        )
        own.end()
    return asked


class _Table:
    """A table of the plan, whose keys are taken one by one: those left at its end are unknown."""

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{place} must be a table, not {values!r}")
        self.place, self._values, self._known = place, values, list[str]()

    @property
    def keys(self) -> Mapping[str, Any]:
        return self._values

    def take(self, key: str, default: Any = None) -> Any:
        self._known.append(key)
        return self._values.get(key, default)

    def end(self) -> None:
        for key in self._values:
            if key not in self._known:
                raise ValueError(f"{self.place} has an unknown key {key!r}; {_nearest(key, self._known)}")

    def text(self, key: str) -> str | None:
        return self._typed(key, None, lambda value: isinstance(value, str) and value.strip(), "a text")  # type: ignore[no-any-return]

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._typed(key, default, lambda value: isinstance(value, bool), "true or false"))

    def whole(self, key: str, default: int | None, least: int = 1) -> Any:
        wanted = f"a whole number of {least} or more"
        return self._typed(key, default, lambda value: type(value) is int and value >= least, wanted)

    def amount(self, key: str, default: float) -> float:
        fits: Callable[[Any], bool] = lambda value: type(value) in (int, float) and 0 <= value < float("inf")  # noqa: E731
        return float(self._typed(key, default, fits, "a number of 0 or more"))

    def items(self, key: str, default: Any = None) -> list[Any]:
        fits: Callable[[Any], bool] = lambda value: isinstance(value, list) and value != []  # noqa: E731
        found: list[Any] = self._typed(key, default, fits, "a list that is not empty")
        if found is None:
            raise ValueError(f'{self.place} has no {key}; for example {key} = ["model.pt"]')
        return found

    def words(self, key: str, default: Sequence[str], *, may_be_empty: bool = False) -> tuple[str, ...]:
        wanted = "a list of texts" if may_be_empty else "a list of texts that is not empty"

        def fits(value: Any) -> bool:
            return (may_be_empty or value != []) and isinstance(value, list) and all(isinstance(x, str) for x in value)

        found = tuple(self._typed(key, list(default), fits, wanted))
        _distinct(key, found)
        return found

    def file(self, key: str, base: Path) -> str | None:
        """The absolute path of a file or directory that exists; relative ones are relative to the plan."""
        named = self.text(key)
        return None if named is None else _existing(base / named, key)

    def _typed(self, key: str, default: Any, fits: Callable[[Any], object], wanted: str) -> Any:
        value = self.take(key, default)
        if key in self._values and not fits(value):
            raise ValueError(f"{key} of {self.place} must be {wanted}, not {value!r}")
        return value


def _existing(path: Path, key: str) -> str:
    if not path.exists():
        raise ValueError(f"{key} names {path}, which does not exist")
    return str(path.resolve())


def _one_of(key: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise ValueError(f"{key} has an unknown name {name!r}; {_nearest(name, known)}")
    return name


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _distinct(what: str, names: Sequence[str]) -> None:
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise ValueError(f"{what} has {twice[0]!r} twice; remove one, or give it another name")


def _refuse_twins(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        if (other := seen.setdefault(cell.key, cell)) is not cell:
            raise ValueError(f"the cells {other.label!r} and {cell.label!r} are the same; remove one")
