"""Writers that are killed, run out of space, may not write, or write at once leave what was there or what is new.

In short here, with every point at which the writers of `mscompile.atomic` touch a file; `benchmarks/reliability.py`
does the same to whole commands, and its results stand in docs/reliability.md.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import stress

from mscompile import atomic
from mscompile.atomic import write_text, writing
from mscompile.contracts import StateSpec, require_memory
from mscompile.errors import InputError, MsCompileError, UsageError

ROOT = Path(atomic.__file__).parents[1]
WRITER = """
import sys
from pathlib import Path
from mscompile.atomic import write_text, writing
from mscompile.errors import MsCompileError

def fill(target):
    with writing(target, force=True, marker="last.txt") as directory:
        (directory / "inner").mkdir()
        for name in ("inner/first.txt", "inner/second.txt", "last.txt"):
            (directory / name).write_bytes(b"new " * 3000)

try:
    WRITE(Path(sys.argv[1]))
except MsCompileError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""
FILE = WRITER.replace("WRITE", "(lambda target: write_text(target, 'new ' * 3000))")
DIRECTORY = WRITER.replace("WRITE", "fill")
WRITERS = {
    "file": stress.Command("file", lambda out: (sys.executable, "-c", FILE, out / "page.html"), ("page.html",)),
    "directory": stress.Command("directory", lambda out: (sys.executable, "-c", DIRECTORY, out / "new"), ("new",)),
}
MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def library(made_once: MadeOnce) -> Path:
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        pytest.skip("points of crashes are reached through a library in C: install gcc or clang, on Linux")
    return made_once("crashpoint", lambda path: (path.mkdir(), stress.crash_library(path))) / "crashpoint.so"


