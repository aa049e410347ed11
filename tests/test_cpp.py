"""The C++ runtime in cpp/: built as CMake builds it, it gives what the Python session gives, errors included.

Needs CMake, a compiler and what cpp/dependencies.sh gets; `make cpp` provides it and builds first. So do the tests,
and export nothing where nothing can be built.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from damage import DAMAGE, edit
from replays import LENGTHS, Replay, mixed

from engines import registry
from engines.cuda import device_count
from mscompile import bundle, checkpoint
from mscompile.contracts import Array, HostInput
from mscompile.errors import MsCompileError
from mscompile.packaging.formats import package
from mscompile.runtime import generate, open_bundle

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cpp"
TOOLS = BUILD / "dependencies" / "bin"
PROMPT = "And it came to pass"
SANITIZERS = ("address", "thread")
STREAMS = 8
FUZZ_SECONDS = 10
LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"))
ENVIRONMENT = {
    **os.environ,
    "MSCOMPILE_ONNXRUNTIME": str(LIBRARY),
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",  # ONNX Runtime's own threads are not instrumented
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


# ---- Building and running ----------------------------------------------------------------------------------


def command(*words: object, stdin: str = "", **changes: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [str(word) for word in words], input=stdin.encode(), capture_output=True, timeout=900,
        env={**ENVIRONMENT, **changes},
    )  # fmt: skip


def output(*words: object, stdin: str = "") -> bytes:
    """What a program that has to succeed writes."""
    ended = command(*words, stdin=stdin)
    assert ended.returncode == 0, (ended.stdout + ended.stderr).decode(errors="replace")[-5000:]
    return ended.stdout


def sentence(ended: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The one sentence of a program that refused."""
    lines = ended.stderr.decode().splitlines()
    assert (ended.returncode, len(lines)) == (code, 1), ended.stderr.decode()[-5000:]
    return lines[0].removeprefix("error: ")


def configured(source: Path, build: Path, *options: object) -> Path:
    output("cmake", "-S", source, "-B", build, *options)
    output("cmake", "--build", build, "--parallel", "2")
    return build


