"""The command line. Results go to stdout, progress and errors to stderr; every command takes --json.

Exit codes: 0 done and gates passed; 1 a parity or latency gate failed; 2 bad usage or input; 3 that engine
cannot be built or run on this machine.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mscompile import terminal
from mscompile.atomic import write_text
from mscompile.errors import MsCompileError, UsageError

if TYPE_CHECKING:
    from mscompile.gate import Release
    from mscompile.runtime import Bundle
    from mscompile.tokenizer import Tokenizer
    from validation.evidence import Validation
    from validation.parity import ParityReport

app = typer.Typer(
    name="mscompile",
    help="Compile trained memory and multi-scale language models into verified streaming engines.",
    epilog="Exit codes: 0 done; 1 a gate failed; 2 bad usage or input; 3 the engine cannot run on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

BundlePath = Annotated[Path, typer.Argument(help="A bundle directory, NAME.msc.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Engines = Annotated[list[str] | None, typer.Option("--engine", help="An engine of the bundle; may be repeated.")]
OneEngine = Annotated[str | None, typer.Option("--engine", help="An engine of the bundle; the first that runs here.")]
Tokens = Annotated[Path | None, typer.Option("--tokens", help="A text file for rollouts on real text.")]
Reference = Annotated[Path | None, typer.Option("--reference", help="The original checkpoint to compare with.")]
AdapterName = Annotated[
    str | None, typer.Option("--adapter", help="For your own module: a Python file or installed adapter with build().")
]
FamilyName = Annotated[str, typer.Option("--family", help="The model's family; auto reads it from the checkpoint.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    _state["debug"] = debug


_state = {"debug": False}


@app.command()
def export(
    model: Annotated[Path, typer.Option("--model", help="The trained checkpoint, .pt or .safetensors.")],
    target: Annotated[
        str, typer.Option("--target", help="Engines, comma-separated: ort, trt-rtx, trt; or onnx.")
    ] = "ort",
    out: Annotated[Path | None, typer.Option("--out", help="The bundle to write.  [default: MODEL.msc]")] = None,
    family: FamilyName = "auto",
    adapter: AdapterName = None,
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, fp16, bf16, int8, int4 (weights only) or int8-dynamic.")
    ] = "fp32",
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes to build for, LEAST:MOST or MOST.")] = "1:8",
    max_chunk: Annotated[int, typer.Option("--max-chunk", help="Most tokens of one prefill call.")] = 512,
    context: Annotated[
        int | None, typer.Option("--context", help="Longest stream in tokens, where memory grows with the stream.")
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="append: memories that roll are rings; replace: for hosts without rings.")
    ] = "append",
    tokens: Tokens = None,
    steps: Annotated[int, typer.Option("--steps", help="Tokens a row in the long parity rollouts.")] = 2048,
    validate: Annotated[bool, typer.Option(help="Roll every engine out against the original.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show which rules and passes did what.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile a trained checkpoint into a verified bundle."""
    from mscompile import codec
    from mscompile.contracts import Profile
    from mscompile.pipeline import Options, compile_checkpoint

    least, most = _batch_range(batch)
    decided = Options(
        family, precision, Profile(least, most, max_chunk), context, tokens, steps, validate, force, memory, adapter
    )
    with terminal.progress() as progress:
        bundle = compile_checkpoint(model, _words(target), out, decided, progress)
    if as_json:
        terminal.show_json({"bundle": str(bundle.path), "manifest": codec.encode(bundle.manifest)})
        return
    from validation import render

    if verbose:
        hits = {"rules": bundle.manifest.rules, "passes": bundle.manifest.passes}
        for table in render.hit_tables({name: codec.encode(found) for name, found in hits.items()}):
            terminal.show(table)
    for report in _reports(bundle):
        terminal.show(render.parity_table(report))
    for engine, facts in bundle.manifest.engines.items():
        built_only = "" if engine in (bundle.manifest.parity or {}) else "; built, not run here"
        typer.echo(f"{engine}: {facts.get('runtime', engine)} {facts.get('version', '')}{built_only}")
    size = sum(entry.size_bytes for entry in bundle.manifest.files.values())
    state = "verified" if bundle.manifest.verified else "NOT verified"
    typer.echo(f"{bundle.path}: {state}, {len(bundle.spec.graphs)} graphs, {size / 1e6:.1f} MB")


