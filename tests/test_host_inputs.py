"""What the host supplies: asking sources, refusing wrong answers, specs, stand-ins and records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

from engines.session import StreamSession
from engines.torch_eager import TorchSession
from mscompile import bench, checkpoint, codec
from mscompile.cli import app
from mscompile.contracts import (
    Array,
    GraphSpec,
    HostInput,
    Schedule,
    Sources,
    StateSpec,
    StreamSpec,
    TensorSpec,
    Tick,
)
from mscompile.errors import BundleError, EngineError, InputError
from mscompile.golden import Golden, Rollout
from mscompile.runtime import Bundle, open_bundle
from mscompile.speccheck import spec_fault
from validation import sources

VOCAB, EVERY = 9, 4
NOTE = HostInput("note", "int64", (2,), EVERY, below=50)
LAST = StateSpec("last", "int64", ("batch", 2))

# A model that answers with the note of the chunk that ended last, the token at hand included.


def graph(name: str, tokens: int | str, takes: bool) -> GraphSpec:
    inputs = [TensorSpec("tokens", "int64", ("batch", tokens)), TensorSpec("position", "int64", ("batch",))]
    inputs += [NOTE.as_input(tokens)] if takes else []
    reads = ("last",) if name != "decode_4" else ()
    writes = ("last", "note.recent") if takes else ("note.recent",)
    outputs = [TensorSpec("logits", "float32", ("batch", tokens, VOCAB))]
    outputs += [LAST.as_output()] if takes else []
    return GraphSpec(
        name, (*inputs, *(LAST.as_input() for _ in reads)), (*outputs, NOTE.recent.as_output(tokens)),
        reads, writes, tokens,
    )  # fmt: skip


SPEC = StreamSpec(
    (LAST, NOTE.recent),
    (graph("decode_1", 1, False), graph("decode_4", 1, True), graph("prefill", "chunk", True)),
    Schedule((Tick(("decode_1",), repeat=3), Tick(("decode_4",))), "prefill", EVERY, 8),
    VOCAB, 3, None, (NOTE,),
)  # fmt: skip


def notes(chunks: Array) -> Array:
    """What depends on every token of a chunk and on their order, 0 to 49."""
    return np.stack([chunks @ [1, 2, 3, 5] % 50, chunks @ [7, 1, 4, 2] % 50], axis=1)


class Noting:
    """The executor: logits begin with the note, the token and the position."""

    def bind(self, name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        def run() -> None:
            tokens, given = inputs["tokens"], inputs.get("note")
            before = inputs["last.in"] if "last.in" in inputs else np.zeros((len(tokens), 2), np.int64)
            logits = outputs["logits"]
            logits[...] = 0
            for t in range(tokens.shape[1]):
                ended = 0 if given is None else (t + 1) // EVERY if name == "prefill" else 1
                logits[:, t, :2] = before if ended == 0 else given[:, ended - 1]
                logits[:, t, 2] = tokens[:, t]
                logits[:, t, 3] = inputs["position"] + t
            outputs["note.recent.out"][...] = tokens
            if "last.out" in outputs:
                assert given is not None
                outputs["last.out"][...] = given[:, -1]

        return run


def expected(tokens: Array) -> Array:
    """The logits (T, VOCAB) of one whole stream (T,)."""
    logits = np.zeros((len(tokens), VOCAB), np.float32)
    for t, token in enumerate(tokens):
        ended = (t + 1) // EVERY * EVERY
        if ended:
            logits[t, :2] = notes(tokens[None, ended - EVERY : ended])[0]
        logits[t, 2:4] = token, t
    return logits


def session(batch: int = 1, source: Callable[[Array], Array] = notes, spec: StreamSpec = SPEC) -> StreamSession:
    return StreamSession(spec, Noting(), batch, {"note": source})


def ids(batch: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


# ---- Asking ------------------------------------------------------------------------------------------------


_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 13)),
        st.tuples(st.just("reset"), st.sets(st.integers(0, 2), min_size=1).map(sorted)),
        st.tuples(st.sampled_from(("save", "back")), st.none()),
    ),
    max_size=8,
)


@drawn(actions=_ACTIONS, batch=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_row_gets_what_its_own_chunks_ask_for(actions: list[tuple[str, Any]], batch: int, seed: int) -> None:
    """Any chunking, with resets that put rows out of phase, and with snapshots in the middle of a chunk."""
    running, random = session(batch), np.random.default_rng(seed)
    rows = [np.zeros(0, np.int64)] * batch
    saved = running.state(), rows
    for name, argument in actions:
        if name == "step":
            new = random.integers(0, VOCAB, (batch, argument))
            rows = [np.concatenate([row, tokens]) for row, tokens in zip(rows, new, strict=True)]
            for row, logits in zip(rows, running.step(new), strict=True):
                np.testing.assert_array_equal(logits, expected(row)[-argument:])
        elif name == "reset":
            chosen = [row for row in argument if row < batch]
            running.reset(chosen)
            rows = [np.zeros(0, np.int64) if place in chosen else row for place, row in enumerate(rows)]
        elif name == "save":
            saved = running.state(), rows
        else:
            running.restore(saved[0])
            rows = saved[1]


class Listening:
    """A source that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Array] = []

    def __call__(self, chunks: Array) -> Array:
        self.asked.append(chunks.copy())
        return notes(chunks)


