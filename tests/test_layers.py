"""The layers of architecture, read from the source: who may import whom, and nothing heavy at the door."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mscompile", "exporters", "engines", "validation")
HEAVY = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "openvino", "matplotlib", "safetensors", "tensorrt")
LEAVES = ("mscompile.contracts", "mscompile.errors")
SIBLINGS = ("mscompile.models", "exporters", "engines", "validation")
TOP = ("mscompile.pipeline", "mscompile.runtime")
COMMANDS = tuple(
    f"mscompile.{name}"
    for name in (
        "cli",
        "__main__",
        "baseline",
        "bench",
        "bisect",
        "departure",
        "gate",
        "inspection",
        "locate",
        "packaging",
        "sweep",
        "pytest_plugin",
        "terminal",
        "verification",
    )
)

# What may be heavy at module level. A file of validation may be, too, if its docstring says "Needs torch".
HEAVY_AT_THE_DOOR = (
    "mscompile.models",
    "mscompile.conversion",
    "mscompile.adapters",
    "mscompile.bisect",
    "mscompile.checkpoint",
    "mscompile.departure",
    "mscompile.locate",
    "mscompile.pipeline",
    "mscompile.verification",
    "exporters",
    "engines.torch_eager",
)

# What opens and runs bundles where only numpy and one engine are installed: nothing heavy, not even by way of others.
LIGHT = (
    "engines",
    *("mscompile", *(f"mscompile.{name}" for name in ("bench", "bundle", "cli", "gate", "pytest_plugin", "runtime"))),
)

# Siblings that know each other: rules match the modules of models, and the eager engine runs them.
ACQUAINTED = (("exporters", "mscompile.models"), ("engines.torch_eager", "mscompile.models"))


@dataclass(frozen=True)
class Import:
    """One imported module, with where it stands."""

    importer: str
    module: str
    line: int
    at_the_door: bool  # runs when the importer is imported

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}, imports {self.module}"


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def sources() -> dict[str, Path]:
    """Every module of the four packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, tree: ast.AST, known: set[str], at_the_door: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, at_the_door)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(name, whole if whole in known else str(node.module), node.lineno, at_the_door)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in node.body:
                yield from imports_of(name, ast.Module([inner], []), known, at_the_door=False)
            for inner in node.orelse:
                yield from imports_of(name, ast.Module([inner], []), known, at_the_door)
        else:
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(name, node, known, at_the_door and not lazy)


def all_imports() -> list[Import]:
    modules = sources()
    return [
        found
        for name, path in modules.items()
        for found in imports_of(name, ast.parse(path.read_text("utf-8")), set(modules))
    ]


IMPORTS = all_imports()


def test_there_is_something_to_check() -> None:
    assert {"mscompile.contracts", "exporters.program", "engines.session"} <= set(sources())
    assert any(found.module == "torch" for found in IMPORTS)


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_need_numpy_and_the_standard_library_only(leaf: str) -> None:
    allowed = {*sys.stdlib_module_names, "numpy"}
    strangers = [
        str(found)
        for found in IMPORTS
        if found.importer == leaf and found.module.partition(".")[0] not in allowed and found.module not in LEAVES
    ]
    assert not strangers


def test_siblings_do_not_import_each_other() -> None:
    def sibling(module: str) -> str | None:
        return next((name for name in SIBLINGS if within(module, name)), None)

    wrong = [
        str(found)
        for found in IMPORTS
        if sibling(found.importer)
        and sibling(found.module)
        and sibling(found.importer) != sibling(found.module)
        and not any(within(found.importer, who) and within(found.module, whom) for who, whom in ACQUAINTED)
    ]
    assert not wrong


def test_only_the_public_package_and_the_eager_engine_read_checkpoints() -> None:
    allowed = ("mscompile", "engines.torch_eager")
    wrong = [str(i) for i in IMPORTS if i.module == "mscompile.checkpoint" and not within(i.importer, *allowed)]
    assert not wrong


def test_nothing_below_them_imports_the_pipeline_or_the_runtime() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.module in TOP
        and not within(found.importer, *TOP, *COMMANDS)
        and not (found.importer == "mscompile" and not found.at_the_door)
    ]
    assert not wrong


def test_the_runtime_needs_no_exporter_and_no_model_at_import() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if within(found.importer, "mscompile.runtime", "mscompile.bundle", "mscompile.cli")
        and within(found.module, "mscompile.models", "mscompile.checkpoint", "exporters", "engines.torch_eager")
        and found.at_the_door
    ]
    assert not wrong


def test_heavy_modules_are_imported_where_they_are_needed() -> None:
    modules = sources()
    wrong = [str(found) for found in IMPORTS if found.at_the_door and _heavy(found.module) and not _may(found, modules)]
    assert not wrong


def _heavy(module: str) -> bool:
    package = module.partition(".")[0]
    return package in HEAVY or package.startswith("tensorrt")


def _may(found: Import, modules: dict[str, Path]) -> bool:
    if within(found.importer, "validation"):
        says = ast.get_docstring(ast.parse(modules[found.importer].read_text("utf-8"))) or ""
        return f"needs {found.module.partition('.')[0]}" in says.lower()
    return within(found.importer, *HEAVY_AT_THE_DOOR)


DOORS = [name for name in sources() if within(name, "engines") or name in LIGHT]


@pytest.mark.parametrize("door", [name for name in DOORS if name != "engines.torch_eager"])
def test_nothing_heavy_comes_in_by_way_of_others(door: str) -> None:
    reached, todo = set(), [door]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [i.module for i in IMPORTS if i.importer == name and i.at_the_door]
    assert not sorted(name for name in reached if _heavy(name))


def test_no_cycle_at_import() -> None:
    modules = sources()
    needs = {
        name: {i.module for i in IMPORTS if i.importer == name and i.at_the_door} & set(modules) for name in modules
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for needed in sorted(needs[name]):
                visit(needed, (*path, name))
            done.add(name)

    for name in modules:
        visit(name, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_package_files_are_empty_but_for_the_public_names(package: str) -> None:
    for path in sorted((ROOT / package).rglob("__init__.py")):
        if path != ROOT / "mscompile" / "__init__.py":
            assert not path.read_text("utf-8").strip(), f"{path.relative_to(ROOT)} must stay empty"


def test_the_public_package_imports_nothing_at_its_door() -> None:
    eager = [str(i) for i in IMPORTS if i.importer == "mscompile" and i.at_the_door and i.module != "__future__"]
    assert not [text for text in eager if text.rpartition(" ")[2].partition(".")[0] not in sys.stdlib_module_names]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_hides_a_module_of_that_name(package: str) -> None:
    hiding = [path for path in (ROOT / package).rglob("*.py") if path.name in ("types.py", "torch.py")]
    assert not hiding


def test_tests_lie_flat() -> None:
    tests = ROOT / "tests"
    assert not list(tests.rglob("__init__.py"))
    assert not [path for path in tests.rglob("test_*.py") if path.parent != tests]


# The checker itself


CHECKED = """
import a
from mscompile import contracts
if TYPE_CHECKING:
    import b
else:
    import c
try:
    import d
except ImportError:
    pass
def f():
    import e
class C:
    import g
    def h(self):
        from x.y import z
"""


def test_the_reader_tells_lazy_imports_from_eager_ones() -> None:
    found = list(imports_of("m", ast.parse(CHECKED), {"mscompile.contracts"}))
    assert {i.module for i in found if i.at_the_door} == {"a", "mscompile.contracts", "c", "d", "g"}
    assert {i.module for i in found if not i.at_the_door} == {"b", "e", "x.y"}
