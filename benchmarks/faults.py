"""Faults to plant in a bundle: what a wrong rule, pass, export, runtime or host would do to it.

Every fault is planted in a copy of a good bundle, whose engine is then built again and whose manifest is sealed again,
so that nothing but what the bundle computes can give it away; faults of kind "file" say what else was left undone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import faulty_sessions as sessions
import numpy as np
import onnx
from bundle_copies import Copy, Graph
from onnx import helper

from mscompile import bundle
from mscompile.contracts import Array
from mscompile.golden import Golden
from mscompile.tokenizer import Tokenizer


@dataclass(frozen=True)
class Fault:
    """A fault, and why a bundle with it is as good as without, if it is."""

    name: str
    kind: str  # graph, contract, file or session
    plant: Callable[[Copy], None]
    equivalent: str = ""
    families: tuple[str, ...] = ("transformer-xl", "hourglass")


def planted(source: Path, target: Path, fault: Fault) -> Copy:
    """A copy of the bundle `source` at `target`, with the fault."""
    copy = Copy(source, target)
    fault.plant(copy)
    copy.finish()
    return copy


# In graphs


def _scaled_weight(copy: Copy) -> None:
    copy.decode.change(copy.decode.weights()[-2], lambda weight: weight * 1.05)


def _slightly_scaled_weight(copy: Copy) -> None:
    copy.decode.change(copy.decode.weights()[-2], lambda weight: weight * 1.001)


def _one_number(copy: Copy) -> None:
    def change(weight: Array) -> Array:
        weight.flat[3] += 0.05
        return weight

    copy.prefill.change(copy.prefill.weights()[0], change)


def _embedding_rows_swapped(copy: Copy) -> None:
    name = next(node.input[0] for node in copy.decode.of("Gather") if "tokens" in node.input)
    copy.decode.change(name, lambda table: table[[0, 2, 1, *range(3, len(table))]])


def _no_bias(copy: Copy) -> None:
    name = next(node.input[2] for node in copy.last.of("LayerNormalization"))
    copy.last.change(name, np.zeros_like)


def _epsilon(copy: Copy) -> None:
    for node in copy.decode.of("LayerNormalization"):
        del node.attribute[:]
        node.attribute.extend([helper.make_attribute("axis", -1), helper.make_attribute("epsilon", 1e-2)])


def _no_mask(copy: Copy) -> None:
    for graph in (copy.decode, copy.prefill):
        for mask in graph.masks():
            graph.after(mask, "Mul", np.float32(0))


def _no_mask_in_prefill(copy: Copy) -> None:
    copy.prefill.after(copy.prefill.masks()[0], "Mul", np.float32(0))


def _mask_too_long(copy: Copy) -> None:
    """The oldest row that may be seen, or the newest, is one off."""
    for node in copy.decode.of("GreaterOrEqual", "LessOrEqual", "Greater", "Less")[:1]:
        strict = {
            "GreaterOrEqual": "Greater",
            "LessOrEqual": "Less",
            "Greater": "GreaterOrEqual",
            "Less": "LessOrEqual",
        }
        node.op_type = strict[node.op_type]


def _rolled(by: int, graph: Callable[[Copy], Graph]) -> Callable[[Copy], None]:
    """A ring that attention reads in the order of other slots."""

    def plant(copy: Copy) -> None:
        name = copy.appended()[0]
        state = copy.spec.state(name)
        axis = state.time_axis or 0
        rows = state.shape[axis]
        assert isinstance(rows, int)
        graph(copy).after(state.input_name, "Gather", np.roll(np.arange(rows), by), axis=axis)

    return plant


def _reversed(copy: Copy) -> None:
    """New rows of a prefill from the newest to the oldest."""
    state = copy.spec.state(copy.appended()[0])
    axis = state.time_axis or 0
    whole = [np.array([number], np.int64) for number in (-1, np.iinfo(np.int64).min, axis, -1)]
    copy.prefill.after(state.output_name, "Slice", *whole)


def _outputs_swapped(copy: Copy) -> None:
    first, second = copy.appended()[:2]
    copy.decode.swap(f"{first}.out", f"{second}.out")


def _inputs_swapped(copy: Copy) -> None:
    first, second = copy.appended()[:2]
    copy.decode.swap(f"{first}.in", f"{second}.in")


def _half_state(copy: Copy) -> None:
    """New rows go through float16."""
    name = f"{copy.appended()[0]}.out"

    def through(right: str) -> list[onnx.NodeProto]:
        half = helper.make_node("Cast", [right], [f"{name}.half"], to=onnx.TensorProto.FLOAT16)
        return [half, helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT)]

    copy.decode.replace(name, through)


def _overflow(copy: Copy) -> None:
    """A product in float16 whose numbers are too large for it, scaled back afterwards."""
    graph = copy.last
    name = graph.of("Relu", "Gelu")[0].output[0]
    graph.set("planted.large", np.float32(1e6))

    def through(right: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Mul", [right, "planted.large"], [f"{name}.large"]),
            helper.make_node("Cast", [f"{name}.large"], [f"{name}.half"], to=onnx.TensorProto.FLOAT16),
            helper.make_node("Cast", [f"{name}.half"], [f"{name}.float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Div", [f"{name}.float", "planted.large"], [name]),
        ]

    graph.replace(name, through)


def _other_activation(copy: Copy) -> None:
    node = copy.decode.of("Relu", "Gelu")[0]
    del node.attribute[:]
    node.op_type = "Identity"


def _other_softmax(copy: Copy) -> None:
    node = copy.prefill.of("Softmax")[0]
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", -2))


def _no_residual(copy: Copy) -> None:
    total = copy.decode.of("LayerNormalization")[-1].input[0]
    node = next(node for node in copy.decode.of("Add") if total in node.output)
    copy.decode.set("planted.half", np.float32(0.5))
    at = list(copy.decode.nodes).index(node)
    half = helper.make_node("Mul", [node.input[0], "planted.half"], ["planted.residual"])
    node.input[0] = "planted.residual"
    copy.decode.nodes.insert(at, half)


def _position_off(copy: Copy) -> None:
    copy.decode.after("position", "Add", np.int64(1))


def _position_frozen(copy: Copy) -> None:
    copy.prefill.after("position", "Mul", np.int64(0))


def _last_logits(copy: Copy) -> None:
    """In a chunk, logits move by one token."""
    copy.prefill.replace(
        "logits",
        lambda right: [
            helper.make_node("Slice", [right, "planted.0", "planted.last", "planted.1"], ["planted.front"]),
            helper.make_node("Slice", [right, "planted.0", "planted.1", "planted.1"], ["planted.head"]),
            helper.make_node("Concat", ["planted.head", "planted.front"], ["logits"], axis=1),
        ],
    )
    for name, number in (("0", 0), ("1", 1), ("last", -1)):
        copy.prefill.set(f"planted.{name}", np.array([number], np.int64))


def _first_row_for_all(copy: Copy) -> None:
    """What a graph specialised to one stream does: other rows get the state of the first."""
    name = f"{copy.appended()[0]}.out"
    copy.decode.replace(
        name,
        lambda right: [
            helper.make_node("Gather", [right, "planted.row"], ["planted.first"], axis=0),
            helper.make_node("Shape", [right], ["planted.shape"]),
            helper.make_node("Expand", ["planted.first", "planted.shape"], [name]),
        ],
    )
    copy.decode.set("planted.row", np.array([0], np.int64))


def _late(copy: Copy) -> None:
    """A fault that begins at token 40 of a stream."""
    name = copy.decode.of("LayerNormalization")[-1].output[0]
    copy.decode.replace(
        name,
        lambda right: [
            helper.make_node("Less", ["position", "planted.at"], ["planted.early"]),
            helper.make_node("Unsqueeze", ["planted.early", "planted.axes"], ["planted.is_early"]),
            helper.make_node("Mul", [right, "planted.more"], ["planted.scaled"]),
            helper.make_node("Where", ["planted.is_early", right, "planted.scaled"], [name]),
        ],
    )
    copy.decode.set("planted.at", np.int64(40))
    copy.decode.set("planted.axes", np.array([1, 2], np.int64))
    copy.decode.set("planted.more", np.float32(1.1))


def _no_new_rows(copy: Copy) -> None:
    copy.decode.after(f"{copy.appended()[0]}.out", "Mul", np.float32(0))


def _stale_replaced(copy: Copy) -> None:
    """A replaced state that a graph returns as it was."""
    name = next(state.name for state in copy.spec.states if state.update == "replace")
    graph = copy.last
    graph.replace(f"{name}.out", lambda _: [helper.make_node("Identity", [f"{name}.in"], [f"{name}.out"])])


def _one_logit(copy: Copy) -> None:
    copy.last.after("logits", "Add", np.eye(1, copy.spec.vocab_size, 5, dtype=np.float32)[0] * np.float32(0.01))


# In the contract


def _initial(copy: Copy) -> None:
    copy.state_is(copy.appended()[0], initial=0.5)


def _initial_replaced(copy: Copy) -> None:
    name = next(state.name for state in copy.spec.states if state.update == "replace")
    copy.state_is(name, initial=0.5)


def _tick_off(copy: Copy) -> None:
    ticks = copy.spec.schedule.ticks
    copy.schedule_is(ticks=(*ticks[1:], ticks[0]))


def _tick_longer(copy: Copy) -> None:
    ticks = copy.spec.schedule.ticks
    copy.schedule_is(ticks=(*ticks[:-1], replace(ticks[-1], repeat=ticks[-1].repeat + 1)))


def _finest_only(copy: Copy) -> None:
    """The coarse scale never runs."""
    copy.schedule_is(ticks=(replace(copy.spec.schedule.ticks[-1], repeat=copy.spec.schedule.period),))


def _chunks_anywhere(copy: Copy) -> None:
    copy.schedule_is(chunk_multiple=1)


def _no_prefill(copy: Copy) -> None:
    copy.schedule_is(prefill=None, max_chunk=1)


def _longer_chunks(copy: Copy) -> None:
    schedule = copy.spec.schedule
    copy.schedule_is(max_chunk=schedule.max_chunk + schedule.chunk_multiple)


def _smaller_ring(copy: Copy) -> None:
    name = copy.appended()[0]
    state = copy.spec.state(name)
    shape = list(state.shape)
    rows = shape[state.time_axis or 0]
    assert isinstance(rows, int)
    shape[state.time_axis or 0] = rows - 1
    copy.state_is(name, shape=tuple(shape))


def _other_time_axis(copy: Copy) -> None:
    name = copy.appended()[0]
    copy.state_is(name, time_axis=(copy.spec.state(name).time_axis or 0) + 1)


def _replace_instead(copy: Copy) -> None:
    copy.state_is(copy.appended()[0], update="replace")


def _smaller_vocabulary(copy: Copy) -> None:
    copy.spec_is(vocab_size=copy.spec.vocab_size - 1)


def _endless(copy: Copy) -> None:
    copy.spec_is(max_context=None)


def _write_forgotten(copy: Copy) -> None:
    """A state that a graph writes and the contract does not mention there."""
    name = copy.appended()[0]
    first = copy.spec.schedule.ticks[0].graphs[0]
    graphs = tuple(
        replace(
            graph,
            writes=tuple(each for each in graph.writes if each != name),
            outputs=tuple(each for each in graph.outputs if each.name != f"{name}.out"),
        )
        if graph.name == first
        else graph
        for graph in copy.spec.graphs
    )
    copy.spec_is(graphs=graphs)


def _wrong_dtype(copy: Copy) -> None:
    copy.state_is(copy.appended()[0], dtype="float64")


def _called_int4(copy: Copy) -> None:
    """A precision whose limits are wide, for graphs that are wrong by little."""
    copy.decode.change(copy.decode.weights()[-2], lambda weight: weight * 1.02)
    copy.manifest = replace(copy.manifest, precision="int4")


# In files


def _packed_only(copy: Copy) -> None:
    """What the engine runs, not the graphs that it was built from."""
    copy.rebuild = False
    path = copy.path / "engines" / "ort" / "packed" / "decode.onnx"
    if not path.is_file():
        path = path.with_name(f"{copy.decode.path.name}")
    graph = Graph(path)
    bias = next(name for name, value in graph.constants().items() if value.shape == (copy.spec.vocab_size,))
    graph.change(bias, lambda value: value + 0.01)
    graph.save()


def _graphs_only(copy: Copy) -> None:
    """The graphs, not what the engine runs on this machine: another one would run them."""
    copy.rebuild = False
    _scaled_weight(copy)


def _derived_swapped(copy: Copy) -> None:
    first, second = sorted((copy.path / "graphs").glob("derived.*.onnx"))[:2]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def _golden_logits(copy: Copy) -> None:
    path = copy.path / bundle.GOLDEN
    golden = Golden.load(path)
    golden.rollouts[0].logits[0, 3, 2] += 0.01
    golden.save(path)


def _golden_state(copy: Copy) -> None:
    path = copy.path / bundle.GOLDEN
    golden = Golden.load(path)
    golden.rollouts[-1].states[copy.appended()[0]][...] *= 1.01
    golden.save(path)


def _no_golden(copy: Copy) -> None:
    (copy.path / bundle.GOLDEN).unlink()


def _tokenizer(copy: Copy) -> None:
    path = copy.path / bundle.TOKENIZER
    old = Tokenizer.load(path)
    tokens = list(old.tokens)
    tokens[3], tokens[4] = tokens[4], tokens[3]
    replace(old, tokens=tuple(tokens)).save(path)


def _flipped_bit(copy: Copy) -> None:
    copy.rebuild = copy.reseal = False
    path = copy.path / "graphs" / "prefill.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _extra_file(copy: Copy) -> None:
    copy.rebuild = copy.reseal = False
    (copy.path / "graphs" / "more.onnx").write_bytes(b"")


def _manifest_edited(copy: Copy) -> None:
    copy.rebuild = copy.reseal = False
    path = copy.path / bundle.MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    content["files"].pop("golden.npz")
    path.write_text(json.dumps(content), encoding="utf-8")


# In sessions


def _session(altered: type[sessions.Altered]) -> Callable[[Copy], None]:
    def plant(copy: Copy) -> None:
        copy.rebuild = False
        copy.session = altered

    return plant


TXL, HOURGLASS = ("transformer-xl",), ("hourglass",)
SLOW_ONLY = "the same results, token by token: prefill is a faster way to them"
DYNAMIC = "graphs take any number of tokens; ONNX Runtime has no limit that this passes"

FAULTS: tuple[Fault, ...] = (
    Fault("weight 5 % too large", "graph", _scaled_weight),
    Fault("weight 0.1 % too large", "graph", _slightly_scaled_weight),
    Fault("one number of a weight, in prefill", "graph", _one_number),
    Fault("two rows of the embedding swapped", "graph", _embedding_rows_swapped),
    Fault("bias of a norm dropped", "graph", _no_bias),
    Fault("epsilon of norms 1e-2", "graph", _epsilon),
    Fault("masks dropped", "graph", _no_mask),
    Fault("first mask dropped, in prefill", "graph", _no_mask_in_prefill),
    Fault("mask one row off", "graph", _mask_too_long),
    Fault("memory read one slot later", "graph", _rolled(1, lambda copy: copy.decode)),
    Fault("memory read one slot earlier, in prefill", "graph", _rolled(-1, lambda copy: copy.prefill), families=TXL),
    Fault("new rows in reverse, in prefill", "graph", _reversed),
    Fault("written states swapped", "graph", _outputs_swapped),
    Fault("read states swapped", "graph", _inputs_swapped),
    Fault("state through float16", "graph", _half_state),
    Fault("overflow of float16", "graph", _overflow),
    Fault("activation dropped", "graph", _other_activation),
    Fault("softmax over another axis", "graph", _other_softmax),
    Fault("residual halved", "graph", _no_residual),
    Fault("position one ahead", "graph", _position_off),
    Fault("position always 0, in prefill", "graph", _position_frozen),
    Fault("logits of a chunk one token late", "graph", _last_logits),
    Fault("all rows get the first row's state", "graph", _first_row_for_all),
    Fault("wrong from token 40 on", "graph", _late),
    Fault("new rows are zero", "graph", _no_new_rows),
    Fault("replaced state returned as it was", "graph", _stale_replaced, families=HOURGLASS),
    Fault("one logit 0.01 too large", "graph", _one_logit),
    Fault("initial value of a ring", "contract", _initial),
    Fault("initial value of a replaced state", "contract", _initial_replaced, families=HOURGLASS),
    Fault("ticks one phase early", "contract", _tick_off, families=HOURGLASS),
    Fault("period one token longer", "contract", _tick_longer, families=HOURGLASS),
    Fault("coarse scale never due", "contract", _finest_only, families=HOURGLASS),
    Fault("chunks may begin anywhere", "contract", _chunks_anywhere, families=HOURGLASS),
    Fault("no prefill", "contract", _no_prefill, SLOW_ONLY),
    Fault("longer chunks", "contract", _longer_chunks, DYNAMIC),
    Fault("ring one row smaller", "contract", _smaller_ring),
    Fault("ring along another axis", "contract", _other_time_axis),
    Fault("ring replaced instead of appended to", "contract", _replace_instead),
    Fault("vocabulary one token smaller", "contract", _smaller_vocabulary),
    Fault("context without end", "contract", _endless, families=HOURGLASS),
    Fault("state that is not written", "contract", _write_forgotten),
    Fault("state of another dtype", "contract", _wrong_dtype),
    Fault("called int4, weight 2 % too large", "contract", _called_int4),
    Fault("bias in the engine's own graph", "file", _packed_only),
    Fault("weight in a graph that this machine does not run", "file", _graphs_only),
    Fault("functions of states swapped", "file", _derived_swapped, families=TXL),
    Fault("golden logit", "file", _golden_logits),
    Fault("golden state", "file", _golden_state),
    Fault("golden rollouts removed", "file", _no_golden),
    Fault("two characters of the tokenizer swapped", "file", _tokenizer),
    Fault("one bit of a graph, not sealed", "file", _flipped_bit),
    Fault("one more file, not sealed", "file", _extra_file),
    Fault("file left out of the manifest, not sealed", "file", _manifest_edited),
    Fault("ring turned by one slot after each step", "session", _session(sessions.RollsTooFar)),
    Fault("chunks written in reverse", "session", _session(sessions.WrongRingOrder)),
    Fault("stale state every fifth step", "session", _session(sessions.StaleBuffer)),
    Fault("single rows are not reset", "session", _session(sessions.KeepsOldRows)),
    Fault("a ring of the first row is not reset", "session", _session(sessions.PositionNotReset)),
    Fault("restored state halved", "session", _session(sessions.BadRestore)),
    Fault("position not restored", "session", _session(sessions.SharedSnapshot)),
    Fault("rows get each other's logits", "session", _session(sessions.RowsMixed)),
    Fault("first logits of long calls late", "session", _session(sessions.LateLogits)),
    Fault("one logit is not a number", "session", _session(sessions.NotANumber)),
)
