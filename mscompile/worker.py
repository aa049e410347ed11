"""A process that answers questions, a JSON object a line: each runtime that is measured gets one of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mscompile.errors import EngineError, EngineUnavailable, MsCompileError, UsageError

Ask = Callable[..., Any]  # keywords of a question -> the answer, a dict
Handler = Callable[[dict[str, Any]], dict[str, Any]]
KINDS: dict[str, type[MsCompileError]] = {kind.__name__: kind for kind in (EngineUnavailable, UsageError, EngineError)}


@contextmanager
def process(name: str, module: str, *arguments: object) -> Iterator[Ask]:
    """Start `python -m module arguments`, wait until it is ready, and say how to ask it. It ends with the block.

    What it answers with is raised: EngineUnavailable, UsageError, or EngineError for all else, as where it ends.
    """
    command = [sys.executable, "-m", module, *(str(argument) for argument in arguments)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stdin, stdout = child.stdin, child.stdout
    assert stdin is not None
    assert stdout is not None

    def answer() -> Any:
        line = stdout.readline()
        if not line:
            raise EngineError(f"the process that measures {name} ended with code {child.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise KINDS[reply["kind"]](reply["error"])
        return reply

    def ask(**question: Any) -> Any:
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        return answer()

    try:
        answer()
        yield ask
    finally:
        child.kill()
        child.wait()
        stdin.close()
        stdout.close()


def serve(start: Callable[[], Handler]) -> None:
    """The other side: `start` loads what answers; then an answer for each line of stdin.

    What libraries print goes to stderr, so that stdout holds answers only.
    """
    replies, sys.stdout = sys.stdout, sys.stderr

    def reply(fields: dict[str, Any]) -> None:
        print(json.dumps(fields), file=replies, flush=True)

    try:
        handle = start()
        reply({"ready": True})
        for line in sys.stdin:
            reply(handle(json.loads(line)))
    except (EngineUnavailable, UsageError) as error:
        reply({"error": str(error), "kind": type(error).__name__})
    except MsCompileError as error:
        reply({"error": str(error), "kind": EngineError.__name__})
    except Exception as error:  # noqa: BLE001 (a runtime's or a peer's own fault is an answer, too)
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        reply({"error": f"{type(error).__name__}: {reason}", "kind": EngineError.__name__})


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident.

    On Linux from its own account: the maximum of getrusage starts with that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
