"""Every reader of untrusted files against spoiled inputs: python benchmarks/fuzzing.py --reader manifest --count 200

An input must open, or be refused by an MsCompileError of one line, within limits of time and memory. Each reader runs
in a child process, so that a crash or a hang of a library is an outcome like others: the child ends by a signal, and
the next one goes on behind that input. `--first N --count 1` runs one input again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import mutators
import typer
from attacks import ATTACKS, copied, resealed

HERE = Path(__file__).parent
CPU_SECONDS, WALL_SECONDS = 10, 120  # for one input; of the processor's, and by the clock where nothing happens
ADDRESS_BYTES = 2**31  # that one reader may map, over what its process has when it is warm
RESIDENT_BYTES = 2**29  # that one input may make resident
CANARY = "canary"
SIGNALS = {signal.SIGPROF: "hang", signal.SIGALRM: "hang", signal.SIGKILL: "killed"}

ADAPTER = """
from torch import Tensor, nn
import torch

from mscompile.models.own import Adapter, state


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.table(tokens)
        memory = memory + rows.sum(1)
        return self.head(rows + memory[:, None]), memory


def build(weights):
    module = Counted()
    module.load_state_dict(torch.load(weights, weights_only=True))
    return Adapter(module, states=(state("memory", 8, initial=0.5),), context=64, vocab=list("abcdefghijk"))
"""


@dataclass(frozen=True)
class Reader:
    """One reader: how its inputs are spoiled, and what opens them."""

    spoil: Callable[[Random, Path, Path], Path]  # (random, seeds, empty directory) -> the input, written there
    open: Callable[[Path], object]


@dataclass
class Found:
    """What became of the inputs of one reader."""

    reader: str
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)  # opened, refused; all else is a finding
    findings: list[dict[str, Any]] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)  # of every input
    slowest_seconds: float = 0.0
    largest_bytes: int = 0

    def take(self, told: dict[str, Any]) -> None:
        self.inputs += 1
        self.told.append(told)
        self.outcomes[told["outcome"]] += 1
        self.slowest_seconds = max(self.slowest_seconds, told.get("seconds", 0.0))
        self.largest_bytes = max(self.largest_bytes, told.get("bytes", 0))
        if told["outcome"] not in ("opened", "refused"):
            self.findings.append(told)

    def row(self) -> dict[str, Any]:
        told = {name: self.outcomes[name] for name in ("opened", "refused")}
        sizes = {"slowest_seconds": round(self.slowest_seconds, 3), "largest_bytes": self.largest_bytes}
        return {"reader": self.reader, "inputs": self.inputs, **told, "findings": len(self.findings), **sizes}


# Good inputs


def seed(directory: Path, bundle: Path | None = None) -> Path:
    """Tiny inputs of every kind, made once: checkpoints in four forms, a bundle (a copy of one that is given)."""
    import torch

    sys.path.append(str(HERE.parent / "tests"))
    import bundles
    from test_conversion_transformer_xl import laid_out, settings_of

    from mscompile import checkpoint

    directory.mkdir(parents=True)
    model = bundles.MODELS["transformer-xl"]()
    for suffix in (".pt", ".safetensors"):
        checkpoint.save(directory / f"model{suffix}", "transformer-xl", model, bundles.VOCAB)
    fields = torch.load(directory / "model.pt", weights_only=True)
    torch.save(fields, directory / "legacy.pt", _use_new_zipfile_serialization=False)
    foreign = directory / "foreign"
    foreign.mkdir()
    tensors = {name: tensor.clone() for name, tensor in laid_out(model, "kimiyoung").items()}
    torch.save(tensors, foreign / "pytorch_model.bin")
    (foreign / "config.json").write_text(json.dumps(settings_of(model)), encoding="utf-8")
    (directory / "adapter.py").write_text(ADAPTER, encoding="utf-8")
    sizes = {"table.weight": (11, 8), "head.weight": (11, 8), "head.bias": (11,)}
    torch.save({name: torch.zeros(size) for name, size in sizes.items()}, directory / "own.pt")
    if bundle is not None:
        shutil.copytree(bundle, directory / "model.msc")
    else:
        bundles.compile_to(directory / "model.msc", directory / "model.pt")
    return directory


# Spoiled ones


def _bytes_of(name: str) -> Callable[[Random, Path, Path], Path]:
    def spoil(random: Random, seeds: Path, into: Path) -> Path:
        path = into / name
        path.write_bytes(mutators.spoiled(random, (seeds / name).read_bytes(), (seeds / "model.pt").read_bytes()))
        return path

    return spoil


def _archive(random: Random, seeds: Path, into: Path) -> Path:
    path = into / "model.pt"
    path.write_bytes(mutators.zipped(random, (seeds / "model.pt").read_bytes(), (seeds / "own.pt").read_bytes()))
    return path


def _contents(random: Random, seeds: Path, into: Path) -> Path:
    """A sound archive of values that are not: settings, tensors that repeat themselves, cycles, code."""
    import torch

    fields = torch.load(seeds / "model.pt", weights_only=True)
    state = fields["state_dict"]
    name = random.choice(list(state))
    kind = random.randrange(9)
    if kind == 0:
        payloads = (mutators.Payload(into.parent / CANARY), mutators.Sized(10**11))
        fields[random.choice(list(fields))] = random.choice(payloads)
    elif kind == 1:
        state[name] = torch.zeros(1).expand(random.choice((10**6, 10**10, 2**40)), *state[name].shape[1:])
    elif kind == 2:
        others = (torch.sparse_coo_tensor(size=(3, 4)), torch.zeros(2, dtype=torch.complex64), torch.empty(0))
        state[name] = random.choice((*others, torch.full_like(state[name], float("nan")), [state[name]]))
    elif kind == 3:
        ring: list[Any] = []
        ring.append(ring)
        fields[random.choice(("config", "args", "vocab"))] = random.choice((ring, {"a": ring}))
        fields["format"] = random.choice(("mscompile", "other"))
    elif kind == 4:
        twice: Any = 1
        for _ in range(60):
            twice = [twice, twice]
        fields[random.choice(("config", "args", "vocab"))] = random.choice((twice, {"a": twice}))
        fields["format"] = random.choice(("mscompile", "other"))
    else:
        mutators.replaced(random, fields["config"])
    path = into / "model.pt"
    torch.save(fields, path, _use_new_zipfile_serialization=bool(random.randrange(4)))
    return path


def _safetensors(random: Random, seeds: Path, into: Path) -> Path:
    """The header's JSON, or the JSON in its metadata, changed; at times its length, too."""
    content = (seeds / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if random.randrange(2):
        field = random.choice(("config", "vocab", "family"))
        text = mutators.json_text(random, json.loads(header["__metadata__"][field]))
        header["__metadata__"][field] = text.decode("utf-8", "replace")
        written = json.dumps(header).encode()
    else:
        written = mutators.json_text(random, header)
    length = len(written) if random.randrange(8) else random.choice(mutators.INTEGERS) % 2**64
    path = into / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + written + content[8 + size :])
    return path