@pytest.fixture
def trials(library: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return stress.Trials(WRITERS[request.param], tmp_path, library)


@pytest.mark.parametrize("trials", WRITERS, indirect=True)
def test_kills_and_a_full_disk_at_every_point_of_a_writer(trials: stress.Trials) -> None:
    for how in ("kill", "full"):
        result = trials.crashes(how, trials.calls)
        assert result.findings == []
        assert result.trials == trials.calls >= 5
        assert result.ended >= (result.trials if how == "kill" else result.trials // 2)
        assert {"nothing", "old"} <= set(result.outputs) <= {"nothing", "old", "new"}


@pytest.mark.parametrize("trials", WRITERS, indirect=True)
def test_a_directory_that_cannot_be_written(trials: stress.Trials) -> None:
    result = trials.read_only()
    assert (result.findings, result.outputs) == ([], {"old": 1})


@pytest.mark.parametrize("trials", WRITERS, indirect=True)
def test_a_disk_that_is_full(trials: stress.Trials) -> None:
    if not stress.can_mount():
        pytest.skip("needs unprivileged user namespaces, to mount a small file system: sysctl user.max_user_namespaces")
    result = trials.full_disks((0.0, 0.5, 2.0))
    assert (result.findings, result.outputs) == ([], {"old": 2, "new": 1})


@pytest.mark.parametrize("trials", ["file"], indirect=True)
def test_a_mixture_would_be_found(trials: stress.Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trials of a writer that writes in place."""
    plain = FILE.replace("from mscompile.atomic import write_text, writing", "write_text = Path.write_text")
    command = stress.Command("plain", lambda out: (sys.executable, "-c", plain, out / "page.html"), ("page.html",))
    monkeypatch.setattr(trials, "command", command)
    result = trials.crashes("kill", trials.calls)
    assert "call 2: page.html is another" in result.findings


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["package --format ort-mobile", "package --format triton", "validate", "bench", "export"]
)
def test_commands_that_are_ended_leave_the_old_or_the_new(
    name: str, library: Path, trained: Path, compiled: Path, tmp_path: Path
) -> None:
    trials = stress.Trials(stress.commands(trained, compiled)[name], tmp_path, library)
    for result in (*(trials.crashes(how, 2) for how in ("kill", "full")), trials.read_only()):
        assert result.findings == []


@pytest.mark.slow
def test_sweeps_that_are_killed_go_on(library: Path, trained: Path, tmp_path: Path) -> None:
    result = stress.sweeps(trained, tmp_path, library, (2, 9))
    assert (result.findings, result.ended, result.outputs) == ([], 2, {"new": 2})


@pytest.mark.slow
def test_two_exports_at_once(trained: Path, compiled: Path, tmp_path: Path) -> None:
    result = stress.at_once(stress.commands(trained, compiled)["export"], tmp_path, rounds=2)
    assert (result.findings, result.ended) == ([], 1)


@pytest.mark.slow
def test_exports_of_other_processes_directories_and_locales_have_the_same_bytes(
    trained: Path, compiled: Path, tmp_path: Path
) -> None:
    found = stress.same_bytes(stress.commands(trained, compiled)["export"], tmp_path)
    assert found["files"] >= 9
    assert found["differing"] == []


# Files


def test_a_file_is_written_and_replaced_through_a_link(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "é 1")
    (tmp_path / "latest.html").symlink_to("page.html")
    write_text(tmp_path / "latest.html", "é 2")
    assert (tmp_path / "latest.html").is_symlink()
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "é 2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.html", "page.html"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o666 & ~umask


def test_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["none/page.html", "file/page.html", "directory", "x" * 300])
def test_a_file_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(UsageError, match=r"^cannot write .*/"):
        write_text(tmp_path / name, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_only_what_nobody_writes_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".page.html.0123abcd.partial").write_text("left by a killed process")
    (tmp_path / ".page.html.mine.partial").write_text("of somebody else")
    partial, lock = atomic._locked_sibling(tmp_path / "page.html", atomic._touch)
    write_text(tmp_path / "page.html", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [partial.name, ".page.html.mine.partial", "page.html"]
    )
    os.close(lock)


def test_writers_of_one_file_at_once(tmp_path: Path) -> None:
    path, texts = tmp_path / "page.html", [str(number) * 50_000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text(encoding="utf-8") in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_that_runs_out_of_space_is_a_sentence(tmp_path: Path) -> None:
    """shutil.copytree gathers its errors in one of its own."""
    gathered = [("a", "b", "[Errno 28] No space left on device: 'b'")]
    with pytest.raises(UsageError, match=r"No space left on device; free some space"), writing(tmp_path / "new"):
        raise shutil.Error(gathered)


# Sizes and sentences


def test_states_that_no_machine_can_hold_are_refused_before_they_are_made() -> None:
    state = StateSpec("memory", "float32", ("batch", 2**20, 2**20))
    with pytest.raises(InputError, match=r"the states of 2 streams take 8796093022208 bytes, and there are"):
        require_memory([state], 2)
    require_memory([StateSpec("memory", "float32", ("batch", 4))], 2)


def test_the_size_of_a_state_is_exact() -> None:
    state = StateSpec("memory", "float32", ("batch", *[2**31 - 1] * 4))
    assert state.bytes_per_stream() == 4 * (2**31 - 1) ** 4


def test_an_error_is_one_line_of_printable_characters() -> None:
    assert str(MsCompileError("a\nb \x1b[2J é \ud800")) == "a\\nb \\x1b[2J é \\ud800"
    assert str(InputError("plain")) == "plain"


def test_names_of_files_are_told_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "odd\nname").mkdir()
    with (
        pytest.raises(UsageError, match=r"odd\\nname exists and has no manifest.json"),
        writing(tmp_path / "odd\nname"),
    ):
        pass


# Threads


def test_eight_threads_on_one_plan_are_each_as_one_alone(compiled: Path) -> None:
    import reliability

    from mscompile.runtime import open_bundle

    found = reliability.at_once(open_bundle(compiled).plan("ort"), tokens=200)
    assert found["findings"] == []
    assert (found["threads"], found["equal"]) == (8, 8)


def test_shared_state_would_be_found(compiled: Path) -> None:
    """The same threads on a plan whose sessions are one session."""
    import reliability

    from mscompile.runtime import open_bundle

    plan = open_bundle(compiled).plan("ort")
    one = plan.session()

    class Shared:
        spec = plan.spec

        def session(self, batch: int = 1) -> object:
            return Locked()

    guard = threading.Lock()

    class Locked:
        """Lets threads take turns, so that nothing is refused."""

        def step(self, tokens: object) -> np.ndarray:
            with guard:
                return one.step(tokens)

        def __getattr__(self, name: str) -> object:
            return getattr(one, name)

    assert reliability.at_once(Shared(), tokens=100)["findings"]  # type: ignore[arg-type]


@pytest.mark.slow
def test_memory_does_not_grow_with_steps(compiled: Path, trained: Path) -> None:
    import reliability

    assert reliability.grown(compiled, trained, steps=10_000)["findings"] == []
