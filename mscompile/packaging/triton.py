"""A model repository for Triton Inference Server: one model, whose states Triton keeps per sequence, or the runtime.

Where one graph serves every token and every state is replaced, the graph itself is served, by Triton's ONNX Runtime
backend, and its states are Triton's implicit states. All other bundles, those with rings, schedules or lower
precision among them, are served by a Python-backend model over `mscompile.runtime`. Both take the same requests.

Fields as in Triton's model_config.proto. A bundle with host inputs is refused: requests have no place for a source.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mscompile import bundle
from mscompile.contracts import BATCH, LOGITS, POSITION, TOKENS, GraphSpec, StateSpec, StreamSpec
from mscompile.errors import UsageError
from mscompile.packaging import triton_model
from mscompile.runtime import Bundle

CLIENT = "triton_client.py"  # beside this file, and in every repository
MODELS, VERSION = "models", "1"
CANDIDATES = 64  # sequences that are served at a time; others wait
IDLE_SECONDS = 60  # after which a sequence without a request is forgotten
WEIGHTS = "weights.bin"
INITIAL = "initial_state"  # the folder where Triton looks for values
COUNTER = StateSpec("mscompile.position", "int64", (BATCH, 1))  # `position`, as a state that the graph counts up

TYPES = {
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
}

CONFIG = """\
name: "{name}"
backend: "{backend}"
max_batch_size: {max_batch}
input [ {{ name: "tokens" data_type: TYPE_INT64 dims: [ {tokens} ]{ragged} }} ]
output [ {{ name: "logits" data_type: {logits} dims: [ {tokens}, {vocab_size} ] }} ]
parameters {{ key: "max_tokens" value {{ string_value: "{max_tokens}" }} }}
sequence_batching {{
  max_sequence_idle_microseconds: {idle}
  oldest {{ max_candidate_sequences: {candidates} }}
{states}}}
"""

STATE = """\
  state [ {{
    input_name: "{name}.in" output_name: "{name}.out" data_type: {data_type} dims: [ {dims} ]
    initial_state {{ name: "{name}" data_type: {data_type} dims: [ {dims} ] {value} }}
  }} ]
"""

README = """\
# {name} on Triton Inference Server

`models/` is a model repository with one model, `{name}`: {title}. {served}

## Serve

{serve}

## Ask

```console
$ pip install 'tritonclient[grpc]'
$ python triton_client.py {prompt} --count 80
```

`triton_client.py` generates greedily; it is an example to copy from. Requests of one stream have one correlation id,
a number from 1 on or a text.

| | |
| --- | --- |
| input `tokens` | INT64 (1, T): the next tokens of the stream, {lengths}; ids are 0 to {last_id} |
| output `logits` | {logits} (1, T, {vocab_size}): `logits[0, t]` predicts the token after `tokens[0, t]` |
| first request of a stream | has the start flag; it begins at position 0, whatever had the id before |
| last request | has the end flag; the states are freed |

{limits}
"""

SERVE_GRAPH = """\
```console
$ docker run --rm -p 8000:8000 -p 8001:8001 -v "$PWD/models:/models" nvcr.io/nvidia/tritonserver:24.12-py3 \\
      tritonserver --model-repository=/models
```
"""

SERVE_RUNTIME = """\
The Python of the server needs the package `mscompile` with an engine, and is 3.11 or newer:

