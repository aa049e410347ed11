"""What one does without this project: the original forward through `torch.onnx.export`, run by a general runtime.

The forward is exported as it is, with its memories, if it has any, as inputs and outputs, and with a dynamic batch,
chunk and memory length. A model without incremental forward runs the whole prefix for every token.

    python -m mscompile.plain CHECKPOINT DIRECTORY      writes plain.onnx and plain.json, in a process of its own,
                                                        so that the process that measures holds one runtime only
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mscompile.contracts import Array, Snapshot, check_tokens
from mscompile.errors import EngineUnavailable, InputError

GRAPH, FACTS = "plain.onnx", "plain.json"
LONGEST_CHUNK = 4096


@dataclass(frozen=True)
class PlainGraph:
    """An exported forward, and what a host must know to run it."""

    path: str
    vocab_size: int
    memories: int  # remembered tensors (batch, up to `rows`, width), empty at the start; 0: the prefix is run again
    width: int
    segment: int  # most tokens of one call
    multiple: int  # calls take multiples of so many tokens; the host pads on the right, which no earlier token sees
    rolls: bool  # the memory moves on at every call; otherwise only at the end of a segment
    export_seconds: float


def exported(checkpoint: Path, directory: Path) -> PlainGraph:
    """The plain export of a checkpoint, made in `directory` on first use. EngineUnavailable where it fails."""
    facts = directory / FACTS
    if not facts.exists():
        command = [sys.executable, "-m", "mscompile.plain", str(checkpoint), str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or f"code {done.returncode}").splitlines()[-1]
            raise EngineUnavailable(f"torch.onnx.export of the original failed: {reason}")
    return PlainGraph(**json.loads(facts.read_text(encoding="utf-8")))


def export(checkpoint: Path, directory: Path) -> PlainGraph:
    """Run `torch.onnx.export` on the original forward; the seconds are those of the export and of writing it."""
    import torch
    from torch.export import Dim

    from mscompile.checkpoint import load

    model = load(checkpoint).model
    config = model.config
    memories = config.n_layer if hasattr(model, "empty_mems") else 0

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor, *mems: torch.Tensor) -> Any:
            if not mems:
                return self.model(tokens)
            logits, new_mems = self.model(tokens, mems)
            return (logits, *new_mems)

    multiple = getattr(config, "period", 1)
    batch, groups = Dim("batch", max=1024), Dim("groups", max=LONGEST_CHUNK // multiple)
    chunk = multiple * groups if multiple > 1 else groups
    examples: tuple[Any, ...] = (torch.zeros(2, 5 * multiple, dtype=torch.int64),)
    shapes: dict[str, Any] = {"tokens": {0: batch, 1: chunk}}
    if memories:
        rows = Dim("memory", max=config.mem_len)
        examples += tuple(torch.zeros(2, max(config.mem_len - 1, 1), config.d_model) for _ in range(memories))
        shapes["mems"] = tuple({0: batch, 1: rows} for _ in range(memories))
    path = directory / GRAPH
    begun = time.perf_counter()
    program = torch.onnx.export(
        Plain(),
        examples,
        dynamo=True,
        verbose=False,
        input_names=["tokens", *(f"memory_{number}.in" for number in range(memories))],
        output_names=["logits", *(f"memory_{number}.out" for number in range(memories))],
        dynamic_shapes=shapes,
    )
    assert program is not None
    program.save(path, external_data=True)
    seconds = time.perf_counter() - begun
    segment = config.tgt_len if memories else LONGEST_CHUNK
    rolls = bool(memories and config.same_length)
    graph = PlainGraph(str(path), config.vocab_size, memories, config.d_model, segment, multiple, rolls, seconds)
    (directory / FACTS).write_text(json.dumps(asdict(graph)), encoding="utf-8")
    return graph


class Network(Protocol):
    """One runtime with the graph loaded. Memories stay in the runtime's own tensors, from call to call."""

    def __call__(self, tokens: Array, memories: Any) -> tuple[Array, Any]:
        """tokens (B, T) and the memories of the last call, None at the start -> logits (B, T, V), new memories."""
        ...


