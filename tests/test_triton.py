"""Model repositories for Triton: what Triton keeps itself, what the Python backend serves, and a real server of both.

A real server needs the environment that tests/triton_server.sh makes; `make triton` puts it in build/triton.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch

from mscompile import checkpoint
from mscompile.contracts import Array, StreamSpec
from mscompile.errors import InputError, UsageError
from mscompile.packaging import triton
from mscompile.packaging.formats import package
from mscompile.packaging.triton_streams import Streams
from mscompile.runtime import Bundle, generate, open_bundle

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "tests" / "triton_driver.py"
TOLERANCE = 1e-5
PROMPT = "And it came to pass"


@pytest.fixture(scope="session")
def replaced(made_once: bundles.MadeOnce, trained: Path) -> Path:
    """A tiny Transformer-XL without rings."""
    from mscompile.pipeline import compile_checkpoint

    wanted = bundles.options(memory="replace", validate=False)
    return made_once("transformer-xl-replace.msc", lambda path: compile_checkpoint(trained, ["ort"], path, wanted))


def tiny_bundle(family: str, folder: Path) -> Path:
    from mscompile.pipeline import compile_checkpoint

    source, bundle = folder / f"{family}.pt", folder / f"{family}.msc"
    model = tiny.model(family, next(iter(tiny.TINY[family])), torch.float32, len(bundles.VOCAB))
    checkpoint.save(source, family, model, bundles.VOCAB)
    compile_checkpoint(source, ["ort"], bundle, bundles.options(validate=False))
    return bundle


def packaged(bundle: Path, out: Path) -> Path:
    """The folder of the model in a new repository."""
    (model,) = (package(bundle, "triton", out) / triton.MODELS).iterdir()
    return model


# ---- Sequences, as tokens of requests ----------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """One stream: when it begins, and the tokens (1, T) of each of its requests."""

    name: int | str
    begins: int
    pieces: tuple[Array, ...]

    def piece(self, number: int) -> Array | None:
        """The tokens of round `number`."""
        place = number - self.begins
        return self.pieces[place] if 0 <= place < len(self.pieces) else None

    def starts(self, number: int) -> bool:
        return number == self.begins

    def ends(self, number: int) -> bool:
        return number == self.begins + len(self.pieces) - 1

    def expected(self, opened: Bundle) -> list[Array]:
        session = opened.session("ort")
        return [session.step(piece) for piece in self.pieces]


def sequences(spec: StreamSpec, names: Sequence[int | str], longest: int) -> list[Stream]:
    """Interleaved streams of different lengths, the last one with the id of the first, which has ended by then."""
    random = np.random.default_rng(0)

    def pieces(count: int) -> tuple[Array, ...]:
        lengths = random.choice([1, 1, 1, min(2, longest), longest], count)
        return tuple(random.integers(0, spec.vocab_size, (1, length)) for length in lengths)

    streams = [Stream(name, 2 * place, pieces(5 + 3 * place)) for place, name in enumerate(names)]
    return [*streams, Stream(names[0], 8, pieces(6))]


def rounds_of(streams: Sequence[Stream]) -> range:
    return range(max(stream.begins + len(stream.pieces) for stream in streams))


# ---- Streams -----------------------------------------------------------------------------------------------


def test_interleaved_streams_equal_sessions_of_their_own(bundle_of: Path) -> None:
    opened = open_bundle(bundle_of)
    streams, served = sequences(opened.spec, (7, "seven", 2**63 - 1), 5), Streams(opened, idle_s=60)
    answers: dict[int, list[Array]] = {id(stream): [] for stream in streams}
    for number in rounds_of(streams):
        for stream in streams:
            if (piece := stream.piece(number)) is not None:
                logits = served.step(stream.name, piece, stream.starts(number), stream.ends(number))
                answers[id(stream)].append(logits)
    assert len(served) == 0
    for stream in streams:
        for found, expected in zip(answers[id(stream)], stream.expected(opened), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_stream_has_to_be_begun(compiled: Path) -> None:
    served = Streams(open_bundle(compiled), idle_s=60)
    with pytest.raises(InputError, match="sequence 5 is not known here; begin it with the start flag"):
        served.step(5, [[1]])
    served.step(5, [[1]], start=True, end=True)
    with pytest.raises(InputError, match="sequence 5 is not known"):
        served.step(5, [[1]])


def test_a_refused_request_leaves_its_stream_as_it_was(compiled: Path) -> None:
    opened = open_bundle(compiled)
    served, session = Streams(opened, idle_s=60), opened.session()
    served.step("a", [[1, 2]], start=True)
    with pytest.raises(InputError, match="token id 99 is out of range"):
        served.step("a", [[3, 99]])
    session.step([[1, 2]])
    np.testing.assert_array_equal(served.step("a", [[3]]), session.step([[3]]))


def test_a_second_beginning_forgets_the_first(compiled: Path) -> None:
    opened = open_bundle(compiled)
    served = Streams(opened, idle_s=60)
    served.step(1, [[4, 5, 6]], start=True)
    np.testing.assert_array_equal(served.step(1, [[2]], start=True), opened.session().step([[2]]))
    assert len(served) == 1


def test_streams_that_nobody_asks_are_forgotten(compiled: Path) -> None:
    now = 0.0
    served = Streams(open_bundle(compiled), idle_s=10, clock=lambda: now)
    served.step("old", [[1]], start=True)
    now = 9.0
    served.step("kept", [[1]], start=True)
    now = 11.0
    served.step("new", [[1]], start=True)
    assert len(served) == 2
    served.step("kept", [[1]])
    with pytest.raises(InputError, match="sequence 'old' is not known"):
        served.step("old", [[1]])


# ---- Implicit states ---------------------------------------------------------------------------------------

STATE = re.compile(
    r'state \[ \{\s+input_name: "(?P<input>.+?)" output_name: "(?P<output>.+?)" data_type: TYPE_(?P<kind>\w+) '
    r'dims: \[ (?P<dims>.*?) \]\s+initial_state \{ .*?(?:zero_data: true|data_file: "(?P<file>.+?)") \}'
)
KINDS = {"FP32": "float32", "INT64": "int64", "BOOL": "bool"}


class ImplicitHost:
    """What Triton does with implicit states: a value for each sequence, initial at its start, stacked in a batch."""

    def __init__(self, model: Path) -> None:
        self.entries = [match.groupdict() for match in STATE.finditer((model / "config.pbtxt").read_text("utf-8"))]
        self.session = onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        self.initial = {entry["input"]: self._initial(model, entry) for entry in self.entries}
        self.states: dict[Any, dict[str, Array]] = {}

    @staticmethod
    def _initial(model: Path, entry: dict[str, str]) -> Array:
        shape = (1, *(int(dim) for dim in entry["dims"].split(", ")))
        if entry["file"] is None:
            return np.zeros(shape, KINDS[entry["kind"]])
        return np.fromfile(model / "initial_state" / entry["file"], KINDS[entry["kind"]]).reshape(shape)

    def batch(self, names: Sequence[Any], tokens: Array, starts: Sequence[bool]) -> Array:
        """One call on the sequences of `names`; tokens and logits have a row for each."""
        for name, start in zip(names, starts, strict=True):
            if start:
                self.states[name] = dict(self.initial)
        given = {key: np.concatenate([self.states[name][key] for name in names]) for key in self.initial}
        outputs = [output.name for output in self.session.get_outputs()]
        results = dict(zip(outputs, self.session.run(outputs, {"tokens": tokens, **given}), strict=True))
        for row, name in enumerate(names):
            self.states[name] = {e["input"]: results[e["output"]][row : row + 1] for e in self.entries}
        logits: Array = results["logits"]
        return logits


def check_implicit(bundle: Path, model: Path, longest: int) -> None:
    """Interleaved sequences on the written model, in batches where lengths agree, against sessions."""
    opened, host = open_bundle(bundle), ImplicitHost(model)
    streams = sequences(opened.spec, (7, "seven", 3), longest)
    expected = {id(stream): stream.expected(opened) for stream in streams}
    batches = 0
    for number in rounds_of(streams):
        asked = [(stream, piece) for stream in streams if (piece := stream.piece(number)) is not None]
        for length in {piece.shape[1] for _, piece in asked}:
            alike = [(stream, piece) for stream, piece in asked if piece.shape[1] == length]
            names = [stream.name for stream, _ in alike]
            tokens = np.concatenate([piece for _, piece in alike])
            found = host.batch(names, tokens, [stream.starts(number) for stream, _ in alike])
            batches += len(alike) > 1
            for row, (stream, _) in enumerate(alike):
                wanted = expected[id(stream)][number - stream.begins]
                np.testing.assert_allclose(found[row : row + 1], wanted, rtol=0, atol=TOLERANCE)
    assert batches > 3


def test_implicit_states_equal_sessions(replaced: Path, tmp_path: Path) -> None:
    model = packaged(replaced, tmp_path / "repository")
    config = (model / "config.pbtxt").read_text("utf-8")
    assert 'backend: "onnxruntime"' in config
    assert "control_input" not in config  # initial values are declared, so the graph needs no flags
    assert len(STATE.findall(config)) == len(open_bundle(replaced).spec.states) + 1
    check_implicit(replaced, model, longest=16)


def with_initial(bundle: Path, altered: Path) -> tuple[Path, Array]:
    """The bundle with an initial value for its first state, one (1, ...) row of it."""
    shutil.copytree(bundle, altered)
    manifest = json.loads((altered / "manifest.json").read_text("utf-8"))
    state = manifest["spec"]["states"][0]
    shared = (state["batch_axis"], state["time_axis"])
    row = int(np.prod([size for axis, size in enumerate(state["shape"]) if axis not in shared]))
    state["initial"] = np.linspace(-1, 2, row).tolist()
    (altered / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return altered, open_bundle(altered).spec.states[0].initial_value(1)


def test_initial_values_that_are_not_zero_come_from_files(replaced: Path, tmp_path: Path) -> None:
    altered, value = with_initial(replaced, tmp_path / "altered.msc")
    model = packaged(altered, tmp_path / "repository")
    (file,) = (model / "initial_state").iterdir()
    assert file.read_bytes() == value.tobytes()
    check_implicit(altered, model, longest=4)


@pytest.mark.slow
def test_a_model_without_prefill_takes_one_token_a_request(tmp_path: Path) -> None:
    bundle = tiny_bundle("hm-lstm", tmp_path)
    model = packaged(bundle, tmp_path / "repository")
    config = (model / "config.pbtxt").read_text("utf-8")
    assert 'backend: "onnxruntime"' in config
    assert "dims: [ 1 ]" in config.splitlines()[3]
    check_implicit(bundle, model, longest=1)


def test_the_rewritten_graph_is_a_sound_model(replaced: Path, tmp_path: Path) -> None:
    path = packaged(replaced, tmp_path / "repository") / "1" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path), load_external_data=False).graph
    kept = [value.name.removesuffix(".in") for value in graph.input if value.name.endswith(".in")]
    assert sorted(kept) == sorted(v.name.removesuffix(".out") for v in graph.output if v.name.endswith(".out"))


# ---- What is chosen, and what is refused -------------------------------------------------------------------


def reason(bundle: Path, out: Path) -> str:
    readme = (packaged(bundle, out).parents[1] / "README.md").read_text("utf-8")
    found = re.search(r"Python backend, because (.*)\.$", readme, re.MULTILINE)
    assert found is not None
    return found[1]


def test_a_bundle_with_rings_is_served_by_the_runtime_and_says_why(compiled: Path, tmp_path: Path) -> None:
    assert "--memory replace` makes no rings" in reason(compiled, tmp_path / "repository")


def test_a_bundle_with_a_schedule_is_served_by_the_runtime(bundle_of: Path, family: str, tmp_path: Path) -> None:
    if family == "hourglass":
        assert reason(bundle_of, tmp_path / "repository") == "different tokens run different graphs"


def test_without_onnx_it_says_what_to_install(replaced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"pip install 'mscompile\[export\]'"):
        package(replaced, "triton", tmp_path / "repository")


@pytest.mark.slow
def test_a_bundle_with_host_inputs_is_refused(tmp_path: Path) -> None:
    bundle = tiny_bundle("retro", tmp_path)
    with pytest.raises(UsageError, match=r"takes neighbours from its host, for which requests to Triton have no place"):
        package(bundle, "triton", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_an_existing_repository_is_replaced_only_if_asked(compiled: Path, tmp_path: Path) -> None:
    out = package(compiled, "triton", tmp_path / "repository")
    with pytest.raises(UsageError, match="exists"):
        package(compiled, "triton", out)
    assert package(compiled, "triton", out, force=True) == out


# ---- A real server -----------------------------------------------------------------------------------------


def environment() -> Path:
    """Where the server is; skips where it was not set up."""
    place = Path(os.environ.get("MSCOMPILE_TRITONSERVER", ROOT / "build" / "triton"))
    if not (place / ".ready").is_file():
        pytest.skip(f"no Triton server in {place}; run make triton, or set MSCOMPILE_TRITONSERVER to its environment")
    return place.resolve()


def driver(*arguments: object, stdin: str = "") -> Any:
    """What tests/triton_driver.py answers."""
    command = [str(environment() / "bin" / "python"), *(str(argument) for argument in (DRIVER, *arguments))]
    ended = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


@dataclass(frozen=True)
class Server:
    http: int
    grpc: int
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc}"

    def ask(self, rounds: Sequence[Sequence[dict[str, Any]]]) -> tuple[dict[str, Array], dict[str, str]]:
        """Logits and refusals by "<round>/<request>"."""
        out = self.log.with_suffix(".npz")
        refusals = driver("ask", self.address, out, stdin=json.dumps(rounds))
        with np.load(out) as logits:
            return dict(logits), refusals


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def serving(folder: Path, *repositories: Path) -> Iterator[Server]:
    """A server of these model repositories, once it is ready; it ends with the block."""
    place = environment()
    (site,) = place.glob("lib/python*/site-packages")
    http, grpc, metrics = free_ports(3)
    server = Server(http, grpc, folder / "server.log")
    tritonserver = site / "pytriton" / "tritonserver"
    command = [
        str(tritonserver / "bin" / "tritonserver"),
        *(f"--model-repository={repository}" for repository in repositories),
        f"--backend-directory={tritonserver / 'backends'}",
        "--exit-timeout-secs=1",  # sequences that were not ended are not waited for
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        *(f"--{name}-port={port}" for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics))),
    ]
    variables = {
        **os.environ,
        "LD_LIBRARY_PATH": str(site / "nvidia_pytriton.libs"),
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    with server.log.open("w") as log, subprocess.Popen(command, env=variables, stdout=log, stderr=log) as process:
        try:
            wait_until_ready(server, process)
            yield server
        finally:
            process.terminate()


def wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, server.log.read_text()[-5000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.http}/v2/health/ready", timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(server.log.read_text()[-5000:])


@pytest.fixture(scope="module")
def examples(made_once: bundles.MadeOnce) -> dict[str, Bundle]:
    environment()
    return {name: open_bundle(bundles.example_of(name, made_once)) for name in bundles.EXAMPLES}


@pytest.fixture(scope="module")
def served(examples: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """Both examples on one server, and the folder of their projects."""
    folder = tmp_path_factory.mktemp("triton")
    projects = [package(opened.path, "triton", folder / name) for name, opened in examples.items()]
    with serving(folder, *(project / triton.MODELS for project in projects)) as server:
        yield server, folder


def request(model: str, sequence: int | str, tokens: Any, **flags: bool) -> dict[str, Any]:
    return {"model": model, "sequence": sequence, "tokens": np.asarray(tokens).tolist(), **flags}


@pytest.mark.slow
def test_a_real_server_serves_both_examples_as_python_does(
    served: tuple[Server, Path], examples: dict[str, Bundle]
) -> None:
    """Interleaved, with start and end flags, several under way at a time; one id is a text, one is used twice."""
    server, _ = served
    streams = [
        (name, stream)
        for name, opened in examples.items()
        for stream in sequences(opened.spec, (7, "seven", 2**63 - 1, 8, 9), 40)
    ]
    rounds, asked = [], {}
    for number in rounds_of([stream for _, stream in streams]):
        requests = []
        for name, stream in streams:
            if (piece := stream.piece(number)) is not None:
                asked[f"{number}/{len(requests)}"] = (id(stream), number - stream.begins)
                flags = {"start": stream.starts(number), "end": stream.ends(number)}
                requests.append(request(name, stream.name, piece, **flags))
        rounds.append(requests)
    logits, refusals = server.ask(rounds)
    assert refusals == {}
    expected = {id(stream): stream.expected(examples[name]) for name, stream in streams}
    assert max(len(requests) for requests in rounds) > 8
    for key, (stream, place) in asked.items():
        np.testing.assert_allclose(logits[key], expected[stream][place], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_a_real_server_refuses_one_request_and_answers_the_others(
    served: tuple[Server, Path], examples: dict[str, Bundle]
) -> None:
    server, _ = served
    name, vocab_size = "hourglass", examples["hourglass"].spec.vocab_size
    logits, refusals = server.ask(
        [
            [request(name, 21, [[1, 2]], start=True), request(name, 22, [[3]], start=True)],
            [request(name, 21, [[4, vocab_size]]), request(name, 22, [[4]]), request(name, 23, [[5]])],
            [request(name, 21, [[5]], end=True), request(name, 22, [[5]], end=True)],
            [request(name, 21, [[6]])],
        ]
    )
    assert sorted(refusals) == ["1/0", "1/2", "3/0"]
    assert f"token id {vocab_size} is out of range: this model knows ids 0 to {vocab_size - 1}" in refusals["1/0"]
    assert "START" in refusals["1/2"]
    assert "START" in refusals["3/0"]
    session = examples[name].session()
    session.step([[1, 2]])
    np.testing.assert_allclose(logits["2/0"], session.step([[5]]), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", bundles.EXAMPLES)
def test_the_client_of_a_repository_writes_what_python_writes(
    served: tuple[Server, Path], examples: dict[str, Bundle], name: str
) -> None:
    server, folder = served
    client = [str(environment() / "bin" / "python"), str(folder / name / triton.CLIENT)]
    ended = subprocess.run(
        [*client, PROMPT, "--count", "40", "--url", server.address], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    opened = examples[name]
    ids = generate(opened.session(), opened.tokenizer.encode(PROMPT), 40)
    assert ended.stdout == PROMPT + opened.tokenizer.decode(ids) + "\n"


STAND_IN = """\
import numpy as np
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        self.names = {names!r}

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        sums = [np.from_dlpack(triton.get_input_tensor_by_name(request, name)).sum() for name in self.names]
        logits = np.array([[sums]], np.float32)
        return triton.InferenceResponse([triton.Tensor.from_dlpack("logits", logits)])