def test_a_source_is_asked_once_a_step_for_the_chunks_that_the_step_completes() -> None:
    source = Listening()
    running, tokens = session(2, source), ids(2, 14)
    running.step(tokens[:, :3])
    assert source.asked == []
    running.step(tokens[:, 3:4])
    running.step(tokens[:, 4:13])
    running.step(tokens[:, 13:])
    first, second = source.asked
    assert first.dtype == np.int64
    np.testing.assert_array_equal(first, tokens[:, :4])
    np.testing.assert_array_equal(second, tokens[:, 4:12].reshape(4, 4))  # two chunks of each row


def test_rows_out_of_phase_are_asked_for_when_each_is_due() -> None:
    source = Listening()
    running, tokens = session(2, source), ids(2, 8)
    running.step(tokens[:, :2])
    running.reset([1])
    running.step(tokens[:, 2:5])
    running.step(tokens[:, 5:6])
    np.testing.assert_array_equal(source.asked[0], tokens[:1, :4])
    np.testing.assert_array_equal(source.asked[1], tokens[1:, 2:6])
    assert len(source.asked) == 2


def test_a_source_that_fails_leaves_the_session_as_it_was() -> None:
    class Unreachable(Exception):
        pass

    def failing(chunks: Array) -> Array:
        if not reachable:
            raise Unreachable
        return notes(chunks)

    reachable, tokens = False, ids(2, 10)
    running = session(2, failing)
    running.step(tokens[:, :3])
    with pytest.raises(Unreachable):
        running.step(tokens[:, 3:])
    assert running.position.tolist() == [3, 3]
    reachable = True
    np.testing.assert_array_equal(running.step(tokens[:, 3:])[1], expected(tokens[1])[3:])


def test_an_engine_that_fails_is_still_told_apart() -> None:
    class Broken(Noting):
        def bind(self, name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
            def run() -> None:
                raise EngineError("out of memory")

            return run

    running = StreamSession(SPEC, Broken(), 1, {"note": notes})
    with pytest.raises(EngineError, match="out of memory"):
        running.step(ids(1, 4))
    with pytest.raises(EngineError, match="an earlier step failed"):
        running.step(ids(1, 4))


# ---- Wrong sources -----------------------------------------------------------------------------------------

FUNCTION = "a function from int64 tokens (N, 4) to int64 (N, 2) of 0 to 49"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, f"this model needs sources={{'note': f}} from its host, f {FUNCTION}"),
        ({}, f"this model needs sources={{'note': f}} from its host, f {FUNCTION}"),
        ({"note": notes, "nut": notes}, "this model takes no nut from its host; it takes note"),
    ],
)
def test_sources_are_held_against_the_spec_before_the_first_token(given: Sources | None, message: str) -> None:
    with pytest.raises(InputError) as raised:
        StreamSession(SPEC, Noting(), 1, given)
    assert str(raised.value) == message