@cache
def built(preset: str) -> Path:
    """The directory of a build that is up to date; skips where this machine cannot build."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    setup = subprocess.run(["cmake", "--preset", preset], cwd=ROOT / "cpp", capture_output=True, text=True)
    reason = " ".join(setup.stderr.split())
    if setup.returncode and ("not found" in reason or "not find" in reason):
        pytest.skip(f"run make cpp: {reason[:300]}")
    assert setup.returncode == 0, setup.stderr
    output("cmake", "--build", BUILD / preset, "--parallel", "2")
    return BUILD / preset


@pytest.fixture(scope="session", autouse=True)
def programs() -> Path:
    return built("release") / "tests"


# ---- The same logits ---------------------------------------------------------------------------------------


def line(verb: str, given: Array | Sequence[int] | None = None) -> str:
    """What tests/replay.cpp reads: rows of a reset, or the number of tokens a row and the tokens."""
    tokens = (given.shape[1], *given.ravel()) if isinstance(given, np.ndarray) else ()
    return " ".join(map(str, (verb, *(tokens or given or ()))))


def source_of(given: HostInput) -> Callable[[Array], Array]:
    """The stand-in of tests/replay.cpp for every host input."""
    places = np.arange(int(np.prod(given.shape))).reshape(given.shape)

    def source(chunks: Array) -> Array:
        sums = chunks.sum(axis=1).reshape(-1, *(1,) * len(given.shape))
        found: Array = (sums + places) % (given.below or 1)
        return found

    return source


def replayed(path: Path, batch: int, count: int) -> Replay:
    """Mixed chunks of `count` tokens and more, a few of them longer than a prefill call."""
    sources = {given.name: source_of(given) for given in open_bundle(path).spec.inputs}
    return mixed(path, batch, count, (*LENGTHS, 200), sources)


def largest_difference(replay: Replay, programs: Path) -> float:
    """Between the logits of the C++ session and the Python session."""
    script = "\n".join(line(verb, *given) for verb, *given in replay.script)
    came = output(programs / "replay", replay.opened.path, replay.batch, stdin=script)
    return replay.largest_difference(np.frombuffer(came, np.float32))


def test_logits_are_those_of_the_python_session(programs: Path, example: Path) -> None:
    replay = replayed(example, batch=3, count=2000)
    assert {"save", "restore"} < replay.verbs
    assert largest_difference(replay, programs) <= 1e-6


def test_the_bundles_own_graphs_give_the_same(programs: Path, example: Path, tmp_path: Path) -> None:
    """As on another processor, where the packed weights do not fit."""
    copy = shutil.copytree(example, tmp_path / "copy.msc")
    edit(copy, "engines/ort/engine.json", lambda facts: facts.update(packed_for="another machine"))
    assert largest_difference(replayed(copy, batch=2, count=300), programs) <= 1e-6


@pytest.mark.parametrize("family", ["retro", "hm-lstm", "compressive"])
def test_host_inputs_and_other_states(programs: Path, family: str, made_once: bundles.MadeOnce) -> None:
    name = next(iter(tiny.TINY[family]))

    def trained(path: Path) -> None:
        model = tiny.model(family, name, torch.float32, len(bundles.VOCAB))
        checkpoint.save(path, family, model, bundles.VOCAB)

    def exported(path: Path) -> None:
        from mscompile.pipeline import compile_checkpoint

        compile_checkpoint(made_once(f"cpp-{family}.pt", trained), ["ort"], path, bundles.options(validate=False))

    path = made_once(f"cpp-{family}.msc", exported)
    assert largest_difference(replayed(path, batch=3, count=100), programs) <= 1e-6


@pytest.mark.parametrize("preset", SANITIZERS)
def test_sanitizers_find_nothing(preset: str, example: Path) -> None:
    """Memory, leaks and undefined behaviour, or data races, over sessions in one thread and in several."""
    programs = built(preset) / "tests"
    output(programs / "unit")
    output(programs / "streams", example, STREAMS)
    assert largest_difference(replayed(example, batch=3, count=400), programs) <= 1e-6
    assert PROMPT in output(programs / "generate-c", example, PROMPT, 20).decode()


def test_units(programs: Path) -> None:
    output(programs / "unit")


# ---- The same text -----------------------------------------------------------------------------------------


def text_of(path: Path, count: int, temperature: float, seed: int | None) -> str:
    """What Python generates."""
    opened = open_bundle(path)
    ids = generate(opened.session("ort"), opened.tokenizer.encode(PROMPT), count, temperature, seed)
    return PROMPT + opened.tokenizer.decode(ids) + "\n"


@pytest.fixture(scope="session")
def consumer(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example program, built as a stranger does: against an installed library."""
    prefix, build = tmp_path_factory.mktemp("prefix"), tmp_path_factory.mktemp("consumer")
    output("cmake", "--install", programs.parent, "--prefix", prefix)
    configured(ROOT / "cpp" / "example", build, f"-DCMAKE_PREFIX_PATH={prefix};{BUILD / 'dependencies' / 'usr'}")
    return build / "generate"


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (0.8, 1), (1.3, 2**40)])
def test_an_installed_library_gives_the_same_text(consumer: Path, example: Path, temperature: float, seed: int) -> None:
    came = output(consumer, example, PROMPT, 200, temperature, seed).decode()
    assert came == text_of(example, 200, temperature, seed)


def test_c_gives_the_same_text(programs: Path, example: Path) -> None:
    assert output(programs / "generate-c", example, PROMPT, 100).decode() == text_of(example, 100, 0.0, None)
    ended = command(programs / "generate-c", example / "nowhere", PROMPT, 100)
    assert sentence(ended, 2) == f"{example / 'nowhere'} is not a bundle: no such directory"


@pytest.mark.parametrize("example", ["hourglass"], indirect=True)
def test_a_packaged_project_builds_and_gives_the_same_text(example: Path, tmp_path: Path) -> None:
    project = package(example, "cpp", tmp_path / "project")
    prefix = f"-DCMAKE_PREFIX_PATH={BUILD / 'dependencies' / 'usr'}"
    configured(project, project / "build", "-DCMAKE_BUILD_TYPE=Release", prefix)
    inside = project / f"{open_bundle(example).manifest.name}.msc"
    came = output(project / "build" / "generate", inside, PROMPT, 60, 0.8, 1).decode()
    assert came == text_of(example, 60, 0.8, 1)


