"""Is there an NVIDIA GPU here? Asked of the driver itself, without any CUDA package."""

from __future__ import annotations

import ctypes


def device_count() -> int:
    """CUDA devices that the driver of this machine offers; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
