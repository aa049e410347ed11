"""Triton's Python backend over `mscompile.runtime`: one stream for each correlation id.

Arrays pass by DLPack: some releases of the backend were built for numpy 1 and misread arrays of numpy 2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mscompile.errors import MsCompileError
from mscompile.packaging.triton_streams import Streams
from mscompile.runtime import open_bundle

BUNDLE = "bundle.msc"  # beside this file
START, END = 1, 2  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_*, tritonserver.h


class TritonPythonModel:
    """What the backend calls; each request is answered by itself."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle and load its engine, so that a server that says it is ready is."""
        batching = json.loads(args["model_config"])["sequence_batching"]
        opened = open_bundle(Path(args["model_repository"], args["model_version"], BUNDLE))
        opened.plan()
        self.streams = Streams(opened, int(batching["max_sequence_idle_microseconds"]) / 1e6)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        import triton_python_backend_utils as triton  # which only the backend's own process has

        tokens = np.from_dlpack(triton.get_input_tensor_by_name(request, "tokens"))
        flags = request.flags()
        try:
            logits = self.streams.step(request.correlation_id(), tokens, bool(flags & START), bool(flags & END))
        except MsCompileError as error:
            kind = triton.TritonError.INVALID_ARG if error.exit_code == 2 else triton.TritonError.INTERNAL
            return triton.InferenceResponse([], triton.TritonError(str(error), kind))
        return triton.InferenceResponse([triton.Tensor.from_dlpack("logits", logits)])
