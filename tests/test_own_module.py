"""Users' own modules: from the adapter to the engine, and what is refused with what to change."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import cases
import pytest
import torch
from bundles import ADAPTERS as EXAMPLES
from bundles import weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from engines.session import StreamSession
from engines.torch_eager import original
from exporters import adapter as exported
from exporters import cost, program
from mscompile import adapters, cli
from mscompile.contracts import Profile, Tick
from mscompile.errors import CheckpointError, MsCompileError, Refusal, UsageError
from mscompile.models.own import Adapter, OwnModule, state
from mscompile.runtime import open_bundle

ROOT = Path(__file__).parent.parent
NAMES = ("gru", "convolution", "fast_weights", "clockwork")
CONTEXT = 40
PAGE = (ROOT / "docs" / "your-own-module.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OwnModule]:
    folder, built = tmp_path_factory.mktemp("own"), {}
    for name in NAMES:
        weights = weights_of(name, folder / f"{name}.pt")
        model = adapters.load(str(EXAMPLES / f"{name}_adapter.py"), weights, CONTEXT).model
        assert isinstance(model, OwnModule)
        built[name] = model
    return built


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6), reset=st.integers(0, 5))
def test_any_chunking_equals_the_modules_own_forward(
    models: dict[str, OwnModule], name: str, chunks: list[int], reset: int
) -> None:
    model = models[name]
    stream = exported.build(model, Profile(1, 2, 8))
    session = StreamSession(stream.spec, program.EagerExecutor(stream), 2)
    session.step(cases.tokens(2, reset + 1))
    session.reset([0])
    session.reset()
    chunks = chunks if sum(chunks) <= CONTEXT else chunks[:4]
    tokens = cases.tokens(2, sum(chunks), seed=1)
    assert cases.worst(cases.stream(session, tokens, chunks), original(model)(tokens)) < 1e-5


def test_the_clockwork_runs_its_slow_cell_at_one_token_of_four(models: dict[str, OwnModule]) -> None:
    stream = exported.build(models["clockwork"], Profile())
    assert stream.spec.schedule.ticks == (Tick(("both",)), Tick(("only_fast",), repeat=3))
    assert {graph.name: graph.writes for graph in stream.spec.graphs} == {
        "both": ("fast", "slow"),
        "only_fast": ("fast",),
    }
    costs = cost.eager_flops(stream)
    cell = 2 * 2 * 3 * 16 * 16  # multiply-adds of the slow GRUCell's two products
    assert costs["both"] - costs["only_fast"] == cell
    assert cost.per_token(costs, stream.spec.schedule) == costs["only_fast"] + cell / 4


def test_a_module_without_memory_has_the_stream_as_its_state(models: dict[str, OwnModule]) -> None:
    spec = exported.build(models["convolution"], Profile()).spec
    assert [(one.name, one.dtype, one.shape) for one in spec.states] == [("history", "int64", ("batch", CONTEXT))]
    assert (spec.max_context, spec.schedule.prefill) == (CONTEXT, "prefill")


# The command line


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_exported_and_verified(tmp_path: Path, name: str) -> None:
    adapter = str(EXAMPLES / f"{name}_adapter.py")
    weights, out = weights_of(name, tmp_path / "own.pt"), tmp_path / "own.msc"
    command = ["export", "--model", str(weights), "--adapter", adapter, "--out", str(out), "--steps", "96"]
    done = CliRunner().invoke(cli.app, [*command, "--context", str(CONTEXT), "--batch", "3"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    bundle = open_bundle(out)
    assert bundle.manifest.verified
    assert bundle.manifest.family == f"{name}_adapter"
    assert bundle.manifest.source["format"] == f"adapter {name}_adapter.py"
    again = ["validate", str(out), "--reference", str(weights), "--adapter", adapter, "--steps", "64"]
    assert CliRunner().invoke(cli.app, again).exit_code == 0


@pytest.mark.slow
def test_another_adapter_is_not_what_the_bundle_was_made_with(tmp_path: Path) -> None:
    weights, adapter = weights_of("gru", tmp_path / "own.pt"), tmp_path / "gru_adapter.py"
    shutil.copy(EXAMPLES / "gru.py", tmp_path)
    shutil.copy(EXAMPLES / "gru_adapter.py", adapter)
    command = ["export", "--model", str(weights), "--adapter", str(adapter), "--steps", "64"]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    adapter.write_text(adapter.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    again = ["validate", str(tmp_path / "own.msc"), "--reference", str(weights), "--adapter", str(adapter)]
    done = CliRunner().invoke(cli.app, again)
    assert isinstance(done.exception, UsageError)
    assert "its sha256 differs" in str(done.exception)


def test_inspect_says_what_it_is_before_anything_is_built(tmp_path: Path) -> None:
    weights = weights_of("gru", tmp_path / "gru.pt")
    done = CliRunner().invoke(cli.app, ["inspect", str(weights), "--adapter", str(EXAMPLES / "gru_adapter.py")])
    assert done.exit_code == 0, done.output
    for fact in ("adapter gru_adapter.py", "3968", "endless", "hidden"):
        assert fact in done.output


def test_inspect_of_a_bundle_needs_no_adapter(compiled: Path) -> None:
    done = CliRunner().invoke(cli.app, ["inspect", str(compiled), "--adapter", str(EXAMPLES / "gru_adapter.py")])
    assert isinstance(done.exception, UsageError)
    assert "is a bundle, which needs no --adapter" in str(done.exception)


# The documentation


def test_the_page_shows_the_adapters_as_they_are_and_they_are_short() -> None:
    shown = re.findall(r"^```py\n# (\w+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in shown] == [
        f"{name}_adapter.py" for name in ("gru", "fast_weights", "convolution", "clockwork")
    ]
    for name, text in shown:
        assert (EXAMPLES / name).read_text(encoding="utf-8") == f"# {name}\n{text}"
        assert len(text.splitlines()) <= 25


# Finding adapters


def test_an_installed_adapter_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    found = EntryPoints([EntryPoint("gru", "gru_adapter:build", adapters.GROUP)])
    monkeypatch.setattr(adapters, "entry_points", lambda group: found.select(group=group))
    weights = weights_of("gru", tmp_path / "gru.pt")
    assert adapters.load("gru", weights).source == "adapter gru"
    with pytest.raises(UsageError, match=r"'lstm' is neither a \.py file nor an installed adapter \(installed: gru\)"):
        adapters.load("lstm", weights)


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        (None, UsageError, "no such adapter file"),
        ("def build(", UsageError, "cannot be imported: SyntaxError"),
        ("import nothing_like_it", UsageError, "No module named 'nothing_like_it' (line 1)"),
        ("model = 3", UsageError, "has no function build(weights) that returns the module"),
        ("def build(weights):\n    return 3", UsageError, "returned a int; wanted a torch module, or an Adapter"),
        ("def build(weights):\n    return {}['no']", CheckpointError, "failed for {weights}: KeyError: 'no' (line 2)"),
    ],
)
def test_adapters_that_cannot_be_used(
    tmp_path: Path, text: str | None, error: type[MsCompileError], sentence: str
) -> None:
    path, weights = tmp_path / "adapter.py", tmp_path / "weights.pt"
    weights.touch()
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(error, match=re.escape(sentence.format(weights=weights))):
        adapters.load(str(path), weights)


def test_missing_weights_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt: no such file$"):
        adapters.load(str(EXAMPLES / "gru_adapter.py"), tmp_path / "none.pt")


# What is refused


class Bag(nn.Module):
    """Logits from the sum of all tokens: of those before, or of all of them."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.embedding, self.causal = nn.Embedding(11, 8), causal
        self.register_buffer("count", torch.tensor(0.0))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return (x.cumsum(1) if self.causal else x.sum(1, keepdim=True).expand_as(x)) @ self.embedding.weight.T