@app.command()
def validate(
    bundle: BundlePath,
    engine: Engines = None,
    reference: Reference = None,
    family: FamilyName = "auto",
    adapter: AdapterName = None,
    tokens: Tokens = None,
    steps: Annotated[int, typer.Option("--steps", help="Tokens a row in the long rollouts.")] = 2048,
    thresholds: Annotated[
        Path | None, typer.Option("--thresholds", help="A TOML file of stricter limits, see docs/ci.md.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="The last release's bundle: its logits and its latency.")
    ] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option(
            "--max-slowdown", help="Fail where steps surely take more than this times the baseline's.  [default: 1.1]"
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Interleaved rounds of --baseline.  [default: 10]")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write JUnit XML to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Also write a summary for pull requests.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with charts to this file.")] = None,
    as_json: AsJson = False,
    unfinished: Annotated[bool, typer.Option("--unfinished", hidden=True)] = False,
) -> None:
    """Check a bundle: its golden rollouts, or with --reference full rollouts against the original model."""
    from mscompile import codec, gate
    from mscompile.runtime import open_bundle

    if unfinished:
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
    release = _release(baseline, max_slowdown=max_slowdown, rounds=rounds)
    opened = open_bundle(bundle, unfinished=unfinished)
    original = gate.Original(reference, family, adapter, tokens, steps) if reference else None
    with terminal.progress() as progress:
        found = gate.validate(
            opened, engine or [], original, thresholds, release, progress, isolated=not unfinished, command=_command()
        )
    _write_evidence(found, junit, markdown, html)
    if as_json:
        terminal.show_json({"passed": found.passed, "failures": found.failures, **codec.encode(found)})
    else:
        from validation import render

        for report in found.reports:
            terminal.show(render.parity_table(report))
        for line in render.evidence_lines(found):
            typer.echo(line)
    found.raise_if_failed()


