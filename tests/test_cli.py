"""Every command as a user runs it: what it prints, its exit code, and one clear sentence for bad input."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import bundles
import pytest
import torch
from commands import Run, refused

from engines.ort import ENGINE as ORT
from mscompile import bundle, cli

# ---- What works -------------------------------------------------------------------------------------------


def test_help_names_every_command_and_exit_code(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("export", "validate", "bisect", "bench", "generate", "inspect", "doctor", "families", "rules"):
        assert command in out
    assert "Exit codes: 0 done; 1 a gate failed; 2 bad usage or input; 3" in " ".join(out.split()).replace("│", "")


def test_inspect_a_bundle(run: Run, compiled: Path) -> None:
    code, out, _ = run("inspect", compiled, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kind"], facts["family"], facts["verified"]) == ("bundle", "transformer-xl", True)
    assert facts["engines"] == {"ort": "verified"}
    assert [state["name"] for state in facts["states"]] == ["layer00.mems.key", "layer00.mems.value"]
    assert {hit["name"] for hit in facts["rules"]} == {"transformer-xl", "rolling-memory"}
    applied = [(hit["name"], hit["place"]) for hit in facts["passes"] if hit["applied"]]
    states = ("layer00.mems.key", "layer00.mems.value")
    assert {*applied} >= {("fold", "decode"), ("hoist", "layer00.mems"), *(("append", state) for state in states)}
    assert {name for name, _ in applied} == {"fold", "hoist", "append", "scale", "merge", "mask", "layout"}


def test_inspect_a_checkpoint_before_anything_is_built(run: Run, checkpoint_of: Path, family: str) -> None:
    code, out, _ = run("inspect", checkpoint_of, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kind"], facts["family"]) == ("checkpoint", family)
    assert facts["parameters"] == sum(p.numel() for p in bundles.MODELS[family]().parameters())
    assert facts["state_bytes_per_stream"] > 0


def test_inspect_a_graph(run: Run, compiled: Path) -> None:
    code, out, _ = run("inspect", compiled / "graphs" / "decode.onnx", "--json")
    facts = json.loads(out)
    assert code == 0
    states = ["layer00.mems.key.in [batch, 2, 3, 3]", "layer00.mems.value.in [batch, 2, 3, 3]"]
    assert facts["inputs"] == ["tokens [batch, 1]", "position [batch]", *states]
    assert facts["outputs"][0] == "logits [batch, 1, 28]"


@pytest.mark.parametrize("what", ["bundle", "checkpoint", "graph"])
def test_inspect_for_people(run: Run, compiled: Path, trained: Path, what: str) -> None:
    path = {"bundle": compiled, "checkpoint": trained, "graph": compiled / "graphs" / "prefill.onnx"}[what]
    code, out, _ = run("inspect", path)
    assert code == 0
    assert what in out
    assert ("layer00.mems" in out) == (what != "graph") or what == "graph"


def test_validate_replays_the_golden_rollouts(run: Run, bundle_of: Path) -> None:
    code, out, _ = run("validate", bundle_of)
    assert code == 0
    assert "passed" in out
    assert "golden, batch 2" in out


def test_validate_against_the_original(run: Run, bundle_of: Path, checkpoint_of: Path) -> None:
    code, out, _ = run("validate", bundle_of, "--reference", checkpoint_of, "--steps", "48", "--json")
    (report,) = json.loads(out)["reports"]
    assert code == 0
    assert report["failures"] == []
    assert {tensor["rollout"] for tensor in report["tensors"]} == {
        "random, mixed chunks", "random, batch 3, mixed chunks", "token by token", "around multiples",
        "rows reset in mid-stream",
    }  # fmt: skip


def test_generate_is_greedy_or_seeded(run: Run, bundle_of: Path) -> None:
    def text(*more: object) -> str:
        code, out, _ = run("generate", bundle_of, "--prompt", "in the", "--tokens", "20", "--json", *more)
        assert code == 0
        generated: str = json.loads(out)["text"]
        assert len(generated) == 20
        return generated

    assert text() == text()
    assert text("--temperature", "1", "--seed", "1") == text("--temperature", "1", "--seed", "1")
    assert len({text("--temperature", "2", "--seed", seed) for seed in range(5)}) > 1


def test_generate_prints_the_prompt_and_its_continuation(run: Run, compiled: Path) -> None:
    code, out, _ = run("generate", compiled, "--prompt", "amen", "--tokens", "5")
    assert code == 0
    assert out.startswith("amen")
    assert len(out) == len("amen") + 5 + 1


def test_generate_continues_ids_as_it_continues_their_text(run: Run, compiled: Path) -> None:
    ids = ",".join(str(bundles.VOCAB.index(character)) for character in "amen")
    code, out, _ = run("generate", compiled, "--ids", ids, "--tokens", "5")
    assert code == 0
    assert out.startswith(f"{ids},")
    found = [int(word) for word in out.split(",")]
    assert len(found) == 4 + 5
    of_text = run("generate", compiled, "--prompt", "amen", "--tokens", "5")[1]
    assert "".join(bundles.VOCAB[index] for index in found) + "\n" == of_text
    code, out, _ = run("generate", compiled, "--ids", ids, "--tokens", "5", "--json")
    assert json.loads(out) == {"prompt": found[:4], "ids": found[4:]}


def test_generate_without_a_tokenizer(run: Run, compiled: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(compiled, tmp_path / "ids.msc")
    (copy / bundle.TOKENIZER).unlink()
    bundle.seal(copy, bundle.read(compiled))
    assert "use token ids, as --ids 1,2,3" in refused(run("generate", copy, "--prompt", "amen"))
    assert run("generate", copy, "--ids", "3", "--tokens", "2")[0] == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ids", "1,a"], "--ids must be whole numbers between commas, such as 1,2,3, not '1,a'"),
        (["--ids", ""], "--ids must be whole numbers between commas, such as 1,2,3, not ''"),
        (["--ids", "28"], "28"),
        (["--ids", "1", "--prompt", "a"], "--prompt and --ids are two ways to say what to continue"),
        (["--prompt", ""], "--prompt is empty"),
    ],
)
def test_nothing_to_continue(run: Run, compiled: Path, options: list[str], sentence: str) -> None:
    assert sentence in refused(run("generate", compiled, *options))


def test_bench_measures_every_engine_and_the_original(
    run: Run, bundle_of: Path, checkpoint_of: Path, family: str
) -> None:
    code, out, _ = run(
        "bench", bundle_of, "--reference", checkpoint_of, "--rounds", "2", "--samples", "3",
        "--workload", "decode@8", "--workload", "prefill:12", "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0
    measured = [(row["engine"], row["workload"]) for row in report["latencies"]]
    assert measured == [("torch", "decode@8"), ("ort", "decode@8"), ("torch", "prefill:12"), ("ort", "prefill:12")]
    assert all(0 < row["min_ms"] <= row["p95_ms"] for row in report["latencies"])
    assert ("ort decode@8" in report["schedule_gains"]) == (family == "hourglass")
    if family == "hourglass":
        assert report["schedule_gains"]["ort decode@8"]["predicted"] > 1.2


def test_doctor_says_what_can_be_built_and_run(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    engines = json.loads(out)["engines"]
    assert code == 0
    assert engines["ort"] == {"title": "ONNX Runtime", "build": "yes", "run": "yes"}
    assert run("doctor")[0] == 0


@pytest.mark.parametrize(("command", "known"), [("families", "hourglass"), ("rules", "cached-attention")])
def test_lists(run: Run, command: str, known: str) -> None:
    assert known in [row["name"] for row in json.loads(run(command, "--json")[1])]
    assert known in run(command)[1]


# ---- Bad input --------------------------------------------------------------------------------------------


def test_a_missing_checkpoint(run: Run, tmp_path: Path) -> None:
    assert refused(run("export", "--model", tmp_path / "no.pt")) == f"{tmp_path / 'no.pt'}: no such file"


def test_a_file_that_is_no_checkpoint(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("hello")
    assert "not a checkpoint" in refused(run("export", "--model", tmp_path / "model.pt"))


def test_a_truncated_checkpoint(run: Run, tmp_path: Path, trained: Path) -> None:
    (tmp_path / "model.pt").write_bytes(trained.read_bytes()[:-200])
    assert "truncated" in refused(run("export", "--model", tmp_path / "model.pt"))


def test_a_pickle_with_code_is_not_run(run: Run, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": "mscompile", "payload": Evil()}, tmp_path / "model.pt", pickle_module=pickle)
    assert "this pickle needs code to load" in refused(run("export", "--model", tmp_path / "model.pt"))
    assert not (tmp_path / "ran").exists()


def test_an_unknown_family_or_engine_suggests_the_near_one(
    run: Run, trained: Path, compiled: Path, tmp_path: Path
) -> None:
    sentence = refused(run("export", "--model", trained, "--family", "transformer-x", "--out", tmp_path / "new.msc"))
    assert sentence == "unknown family 'transformer-x'; did you mean transformer-xl?"
    assert refused(run("export", "--model", trained, "--target", "orts")) == "unknown engine 'orts'; did you mean ort?"
    assert "did you mean trt-rtx?" in refused(run("export", "--model", trained, "--target", "ort,trt-rxt"))
    assert "did you mean ort?" in refused(run("validate", compiled, "--engine", "orrt"))


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--batch", "x", "--batch must read LEAST:MOST, for example 1:8, not 'x'"),
        ("--batch", "4:2", "batch range 4:2 must be 1 <= least <= most"),
        ("--max-chunk", "0", "max chunk must be at least 1, not 0"),
        ("--context", "1", "context must be at least 2 tokens, not 1"),
        ("--steps", "3", "steps must be at least 32 tokens, not 3"),
        ("--precision", "fp13", "unknown precision 'fp13'; known: fp32, fp16, bf16, int8, int4, int8-dynamic"),
        ("--target", ",", "--target names no engine; for example --target ort,trt-rtx"),
    ],
)
def test_impossible_options(run: Run, trained: Path, option: str, value: str, sentence: str) -> None:
    assert refused(run("export", "--model", trained, option, value)) == sentence


def test_a_text_with_characters_the_model_lacks(run: Run, compiled: Path) -> None:
    assert "'Z'" in refused(run("generate", compiled, "--prompt", "aZ"))


def test_more_tokens_than_the_context(run: Run, made_once: bundles.MadeOnce) -> None:
    source = made_once("hourglass.pt", lambda path: bundles.save("hourglass", path))
    path = made_once("hourglass.msc", lambda path: bundles.compile_to(path, source))
    ended = run("generate", path, "--prompt", "a", "--tokens", "65", "--json")
    assert "exceed the context of 64; reset the row, or export again with a larger --context" in refused(ended)


def test_a_flipped_byte(run: Run, compiled: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.msc"
    shutil.copytree(compiled, broken)
    graph = broken / "graphs" / "decode.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    for command in (["inspect"], ["validate"], ["generate"], ["bench"]):
        assert "the bundle is damaged or was changed" in refused(run(*command, broken))


def test_a_bundle_that_is_not_there(run: Run, tmp_path: Path) -> None:
    assert refused(run("validate", tmp_path / "no.msc")) == f"{tmp_path / 'no.msc'} is not a bundle: no such directory"


def test_an_existing_bundle_needs_force(run: Run, trained: Path, compiled: Path, tmp_path: Path) -> None:
    shutil.copytree(compiled, tmp_path / "old.msc")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "old.msc").rglob("*"))
    assert "use --force to replace it" in refused(run("export", "--model", trained, "--out", tmp_path / "old.msc"))
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "old.msc").rglob("*")) == before


def test_an_engine_that_is_not_installed(run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    sentence = refused(run("export", "--model", trained, "--target", "ort"), code=3)
    assert sentence.startswith("ONNX Runtime is not installed; pip install 'mscompile[ort]'")


def test_an_engine_that_needs_a_gpu(run: Run, trained: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "--target trt-rtx" in refused(run("export", "--model", trained, "--target", "trt"), code=3)


def test_an_engine_the_bundle_was_not_built_for(run: Run, compiled: Path) -> None:
    assert (
        refused(run("generate", compiled, "--engine", "trt-rtx")) == f"{compiled} was not built for trt-rtx; it has ort"
    )


def test_another_checkpoint_as_reference(run: Run, compiled: Path, tmp_path: Path) -> None:
    bundles.save("hourglass", tmp_path / "other.pt")
    sentence = refused(run("validate", compiled, "--reference", tmp_path / "other.pt"))
    assert "is not the checkpoint that" in sentence


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rounds", "3"], "--rounds"),
        (["--max-slowdown", "1.2"], "--max-slowdown"),
        (["--max-slowdown", "1.2", "--rounds", "3"], "--max-slowdown and --rounds"),
    ],
)
def test_options_of_a_baseline_without_one(run: Run, compiled: Path, options: list[str], named: str) -> None:
    sentence = refused(run("validate", compiled, *options))
    assert sentence == f"{named} needs the bundle of the last release to compare with; name it by --baseline"


@pytest.mark.parametrize("command", ["validate", "bisect"])
def test_rollouts_that_show_nothing(run: Run, compiled: Path, trained: Path, command: str) -> None:
    sentence = refused(run(command, compiled, "--reference", trained, "--steps", "0"))
    assert sentence == "steps must be at least 32 tokens, not 0"


def test_an_unknown_workload(run: Run, compiled: Path) -> None:
    assert "unknown workload 'prefil:3'" in refused(run("bench", compiled, "--workload", "prefil:3"))


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["mscompile", "--debug", "validate", str(tmp_path / "no.msc")])
    with pytest.raises(cli.MsCompileError):
        cli.main()


# ---- The gate ---------------------------------------------------------------------------------------------


def test_a_failed_gate_names_graph_step_tensor_and_figures(run: Run, compiled: Path, tmp_path: Path) -> None:
    """Golden logits that are wrong at one token, resealed so that only the gate can see it."""
    path = tmp_path / "wrong.msc"
    shutil.copytree(compiled, path)
    golden = bundle.read(path)
    stored = cli_golden(path)
    stored.rollouts[0].logits[0, 40, 3] += 0.5
    stored.save(path / bundle.GOLDEN)
    bundle.seal(path, golden)
    code, out, err = run("validate", path)
    assert code == 1
    assert "failed" in out
    assert "logits: max abs error 0.5 exceeds 0.001" in err
    assert "step 40 of row 0, logit 3" in err
    assert "graph prefill" in err or "graph decode" in err


def cli_golden(path: Path) -> Any:
    from mscompile.golden import Golden

    golden = Golden.load(path / bundle.GOLDEN)
    for rollout in golden.rollouts:
        rollout.logits.setflags(write=True)
    return golden


def test_ort_is_what_runs_here() -> None:
    assert ORT.cannot_run() is None