def _foreign(random: Random, seeds: Path, into: Path) -> Path:
    """A directory of another project: its settings changed, its weights in shards that an index lists, or both."""
    path = Path(shutil.copytree(seeds / "foreign", into / "foreign"))
    if random.randrange(4):
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (path / "config.json").write_bytes(mutators.json_text(random, settings))
    else:
        (path / "pytorch_model.bin").rename(path / "part.bin")
        index = {"weight_map": dict.fromkeys(("a", "b", "c"), "part.bin"), "metadata": {"total_size": 1}}
        (path / "pytorch_model.bin.index.json").write_bytes(mutators.json_text(random, index))
    return path


def _manifest(random: Random, seeds: Path, into: Path) -> Path:
    bundle = copied(seeds, into)
    manifest = bundle / "manifest.json"
    data = json.loads(manifest.read_text(encoding="utf-8"))
    if random.randrange(2):  # half of all changes where hosts look
        mutators.replaced(random, data[random.choice(("spec", "spec", "spec", "engines", "source", "parity"))])
    manifest.write_bytes(mutators.json_text(random, data))
    return bundle


def _file_of(pattern: str) -> Callable[[Random, Path, Path], Path]:
    def spoil(random: Random, seeds: Path, into: Path) -> Path:
        bundle = copied(seeds, into)
        path = random.choice(sorted(bundle.glob(pattern)))
        other = (bundle / "golden.npz").read_bytes()
        return resealed(bundle, str(path.relative_to(bundle)), _respoiled(random, path, other))

    return spoil


def _respoiled(random: Random, path: Path, other: bytes) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".json" and random.randrange(2):
        return mutators.json_text(random, json.loads(content))
    if path.suffix == ".npz" and random.randrange(2):
        return mutators.zipped(random, content, other)
    return mutators.spoiled(random, content, other)