def test_a_model_without_inputs_takes_no_sources() -> None:
    model = tiny.model("transformer-xl", "rolling")
    from cases import build

    with pytest.raises(InputError, match="this model takes no note from its host; it takes nothing"):
        StreamSession(build(model).spec, Noting(), 1, {"note": notes})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: np.zeros((n, 3), np.int64), f"returned int64 (1, 3) for N = 1; it must be {FUNCTION}"),
        (lambda n: np.zeros((n + 1, 2), np.int64), f"returned int64 (2, 2) for N = 1; it must be {FUNCTION}"),
        (lambda n: np.zeros((n, 2)), f"returned float64 (1, 2) for N = 1; it must be {FUNCTION}"),
        (lambda n: np.full((n, 2), 50), f"returned 50; it must be {FUNCTION}"),
        (lambda n: np.full((n, 2), -1), f"returned -1; it must be {FUNCTION}"),
    ],
)
def test_wrong_answers_are_refused_with_nothing_consumed(answer: Callable[[int], Array], message: str) -> None:
    running = session(1, lambda chunks: answer(len(chunks)))
    running.step(ids(1, 3))
    with pytest.raises(InputError) as raised:
        running.step(ids(1, 2))
    assert str(raised.value) == f"the source of note {message}"
    assert running.position.tolist() == [3]
    running.reset()
    running.step(ids(1, 3))


def test_other_integers_and_lists_are_taken_as_they_mean() -> None:
    tokens = ids(1, 8)
    for source in (lambda chunks: notes(chunks).astype(np.uint8), lambda chunks: notes(chunks).tolist()):
        np.testing.assert_array_equal(session(1, source).step(tokens)[0], expected(tokens[0]))


def test_floats_are_finite_and_of_any_width() -> None:
    vector = HostInput("vector", "float32", (3,), 2)
    chunks = np.zeros((5, 2), np.int64)
    assert vector.ask({"vector": lambda asked: np.ones((len(asked), 3))}, chunks).dtype == np.float32
    with pytest.raises(InputError, match="the source of vector returned a number that is not finite"):
        vector.ask({"vector": lambda asked: np.full((len(asked), 3), np.nan)}, chunks)
    with pytest.raises(InputError, match=r"f a function from int64 tokens \(N, 2\) to float32 \(N, 3\)$"):
        vector.ask({}, chunks)


# ---- The spec ----------------------------------------------------------------------------------------------


def test_the_input_of_a_graph_has_one_entry_a_chunk() -> None:
    assert NOTE.as_input(1).shape == ("batch", 1, 2)
    assert NOTE.as_input("chunk").shape == ("batch", "chunk/4", 2)
    assert replace(NOTE, every=1).as_input("chunk").shape == ("batch", "chunk", 2)


def test_a_spec_goes_to_json_and_back_and_older_ones_have_no_inputs() -> None:
    data = json.loads(json.dumps(codec.encode(SPEC)))
    assert codec.decode(StreamSpec, data) == SPEC
    del data["inputs"]
    assert codec.decode(StreamSpec, data) == replace(SPEC, inputs=())


def without(graphs: tuple[GraphSpec, ...], name: str, **changes: Any) -> tuple[GraphSpec, ...]:
    return tuple(replace(each, **changes) if each.name == name else each for each in graphs)


