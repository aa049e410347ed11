"""What the machine can do at best: bytes read a second by all threads, and floating-point operations a second of
ONNX Runtime's own matrix product at a model's sizes. Measured beside the engines, since a shared machine changes.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mscompile.contracts import Array
from mscompile.errors import EngineUnavailable

PASSES = 5

# Sums a buffer, each thread its part; the sum is returned so that no read can be left out.
READER = r"""
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

typedef struct { const uint64_t *from; size_t count; uint64_t sum; } Part;

static void *read_part(void *argument) {
    Part *part = argument;
    uint64_t sum = 0;
    for (size_t i = 0; i < part->count; i++) sum += part->from[i];
    part->sum = sum;
    return NULL;
}

uint64_t read_all(const uint64_t *from, size_t count, int threads) {
    pthread_t started[64];
    Part parts[64];
    uint64_t sum = 0;
    size_t each = count / threads;
    if (threads > 64) threads = 64;
    for (int t = 0; t < threads; t++) {
        parts[t].from = from + t * each;
        parts[t].count = t + 1 == threads ? count - t * each : each;
        parts[t].sum = 0;
        pthread_create(&started[t], NULL, read_part, &parts[t]);
    }
    for (int t = 0; t < threads; t++) { pthread_join(started[t], NULL); sum += parts[t].sum; }
    return sum;
}
"""


class ReadBandwidth:
    """Reads `size_bytes` of memory with all threads; by a compiled loop, or by numpy where there is no C compiler."""

    def __init__(self, size_bytes: int, threads: int) -> None:
        self.buffer = np.ones(size_bytes // 8, np.uint64)
        self.threads = threads
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        self.method = "C loop" if compiler else "numpy sum"
        self._read = self._compiled(compiler) if compiler else self._in_numpy()

    def bytes_per_second(self) -> float:
        """The median of some passes."""
        seconds = []
        for _ in range(PASSES):
            begun = time.perf_counter()
            total = self._read()
            seconds.append(time.perf_counter() - begun)
            assert total == self.buffer.size
        return self.buffer.nbytes / median(seconds)

    def _compiled(self, compiler: str) -> Callable[[], int]:
        with tempfile.TemporaryDirectory() as directory:
            source, library = Path(directory, "read.c"), Path(directory, "read.so")
            source.write_text(READER, encoding="utf-8")
            command = [compiler, "-O3", "-march=native", "-pthread", "-shared", "-fPIC"]
            subprocess.run([*command, str(source), "-o", str(library)], check=True, capture_output=True)
            read = ctypes.CDLL(str(library)).read_all
        read.restype = ctypes.c_uint64
        read.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return lambda: int(read(self.buffer.ctypes.data, self.buffer.size, self.threads))

    def _in_numpy(self) -> Callable[[], int]:
        parts = np.array_split(self.buffer, self.threads)
        pool = ThreadPoolExecutor(self.threads)
        return lambda: sum(pool.map(lambda part: int(part.sum()), parts))


class ProductRate:
    """Operations a second of ONNX Runtime's MatMul: `rows` rows times constant matrices (k, n), each `count` times."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], rows: int, threads: int) -> None:
        try:
            import onnxruntime
            from onnx import TensorProto, helper, numpy_helper
        except ImportError as error:
            raise EngineUnavailable(f"the arithmetic ceiling needs onnx and onnxruntime: {error}") from error
        random = np.random.default_rng(0)
        nodes, weights, inputs, outputs = [], [], {}, []
        for k, n, count in shapes:
            inputs[f"x{k}"] = random.standard_normal((rows, k), dtype=np.float32)
            for number in range(count):
                name = f"{k}_{n}_{number}"
                weights.append(numpy_helper.from_array(random.standard_normal((k, n), dtype=np.float32), f"w{name}"))
                nodes.append(helper.make_node("MatMul", [f"x{k}", f"w{name}"], [f"y{name}"]))
                outputs.append(helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, (rows, n)))
        entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in inputs.items()]
        graph = helper.make_graph(nodes, "products", entries, outputs, weights)
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.flops = sum(2 * rows * k * n * count for k, n, count in shapes)
        self._binding = _bound(session, inputs, outputs)
        self._run: Callable[[Any], None] = session.run_with_iobinding
        self._run(self._binding)

    def flops_per_second(self) -> float:
        """The median of some runs."""
        seconds = []
        for _ in range(PASSES):
            begun = time.perf_counter()
            self._run(self._binding)
            seconds.append(time.perf_counter() - begun)
        return self.flops / median(seconds)


def _bound(session: Any, inputs: dict[str, Array], outputs: Sequence[Any]) -> Any:
    import onnxruntime

    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_cpu_input(name, array)
    for output in outputs:
        shape = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
        binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)))
    return binding