@app.command()
def bisect(
    bundle: BundlePath,
    reference: Annotated[Path, typer.Option("--reference", help="The original checkpoint to compare with.")],
    engine: OneEngine = None,
    family: FamilyName = "auto",
    adapter: AdapterName = None,
    tokens: Tokens = None,
    steps: Annotated[int, typer.Option("--steps", help="Tokens a row in the long rollouts.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Find the first step, tensor and layer at which an engine leaves the original, and say what may be the cause."""
    from mscompile import bisect as search
    from mscompile import codec
    from mscompile.errors import GateFailed
    from mscompile.runtime import open_bundle

    with terminal.progress() as progress:
        found = search.bisect(open_bundle(bundle), engine, reference, family, tokens, steps, progress, adapter)
    if as_json:
        terminal.show_json(codec.encode(found))
    else:
        from validation import render

        for title, rows in found.tables().items():
            terminal.show(render.fields_table(title, rows))
    if not found.passed:
        raise GateFailed(found.verdict)
    typer.echo(found.verdict, err=as_json)


@app.command()
def bench(
    bundle: BundlePath,
    engine: Engines = None,
    reference: Reference = None,
    adapter: AdapterName = None,
    workload: Annotated[
        list[str] | None, typer.Option("--workload", help="decode, decode@POSITION or prefill:TOKENS; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Interleaved rounds over all engines.")] = 8,
    samples: Annotated[int, typer.Option("--samples", help="Steps of each engine in a round.")] = 12,
    batch: Annotated[int, typer.Option("--batch", help="Streams stepped together.")] = 1,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="What else runs --reference, comma-separated: torch, torch-compile, onnx-plain, openvino, "
            "hourglass-pytorch.  [default: torch]",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a report with charts to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure decode and prefill latency, one process an engine; --reference adds the original model."""
    from mscompile import bench as benchmark
    from mscompile import codec, peers

    workloads = workload or ["decode", "prefill:128"]
    rivals = None if against is None else peers.words(against)
    ceilings = html is not None or against is not None
    with terminal.progress() as progress:
        report = benchmark.run(
            bundle, engine or [], workloads, reference, rounds, samples, batch, progress, rivals, ceilings, adapter
        )
    if html is not None:
        from validation.html import bench_page

        write_text(html, bench_page(codec.encode(report)))
    if as_json:
        terminal.show_json(codec.encode(report))
        return
    from validation import render

    processor = f"{report.machine['processor']}, {report.machine['cores']} cores"
    terminal.show(render.latency_table(report.latencies, f"latency of {report.bundle}, batch {batch}, {processor}"))
    for line in render.gain_lines(report.latencies, report.schedule_gains):
        typer.echo(line)
    for line in render.ratio_lines(report.speedups, report.ceilings):
        typer.echo(line)
    for name, reason in report.skipped.items():
        typer.echo(f"{name}: not measured: {reason}")


@app.command()
def sweep(
    plan: Annotated[Path, typer.Argument(help="A plan, see docs/sweep.md.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="The directory to write, and to go on in.  [default: PLAN.sweep]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Cells at a time, on this machine.  [default: cores / 4]")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Run on this Ray cluster, HOST:PORT; auto: the one that is here.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Also write a summary for pull requests.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with charts to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Export, validate and measure checkpoints x targets x precisions x shapes; what is finished is not run again."""
    from mscompile.sweep import plan as plans
    from mscompile.sweep import report, sweeping
    from mscompile.sweep.progress import Board

    read = plans.load(plan)
    if ray is not None and workers is not None:
        raise UsageError("--workers is of this machine, and --ray of a cluster, which has its own; give one of them")
    with Board(len(read.cells)) as board:
        outcome = sweeping.run(read, out or plan.with_suffix(".sweep"), board, workers, ray)
    if markdown is not None:
        write_text(markdown, report.markdown(outcome))
    if html is not None:
        write_text(html, report.page(outcome))
    if as_json:
        terminal.show_json(outcome.to_json())
    else:
        terminal.show(report.table(outcome))
    outcome.raise_if_failed()


@app.command()
def generate(
    bundle: BundlePath,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The text to continue.  [default: a line break]")
    ] = None,
    ids: Annotated[
        str | None, typer.Option("--ids", help="Token ids to continue instead, such as 1,2,3; more ids are printed.")
    ] = None,
    engine: OneEngine = None,
    tokens: Annotated[int, typer.Option("--tokens", help="How many tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the sampling.")] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text, or token ids."""
    from mscompile import runtime

    if tokens < 1:
        raise UsageError(f"--tokens must be at least 1, not {tokens}")
    if prompt is not None and ids is not None:
        raise UsageError("--prompt and --ids are two ways to say what to continue; give one of them")
    opened = runtime.open_bundle(bundle)
    begin = _ids(ids) if ids is not None else _encoded(opened, "\n" if prompt is None else prompt)
    stream = runtime.generate(opened.session(engine), begin, tokens, temperature, seed)
    if ids is not None:
        _print_ids(begin, stream, as_json)
    else:
        _print_text(opened.tokenizer, begin, stream, as_json)


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--ids must be whole numbers between commas, such as 1,2,3, not {text!r}") from error


def _encoded(opened: Bundle, text: str) -> list[int]:
    if not text:
        raise UsageError("--prompt is empty; give at least one character")
    ids: list[int] = opened.tokenizer.encode(text).tolist()
    return ids


def _print_ids(begin: list[int], stream: Iterator[int], as_json: bool) -> None:
    if as_json:
        terminal.show_json({"prompt": begin, "ids": list(stream)})
    else:
        terminal.show_pieces(",".join(map(str, begin)), (f",{token}" for token in stream))


def _print_text(tokenizer: Tokenizer, begin: list[int], stream: Iterator[int], as_json: bool) -> None:
    prompt = tokenizer.decode(begin)
    if as_json:
        terminal.show_json({"prompt": prompt, "text": tokenizer.decode(list(stream))})
    else:
        terminal.show_pieces(prompt, (tokenizer.decode([token]) for token in stream))


@app.command()
def package(
    bundle: BundlePath,
    form: Annotated[str, typer.Option("--format", help="cpp, ort-mobile, triton or web; see docs/embedding.md.")],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing project.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a project for another host around a bundle, ready to build."""
    from mscompile.packaging import formats

    written = formats.package(bundle, form, out, force)
    if as_json:
        terminal.show_json({"project": str(written), "format": form})
        return
    typer.echo(f"{written}: {formats.FORMATS[form].title}; see {written / 'README.md'}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, a bundle or an .onnx graph.", show_default=False)],
    context: Annotated[int | None, typer.Option("--context", help="Longest stream in tokens to assume.")] = None,
    adapter: AdapterName = None,
    as_json: AsJson = False,
) -> None:
    """Say what a file is: its states, schedule, and which rules and passes fired or refused, and why."""
    from mscompile import inspection

    facts = inspection.inspect(path, context, adapter)
    if as_json:
        terminal.show_json(facts)
        return
    from validation import render

    for table in render.inspection_tables(str(path), facts):
        terminal.show(table)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can build and run."""
    from mscompile.doctor import examine

    facts = examine()
    if as_json:
        terminal.show_json(facts)
        return
    from validation import render

    packages = {name: found or "not installed" for name, found in facts["packages"].items()}
    terminal.show(
        render.fields_table("machine", {"python": facts["python"], "CUDA devices": facts["cuda_devices"], **packages})
    )
    rows = [(name, engine["build"], engine["run"]) for name, engine in facts["engines"].items()]
    terminal.show(render.rows_table("engines", ("engine", "can build", "can run"), rows))
    for problem in facts["problems"]:
        typer.echo(f"problem: {problem}")


@app.command()
def families(as_json: AsJson = False) -> None:
    """List the model families."""
    from mscompile.models.families import FAMILIES

    columns = ("name", "title", "status", "source")
    rows = [{column: getattr(family, column) for column in columns} for family in FAMILIES]
    _list("families", rows, as_json)


@app.command()
def rules(as_json: AsJson = False) -> None:
    """List the streaming rules and the graph passes, in the order they are tried."""
    from exporters.passes.table import PASSES
    from exporters.rules import RULES

    rows = [{"kind": "rule", "name": rule.name, "why": rule.why} for rule in RULES]
    rows += [{"kind": "pass", "name": rewrite.name, "why": rewrite.why} for rewrite in PASSES]
    _list("rules and passes", rows, as_json)


def _list(title: str, rows: Sequence[dict[str, str]], as_json: bool) -> None:
    if as_json:
        terminal.show_json(rows)
        return
    from validation import render

    terminal.show(render.rows_table(title, list(rows[0]), [list(row.values()) for row in rows]))


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError("--target names no engine; for example --target ort,trt-rtx")
    return words


def _batch_range(text: str) -> tuple[int, int]:
    least, colon, most = text.rpartition(":")
    try:
        return (int(least), int(most)) if colon else (1, int(most))
    except ValueError as error:
        raise UsageError(f"--batch must read LEAST:MOST, for example 1:8, not {text!r}") from error


def _release(baseline: Path | None, **decided: float | None) -> Release | None:
    """The last release to compare with; its options mean nothing without it."""
    from mscompile import gate

    given: dict[str, Any] = {name: value for name, value in decided.items() if value is not None}
    if baseline is None and given:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{named} needs the bundle of the last release to compare with; name it by --baseline")
    return None if baseline is None else gate.Release(baseline, **given)


def _end_with_the_parent() -> None:
    """Wait for the end of stdin, which an export holds open while it lives."""
    os.read(0, 1)  # not sys.stdin, whose lock a forked process would find held for ever
    os._exit(1)


def _command() -> str:
    """What was typed, as a shell takes it."""
    return shlex.join(["mscompile", *sys.argv[1:]])


def _write_evidence(found: Validation, junit: Path | None, markdown: Path | None, html: Path | None) -> None:
    """The reports that were asked for, before a failed gate ends the command."""
    if junit is not None:
        from validation.junit import document

        write_text(junit, document(found))
    if markdown is not None:
        from validation.markdown import summary

        write_text(markdown, summary(found))
    if html is not None:
        from validation.parity_html import parity_page

        write_text(html, parity_page(found))


def _reports(bundle: Bundle) -> list[ParityReport]:
    from mscompile import codec
    from validation.parity import ParityReport

    return [codec.decode(ParityReport, report) for report in (bundle.manifest.parity or {}).values()]


def main() -> None:
    """Entry point: one clear sentence and the documented exit code for every expected error."""
    try:
        app()
    except MsCompileError as error:
        if _state["debug"]:
            raise
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
