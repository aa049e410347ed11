"""Peers are the original model: a peer with other logits would make every comparison a lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import cases
import numpy as np
import pytest
import torch

from engines.torch_eager import TorchSession
from mscompile import checkpoint, peers, plain
from mscompile.bench import Contestant, Field
from mscompile.contracts import Array
from mscompile.errors import EngineUnavailable, InputError, UsageError
from mscompile.peers import Source
from mscompile.plain import PlainGraph, PlainSession

CHUNKS = (5, 1, 1, 9, 1, 3)
MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def workspace_of(made_once: MadeOnce, family: str) -> Path:
    """Where peers of one checkpoint share their export."""
    return made_once(f"{family}.peers", Path.mkdir)


def logits(session: Any, batch: int, vocab: int = len(bundles.VOCAB)) -> Array:
    tokens = np.random.default_rng(3).integers(0, vocab, (batch, sum(CHUNKS)))
    return cases.stream(session, tokens, CHUNKS)


def named(peer: str) -> Any:
    """A peer, left out where what it needs is not installed."""
    reason = peers.find(peer).cannot_run()
    return pytest.param(peer, marks=[pytest.mark.skipif(reason is not None, reason=str(reason))])


@pytest.mark.parametrize("peer", [named("torch"), named("onnx-plain"), named("openvino")])
@pytest.mark.parametrize("batch", [1, 2])
def test_peers_are_the_original(peer: str, batch: int, checkpoint_of: Path, workspace_of: Path) -> None:
    source = Source(checkpoint_of)
    session = peers.sessions(peer, source, workspace_of, 1)(batch)
    expected = logits(TorchSession(source.model(), batch), batch)
    for _ in range(2):  # the second time after a reset
        assert cases.worst(logits(session, batch), expected) < 1e-4
        assert list(session.position) == [sum(CHUNKS)] * batch
        session.reset()


@pytest.mark.slow
def test_a_compiled_peer_is_the_original(bundle_of: Path, checkpoint_of: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, as it is measured."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    rivals = [Contestant(name, name, bundle_of, checkpoint_of) for name in ("torch", "torch-compile")]
    with Field(rivals) as field:
        assert field.errors()["torch-compile"] < 1e-4


@pytest.mark.parametrize("peer", [named("hourglass-pytorch")])
def test_the_public_hourglass_has_the_shape_of_the_checkpoint(peer: str, tmp_path: Path) -> None:
    bundles.save("hourglass", tmp_path / "hourglass.pt")
    session = peers.sessions(peer, Source(tmp_path / "hourglass.pt"), tmp_path, 1)(1)
    found = logits(session, 1)
    assert found.shape == (1, sum(CHUNKS), len(bundles.VOCAB))
    bundles.save("transformer-xl", tmp_path / "other.pt")
    with pytest.raises(EngineUnavailable, match="Hourglass models of two scales only"):
        peers.sessions(peer, Source(tmp_path / "other.pt"), tmp_path, 1)


@pytest.mark.parametrize("name", ["post-norm", "pre-norm-same-length-clamp", "segment-longer-than-memory"])
def test_a_plain_session_carries_memory_as_the_original_does(name: str) -> None:
    model = cases.model(name, torch.float32)
    config = model.config

    def network(tokens: Array, memories: Any) -> tuple[Array, Any]:
        assert tokens.shape[1] <= config.tgt_len
        with torch.inference_mode():
            found, new = model(torch.from_numpy(tokens), memories or model.empty_mems(tokens.shape[0]))
        return found.numpy(), new

    graph = PlainGraph("", cases.VOCAB, config.n_layer, config.d_model, config.tgt_len, 1, config.same_length, 0.0)
    session = PlainSession(graph, network, 2)
    assert cases.worst(logits(session, 2, cases.VOCAB), logits(TorchSession(model, 2), 2, cases.VOCAB)) < 1e-4


def test_what_a_plain_session_cannot_do() -> None:
    session = PlainSession(PlainGraph("", 5, 0, 1, 9, 1, False, 0.0), lambda tokens, _: (tokens, None), 2)
    for attempt in (lambda: session.reset([0]), session.state, lambda: session.restore(None)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="a plain export"):
            attempt()


def test_an_export_that_fails_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"torch.onnx.export of the original failed: .*no such file"):
        plain.exported(tmp_path / "none.pt", tmp_path)


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    with pytest.raises(
        EngineUnavailable, match=r"openvino is not installed; pip install 'mscompile\[export,openvino\]'"
    ):
        peers.sessions("openvino", Source(tmp_path), tmp_path, 1)


def test_what_an_adapter_builds_is_run_by_the_original_alone(tmp_path: Path) -> None:
    weights = bundles.weights_of("gru", tmp_path / "gru.pt")
    source = Source(weights, str(bundles.ADAPTERS / "gru_adapter.py"), 40)
    session = peers.sessions("torch", source, tmp_path, 1)(1)
    assert logits(session, 1).shape == (1, sum(CHUNKS), len(bundles.VOCAB))
    for peer in ("onnx-plain", "hourglass-pytorch"):
        if peers.find(peer).cannot_run() is None:
            with pytest.raises(EngineUnavailable, match="no module of --adapter"):
                peers.sessions(peer, source, tmp_path, 1)


def test_peers_are_found_by_name() -> None:
    assert peers.words("torch, openvino") == ["torch", "openvino"]
    with pytest.raises(UsageError, match="unknown peer 'tflite'; known: torch, torch-compile, onnx-plain"):
        peers.words("torch,tflite")


def test_the_export_is_made_once(checkpoint_of: Path, workspace_of: Path) -> None:
    graph = plain.exported(checkpoint_of, workspace_of)
    model = checkpoint.load(checkpoint_of).model
    assert graph.vocab_size == model.config.vocab_size
    assert graph.memories == (model.config.n_layer if hasattr(model, "empty_mems") else 0)
    assert graph.export_seconds > 0
    written = Path(graph.path).stat().st_mtime_ns
    assert plain.exported(checkpoint_of, workspace_of) == graph
    assert Path(graph.path).stat().st_mtime_ns == written