"""


@pytest.mark.slow
def test_a_real_server_takes_the_implicit_states_and_gives_their_initial_values(replaced: Path, tmp_path: Path) -> None:
    """The configuration as written, with a stand-in for the backend that is not in the test's server.

    The stand-in answers with the sums of the states that it was given at the start of a sequence.
    """
    environment()
    altered, value = with_initial(replaced, tmp_path / "altered.msc")
    model = packaged(altered, tmp_path / "repository")
    config = (model / "config.pbtxt").read_text("utf-8")
    names = [entry["input"] for entry in ImplicitHost(model).entries]
    config = re.sub(r"(output .*dims: \[) .*? \]", rf"\1 -1, {len(names)} ]", config)
    (model / "config.pbtxt").write_text(config.replace('"onnxruntime"', '"python"'), "utf-8")
    (model / "1" / "model.py").write_text(STAND_IN.format(names=names), "utf-8")
    with serving(tmp_path, model.parent) as server:
        logits, refusals = server.ask([[request(model.name, 1, [[1]], start=True)]])
    assert refusals == {}
    expected = dict.fromkeys(names, 0.0) | {names[1]: value.sum()}
    np.testing.assert_allclose(logits["0/0"][0, 0], list(expected.values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["implicit", "runtime"])
def test_configurations_are_of_the_schema(replaced: Path, compiled: Path, form: str, tmp_path: Path) -> None:
    model = packaged(replaced if form == "implicit" else compiled, tmp_path / "repository")
    config = driver("schema", model / "config.pbtxt")
    spec = open_bundle(compiled).spec
    assert (config["name"], config["max_batch_size"]) == (model.name, spec.max_batch)
    assert config["output"] == [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["-1", str(spec.vocab_size)]}]
    states = config["sequence_batching"].get("state", [])
    assert len(states) == (len(spec.states) + 1 if form == "implicit" else 0)
    assert all(state["initial_state"][0]["dims"] == state["dims"] for state in states)
