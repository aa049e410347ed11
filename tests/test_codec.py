"""The JSON codec: what it writes it reads back, and nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from mscompile import codec
from mscompile.contracts import Schedule, StateSpec, StreamSpec, Tick


@dataclass(frozen=True)
class Inner:
    count: int
    label: str = "none"


@dataclass(frozen=True)
class Outer:
    ratio: float
    flag: bool
    dim: int | str
    mode: Literal["replace", "append"]
    inner: Inner
    many: tuple[Inner, ...]
    pair: tuple[int, str]
    maybe: Inner | None
    table: dict[str, Any]
    limits: dict[str, float]


OUTER = Outer(
    0.5, True, "batch", "append", Inner(1), (Inner(2, "b"), Inner(3)), (4, "c"), None, {"x": [1, 1.0]}, {"a": 0.1}
)
DATA = codec.encode(OUTER)


def test_round_trip_through_json_text() -> None:
    assert codec.decode(Outer, json.loads(json.dumps(codec.encode(OUTER)))) == OUTER


def test_ints_and_floats_stay_what_they_are() -> None:
    table = codec.decode(Outer, json.loads(json.dumps(DATA))).table
    assert [type(item) for item in table["x"]] == [int, float]


def test_a_stream_spec_makes_the_round_trip() -> None:
    state = StateSpec("layer0.key", "float32", ("batch", 4, 8), "append", 1, initial=-math.inf)
    spec = StreamSpec((state,), (), Schedule((Tick(("a",), repeat=3),)), 5, 2)
    text = json.dumps(codec.encode(spec), allow_nan=False)
    assert codec.decode(StreamSpec, json.loads(text)) == spec


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e-300, 5e-324, 0.1])
def test_every_float_comes_back(value: float) -> None:
    text = json.dumps(codec.encode(value), allow_nan=False)
    assert codec.decode(float, json.loads(text)) == value


def test_nan_comes_back() -> None:
    assert math.isnan(codec.decode(float, codec.encode(math.nan)))


def test_dict_keys_are_sorted_and_fields_are_not() -> None:
    assert list(codec.encode({"b": 1, "a": 2})) == ["a", "b"]
    assert list(DATA)[:3] == ["ratio", "flag", "dim"]


def test_defaults_fill_missing_keys() -> None:
    assert codec.decode(Inner, {"count": 1}) == Inner(1, "none")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ratio": 1}, "value.ratio: wanted float, got int 1"),
        ({"ratio": "fast"}, "value.ratio: wanted float, got str 'fast'"),
        ({"flag": 1}, "value.flag: wanted bool, got int 1"),
        ({"dim": 1.0}, "value.dim: wanted int or str, got float 1.0"),
        ({"dim": True}, "value.dim: wanted int or str, got bool True"),
        ({"mode": "swap"}, "value.mode: wanted 'replace' or 'append', got str 'swap'"),
        ({"inner": 3}, "value.inner: wanted object, got int 3"),
        ({"inner": {"count": True}}, "value.inner.count: wanted int, got bool True"),
        ({"inner": {}}, "value.inner: missing key 'count'"),
        ({"inner": {"count": 1, "cuont": 1}}, "value.inner: unknown key 'cuont', Inner has count, label"),
        ({"many": {}}, "value.many: wanted list, got dict {}"),
        ({"many": [{"count": 1}, {"count": 1.0}]}, "value.many[1].count: wanted int, got float 1.0"),
        ({"pair": [1]}, "value.pair: wanted 2 items, got 1"),
        ({"pair": [1, None]}, "value.pair[1]: wanted str, got NoneType None"),
        ({"maybe": {"count": "1"}}, "value.maybe.count: wanted int, got str '1'"),
        ({"table": []}, "value.table: wanted object, got list []"),
        ({"limits": {"a": None}}, "value.limits['a']: wanted float, got NoneType None"),
    ],
)
def test_refusals_name_the_place(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^value") as caught:
        codec.decode(Outer, DATA | change)
    assert str(caught.value) == sentence


def test_long_values_are_cut() -> None:
    with pytest.raises(ValueError, match=r"wanted int, got str 'x+\.\.\.x+'$"):
        codec.decode(int, "x" * 10_000)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"a": (1, object)}, r"value\['a'\]\[1\]: type .* has no JSON form"),
        ({1: "a"}, r"value: dict \{1: 'a'\} has no JSON form"),
        (Inner(b"x"), r"value.count: bytes b'x' has no JSON form"),  # type: ignore[arg-type]
    ],
)
def test_what_has_no_json_form_is_refused(value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        codec.encode(value)