class Cell(nn.Module):
    """One token a call, and it says so."""

    def forward(self, tokens: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        assert tokens.shape[1] == 1
        row = 0.5 * row + tokens
        return row[:, None] + torch.arange(4.0), row


class TwoSpeeds(nn.Module):
    def both(self, tokens: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return row[:, None] + tokens[:, :, None], row + 1


def over(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, 4)


def refusals() -> Iterator[tuple[Callable[[], Adapter], str]]:
    row = [state("row", 4)]
    yield lambda: Adapter(Bag(causal=False)), "its logits change by"
    yield lambda: Adapter(Bag(causal=True), buffers=["sum"]), "the module has no buffer sum; it has count"
    yield lambda: Adapter(Bag(causal=True), buffers=["count"]), "buffer count is one number; a state has a batch axis"
    yield lambda: Adapter(Cell(), row, full=over), "called token by token, the module differs from full by"
    yield lambda: Adapter(Cell(), row, full=lambda tokens: over(tokens)[:, 1:]), "full returned logits (2, 6, 4)"
    yield lambda: Adapter(Cell(), [state("row", 4, update="append")]), "is appended to and needs time_axis="
    yield lambda: Adapter(Cell(), row, position=True), "forward(tokens, position, *states) must take"
    yield lambda: Adapter(TwoSpeeds(), row, ["row"]), "declares its memory as states or as buffers, not both"
    yield lambda: Adapter(TwoSpeeds(), row, ticks=[Tick(("both",))]), "an adapter with ticks needs full="
    yield lambda: Adapter(TwoSpeeds(), ticks=[Tick(("both",))], full=over), "an adapter with ticks needs states"
    yield (
        lambda: Adapter(TwoSpeeds(), row, ticks=[Tick(("slow",))], full=over),
        "a tick names 'slow', which is no method",
    )


def test_a_module_that_takes_one_token_has_no_prefill_and_says_why() -> None:
    stream = exported.build(OwnModule(Adapter(Cell(), [state("row", 4, dtype=torch.float32)])), Profile())
    assert stream.spec.schedule.prefill is None
    (hit,) = (hit for hit in stream.hits if hit.place == "prefill")
    assert "forward failed for tokens (2, 5) and states (2, 4): AssertionError" in hit.reason


@pytest.mark.parametrize(("declare", "sentence"), list(refusals()), ids=[text for _, text in refusals()])
def test_what_is_refused(declare: Callable[[], Adapter], sentence: str) -> None:
    with pytest.raises(Refusal, match=re.escape(sentence)):
        exported.build(OwnModule(declare()), Profile())


class Splitting(nn.Module):
    """Takes any number of tokens, but the trace freezes how many."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)

    def forward(self, tokens: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        steps = [self.embedding(tokens[:, i]) for i in range(int(tokens.shape[1]))]
        rows = torch.stack(steps, 1).cumsum(1) + row[:, None]
        return rows @ self.embedding.weight.T, rows[:, -1]


@pytest.mark.slow
def test_a_length_that_the_trace_has_frozen_is_refused_with_what_to_change(tmp_path: Path) -> None:
    source = "import test_own_module as t\nfrom mscompile import Adapter, state\n"
    source += "def build(weights):\n    return Adapter(t.Splitting(), states=[state('row', 8)]{})\n"
    weights = tmp_path / "weights.pt"
    weights.touch()
    for name, more in (("any", ""), ("single", ", prefill=None")):
        (tmp_path / f"{name}.py").write_text(source.format(more), encoding="utf-8")
    command = ["export", "--model", str(weights), "--steps", "64", "--adapter"]
    done = CliRunner().invoke(cli.app, [*command, str(tmp_path / "any.py"), "--target", "onnx"])
    assert isinstance(done.exception, Refusal)
    assert "no int(), len(), .item(), branch or loop over a size" in str(done.exception)
    assert not (tmp_path / "weights.msc").exists()
    done = CliRunner().invoke(cli.app, [*command, str(tmp_path / "single.py"), "--target", "onnx"])
    assert done.exit_code == 0, repr(done.exception)


WINDOW = """
import torch
from mscompile import Adapter, state

class Window(torch.nn.Module):
    '''Attends to the six rows before a token, to the zeros before the stream, too.'''

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(28, 8)
        self.query, self.key, self.value = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, tokens, mems):
        h = self.embedding(tokens)
        rows = torch.cat([mems, h], dim=1)
        ages = torch.arange(h.shape[1])[:, None] + 6 - torch.arange(rows.shape[1])
        scores = self.query(h) @ self.key(rows).transpose(1, 2)
        weights = scores.masked_fill((ages < 0) | (ages > 6), float("-inf")).softmax(-1)
        return (h + weights @ self.value(rows)) @ self.embedding.weight.T, rows[:, -6:]

def build(weights):
    torch.manual_seed(0)
    return Adapter(Window(), states=[state("mems", 6, 8)])
"""


@pytest.mark.slow
def test_memory_whose_zeros_are_attended_to_becomes_rings_that_say_so(tmp_path: Path) -> None:
    (weights := tmp_path / "window.pt").touch()
    (tmp_path / "window.py").write_text(WINDOW, encoding="utf-8")
    command = ["export", "--model", str(weights), "--adapter", str(tmp_path / "window.py"), "--steps", "64"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, repr(done.exception)
    states = open_bundle(tmp_path / "window.msc").spec.states
    found = {each.name: (each.update, each.reads_initial) for each in states}
    assert found == {"mems.key": ("append", True), "mems.value": ("append", True)}
