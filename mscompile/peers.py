"""What else would run a checkpoint: the original itself, and what general tools make of it. Each is a session, so
that one meter measures all of them. Every peer is asked first whether it can run here, and says in one sentence
why not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mscompile.contracts import Session
from mscompile.errors import EngineUnavailable, UsageError
from validation import sources

if TYPE_CHECKING:
    from mscompile.models.family import ReferenceModel

NewSession = Callable[[int], Session]


@dataclass(frozen=True)
class Source:
    """The original: a checkpoint, or what an adapter builds from it for streams of at most `context` tokens."""

    checkpoint: Path
    adapter: str | None = None
    context: int | None = None

    def model(self) -> ReferenceModel:
        """It, with stand-ins for what a host supplies."""
        from mscompile import adapters

        model = adapters.trained(self.checkpoint, adapter=self.adapter, context=self.context).model
        model.sources = sources.pseudo(model.inputs)
        return model

    def of_a_family(self) -> Path:
        """The checkpoint, for peers that take no module of one's own. Raises EngineUnavailable."""
        if self.adapter is not None:
            raise EngineUnavailable("it takes checkpoints of known families, and no module of --adapter")
        return self.checkpoint


@dataclass(frozen=True)
class Peer:
    """One way to run the original. `sessions(source, workspace, threads)` makes a maker of sessions."""

    name: str
    title: str
    needs: tuple[str, ...]  # modules
    install: str
    sessions: Callable[[Source, Path, int], NewSession]
    exact: bool = True  # it is the original, so its logits must be

    def cannot_run(self) -> str | None:
        missing = [module for module in self.needs if find_spec(module) is None]
        return f"{', '.join(missing)} is not installed; pip install {self.install}" if missing else None


def find(name: str) -> Peer:
    """Raises UsageError for a name that is not in the table."""
    if name not in PEERS:
        raise UsageError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    return PEERS[name]


def words(text: str) -> list[str]:
    """The names in a comma-separated list of peers."""
    return [find(word.strip()).name for word in text.split(",") if word.strip()]


def sessions(name: str, source: Source, workspace: Path, threads: int) -> NewSession:
    """A maker of sessions of a peer. `workspace` keeps what peers share. Raises EngineUnavailable."""
    peer = find(name)
    if reason := peer.cannot_run():
        raise EngineUnavailable(reason)
    return peer.sessions(source, workspace, threads)


def _eager(source: Source, _: Path, threads: int) -> NewSession:
    import torch

    from engines.torch_eager import TorchSession

    torch.set_num_threads(threads)
    model = source.model()
    return lambda batch: TorchSession(model, batch)


def _compiled(source: Source, _: Path, threads: int) -> NewSession:
    import torch

    from engines.torch_eager import TorchSession

    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        raise EngineUnavailable("torch.compile needs a C++ compiler on CPUs; install one, for example g++")
    torch.set_num_threads(threads)
    model = source.model()
    model.compile()
    return lambda batch: TorchSession(model, batch)


def _plain(runtime: str) -> Callable[[Source, Path, int], NewSession]:
    def sessions(source: Source, workspace: Path, threads: int) -> NewSession:
        from mscompile import plain

        graph = plain.exported(source.of_a_family(), workspace)
        network = getattr(plain, runtime)(graph, threads)
        return lambda batch: plain.PlainSession(graph, network, batch)

    return sessions


def _public_hourglass(source: Source, _: Path, threads: int) -> NewSession:
    """A model of the same depth, width, heads and factor with random weights; it recomputes the prefix."""
    import torch

    from engines.torch_eager import TorchSession
    from mscompile.checkpoint import load
    from mscompile.models.family import ReferenceModel

    config: Any = load(source.of_a_family()).model.config
    public = import_module("hourglass_transformer_pytorch").HourglassTransformerLM
    scales: tuple[Any, ...] = getattr(config, "scales", ())
    if len(scales) != 2:
        raise EngineUnavailable("hourglass-transformer-pytorch is compared with Hourglass models of two scales only")
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    class Public(ReferenceModel):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.network = public(
                num_tokens=config.vocab_size,
                dim=config.d_model,
                max_seq_len=config.context,
                depth=(scales[0].layers, scales[1].layers, scales[0].layers),
                shorten_factor=scales[1].factor,
                heads=config.n_head,
                dim_head=config.d_model // config.n_head,
                attn_resampling=config.shortening.startswith("attention"),
                updown_sample_type="linear" if config.upsampling == "linear" else "naive",
            )

        def full(self, tokens: torch.Tensor) -> torch.Tensor:
            # Release 0.0.6 fails at lengths that are no multiple of the factor.
            padded = torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % scales[1].factor))
            logits: torch.Tensor = self.network(padded)
            return logits[:, : tokens.shape[1]]

    model = Public().eval()
    return lambda batch: TorchSession(model, batch)


_ROWS: Sequence[Any] = (
    Peer("torch", "the original, PyTorch eager", ("torch",), "'mscompile[export]'", _eager),
    Peer("torch-compile", "the original, torch.compile", ("torch",), "'mscompile[export]'", _compiled),
    Peer(
        "onnx-plain", "torch.onnx.export of the original, ONNX Runtime", ("torch", "onnxscript", "onnxruntime"),
        "'mscompile[export,ort]'", _plain("OrtNetwork"),
    ),
    Peer(
        "openvino", "torch.onnx.export of the original, OpenVINO", ("torch", "onnxscript", "openvino"),
        "'mscompile[export,openvino]'", _plain("OpenVinoNetwork"),
    ),
    Peer(
        "hourglass-pytorch", "hourglass-transformer-pytorch, PyTorch eager",
        ("torch", "hourglass_transformer_pytorch"), "hourglass-transformer-pytorch==0.0.6",
        _public_hourglass, exact=False,
    ),
)  # fmt: skip
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ROWS}
