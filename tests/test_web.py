"""The JavaScript runtime and the page in web/: in Node and in Chromium they give what the Python session gives.

Needs Node 20 and what `make web` gets from npm; MSCOMPILE_NODE_MODULES may name another folder node_modules.
"""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import browser
import bundles
import numpy as np
import pytest
import tiny
import torch
from damage import DAMAGE, touched
from replays import Replay, mixed

from mscompile import checkpoint
from mscompile.contracts import Array
from mscompile.errors import MsCompileError, UsageError
from mscompile.packaging.formats import package
from mscompile.packaging.web import MODULES, PACKAGE
from mscompile.runtime import generate, open_bundle

ROOT = Path(__file__).parents[1]
WEB = ROOT / "web"
NODE, WASM = "onnxruntime-node", "onnxruntime-web"
PROMPT = "And it came to pass"
PATIENCE_MS = 60_000


@pytest.fixture(scope="session")
def modules() -> Path:
    """The folder node_modules, or the reason why there is none."""
    if shutil.which("node") is None:
        pytest.skip("needs Node 20 (on Debian: nodejs)")
    found = Path(os.environ.get(MODULES) or ROOT / "build" / "web" / "node_modules")
    if not (found / PACKAGE / "package.json").is_file():
        pytest.skip(f"{found} has no {PACKAGE}: run make web")
    return found


# ---- The same logits and texts in Node ---------------------------------------------------------------------


@dataclass
class Said:
    """What the driver in web/tests wrote: all logits, and the answers in their order."""

    logits: Array
    answers: list[Any]


def replay(path: Path, modules: Path, script: Sequence[Sequence[Any]], batch: int = 1, runtime: str = NODE) -> Said:
    wanted = {"bundle": str(path), "modules": str(modules), "runtime": runtime, "batch": batch, "script": script}
    ended = subprocess.run(
        ["node", WEB / "tests" / "replay.js"], input=json.dumps(wanted), capture_output=True, text=True, timeout=300
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr[-5000:]
    came = json.loads(ended.stdout)
    return Said(np.frombuffer(base64.b64decode(came["logits"]), np.float32), came["said"])


def largest_difference(done: Replay, modules: Path, runtime: str) -> float:
    """Between the logits of the JavaScript session and the Python session, which end at the same positions."""
    script = [[verb, *(np.asarray(each).tolist() for each in given)] for verb, *given in done.script]
    came = replay(done.opened.path, modules, [*script, ["position"]], done.batch, runtime)
    assert came.answers == [done.session.position.tolist()]
    return done.largest_difference(came.logits)


@pytest.mark.parametrize("runtime", [NODE, WASM])
def test_logits_of_small_models(bundle_of: Path, modules: Path, runtime: str) -> None:
    assert largest_difference(mixed(bundle_of, batch=3, count=120), modules, runtime) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [NODE, WASM])
def test_logits_are_those_of_the_python_session(modules: Path, example: Path, runtime: str) -> None:
    done = mixed(example, batch=3, count=600)
    assert {"save", "restore", "reset"} < done.verbs
    assert largest_difference(done, modules, runtime) <= 1e-4


def made(family: str, made_once: bundles.MadeOnce, **changes: object) -> Path:
    """The bundle of the first tiny model of a family."""
    from mscompile.pipeline import compile_checkpoint

    def trained(path: Path) -> None:
        model = tiny.model(family, next(iter(tiny.TINY[family])), torch.float32, len(bundles.VOCAB))
        checkpoint.save(path, family, model, bundles.VOCAB)

    source = made_once(f"web-{family}.pt", trained)
    wanted = bundles.options(validate=False, **changes)
    name = "-".join(["web", family, *map(str, changes.values())])
    return made_once(f"{name}.msc", lambda out: compile_checkpoint(source, ["ort"], out, wanted))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["compressive", "hm-lstm", "multiscale-top-down"])
