"""What this machine can build and run, and what is wrong with it."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

from engines import registry
from engines.cuda import device_count

PACKAGES = (
    "torch",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx",
    "tensorrt",
    "numpy",
)


def examine() -> dict[str, Any]:
    """Facts about this machine, as plain data."""
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "cuda_devices": device_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "engines": {
            engine.name: {
                "title": engine.title,
                "build": engine.cannot_build() or "yes",
                "run": engine.cannot_run() or "yes",
            }
            for engine in registry.engines()
        },
        "problems": _problems(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _problems() -> list[str]:
    problems = []
    runtimes = sorted(set(packages_distributions().get("onnxruntime", [])))
    if len(runtimes) > 1:
        problems.append(
            f"{' and '.join(runtimes)} are both installed, and the last one installed wins; "
            "uninstall both, then install one"
        )
    return problems
