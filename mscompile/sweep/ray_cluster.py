"""Cells as tasks of a Ray cluster that is there already.

Every node has the same mscompile and sees the checkpoints and the directory of the sweep under the same paths. A task
runs its cell in a process of its own, as on one machine; a task that is lost with its worker or node is submitted once
more.
"""

from __future__ import annotations

import logging
import secrets
import socket
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mscompile import codec
from mscompile.atomic import write_text
from mscompile.errors import EngineUnavailable
from mscompile.sweep import local
from mscompile.sweep.local import Event
from mscompile.sweep.plan import Cell, Resources
from mscompile.sweep.result import Result, Store

CONNECT_S = 10
SHARED = "shared"  # a file of the store, by whose content nodes see that they share it


def run(cells: Sequence[Cell], store: Store, address: str) -> Generator[Event, None, None]:
    """Run the cells on the cluster at `address`. When the iteration is left, what still runs there is ended.

    Raises EngineUnavailable where there is no such cluster.
    """
    with redirect_stdout(sys.stderr):  # Ray prints there what it thinks of lost workers
        ray = _connected(address)
        try:
            token = secrets.token_hex(8)
            write_text(store.path / SHARED, token)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            yield from _tasks(ray, cells, store, token, nodes)
        finally:
            ray.shutdown()


def _connected(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise EngineUnavailable("Ray is not installed; pip install 'mscompile[ray]'") from error
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="mscompile")
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineUnavailable(
            f"no Ray cluster at {address}: {reason}; start one with ray start --head, or leave --ray out"
        ) from error
    return ray


def _reach(address: str) -> None:
    """OSError where nothing answers at HOST:PORT, which Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in host:
        socket.create_connection((host, int(port)), CONNECT_S).close()


def _tasks(
    ray: Any, cells: Sequence[Cell], store: Store, token: str, nodes: Sequence[Mapping[str, float]]
) -> Iterator[Event]:
    task = ray.remote(_on_a_node)
    attempts: dict[Cell, int] = {}
    waiting: dict[Any, Cell] = {}

    def submit(cell: Cell) -> None:
        attempts[cell] = attempts.get(cell, 0) + 1
        options = {**_options(cell.resources), "max_retries": 0, "name": cell.label}
        waiting[task.options(**options).remote(codec.encode(cell), str(store.path), token, attempts[cell])] = cell

    for cell in cells:
        if (reason := lacking(cell.resources, nodes)) is not None:
            yield Event(cell, "done", result=_lost(cell, store, "unavailable", reason, 0))
            continue
        submit(cell)
        yield Event(cell, "in the cluster")
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        cell = waiting.pop(ready)
        try:
            result = codec.decode(Result, ray.get(ready))
        except ray.exceptions.RayError as error:
            if attempts[cell] < local.ATTEMPTS:
                submit(cell)
                yield Event(cell, "in the cluster again")
                continue
            reason = f"its Ray task was lost {attempts[cell]} times: {type(error).__name__}"
            result = _lost(cell, store, "failed", reason, attempts[cell])
        yield Event(cell, "done", result=result)


def _lost(cell: Cell, store: Store, status: Any, reason: str, attempts: int) -> Result:
    result = Result(cell.key, status, "process", reason, attempts=attempts)
    store.save(cell, result)
    return result


def _options(asked: Resources) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": asked.num_cpus, "num_gpus": asked.num_gpus, "resources": dict(asked.custom)}
    return options | ({"accelerator_type": asked.accelerator_type} if asked.accelerator_type else {})


def lacking(asked: Resources, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why no node of the cluster can take a task, which would wait forever; None if one can."""
    wanted = {"CPU": asked.num_cpus, "GPU": asked.num_gpus, **dict(asked.custom)}
    if asked.accelerator_type:
        wanted[f"accelerator_type:{asked.accelerator_type}"] = 0.001  # what Ray reserves of it
    if any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
        return None
    words = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items() if amount)
    types = sorted({name for node in nodes for name in node if name.startswith("accelerator_type:")})
    return f"no node of the Ray cluster has {words}; it has the GPU types {', '.join(types) or 'none'}"


def _on_a_node(encoded: Any, path: str, token: str, number: int) -> Any:
    """The task."""
    cell, store = codec.decode(Cell, encoded), Store(Path(path))
    if not (store.path / SHARED).is_file() or (store.path / SHARED).read_text(encoding="utf-8") != token:
        reason = (
            f"{socket.gethostname()} does not share {path} with the machine that reads the plan; "
            "set --out to a directory that all nodes share"
        )
        return codec.encode(Result(cell.key, "failed", "process", reason))
    running = local.Running()
    try:
        return codec.encode(local.attempt(cell, store, running, first=number))
    finally:
        running.end()