def code_of(language: str) -> str:
    """The one example of docs/embedding.md in this language, as a whole program."""
    text = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    includes = [entry for entry in block.splitlines() if entry.startswith("#include")]
    body = [entry for entry in block.splitlines() if entry not in includes]
    return "\n".join(["#include <stdio.h>", *includes, "int main(void) {", *body, "return 0;", "}", ""])


@pytest.mark.parametrize("language", ["cpp", "c"])
def test_examples_of_the_documentation_run(programs: Path, language: str, compiled: Path, tmp_path: Path) -> None:
    library = programs.parent / "libmscompile.a"
    (source := tmp_path / f"example.{language}").write_text(code_of(language), encoding="utf-8")
    include = ROOT / "cpp" / "include"
    output("cc", "-c", source, "-o", tmp_path / "example.o", "-I", include, *["-std=c++17"] * (language == "cpp"))
    crypto = next((BUILD / "dependencies").glob("usr/lib/*/libcrypto.so"), "-lcrypto")
    output("c++", tmp_path / "example.o", library, crypto, "-ldl", "-o", tmp_path / "example")
    (tmp_path / "hourglass.msc").symlink_to(compiled)
    ended = subprocess.run([tmp_path / "example"], cwd=tmp_path, capture_output=True, env=ENVIRONMENT, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")


# ---- Bad input ---------------------------------------------------------------------------------------------


SAME_START = ("repeated key", "other engine")  # what follows is of the host: its parser, its engines


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bundles_are_refused_as_in_python(programs: Path, compiled: Path, damage: str, tmp_path: Path) -> None:
    path = shutil.copytree(compiled, tmp_path / "damaged.msc")
    DAMAGE[damage](path)
    ended = command(programs / "replay", path, 1)
    try:
        open_bundle(path).session("ort" if damage not in ("engine absent", "other engine") else None)
    except MsCompileError as error:
        wanted, code = str(error), error.exit_code
    else:
        assert (ended.returncode, damage) == (0, "engine.json not JSON")
        return
    came = sentence(ended, code)
    if damage == "other engine":
        assert came == "this build of mscompile has no engine 'trt-rtx'; it has ort"
    elif damage == "repeated key":
        assert "key 'schema' occurs twice in one object" in came
    else:
        assert came == wanted


REFUSED = {
    "an id too large": [[0, 10**9]],
    "a negative id": [[5, -3]],
    "beyond the context": None,
    "no tokens": [[]],
}


@pytest.mark.parametrize("name", REFUSED)
def test_steps_are_refused_as_in_python(programs: Path, example: Path, name: str) -> None:
    opened, given = open_bundle(example), REFUSED[name]
    session, limit = opened.session("ort"), opened.spec.max_context
    fed: list[str] = []
    if given is None:
        if limit is None:
            pytest.skip("this model has no limit")
        fill, given = np.zeros((1, limit), np.int64), [[0]]
        session.step(fill)
        fed = [line("step", fill)]
    tokens = np.array(given, np.int64)
    with pytest.raises(MsCompileError) as refused:
        session.step(tokens)
    script = "\n".join([*fed, line("refused", tokens), "position"])
    written = output(programs / "replay", example, 1, stdin=script)
    came = written[sum(len(entry.split()) - 2 for entry in fed) * opened.spec.vocab_size * 4 :].decode().splitlines()
    assert came == [str(refused.value), f"{session.position[0]} "]


@pytest.mark.parametrize("batch", [0, 9])
def test_a_batch_beyond_the_profile_is_refused_as_in_python(programs: Path, example: Path, batch: int) -> None:
    with pytest.raises(MsCompileError) as refused:
        open_bundle(example).session("ort", batch)
    assert sentence(command(programs / "replay", example, batch), 2) == str(refused.value)


def test_a_missing_or_wrong_library_is_named(programs: Path, compiled: Path, tmp_path: Path) -> None:
    def refused(library: Path | str, **changes: str) -> str:
        return sentence(command(programs / "replay", compiled, 1, MSCOMPILE_ONNXRUNTIME=str(library), **changes), 3)

    absent = tmp_path / "libonnxruntime.so"
    assert refused(absent).startswith(f"ONNX Runtime cannot be loaded from {absent}: ")
    assert refused("libm.so.6").startswith("libm.so.6 is not ONNX Runtime: it has no OrtGetApiBase; give the path")
    assert refused("", PATH="", VIRTUAL_ENV="").startswith("ONNX Runtime is not installed; ")

    source, old = tmp_path / "old.c", tmp_path / "old.so"
    source.write_text(
        "typedef struct { const void* (*api)(unsigned); const char* (*version)(void); } Base;\n"
        "static const void* api(unsigned version) { (void)version; return 0; }\n"
        'static const char* version(void) { return "1.16.3"; }\n'
        "const Base* OrtGetApiBase(void) { static const Base base = {api, version}; return &base; }\n"
    )
    output("cc", "-shared", "-fPIC", "-o", old, source)
    assert refused(old).startswith(f"{old} is ONNX Runtime 1.16.3, and 1.18 or newer is needed; ")


def test_the_library_of_the_python_package_is_found(programs: Path, compiled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "onnxruntime" / "capi"
    folder.mkdir(parents=True)
    (folder / LIBRARY.name).symlink_to(LIBRARY)
    ended = command(programs / "replay", compiled, 1, MSCOMPILE_ONNXRUNTIME="", PATH="", VIRTUAL_ENV=str(tmp_path))
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(("told", "writes"), [({}, False), ({"ORT_DISABLE_TELEMETRY": "0"}, True)])
def test_onnxruntime_reports_nothing_unless_told_to(
    programs: Path, compiled: Path, told: dict[str, str], writes: bool, tmp_path: Path
) -> None:
    """As in tests/test_runtime.py."""
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "MSCOMPILE_ONNXRUNTIME": str(LIBRARY), **told}
    subprocess.run([programs / "replay", compiled, "1"], env=environment, input=b"", check=True, timeout=120)
    assert bool(list(tmp_path.rglob("deviceid"))) == writes


@pytest.fixture(scope="session")
def fuzzer() -> Path:
    if not (TOOLS / "clang++").exists():
        pytest.skip("needs clang: bash cpp/dependencies.sh build/cpp/dependencies clang")
    return built("fuzz") / "fuzz" / "fuzz-manifest"


def test_fuzzing_the_manifest_reader_finds_nothing(fuzzer: Path, compiled: Path, tmp_path: Path) -> None:
    small = json.loads((compiled / "manifest.json").read_text(encoding="utf-8"))
    small.update(rules=[], passes=[], source={"sha256": ""}, versions={}, tolerances={}, parity=None, verified=False)
    small["files"] = {name: entry for name, entry in small["files"].items() if name.startswith("graphs/")}
    text = json.dumps(small)
    assert bundle._manifest_fault(bundle._parse(compiled, text.encode())) is None, "a refused seed is not walked"
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "small.json").write_text(text, encoding="utf-8")
    words = {*small, *small["spec"], *small["spec"]["schedule"], *small["spec"]["states"][0], "batch", "chunk", "/2"}
    (tmp_path / "words").write_text("".join(f'"\\"{word}\\""\n' for word in words), encoding="utf-8")
    output(
        fuzzer, tmp_path / "corpus", f"-dict={tmp_path / 'words'}", f"-max_total_time={FUZZ_SECONDS}",
        "-rss_limit_mb=2048", "-timeout=10", f"-artifact_prefix={tmp_path}/",
    )  # fmt: skip


