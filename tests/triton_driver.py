"""Runs in the environment of tests/triton_server.sh, where tritonclient is.

    triton_driver.py schema FILE               the configuration as JSON, read by Triton's own schema
    triton_driver.py ask ADDRESS OUT < rounds  asks the server; logits to OUT (.npz), refusals as JSON to stdout

`rounds` is JSON: a list of rounds, each a list of {"model", "sequence", "tokens", "start", "end"}. Requests of a round
are under way together. Logits and refusals go by "<round>/<request>".
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2


def schema(file: str) -> None:
    config = text_format.Parse(Path(file).read_text("utf-8"), model_config_pb2.ModelConfig())
    print(json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)))


def ask(address: str, out: str) -> None:
    client, logits, refusals = triton.InferenceServerClient(address), {}, {}
    for number, requests in enumerate(json.load(sys.stdin)):
        futures = [_sent(client, request) for request in requests]
        for place, future in enumerate(futures):
            try:
                logits[f"{number}/{place}"] = future.result(timeout=60).as_numpy("logits")
            except triton.InferenceServerException as refusal:
                refusals[f"{number}/{place}"] = refusal.message()
    np.savez(out, **logits)
    print(json.dumps(refusals))


def _sent(client: Any, request: dict[str, Any]) -> Future[Any]:
    tokens = np.array(request["tokens"], np.int64)
    given = triton.InferInput("tokens", list(tokens.shape), "INT64")
    given.set_data_from_numpy(tokens)
    future: Future[Any] = Future()

    def answered(result: Any, error: Exception | None) -> None:
        future.set_result(result) if error is None else future.set_exception(error)

    flags = {"sequence_start": request.get("start", False), "sequence_end": request.get("end", False)}
    client.async_infer(request["model"], [given], answered, sequence_id=request["sequence"], **flags)
    return future


if __name__ == "__main__":
    {"schema": schema, "ask": ask}[sys.argv[1]](*sys.argv[2:])