FAULTS: dict[str, tuple[StreamSpec, str]] = {
    "twice": (replace(SPEC, inputs=(NOTE, NOTE)), "two host inputs are named 'note'"),
    "no size": (
        replace(SPEC, inputs=(replace(NOTE, shape=(0,)),)),
        "host input 'note' is (0,) every 4 tokens, which must all be at least 1",
    ),
    "no bound": (
        replace(SPEC, inputs=(replace(NOTE, below=None),)),
        "host input 'note' is int64 below None: whole numbers need a bound, others have none",
    ),
    "no ring": (
        replace(SPEC, states=(LAST, replace(NOTE.recent, shape=("batch", 5)))),
        "host input 'note' has no state 'note.recent', int64 (batch, 4), to be asked for with",
    ),
    "ring not written": (
        replace(SPEC, graphs=without(SPEC.graphs, "decode_1", writes=())),
        "graph 'decode_1' does not write state 'note.recent'",
    ),
    "of another shape": (
        replace(SPEC, inputs=(replace(NOTE, shape=(3,)),)),
        "graph 'decode_4' takes host input 'note' as int64 ('batch', 1, 2)",
    ),
    "before its time": (
        replace(SPEC, schedule=Schedule((Tick(("decode_4",)), Tick(("decode_1",), repeat=3)), "prefill", EVERY, 8)),
        "host input 'note' is taken at phase 0, where no 4 tokens are complete",
    ),
    "out of step": (
        replace(SPEC, schedule=Schedule((Tick(("decode_1",), repeat=5), Tick(("decode_4",))), "prefill", EVERY, 8)),
        "host input 'note' comes every 4 tokens, which must divide the period and chunk_multiple",
    ),
    "prefill out of step": (
        replace(SPEC, schedule=replace(SPEC.schedule, chunk_multiple=2)),
        "host input 'note' comes every 4 tokens, which must divide the period and chunk_multiple",
    ),
}


def test_a_spec_that_can_be_followed_has_no_fault() -> None:
    assert spec_fault(SPEC) is None


@pytest.mark.parametrize("name", FAULTS)
def test_a_spec_that_no_host_can_follow_is_refused(name: str) -> None:
    spec, fault = FAULTS[name]
    assert spec_fault(spec) == fault


# ---- Stand-ins ---------------------------------------------------------------------------------------------


