"""The NVIDIA GPUs of this machine, as its driver tells them: asked without any CUDA package."""

from __future__ import annotations

import ctypes
import os

from mscompile.errors import EngineUnavailable

_CUDA_ERROR_NO_DEVICE = 100
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def devices() -> tuple[str, ...]:
    """Compute capabilities of the GPUs here, as "SM89", from the driver alone; EngineUnavailable without one."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as cause:
        raise EngineUnavailable(f"no NVIDIA driver is installed ({name} was not found)") from cause

    def ask(function: str, *arguments: int) -> int:
        answer = ctypes.c_int()
        status = getattr(driver, function)(ctypes.byref(answer), *arguments)
        if status:
            raise EngineUnavailable(f"the NVIDIA driver's {function} answers with error {status}")
        return answer.value

    if status := driver.cuInit(0):
        reason = "sees no GPU" if status == _CUDA_ERROR_NO_DEVICE else f"does not start (error {status})"
        raise EngineUnavailable(f"the NVIDIA driver {reason}")
    found = [ask("cuDeviceGet", ordinal) for ordinal in range(ask("cuDeviceGetCount"))]
    if not found:
        raise EngineUnavailable("the NVIDIA driver sees no GPU")
    pairs = [(ask("cuDeviceGetAttribute", _MAJOR, d), ask("cuDeviceGetAttribute", _MINOR, d)) for d in found]
    return tuple(f"SM{major}{minor}" for major, minor in pairs)


def device_count() -> int:
    """How many GPUs the driver offers; 0 where there is no driver, or none that works."""
    try:
        return len(devices())
    except EngineUnavailable:
        return 0