def _adapter(random: Random, seeds: Path, into: Path) -> Path:
    """The file, which is code that the user runs: what it declares is changed, or its text is damaged."""
    text = (seeds / "adapter.py").read_text(encoding="utf-8")
    begin = text.index("def build")
    if random.randrange(3):
        values = [*map(repr, mutators.NUMBERS), "None", "'x'", "[]", "print", "int", "1j", "(state,)", "exit()", "1/0"]
        parts = text[begin:].split(random.choice(("64", "8", "0.5", '"memory"', "module", "vocab", "torch")))
        at = random.randrange(1, len(parts)) if len(parts) > 1 else 0
        value = random.choice(values)
        text = text[:begin] + (value.join(("".join(parts[:at]), "".join(parts[at:]))) if at else value)
        content = text.encode()
    else:
        content = mutators.spoiled(random, text.encode())
    (into / "adapter.py").write_bytes(content)
    own = (seeds / "own.pt").read_bytes()
    (into / "own.pt").write_bytes(own if random.randrange(4) else mutators.spoiled(random, own))
    return into / "adapter.py"


# Readers


def _load(path: Path) -> None:
    from mscompile import checkpoint

    checkpoint.load(path)


def _load_adapter(path: Path) -> None:
    from mscompile import adapters

    adapters.load(str(path), path.with_name("own.pt"))


def _host(path: Path) -> None:
    """Open, make a session, step, take a snapshot."""
    from mscompile.runtime import open_bundle

    session = open_bundle(path).session("ort", batch=1)
    session.step([[1, 2, 3]])
    session.state()


def _inspect(path: Path) -> None:
    """`mscompile inspect`, as JSON and as tables."""
    from mscompile.inspection import inspect
    from validation import render

    facts = inspect(path)
    json.dumps(facts, indent=2)
    for table in render.inspection_tables(str(path), facts):
        _printed(table)


def _validate(path: Path) -> None:
    """`mscompile validate` with all its documents."""
    from mscompile import codec, gate
    from mscompile.runtime import open_bundle
    from validation import junit, markdown, parity_html, render

    found = gate.validate(open_bundle(path), ["ort"])
    json.dumps(codec.encode(found))
    for document in (junit.document, markdown.summary, parity_html.parity_page):
        document(found)
    for report in found.reports:
        _printed(render.parity_table(report))
    found.raise_if_failed()


def _tokenizer(path: Path) -> None:
    from mscompile.runtime import open_bundle

    tokenizer = open_bundle(path).tokenizer
    tokenizer.decode(tokenizer.encode("ab"))


def _printed(table: Any) -> None:
    from rich.console import Console

    Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), width=120).print(table)


READERS: dict[str, Reader] = {
    "checkpoint .pt, bytes": Reader(_bytes_of("model.pt"), _load),
    "checkpoint .pt, archive": Reader(_archive, _load),
    "checkpoint .pt, contents": Reader(_contents, _load),
    "checkpoint .pt, legacy": Reader(_bytes_of("legacy.pt"), _load),
    "checkpoint .safetensors, bytes": Reader(_bytes_of("model.safetensors"), _load),
    "checkpoint .safetensors, header": Reader(_safetensors, _load),
    "checkpoint directory": Reader(_foreign, _load),
    "inspect of a checkpoint": Reader(_contents, _inspect),
    "adapter": Reader(_adapter, _load_adapter),
    "manifest, inspect": Reader(_manifest, _inspect),
    "manifest, session": Reader(_manifest, _host),
    "manifest, validate": Reader(_manifest, _validate),
    "golden.npz": Reader(_file_of("golden.npz"), _validate),
    "tokenizer.json": Reader(_file_of("tokenizer.json"), _tokenizer),
    "engine.json": Reader(_file_of("engines/*/engine.json"), _host),
    "graphs": Reader(_file_of("engines/ort/packed/*.onnx"), _host),
}


ATTACK = "attacks"  # the reader whose inputs are the ATTACKS, in their order
OPENERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": _load,
    "inspect": _inspect,
    "bundle": _inspect,
    "host": _host,
    "validate": _validate,
}


def _reader(name: str, number: int) -> Reader:
    if name != ATTACK:
        return READERS[name]
    attack = list(ATTACKS.values())[number - 1]
    return Reader(lambda _, seeds, into: attack.make(seeds, into), OPENERS[attack.kind])


# The child