def mixed(word: int) -> int:
    """SplitMix64, in Python's own integers."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_stand_ins_are_the_hashes_they_say() -> None:
    chunks = np.arange(8).reshape(2, 4)
    hashes = [0, 0]
    for row, chunk in enumerate(chunks.tolist()):
        for token in chunk:
            hashes[row] = mixed(hashes[row] + token + 1)
    wanted = [[mixed(hashed + n * 0x9E3779B97F4A7C15) % 50 for n in range(2)] for hashed in hashes]
    assert sources.pseudo([NOTE])["note"](chunks).tolist() == wanted


def test_stand_ins_depend_on_every_token_and_their_order_and_the_seed() -> None:
    wide = replace(NOTE, shape=(3, 5), below=1000)
    base = np.array([[1, 2, 3, 4]])
    others = [[[0, 2, 3, 4]], [[1, 2, 3, 5]], [[1, 2, 0, 4]], [[2, 1, 3, 4]]]
    source = sources.pseudo([wide])["note"]
    assert all((source(np.array(other)) != source(base)).mean() > 0.9 for other in others)
    assert (sources.pseudo([wide], seed=1)["note"](base) != source(base)).mean() > 0.9
    np.testing.assert_array_equal(source(np.concatenate([base, base]))[1], source(base)[0])


def test_stand_ins_fill_their_range() -> None:
    chunks = np.random.default_rng(0).integers(0, 30, (2000, 4))
    whole = sources.pseudo([replace(NOTE, below=7)])["note"](chunks)
    assert np.bincount(whole.ravel(), minlength=7).min() > 0.9 * whole.size / 7
    vector = HostInput("vector", "float32", (4,), 4)
    floats = sources.pseudo([vector])["vector"](chunks)
    assert floats.dtype == np.float32
    assert (floats >= -1).all()
    assert (floats < 1).all()
    assert abs(floats.mean()) < 0.03
    assert abs(floats.std() - 3**-0.5) < 0.02


# ---- Records -----------------------------------------------------------------------------------------------


def record(**changes: Any) -> Rollout:
    tokens = ids(2, 9)
    logits = np.stack([expected(row) for row in tokens])
    entries = notes(tokens[:, :8].reshape(4, 4)).reshape(2, 2, 2)
    usual = {"tokens": tokens, "chunks": np.array([5, 4]), "logits": logits, "states": {}, "inputs": {"note": entries}}
    return Rollout("golden", **{**usual, **changes})


def test_records_answer_a_replay(tmp_path: Path) -> None:
    Golden((record(),)).save(tmp_path / "golden.npz")
    golden = Golden.load(tmp_path / "golden.npz")
    (rollout,) = golden.rollouts
    replayed = StreamSession(SPEC, Noting(), 2, golden.sources(SPEC.inputs))
    found = np.concatenate([replayed.step(part) for part in np.split(rollout.tokens, [5], axis=1)], axis=1)
    np.testing.assert_array_equal(found, rollout.logits)


@pytest.mark.parametrize(
    ("inputs", "got"),
    [({}, "nothing"), ({"note": np.zeros((2, 1, 2), np.int64)}, "int64 (2, 1, 2)")],
)
def test_records_without_what_a_replay_needs_are_refused(inputs: dict[str, Array], got: str) -> None:
    with pytest.raises(BundleError) as raised:
        Golden((record(inputs=inputs),)).sources([NOTE])
    assert str(raised.value) == f"golden rollout 'golden': wanted int64 (2, 2, 2) of note, got {got}"


# ---- A bundle ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def retro_bundle(made_once: bundles.MadeOnce) -> Path:
    def trained(path: Path) -> None:
        model = tiny.model("retro", "first-layer", torch.float32, len(bundles.VOCAB))
        checkpoint.save(path, "retro", model, bundles.VOCAB)

    source = made_once("host-inputs.pt", trained)
    return made_once("host-inputs.msc", lambda path: bundles.compile_to(path, source))


@pytest.mark.slow
def test_a_bundle_streams_with_the_sources_of_its_user(retro_bundle: Path) -> None:
    opened = open_bundle(retro_bundle)
    model = checkpoint.load(retro_bundle.with_suffix(".pt")).model
    model.sources = sources.pseudo(opened.spec.inputs, seed=5)
    tokens = np.random.default_rng(2).integers(0, len(bundles.VOCAB), (2, 20))
    running, original = opened.session("ort", 2, model.sources), TorchSession(model, 2)
    for part in np.split(tokens, [1, 2, 9, 10, 11, 12], axis=1):
        assert np.abs(running.step(part) - original.step(part)).max() < 1e-4


@pytest.mark.slow
def test_a_bundle_checks_itself_by_its_records(retro_bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(retro_bundle)
    assert opened.verify("ort").failures == ()
    golden = opened.golden
    wrong = {"neighbours": golden.rollouts[0].inputs["neighbours"][:, ::-1].copy()}
    other = Bundle(shutil.copytree(retro_bundle, tmp_path / "other.msc"), opened.manifest)
    other.golden = Golden((replace(golden.rollouts[0], inputs=wrong),))
    assert other.verify("ort").failures != ()


@pytest.mark.slow
def test_commands_say_what_is_missing_or_use_stand_ins(retro_bundle: Path) -> None:
    with pytest.raises(InputError, match="this model needs sources="):
        app(["generate", str(retro_bundle), "--prompt", "a"], standalone_mode=False)
    report = bench.run(retro_bundle, ["ort"], ["decode@4"], retro_bundle.with_suffix(".pt"), rounds=1, samples=3)
    assert report.errors["ort"] < 1e-4


def test_inspect_lists_what_the_host_supplies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.pt"
    model = tiny.model("retro", "first-layer", torch.float32, len(bundles.VOCAB))
    checkpoint.save(path, "retro", model, bundles.VOCAB)
    app(["inspect", str(path), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["host_inputs"] == [
        {"name": "neighbours", "dtype": "int64", "shape": [1, 5], "every": 3, "below": len(bundles.VOCAB)}
    ]
    app(["inspect", str(path)], standalone_mode=False)
    assert "supplied by the host" in capsys.readouterr().out
