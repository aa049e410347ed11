"""TensorRT for RTX: engines for GeForce and RTX GPUs, built ahead of time on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines import cuda, tensorrt_build, tensorrt_load
from engines.tensorrt_library import Library, Native, Runtime
from mscompile.contracts import Plan, Profile, StreamSpec
from mscompile.errors import EngineError

LIBRARY = Library("tensorrt_rtx", "TensorRT for RTX", "trt-rtx")

# Members of ComputeCapability that name no target: NONE is unset, CURRENT needs a GPU here. SM75 (Turing) has
# no FP32 matrix multiplication, so that an FP32 graph does not build for it.
_NO_TARGETS = ("NONE", "CURRENT", "SM75")


class TensorRTForRTX:
    """The engine `trt-rtx`."""

    name = "trt-rtx"
    title = "TensorRT for RTX"

    def cannot_build(self) -> str | None:
        return LIBRARY.missing()

    def cannot_run(self) -> str | None:
        if reason := LIBRARY.cannot_run():
            return reason
        here, known = cuda.devices()[0], targets(LIBRARY.load())
        if here not in known:
            return (
                f"TensorRT for RTX runs FP32 engines on {', '.join(known)} and this GPU is {here}; "
                "use the engine 'trt' or 'ort'"
            )
        return None

    def build(self, graphs: Path, out: Path, spec: StreamSpec, profile: Profile) -> dict[str, Any]:
        return tensorrt_build.build(LIBRARY, graphs, out, spec, profile, targets(LIBRARY.load()), _aim)

    def load(self, graphs: Path, built: Path, spec: StreamSpec) -> Plan:
        return tensorrt_load.load(LIBRARY, built, spec, self.cannot_run())


def targets(runtime: Runtime) -> tuple[str, ...]:
    """The compute capabilities that engines are built for: all that FP32 graphs build for.

    An engine runs on no others. Leaving one out saves nothing: kernels are compiled on the user's machine, so
    a graph of 79 MB of weights gives an engine of 80.6 MB in about a second for one target as for five.
    """
    return tuple(name for name in runtime.ComputeCapability.__members__ if name not in _NO_TARGETS)


def _aim(runtime: Runtime, config: Native) -> None:
    """Set the targets in a builder's config."""
    names = targets(runtime)
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        # A capability that the library does not know is answered with False, and the build would then fail silently.
        if not config.set_compute_capability(runtime.ComputeCapability.__members__[name], index):
            raise EngineError(f"TensorRT for RTX {runtime.__version__} does not build for {name}")


ENGINE = TensorRTForRTX()