def child(name: str, seeds: Path, first: int, last: int) -> None:
    """Open the inputs `first` to `last`, a JSON line on stdout for each."""
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"
    lines = sys.stdout
    sys.stdout = io.StringIO()
    with tempfile.TemporaryDirectory() as directory:
        for number in range(first - 1, last + 1):  # the one before the first warms the process up
            reader = _reader(name, number)
            random, into = Random(f"{name} {number}"), Path(directory, "input")  # noqa: S311
            into.mkdir()
            sys.setrecursionlimit(20_000)  # for deep values: what reads them has the usual limit
            path = reader.spoil(random, seeds, into)
            sys.setrecursionlimit(1000)
            if number >= first:
                lines.write(json.dumps({"input": number, **_outcome(reader, path, Path(directory, CANARY))}) + "\n")
                lines.flush()
            else:
                _warm(reader, seeds, path)
                _limit(ADDRESS_BYTES)
            shutil.rmtree(into)


def _warm(reader: Reader, seeds: Path, path: Path) -> None:
    """Import and open once what is sound, so that what follows is the reader's alone."""
    named = {"foreign": "foreign", "model.msc": "model.msc"}.get(path.name, path.name)
    reader.open(seeds / named)


def _limit(more_bytes: int) -> None:
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more_bytes, resource.RLIM_INFINITY))


def _outcome(reader: Reader, path: Path, canary: Path) -> dict[str, Any]:
    from mscompile.errors import MsCompileError

    before, begun = _peak(reset=True), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WALL_SECONDS)
    said = ""
    try:
        reader.open(path)
        outcome = "opened"
    except MsCompileError as error:
        said, outcome = str(error), "refused"
        if "\n" in said or not said:
            outcome = "not one line"
    except BaseException as error:  # noqa: BLE001 (that is what is looked for)
        said, outcome = f"{error}"[:300], type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    seconds, grown = time.process_time() - begun, _peak() - before
    if canary.exists():
        outcome = "code ran"
        canary.unlink()
    elif grown > RESIDENT_BYTES:
        outcome = "too much memory"
    return {"outcome": outcome, "said": said[:300], "seconds": seconds, "bytes": max(0, grown)}


def _peak(reset: bool = False) -> int:
    """The most memory that was resident since the last reset, which sets it to what is resident now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


# The parent


def fuzz(name: str, seeds: Path, count: int, first: int = 1) -> Found:
    """What became of `count` inputs of a reader. After each crash or hang a new child goes on."""
    found, number = Found(name), first
    while number < first + count:
        command = [sys.executable, __file__, "--reader", name, "--seeds", str(seeds), "--child"]
        command += ["--first", str(number), "--count", str(first + count - number)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                found.take(json.loads(line))
                number += 1
            code = process.wait()
            errors.seek(0)
            said = errors.read().strip()
        if code > 0 and "Traceback" in said:
            raise RuntimeError(f"the child of {name} failed at input {number}: {said[-2000:]}")
        if number < first + count:
            outcome = SIGNALS.get(-code, f"crash: {signal.Signals(-code).name}" if code < 0 else f"exit {code}")
            found.take({"input": number, "outcome": outcome, "said": said[-300:]})
            number += 1
    return found


def attack(seeds: Path) -> Found:
    """What became of the attacks; one that opened is a finding, unless it is harmless."""
    found = fuzz(ATTACK, seeds, len(ATTACKS))
    opened = {told["input"] for told in found.told if told["outcome"] == "opened"}
    for number, (name, each) in enumerate(ATTACKS.items(), 1):
        if (number in opened) != each.harmless:
            found.findings.append({"input": name, "outcome": "opened" if number in opened else "not opened"})
    return found


def main(
    reader: Annotated[str, typer.Option(help="Readers whose name contains this.")] = "",
    count: Annotated[int, typer.Option(help="Inputs of each reader.")] = 200,
    first: Annotated[int, typer.Option(help="The number of the first.")] = 1,
    seeds: Annotated[Path | None, typer.Option(help="Sound inputs; made where there are none.")] = None,
    as_child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
) -> None:
    """Open spoiled inputs; a table, and every finding with its number."""
    if as_child:
        assert seeds is not None
        child(reader, seeds, first, first + count - 1)
        return
    with contextlib.ExitStack() as stack:
        if seeds is None:
            seeds = seed(Path(stack.enter_context(tempfile.TemporaryDirectory()), "seeds"))
        for name in (*READERS, ATTACK):
            if reader in name:
                found = attack(seeds) if name == ATTACK else fuzz(name, seeds, count, first)
                print(found.row(), flush=True)
                for finding in found.findings:
                    print("   ", finding, flush=True)


if __name__ == "__main__":
    typer.run(main)
