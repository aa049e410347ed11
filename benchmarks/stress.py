"""What goes wrong while a command writes: it is killed, the disk is full or read-only, another one writes as well.

Crashes and refusals are real: `crashpoint.c`, loaded into the command, ends it by SIGKILL instead of its n-th call that
changes files, or lets that call and all later ones fail with ENOSPC; full disks are also file systems in memory of a
fixed size. After each trial every output must be what it was, nothing, or the whole new one.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
CLI = (sys.executable, "-m", "mscompile.cli")
FORMATS = ("cpp", "ort-mobile", "triton")  # web needs packages of npm beside it
PLAN = """
checkpoints = [{checkpoint}]
steps = 32
shape = [{{ batch = "1:2", max_chunk = 1 }}]
[bench]
workloads = ["decode@4"]
rounds = 1
samples = 1
original = false
"""
PAGE_BYTES = 4096
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # linux/prctl.h, linux/capability.h


@dataclass(frozen=True)
class Command:
    """A command that writes: `line(out)` is what is run, `outputs` what it leaves in the directory `out`."""

    name: str
    line: Callable[[Path], Sequence[str | Path]]
    outputs: tuple[str, ...]


def commands(checkpoint: Path, bundle: Path) -> dict[str, Command]:
    """Every command of mscompile that writes, on tiny inputs; for sweeps, which go on, see `sweeps`."""
    sizes = ("--target", "ort", "--batch", "1:3", "--max-chunk", "1", "--steps", "64")

    def reports(out: Path) -> list[str | Path]:
        return ["--junit", out / "parity.xml", "--markdown", out / "parity.md", "--html", out / "parity.html"]

    found = (
        Command(
            "export",
            lambda out: (*CLI, "export", "--model", checkpoint, "--out", out / "model.msc", *sizes, "--force"),
            ("model.msc",),
        ),
        *(
            Command(
                f"package --format {form}",
                lambda out, form=form: (*CLI, "package", bundle, "--format", form, "--out", out / "project", "--force"),
                ("project",),
            )
            for form in FORMATS
        ),
        Command(
            "validate",
            lambda out: (*CLI, "validate", bundle, *reports(out)),
            ("parity.xml", "parity.md", "parity.html"),
        ),
        Command(
            "bench",
            lambda out: (
                *(*CLI, "bench", bundle, "--workload", "decode", "--rounds", "1", "--samples", "2"),
                *("--html", out / "bench.html"),
            ),
            ("bench.html",),
        ),
    )
    return {command.name: command for command in found}


@dataclass
class Result:
    """What became of the outputs of one command over many trials of one kind."""

    command: str
    what: str
    trials: int = 0
    ended: int = 0  # by the kill, or with code 2 and one sentence
    outputs: Counter[str] = field(default_factory=Counter)  # nothing, old, new; all else is a finding
    findings: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        states = {state: self.outputs[state] for state in ("nothing", "old", "new")}
        counts = {"trials": self.trials, "ended": self.ended, **states, "findings": len(self.findings)}
        return {"command": self.command, "what": self.what, **counts}


class Trials:
    """One command in a directory of its own, whose outputs are known: what was there before, and the whole new ones."""

    def __init__(self, command: Command, directory: Path, library: Path) -> None:
        self.command, self.directory, self.library = command, directory, library
        self.out, self._old = directory / "out", directory / "old"
        self.out.mkdir(parents=True)
        calls = directory / "calls"
        done = self.run({"CRASH_COUNT": str(calls)})
        if done.returncode:
            raise RuntimeError(f"{command.name} failed: {done.stderr}")
        self.calls = max(map(int, calls.read_text(encoding="ascii").split()))
        self.new = self._states()
        self.new_bytes = _size_bytes(self.out)
        self._make_old()
        self.old = self._states()
        shutil.copytree(self.out, self._old)

    def _make_old(self) -> None:
        """Another whole output than the command writes, of the same kind."""
        for name in self.command.outputs:
            path = self.out / name
            (path / "old.txt" if path.is_dir() else path).write_text("old", encoding="utf-8")

    def prepare(self, fresh: bool) -> None:
        """An empty directory, or the old outputs; what killed trials left beside them stays."""
        for name in self.command.outputs:
            path = self.out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            if not fresh and (old := self._old / name).is_dir():
                shutil.copytree(old, path)
            elif not fresh:
                shutil.copy(old, path)

    def run(self, crash: Mapping[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        settings = {"LD_PRELOAD": str(self.library), "CRASH_BELOW": f"{self.out}/", **crash} if crash else {}
        line = [str(word) for word in self.command.line(self.out)]
        environment = {**os.environ, **settings}
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, **options)

    def look(self, result: Result, done: subprocess.CompletedProcess[str], fresh: bool, clean: bool) -> None:
        """Take down what one trial left; `clean`: nothing beside the outputs may be left."""
        result.trials += 1
        states = self._states()
        for name, state in states.items():
            known = {None: "nothing", self.old[name]: "old", self.new[name]: "new"}
            kind = known.get(state, "another")
            result.outputs[kind] += 1
            if kind == "another" or kind == ("old" if fresh else "nothing"):
                result.findings.append(f"{name} is {kind}")
        if clean and (left := self.leftovers()):
            result.findings.append(f"left behind: {', '.join(left)}")
        killed = done.returncode == -9
        sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        refused = done.returncode == 2 and len(sentences) == 1 and "Traceback" not in done.stderr
        result.ended += killed or refused
        if not (killed or refused or done.returncode == 0):
            result.findings.append(f"code {done.returncode}: {done.stderr.strip()[-300:]}")
        if done.returncode == 0 and set(states.values()) != set(self.new.values()):
            result.findings.append("code 0, and the outputs are not the new ones")

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.out.iterdir() if path.name not in self.command.outputs)

    def _states(self) -> dict[str, str | None]:
        return {name: _digest(self.out / name) for name in self.command.outputs}

    # The trials

    def crashes(self, how: str, count: int) -> Result:
        """`how`: kill or full, at `count` of the points where the command changes files; half of them onto old outputs.

        After all kills the command runs once more, which has to remove what they left.
        """
        points = range(1, self.calls + 1)
        random = Random(f"{self.command.name} {how}")  # noqa: S311 (the same points again)
        chosen = sorted(random.sample(points, count)) if count < len(points) else list(points)
        result = Result(self.command.name, {"kill": "killed", "full": "refused space"}[how])
        for index, point in enumerate(chosen):
            fresh = bool(index % 2)
            self.prepare(fresh)
            done = self.run({"CRASH_HOW": how, "CRASH_AT": str(point)})
            before = len(result.findings)
            self.look(result, done, fresh, clean=how == "full")
            result.findings[before:] = [f"call {point}: {finding}" for finding in result.findings[before:]]
        if self.run({}).returncode or self._states() != self.new or self.leftovers():
            result.findings.append(f"the next run left {', '.join(self.leftovers()) or 'other outputs'}")
        return result

    def read_only(self) -> Result:
        """Into a directory without permission to write, as a process that is bound by permissions."""
        result = Result(self.command.name, "read-only directory")
        self.prepare(fresh=False)
        self.out.chmod(0o555)
        try:
            done = self.run({}, preexec_fn=_bound_by_permissions)
        finally:
            self.out.chmod(0o755)
        self.look(result, done, fresh=False, clean=True)
        if done.returncode != 2:
            result.findings.append(f"code {done.returncode}")
        return result

    def full_disks(self, shares: Sequence[float]) -> Result:
        """On file systems with room for the old outputs and these shares of the new ones."""
        result = Result(self.command.name, "full disk")
        for share in shares:
            self.prepare(fresh=False)
            size = _size_bytes(self.out) + int(share * self.new_bytes) // PAGE_BYTES * PAGE_BYTES
            line = ["unshare", "-rm", sys.executable, __file__, str(self.out), str(self._old), str(size)]
            line += [str(word) for word in self.command.line(self.out)]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            shutil.rmtree(self.out)
            shutil.copytree(self._old.with_name("found"), self.out)
            shutil.rmtree(self._old.with_name("found"))
            self.look(result, done, fresh=False, clean=True)
        return result


def _on_a_small_disk(out: Path, old: Path, size_bytes: int, line: Sequence[str]) -> int:
    """In a namespace of its own: the code of a command whose directory is a small file system, kept for a look."""
    mount = shutil.which("mount") or "mount"
    subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(out)], check=True)
    shutil.copytree(old, out, dirs_exist_ok=True)
    code = subprocess.run(line, check=False).returncode
    shutil.copytree(out, old.with_name("found"))
    return code


def _bound_by_permissions() -> None:
    """Let the superuser's next program be bound by the permissions of files; others are."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def _digest(path: Path) -> str | None:
    """Of all files below a directory, or of a document without its figures, which differ between runs.

    How much a page draws depends on its figures: of a page, the title and the end, behind which nothing may stand.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        text = "".join(f"{file.relative_to(path)} {_content(file, path / 'sizes.json')}\n" for file in files)
    elif path.exists():
        text = path.read_text(encoding="utf-8")
        if page := re.fullmatch(r"(<!doctype html>.*?</title>).*(</html>\s*)", text, re.DOTALL | re.IGNORECASE):
            text = page[1] + page[2]
        text = re.sub(r"(#\s*)+", "#", re.sub(r"[-+\d.,e:%]+", "#", text))
    else:
        return None
    return sha256(text.encode()).hexdigest()


def _content(file: Path, record: Path) -> str:
    """The hash of a file. Of an .ort file, which is not the same twice, whether `record` has its hash."""
    content = file.read_bytes()
    found = sha256(content).hexdigest()
    if file.suffix == ".ort":
        return str(record.exists() and found in record.read_text(encoding="utf-8"))
    return sha256(re.sub(rb"[0-9a-f]{64}|\d+", b"", content)).hexdigest() if file == record else found


def _size_bytes(directory: Path) -> int:
    """What a file system in memory needs for it."""
    files = [path.stat().st_size if path.is_file() else 0 for path in directory.rglob("*")]
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in files)


def crash_library(directory: Path) -> Path:
    """crashpoint.c, compiled. RuntimeError where there is no C compiler."""
    compiler, library = shutil.which("cc"), directory / "crashpoint.so"
    if compiler is None:
        raise RuntimeError("no C compiler: install gcc or clang")
    line = [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "crashpoint.c", "-ldl"]
    subprocess.run(line, check=True, capture_output=True)
    return library


def can_mount() -> bool:
    """Whether this process may make namespaces with file systems of their own."""
    unshare, mount = shutil.which("unshare"), shutil.which("mount")
    if unshare is None or mount is None:
        return False
    line = [unshare, "-rm", mount, "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


# Several exports


def at_once(command: Command, directory: Path, rounds: int) -> Result:
    """Two exports to one directory at once: one may be refused, and what is there is whole."""
    from mscompile.runtime import open_bundle

    result = Result(command.name, "two at once")
    for number in range(rounds):
        out = directory / str(number)
        out.mkdir(parents=True)
        line = [str(word) for word in command.line(out) if number % 2 or word != "--force"]
        both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) for _ in range(2)]
        said = [process.communicate()[1] for process in both]
        codes = sorted(process.returncode for process in both)
        result.trials += 1
        result.ended += codes.count(2)
        result.outputs["new"] += 1
        if codes != ([0, 0] if number % 2 else [0, 2]) or any("Traceback" in each for each in said):
            result.findings.append(f"round {number}: codes {codes}: {said}")
        open_bundle(out / command.outputs[0])
        if [path.name for path in out.iterdir()] != list(command.outputs):
            result.findings.append(f"round {number}: left behind {[path.name for path in out.iterdir()]}")
    return result


def sweeps(checkpoint: Path, directory: Path, library: Path, points: Sequence[int]) -> Result:
    """A sweep of one cell, in which each process is killed at its n-th call; the same command has to end it."""
    from mscompile.runtime import open_bundle

    result = Result("sweep", "killed, then run again")
    directory.mkdir(parents=True, exist_ok=True)
    plan = directory / "plan.toml"
    plan.write_text(PLAN.format(checkpoint=json.dumps(str(checkpoint))), encoding="utf-8")
    for point in points:
        out = directory / str(point)
        out.mkdir()
        line = [str(word) for word in (*CLI, "sweep", plan, "--out", out / "sweep", "--html", out / "sweep.html")]
        crash = {"LD_PRELOAD": str(library), "CRASH_BELOW": f"{out}/", "CRASH_HOW": "kill", "CRASH_AT": str(point)}
        killed = subprocess.run(line, env={**os.environ, **crash}, capture_output=True, text=True, check=False)
        result.trials += 1
        result.ended += killed.returncode in (-9, 1)
        if killed.returncode not in (-9, 0, 1) or "Traceback" in killed.stderr:
            result.findings.append(f"call {point}: code {killed.returncode}: {killed.stderr.strip()[-300:]}")
        again = subprocess.run(line, capture_output=True, text=True, check=False)
        names = {each: sorted(path.stem for path in (out / "sweep" / each).iterdir()) for each in ("bundles", "cells")}
        if again.returncode or names["bundles"] != names["cells"] or len(names["cells"]) != 1:
            result.findings.append(
                f"call {point}: then code {again.returncode}, {names}: {again.stderr.strip()[-300:]}"
            )
            continue
        open_bundle(next((out / "sweep" / "bundles").iterdir()))
        if sorted(path.name for path in out.iterdir()) != ["sweep", "sweep.html"]:
            result.findings.append(f"call {point}: left behind {sorted(path.name for path in out.iterdir())}")
        result.outputs["new"] += 1
    return result


def same_bytes(command: Command, directory: Path) -> dict[str, Any]:
    """Two exports, of different processes, hash seeds, directories, time zones and locales, byte by byte."""
    settings = (
        {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C", "COLUMNS": "80"},
        {"PYTHONHASHSEED": "4242", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8", "COLUMNS": "200"},
    )
    contents = []
    for index, changed in enumerate(settings):
        out = directory / ("a" * (index + 1))
        (out / "tmp").mkdir(parents=True)
        line = [str(word) for word in command.line(out)]
        environment = {**os.environ, **changed, "TMPDIR": str(out / "tmp")}
        subprocess.run(line, check=True, capture_output=True, cwd=out, env=environment)
        bundle = out / command.outputs[0]
        files = sorted(path for path in bundle.rglob("*") if path.is_file())
        contents.append({str(path.relative_to(bundle)): path.read_bytes() for path in files})
    first, second = contents
    differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return {"files": len(first), "bytes": sum(map(len, first.values())), "differing": differing}


if __name__ == "__main__":
    sys.exit(_on_a_small_disk(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