class OrtNetwork:
    """ONNX Runtime: memories go from output to input without a copy."""

    def __init__(self, graph: PlainGraph, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self.graph = graph
        self.session = onnxruntime.InferenceSession(graph.path, options, providers=["CPUExecutionProvider"])

    def __call__(self, tokens: Array, memories: Any) -> tuple[Array, Any]:
        binding = self.session.io_binding()
        binding.bind_cpu_input("tokens", tokens)
        if memories is None:
            empty = np.zeros((tokens.shape[0], 0, self.graph.width), np.float32)
            for number in range(self.graph.memories):
                binding.bind_cpu_input(f"memory_{number}.in", empty)
        else:
            for number, value in enumerate(memories):
                binding.bind_ortvalue_input(f"memory_{number}.in", value)
        for output in self.session.get_outputs():
            binding.bind_output(output.name, "cpu")
        self.session.run_with_iobinding(binding)
        logits, *new = binding.get_outputs()
        return logits.numpy(), new


class OpenVinoNetwork:
    """OpenVINO: two requests in turn, each reading what the other wrote.

    Computes in float32, as the original does; by default it takes bfloat16 where the processor has it.
    """

    def __init__(self, graph: PlainGraph, threads: int) -> None:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.graph, self.tensor = graph, openvino.Tensor
        compiled = openvino.Core().compile_model(graph.path, "CPU", settings)
        self.requests = [compiled.create_infer_request() for _ in range(2)]
        self.turn = 0

    def __call__(self, tokens: Array, memories: Any) -> tuple[Array, Any]:
        self.turn = 1 - self.turn
        request = self.requests[self.turn]
        if memories is None:
            empty = np.zeros((tokens.shape[0], 0, self.graph.width), np.float32)
            memories = [self.tensor(empty) for _ in range(self.graph.memories)]
        for number, tensor in enumerate((self.tensor(np.ascontiguousarray(tokens)), *memories)):
            request.set_input_tensor(number, tensor)
        request.infer()
        logits, *new = (request.get_output_tensor(number) for number in range(1 + self.graph.memories))
        return logits.data.copy(), new


class PlainSession:
    """A session over a plain export: goes on as the original's own `advance` does."""

    def __init__(self, graph: PlainGraph, network: Network, batch: int) -> None:
        self.graph, self.network, self._batch = graph, network, batch
        self._memories: Any = None
        self._begun = np.zeros((batch, 0), np.int64)  # tokens of a segment that has not ended
        self._consumed = 0

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def position(self) -> Array:
        return np.full(self._batch, self._consumed, np.int64)

    def step(self, tokens: Any) -> Array:
        array = check_tokens(tokens, self._batch, self.graph.vocab_size)
        logits, rest = [], np.concatenate([self._begun, array], axis=1)
        while rest.shape[1]:
            segment, after = rest[:, : self.graph.segment], rest[:, self.graph.segment :]
            padded = np.pad(segment, ((0, 0), (0, -segment.shape[1] % self.graph.multiple)))
            new, memories = self.network(padded, self._memories)
            logits.append(new[:, : segment.shape[1]])
            final = self.graph.memories and (self.graph.rolls or segment.shape[1] == self.graph.segment)
            if final:
                self._memories = memories
            self._begun = segment[:, :0] if final else segment
            rest = after
        self._consumed += array.shape[1]
        return np.concatenate(logits, axis=1)[:, -array.shape[1] :]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        if rows is not None:
            raise InputError("a plain export begins all its streams together; reset() without rows")
        self._memories, self._begun, self._consumed = None, np.zeros((self._batch, 0), np.int64), 0

    def state(self) -> Snapshot:
        raise InputError("a plain export keeps no named states; use an exported engine for snapshots")

    def restore(self, snapshot: Snapshot) -> None:
        raise InputError("a plain export keeps no named states; use an exported engine for snapshots")


if __name__ == "__main__":
    try:
        export(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:
        cause = error.__cause__ or error
        raise SystemExit(f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}") from error