# ---- TensorRT ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gpu_programs() -> Path:
    """A build with the TensorRT engines, for NVIDIA's headers where an environment variable names them."""
    headers, cuda = os.environ.get("MSCOMPILE_NVINFER_INCLUDE"), os.environ.get("MSCOMPILE_CUDA")
    if not headers or not cuda:
        pytest.skip(
            "set MSCOMPILE_NVINFER_INCLUDE to the folder of NvInferRuntime.h and MSCOMPILE_CUDA to that of the CUDA "
            "runtime's include and lib, as pip install nvidia-cuda-runtime nvidia-cuda-crt has them"
        )
    built("release")
    options = (
        f"-DNVINFER_INCLUDE_DIR={headers}",
        f"-DCUDA_INCLUDE_DIR={cuda}/include",
        f"-DCUDART_LIBRARY={cuda}/lib/libcudart_static.a",
        f"-DCMAKE_PREFIX_PATH={BUILD / 'dependencies' / 'usr'}",
        "-DMSCOMPILE_WERROR=ON",
    )
    return configured(ROOT / "cpp", BUILD / "tensorrt", *options) / "tests"


@pytest.fixture(scope="session")
def for_gpus(trained: Path, made_once: bundles.MadeOnce) -> Path:
    """A bundle with engines for RTX GPUs only."""
    from mscompile.pipeline import compile_checkpoint

    pytest.importorskip("tensorrt_rtx", reason="pip install 'mscompile[trt-rtx]'")
    if device_count():
        pytest.skip("this is about machines without a GPU")
    wanted = bundles.options(validate=False)
    return made_once("cpp-trt-rtx.msc", lambda path: compile_checkpoint(trained, ["trt-rtx"], path, wanted))