```console
$ docker run --rm -p 8000:8000 -p 8001:8001 -v "$PWD/models:/models" nvcr.io/nvidia/tritonserver:24.12-py3 \\
      bash -c "pip install 'mscompile[ort]' && tritonserver --model-repository=/models"
```
"""


def fill(opened: Bundle, directory: Path) -> None:
    """A model repository, a client, and how to use them. UsageError for a bundle with host inputs."""
    if names := ", ".join(given.name for given in opened.spec.inputs):
        raise UsageError(
            f"{opened.path} takes {names} from its host, for which requests to Triton have no place; "
            "run it in a program of yours, with sources={...}"
        )
    model = directory / MODELS / opened.manifest.name
    version = model / VERSION
    version.mkdir(parents=True)
    reason = not_implicit(opened)
    if reason is None:
        _write_graph(opened, served_graph(opened.spec), version)
        config = _config(opened, "onnxruntime", "".join(_state(state, model) for state in _kept(opened.spec)))
    else:
        shutil.copytree(opened.path, version / triton_model.BUNDLE)
        shutil.copyfile(triton_model.__file__, version / "model.py")
        config = _config(opened, "python", "")
    (model / "config.pbtxt").write_text(config, encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name(CLIENT), directory / CLIENT)
    if (opened.path / bundle.TOKENIZER).is_file():
        shutil.copyfile(opened.path / bundle.TOKENIZER, directory / bundle.TOKENIZER)
    (directory / "README.md").write_text(_readme(opened, reason), encoding="utf-8")


# ---- Which of the two --------------------------------------------------------------------------------------


def not_implicit(opened: Bundle) -> str | None:
    """Why Triton cannot keep the states of this bundle itself; None if it can."""
    spec, states = opened.spec, {state.name for state in opened.spec.states}
    if len({(tick.graphs, tick.closing) for tick in spec.schedule.ticks}) > 1 or spec.schedule.ticks[0].closing:
        return "different tokens run different graphs"
    if any(hit.name == "append" and hit.applied for hit in opened.manifest.passes):
        return "its memories are rings, which Triton cannot keep; `mscompile export --memory replace` makes no rings"
    if any(state.update == "append" for state in spec.states):
        return "its memories gain rows at every token, and Triton can only replace them"
    if spec.max_context is not None:
        return f"its streams end after {spec.max_context} tokens, and Triton does not count"
    if any(state.batch_axis for state in spec.states):
        return "the batch is not the first axis of all states"
    graph = served_graph(spec)
    if len(spec.schedule.ticks[0].graphs) > 1 or not set(graph.reads) == set(graph.writes) == states:
        return "no graph of it reads and writes all states"
    if opened.manifest.precision != "fp32":
        return f"it was verified with settings of the runtime that {opened.manifest.precision} needs"
    return None


def served_graph(spec: StreamSpec) -> GraphSpec:
    """The graph that takes any number of tokens, where there is one; otherwise that of one token."""
    schedule = spec.schedule
    takes_any = schedule.prefill is not None and schedule.chunk_multiple == 1
    return spec.graph(schedule.prefill if takes_any and schedule.prefill else schedule.ticks[0].graphs[0])


# ---- Implicit states ---------------------------------------------------------------------------------------


def _kept(spec: StreamSpec) -> tuple[StateSpec, ...]:
    """What Triton keeps: the states, and how many tokens the sequence has had."""
    return (COUNTER, *spec.states)


def _state(state: StateSpec, model: Path) -> str:
    """The entry of a state, (batch, *dims); a value that is not zero is written to a file."""
    value = state.initial_value(1)
    if value.any():
        (model / INITIAL).mkdir(exist_ok=True)
        (model / INITIAL / state.name).write_bytes(value.tobytes())
    return STATE.format(
        name=state.name,
        data_type=TYPES[state.dtype],
        dims=", ".join(map(str, value.shape[1:])),
        value=f'data_file: "{state.name}"' if value.any() else "zero_data: true",
    )


def _write_graph(opened: Bundle, graph: GraphSpec, version: Path) -> None:
    """model.onnx, which takes the position as a state and counts it up, and the weights.

    Given position (batch,) int64. Becomes `<COUNTER>.in` (batch, 1) -> `<COUNTER>.out` = in + the tokens of this call.
    """
    try:
        import onnx
    except ImportError as error:
        raise UsageError(
            "Triton keeps the states of this bundle, for which its graph is rewritten; pip install 'mscompile[export]'"
        ) from error
    model = onnx.load(str(opened.path / bundle.GRAPHS / f"{graph.name}.onnx"), load_external_data=False)
    make, inputs = onnx.helper, model.graph.input
    kind, shape = onnx.TensorProto.INT64, list(COUNTER.shape)
    (position,) = (given for given in inputs if given.name == POSITION)
    inputs.remove(position)
    inputs.append(make.make_tensor_value_info(COUNTER.input_name, kind, shape))
    model.graph.output.append(make.make_tensor_value_info(COUNTER.output_name, kind, shape))
    flat, count = f"{COUNTER.name}.shape", f"{COUNTER.name}.count"
    model.graph.initializer.append(make.make_tensor(flat, kind, [1], [-1]))
    model.graph.node.insert(0, make.make_node("Reshape", [COUNTER.input_name, flat], [POSITION]))
    model.graph.node.append(make.make_node("Shape", [TOKENS], [count], start=1, end=2))
    model.graph.node.append(make.make_node("Add", [COUNTER.input_name, count], [COUNTER.output_name]))
    onnx.save(model, str(version / "model.onnx"))
    shutil.copyfile(opened.path / bundle.GRAPHS / WEIGHTS, version / WEIGHTS)


# ---- Texts -------------------------------------------------------------------------------------------------


def _config(opened: Bundle, backend: str, states: str) -> str:
    spec, ours = opened.spec, backend == "python"
    most = None if ours else _max_tokens(spec)
    return CONFIG.format(
        name=opened.manifest.name,
        backend=backend,
        max_batch=spec.max_batch,
        tokens=1 if most == 1 else -1,
        max_tokens=most or "",
        # Requests of different lengths may then come in one call; only the Python backend can take them so.
        ragged=" allow_ragged_batch: true" if ours else "",
        logits=TYPES[_logits_dtype(spec)],
        vocab_size=spec.vocab_size,
        idle=IDLE_SECONDS * 1_000_000,
        candidates=CANDIDATES,
        states=states,
    )


def _readme(opened: Bundle, reason: str | None) -> str:
    spec, manifest = opened.spec, opened.manifest
    if reason is None:
        served = "Triton keeps its states and runs its graph in the ONNX Runtime backend, which must be 1.18 or newer."
        lengths = f"{_max_tokens(spec)} at most"
        limits = (
            "Token ids are not checked: one that is out of range fails the call, and with it the requests of other "
            "streams that were batched with it."
        )
    else:
        served = f"It is served by the Python backend, because {reason}."
        lengths = "as many as you like"
        limits = "A request that cannot be answered gets an error of its own; other streams go on."
    if spec.max_context is not None:
        limits += f" A stream ends after {spec.max_context} tokens."
    buffers = spec.bytes_per_stream() / 1e6
    limits += (
        f" A stream keeps {buffers:.1f} MB. `config.pbtxt` says how many streams are served at a time "
        f"({CANDIDATES}; others wait) and after how long without a request one is forgotten ({IDLE_SECONDS} s)."
    )
    return README.format(
        name=manifest.name,
        title=manifest.title,
        served=served,
        serve=(SERVE_GRAPH if reason is None else SERVE_RUNTIME).strip(),
        prompt=_prompt(opened),
        lengths=lengths,
        last_id=spec.vocab_size - 1,
        logits=TYPES[_logits_dtype(spec)].removeprefix("TYPE_"),
        vocab_size=spec.vocab_size,
        limits=limits,
    )


def _max_tokens(spec: StreamSpec) -> int:
    """The most tokens of one request where the graph is served."""
    return 1 if served_graph(spec).tokens == 1 else spec.schedule.max_chunk


def _prompt(opened: Bundle) -> str:
    """Something to continue: a character of the vocabulary, or ids where that is not known."""
    if not (opened.path / bundle.TOKENIZER).is_file():
        return "--ids 0 1 2"
    tokens = opened.tokenizer.tokens
    return f'"{next((token for token in tokens if token.isalnum()), tokens[0])}"'


def _logits_dtype(spec: StreamSpec) -> str:
    return next(t.dtype for graph in spec.graphs for t in graph.outputs if t.name == LOGITS)