def test_logits_with_closing_graphs_and_replaced_states(
    family: str, made_once: bundles.MadeOnce, modules: Path
) -> None:
    path = made(family, made_once)
    assert largest_difference(mixed(path, batch=3, count=100), modules, NODE) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4", "int8-dynamic"])
def test_every_precision_runs_in_wasm(precision: str, made_once: bundles.MadeOnce, modules: Path) -> None:
    from mscompile.pipeline import Options, compile_checkpoint

    source = ROOT / "examples" / "transformer-xl.pt"
    wanted = Options(validate=False, precision=precision)
    path = made_once(f"web-{precision}.msc", lambda out: compile_checkpoint(source, ["ort"], out, wanted))
    done = mixed(path, batch=1, count=50)
    assert largest_difference(done, modules, WASM) <= 0.5  # rounded to few bits, by kernels of its own
    came = replay(path, modules, [["generate", PROMPT, 30, 0, None]], runtime=WASM)
    assert came.answers == [text_of(path, PROMPT, 30, 0.0, None)]


def text_of(path: Path, prompt: str, count: int, temperature: float, seed: int | None) -> str:
    """How Python continues the prompt."""
    opened = open_bundle(path)
    ids = generate(opened.session("ort"), opened.tokenizer.encode(prompt), count, temperature, seed)
    return opened.tokenizer.decode(ids)


def test_texts_are_those_of_python(bundle_of: Path, modules: Path) -> None:
    seeds = [0, 1, 7, 2**32 - 1, 2**40 + 3, 2**64 - 1]
    cases = [(0.0, None), *((1.0, seed) for seed in seeds), (2.5, 5)]
    generated = [["generate", "abc", 40, heat, None if seed is None else str(seed)] for heat, seed in cases]
    script = [line for entry in generated for line in (entry, ["reset", None])]
    assert replay(bundle_of, modules, script).answers == [text_of(bundle_of, "abc", 40, *case) for case in cases]