SIDECARS: dict[str, Callable[[Any], object]] = {
    "as it was built": lambda facts: facts.update({}),
    "newer schema": lambda facts: facts.update(schema=2),
    "other runtime": lambda facts: facts.update(runtime="tensorrt"),
    "other range": lambda facts: facts["ranges"].update(chunk=[1, 2, 3]),
    "other type": lambda facts: facts["graphs"]["decode"]["inputs"][0].update(dtype="int32"),
    "other profile": lambda facts: facts["graphs"]["decode"]["inputs"][0]["profile"].update(max=[9, 1]),
    "other size": lambda facts: facts["graphs"]["decode"].update(size_bytes=7),
}


@pytest.mark.parametrize("damage", SIDECARS)
def test_tensorrt_engines_are_refused_as_in_python(
    gpu_programs: Path, for_gpus: Path, damage: str, tmp_path: Path
) -> None:
    path = shutil.copytree(for_gpus, tmp_path / "gpu.msc")
    edit(path, "engines/trt-rtx/engine.json", SIDECARS[damage])
    with pytest.raises(MsCompileError) as refused:
        registry.find("trt-rtx").load(path / "graphs", path / "engines" / "trt-rtx", open_bundle(path).spec)
    wanted = str(refused.value)
    came = sentence(command(gpu_programs / "replay", path, 1), 3)
    if "damaged" in wanted:  # how values are shown is the host's
        came, wanted = came.split(": wanted")[0], wanted.split(": wanted")[0]
    assert came == wanted


# ---- Packages ----------------------------------------------------------------------------------------------


def test_package_says_what_it_cannot_do(compiled: Path, tmp_path: Path) -> None:
    with pytest.raises(MsCompileError, match=r"unknown format 'cp'; did you mean cpp\?"):
        package(compiled, "cp", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(MsCompileError, match=r"exists and has no CMakeLists\.txt"):
        package(compiled, "cpp", tmp_path / "out", force=True)


@pytest.mark.usefixtures("programs")
def test_the_benchmark_runs(compiled: Path, tmp_path: Path) -> None:
    script, result = ROOT / "benchmarks" / "cpp_overhead.py", tmp_path / "result.json"
    output(sys.executable, script, "--bundle", compiled, "--rounds", 2, "--samples", 4, "--out", result)
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["rounds"] == 2
    assert all(found["step_ms"][side] > 0 for side in ("bare", "cpp", "python"))
    assert all(found["added"][side]["ms"] > 0 for side in ("cpp", "python"))


def test_code_is_formatted() -> None:
    tool = TOOLS / "clang-format"
    if not tool.exists():
        pytest.skip("needs clang-format: bash cpp/dependencies.sh build/cpp/dependencies clang")
    files = [path for ending in ("c", "h", "cpp", "hpp") for path in (ROOT / "cpp").rglob(f"*.{ending}")]
    output(tool, "--dry-run", "--Werror", *files)
