"""TensorRT: engines for the NVIDIA GPU of the machine that builds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines import cuda, tensorrt_build, tensorrt_load
from engines.tensorrt_library import Library
from mscompile.contracts import Plan, Profile, StreamSpec
from mscompile.errors import EngineUnavailable

LIBRARY = Library("tensorrt", "TensorRT", "trt")
_INSTEAD = "use --target trt-rtx, which builds without a GPU, or --target ort, which needs none at all"


class TensorRT:
    """The engine `trt`."""

    name = "trt"
    title = "TensorRT"

    def cannot_build(self) -> str | None:
        if reason := LIBRARY.missing():
            return f"{reason}; or {_INSTEAD}"
        try:
            cuda.devices()
        except EngineUnavailable as error:
            return f"TensorRT builds on the GPU that will run the engine, and {error}; {_INSTEAD}"
        return None

    def cannot_run(self) -> str | None:
        return LIBRARY.cannot_run()

    def build(self, graphs: Path, out: Path, spec: StreamSpec, profile: Profile) -> dict[str, Any]:
        if reason := self.cannot_build():
            raise EngineUnavailable(reason)
        here = cuda.devices()[:1]  # kernels are timed on, and chosen for, the current device
        return tensorrt_build.build(LIBRARY, graphs, out, spec, profile, here)

    def load(self, graphs: Path, built: Path, spec: StreamSpec) -> Plan:
        return tensorrt_load.load(LIBRARY, built, spec, self.cannot_run())


ENGINE = TensorRT()