def test_a_session_says_what_it_holds(bundle_of: Path, modules: Path) -> None:
    spec = open_bundle(bundle_of).spec
    script = [["step", [[1] * 5]], ["step", [[2]]], ["calls"], ["bytes"], ["position"]]
    calls, size, position = replay(bundle_of, modules, script).answers
    assert sum(calls.values()) >= 2
    assert set(calls) == {graph.name for graph in spec.graphs}
    assert (size, position) == (spec.bytes_per_stream(), [6])


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(compiled: Path, modules: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```js\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "example.mjs").write_text(block, encoding="utf-8")
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "hourglass-web").symlink_to(WEB)
    (tmp_path / "hourglass.msc").symlink_to(compiled)
    ended = subprocess.run(["node", "example.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == text_of(compiled, "and", 20, 0.8, 1)


# ---- Bad input ---------------------------------------------------------------------------------------------


NOT_SEEN = (
    *("repeated key", "a number too large", "integer initial"),  # JSON.parse does not tell
    *("engine absent", "other engine", "engine.json not JSON"),  # a page runs the graphs themselves
)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in NOT_SEEN])
def test_damaged_bundles_are_refused_as_in_python(damage: str, compiled: Path, modules: Path, tmp_path: Path) -> None:
    path = shutil.copytree(compiled, tmp_path / "damaged.msc")
    DAMAGE[damage](path)
    with pytest.raises(MsCompileError) as refused:
        open_bundle(path).session("ort")
    assert replay(path, modules, []).answers == [{"fault": "bundle", "message": str(refused.value)}]


def test_a_changed_file_is_named(compiled: Path, modules: Path, tmp_path: Path) -> None:
    path = shutil.copytree(compiled, tmp_path / "damaged.msc")
    touched(path / "graphs" / "decode.onnx")
    (answer,) = replay(path, modules, []).answers
    assert answer["message"].startswith(f"{path}: file 'graphs/decode.onnx' does not have the sha256")


def test_steps_are_refused_as_in_python(compiled: Path, modules: Path) -> None:
    session = open_bundle(compiled).session("ort")
    wrong = [[[0, 10**9]], [[5, -3]], [[]], [[1], [2]]]
    answers = replay(compiled, modules, [*(["refused", tokens] for tokens in wrong), ["position"]]).answers
    for tokens, answer in zip(wrong, answers, strict=False):
        with pytest.raises(MsCompileError) as refused:
            session.step(np.array(tokens, np.int64))
        assert answer == {"fault": "input", "message": str(refused.value)}
    assert answers[-1] == [0]


def test_rows_snapshots_texts_and_sampling_are_refused_as_in_python(compiled: Path, modules: Path) -> None:
    opened = open_bundle(compiled)
    session = opened.session("ort")
    script = [["wrong reset", [0, 3]], ["encode", "abC"], ["wrong snapshot"], ["generate", "a", 1, -1, None]]
    rows, *answers = [answer["message"] for answer in replay(compiled, modules, script).answers]
    assert rows == "rows [0, 3] are outside this session's batch of 1"
    refusals: list[Callable[[], object]] = [
        lambda: opened.tokenizer.encode("abC"),
        lambda: session.restore(opened.session("ort", 2).state()),
        lambda: list(generate(session, [0], 1, -1)),
    ]
    for refusal, answer in zip(refusals, answers, strict=True):
        with pytest.raises(MsCompileError) as refused:
            refusal()
        assert answer == str(refused.value)


@pytest.mark.parametrize("batch", [0, 9])
def test_a_batch_beyond_the_profile_is_refused_as_in_python(batch: int, compiled: Path, modules: Path) -> None:
    with pytest.raises(MsCompileError) as refused:
        open_bundle(compiled).session("ort", batch)
    assert replay(compiled, modules, [], batch).answers == [{"fault": "input", "message": str(refused.value)}]


def test_the_context_is_a_limit_as_in_python(made_once: bundles.MadeOnce, modules: Path) -> None:
    source = made_once("hourglass.pt", lambda path: bundles.save("hourglass", path))
    path = made_once("hourglass.msc", lambda out: bundles.compile_to(out, source))
    session, limit = open_bundle(path).session("ort"), open_bundle(path).spec.max_context
    assert limit is not None
    session.step([[0] * limit])
    with pytest.raises(MsCompileError) as refused:
        session.step([[0]])
    came = replay(path, modules, [["step", [[0] * limit]], ["refused", [[0]]]])
    assert came.answers == [{"fault": "input", "message": str(refused.value)}]


def test_two_steps_at_once_and_steps_after_a_failure(compiled: Path, modules: Path) -> None:
    tokens = [[1, 2, 3]]
    came = replay(compiled, modules, [["together", tokens], ["release"], ["refused", tokens], ["refused", tokens]])
    together, failed, after = came.answers
    assert together["message"].startswith("this session is in use by another step; ")
    assert came.logits.shape == (3 * open_bundle(compiled).spec.vocab_size,)
    assert failed["fault"] == "engine"
    assert failed["message"].startswith("ONNX Runtime failed in graph prefill: ")
    assert after["message"] == "an earlier step failed, so the state is unknown: reset() or restore() first"


@pytest.mark.slow
def test_host_inputs_are_refused(made_once: bundles.MadeOnce, modules: Path, tmp_path: Path) -> None:
    path = made("retro", made_once)
    (answer,) = replay(path, modules, []).answers
    assert answer["fault"] == "unavailable"
    assert answer["message"].startswith("this model needs neighbours from its host every ")
    with pytest.raises(UsageError, match="takes neighbours from its host, which a page does not have"):
        package(path, "web", tmp_path / "page")


# ---- The page ----------------------------------------------------------------------------------------------


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """A plain web server on localhost; the address of `directory`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *values: object) -> None:  # noqa: A002 (its name there)
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=directory))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(page: Any, **values: object) -> None:
    """Fill in the form and send it."""
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#generate:enabled").click(timeout=PATIENCE_MS)


def status(page: Any, words: str) -> str:
    """The status, once it has these words."""
    page.locator("#status", has_text=words).wait_for(timeout=PATIENCE_MS)
    return str(page.locator("#status").text_content())


@pytest.fixture(scope="module")
def packaged(example: Path, modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of each example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MODULES, str(modules))
        return package(example, "web", tmp_path_factory.mktemp("page") / "page")


@pytest.mark.slow
def test_the_page_gives_the_same_texts(example: Path, packaged: Path) -> None:
    with served(packaged) as address, browser.page() as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/?prompt={PROMPT}&count=150&temperature=0&seed=")
        ask(page)
        assert status(page, "Done") == "Done, 150 tokens"
        assert page.locator("#made").text_content() == text_of(example, PROMPT, 150, 0.0, None)
        assert page.locator("#given").text_content() == PROMPT
        ask(page, temperature=0.8, seed=1, count=60)
        status(page, "Done, 60 tokens")
        assert page.locator("#made").text_content() == text_of(example, PROMPT, 60, 0.8, 1)
        figures = page.locator("#figures").inner_text()
        assert "tokens/s" in figures
        assert "\N{EN DASH}" not in figures  # which stands for a figure that is not there
        assert all(url.startswith((address, "data:")) for url in asked)


@pytest.mark.slow
def test_the_page_stops_and_says_what_is_wrong(packaged: Path) -> None:
    with served(packaged) as address, browser.page(browser.PHONE, dark=True) as page:
        page.goto(f"{address}/index.html?prompt={PROMPT}&count=1900&temperature=1")
        ask(page)
        page.locator("#made", has_text="e").wait_for(timeout=PATIENCE_MS)
        page.locator("#stop").click()
        assert 0 < int(status(page, "Stopped").split()[1]) < 1900
        assert page.locator("#stop").is_disabled()
        ask(page, prompt="été", count=5)
        assert status(page, "vocabulary").startswith("the vocabulary has no 'é' (position 0 of the text)")
        ask(page, prompt=PROMPT)
        status(page, "Done, 5 tokens")
        page.locator("summary").click()
        assert page.locator("body").evaluate("body => body.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_the_page_refuses_a_damaged_bundle(packaged: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packaged, tmp_path / "page")
    touched(copy / "model.msc" / "graphs" / "weights.bin")
    with served(copy) as address, browser.page() as page:
        page.goto(address)
        assert "file 'graphs/weights.bin' does not have the sha256" in status(page, "sha256")
        assert page.locator("#generate").is_disabled()


@pytest.mark.slow
def test_every_field_has_a_label(packaged: Path) -> None:
    with served(packaged) as address, browser.page() as page:
        page.goto(address)
        for name in ("Prompt", "Tokens", "Temperature", "Seed"):
            assert page.get_by_label(name, exact=True).count() == 1
        status(page, "Ready")


def test_where_the_runtime_comes_from(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: Path
) -> None:
    monkeypatch.setenv(MODULES, str(tmp_path))
    with pytest.raises(UsageError, match=r"run npm install --ignore-scripts onnxruntime-web@\d+\.\d+\.\d+ in this"):
        package(compiled, "web", tmp_path / "page")
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "package.json").write_text("{}")
    with pytest.raises(UsageError, match=r"has no dist/ort\.wasm\.bundle\.min\.mjs"):
        package(compiled, "web", tmp_path / "page")
    monkeypatch.delenv(MODULES)
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    made = package(compiled, "web", tmp_path / "page")
    assert open_bundle(made / "model.msc").manifest == open_bundle(compiled).manifest


@pytest.mark.slow
def test_types_are_right(modules: Path) -> None:
    compiler = modules / ".bin" / "tsc"
    if not compiler.exists():
        pytest.skip(f"{modules} has no typescript: run make web")
    words = [compiler, "--project", WEB, "--typeRoots", modules / "@types"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
