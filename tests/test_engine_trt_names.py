"""Every name that the shared TensorRT code uses exists in TensorRT, in TensorRT for RTX and in CUDA's bindings.

TensorRT proper does not import without its libraries, so its names are looked up in the compiled module of
NVIDIA's bindings package. The names are read from the syntax tree: variables annotated as `Runtime`, `Native`
or `Cuda`, what is assigned from a chain that starts at one, and every attribute along such chains.
"""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

import engines

ENGINES = Path(engines.__path__[0])
DISTRIBUTION = "tensorrt-cu13-bindings"
ANNOTATIONS = {"Runtime": "runtime", "Native": "native", "Cuda": "cuda"}
PYTHON = {"__name__", "__version__", "__members__", "name"}  # of modules and enums, not of the library


class Names(ast.NodeVisitor):
    """Collects (kind of root, dotted chain) of every attribute access on an object of a library."""

    def __init__(self, source: Path) -> None:
        self.scopes: list[dict[str, str]] = [{}]
        self.chains: set[tuple[str, tuple[str, ...]]] = set()
        self.visit(ast.parse(source.read_text(encoding="utf-8")))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        kinds = {argument.arg: kind for argument in arguments if (kind := _kind(argument.annotation))}
        self.scopes.append({**self.scopes[-1], **kinds})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        kind, chain = self._chain(node.value)
        if kind and chain:
            made = "cuda" if kind == "cuda" else "native"
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.scopes[-1][target.id] = made

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and (kind := _kind(node.annotation)):
            self.scopes[-1][node.target.id] = kind

    def visit_Attribute(self, node: ast.Attribute) -> None:
        kind, chain = self._chain(node)
        if kind:
            self.chains.add((kind, chain))
        self.generic_visit(node)

    def _chain(self, node: ast.expr) -> tuple[str, tuple[str, ...]]:
        """The kind of the variable that a chain of attributes and calls starts at, and the attributes."""
        names: list[str] = []
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Attribute):
                names.insert(0, node.attr)
                if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr == "_cuda":
                    return "cuda", tuple(names[1:])
                node = node.value
            elif isinstance(node, ast.Call):
                names = []  # what a call returns is another object
                node = node.func
            else:
                return "", ()
        return self.scopes[-1].get(node.id, ""), tuple(names)


def _kind(annotation: ast.expr | None) -> str:
    name = annotation.attr if isinstance(annotation, ast.Attribute) else getattr(annotation, "id", "")
    return ANNOTATIONS.get(name, "")


def used(pattern: str, *kinds: str) -> set[tuple[str, ...]]:
    """The chains in the files of the package that match."""
    chains = {chain for path in ENGINES.glob(pattern) for chain in Names(path).chains}
    return {chain for kind, chain in chains if kind in kinds and chain and not PYTHON & {*chain}}


SHARED = used("tensorrt_*.py", "runtime", "native") | used("trt.py", "runtime", "native")
RTX = used("trt_rtx.py", "runtime", "native")


def test_the_walk_finds_what_is_used() -> None:
    found = {".".join(chain) for chain in SHARED}
    assert {
        "Builder",
        "BuilderFlag.TF32",
        "ILogger.Severity.WARNING",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser",
        "Runtime",
        "build_serialized_network",
        "create_optimization_profile",
        "deserialize_cuda_engine",
        "execute_async_v3",
        "get_error",
        "node_name",
        "set_shape",
    } <= found
    assert {"set_compute_capability", "num_compute_capabilities"} <= {chain[-1] for chain in RTX}


def compiled_module() -> Path:
    """The compiled part of NVIDIA's bindings, found without importing them."""
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed: pip install 'mscompile[dev]'")
    return next(Path(str(file.locate())) for file in files if file.name in ("tensorrt.so", "tensorrt.pyd"))


def test_every_name_exists_in_tensorrt() -> None:
    """The linker shares the ends of strings, so only the zero byte behind a name can be relied on."""
    content = compiled_module().read_bytes()
    missing = {name for chain in SHARED for name in chain if f"{name}\0".encode() not in content}
    assert not missing
    assert b"set_compute_capability\0" not in content  # so that only trt_rtx.py may use it


def _members(module: Any) -> Iterator[str]:
    for value in vars(module).values():
        if isinstance(value, type):
            yield from dir(value)


def test_every_name_exists_in_tensorrt_for_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    members = set(_members(rtx))
    of_module = {chain for chain in SHARED | RTX if hasattr(rtx, chain[0])}
    assert {("Builder",), ("BuilderFlag", "TF32"), ("ILogger", "Severity", "WARNING")} <= of_module
    for chain in of_module:
        attrgetter(".".join(chain))(rtx)
    assert not {chain for chain in (SHARED | RTX) - of_module if not {*chain} <= members}


def test_every_name_exists_in_the_cuda_bindings() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    names = used("*.py", "cuda")
    assert {("cudaMalloc",), ("cudaMemcpyAsync",), ("cudaGetErrorString",)} <= names
    for chain in names:
        attrgetter(".".join(chain))(cuda)
    assert all(isinstance(answer, tuple) for answer in (cuda.cudaStreamCreate(), cuda.cudaFree(0)))
