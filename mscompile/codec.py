"""Frozen dataclasses to JSON values and back, strictly, by their type hints.

Hints it knows: bool, int, float, str, None, Any, Literal, X | Y, tuple[X, ...], tuple[X, Y], dict[str, X] and
dataclasses. Tuples become lists, dict keys are sorted, and a float that JSON cannot hold becomes "NaN",
"Infinity" or "-Infinity".
"""

from __future__ import annotations

import math
import reprlib
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def encode(value: Any, where: str = "value") -> Any:
    """`value` as JSON values; ValueError naming the place of anything that has no JSON form."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name), f"{where}.{field.name}") for field in fields(value)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encode(value[key], f"{where}[{key!r}]") for key in sorted(value)}
    if isinstance(value, tuple | list):
        return [encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where}: {type(value).__name__} {reprlib.repr(value)} has no JSON form")


def decode(cls: type[T], data: Any, where: str = "value") -> T:
    """The `cls` that `encode` wrote as `data`; ValueError naming the place of anything that does not fit."""
    return cast(T, _decode(cls, data, where))


def _decode(hint: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    exact = hint in (bool, int, float, str, NoneType) and type(data) is hint
    if hint is Any or exact or (origin is Literal and any(type(data) is type(arm) and data == arm for arm in args)):
        return data
    if hint is float and data in NOT_FINITE:
        return float(data)
    if is_dataclass(hint):
        return _dataclass(hint, data, where)
    if origin in (Union, UnionType):
        return _union(hint, args, data, where)
    if origin is tuple and isinstance(data, list):
        return _tuple(args, data, where)
    if origin is dict and isinstance(data, dict):
        return {key: _decode(args[1], item, f"{where}[{key!r}]") for key, item in data.items()}
    raise _wrong(hint, data, where)


def _dataclass(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(cls, data, where)
    known = {field.name: field for field in fields(cls)}
    for name in sorted(data.keys() - known.keys()):
        raise ValueError(f"{where}: unknown key {name!r}, {cls.__name__} has {', '.join(known)}")
    for name, field in known.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}: missing key {name!r}")
    hints = get_type_hints(cls)
    return cls(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def _union(hint: Any, args: tuple[Any, ...], data: Any, where: str) -> Any:
    arms = [arm for arm in args if arm is not NoneType]
    if data is None and len(arms) < len(args):
        return None
    if len(arms) == 1:  # X | None: let X name the place
        return _decode(arms[0], data, where)
    for arm in arms:
        with suppress(ValueError):
            return _decode(arm, data, where)
    raise _wrong(hint, data, where)


def _tuple(args: tuple[Any, ...], data: list[Any], where: str) -> tuple[Any, ...]:
    hints = [args[0]] * len(data) if args[-1] is Ellipsis else args
    if len(hints) != len(data):
        raise ValueError(f"{where}: wanted {len(hints)} items, got {len(data)}")
    return tuple(_decode(item_hint, data[i], f"{where}[{i}]") for i, item_hint in enumerate(hints))


def _wrong(hint: Any, data: Any, where: str) -> ValueError:
    return ValueError(f"{where}: wanted {_words(hint)}, got {type(data).__name__} {reprlib.repr(data)}")


def _words(hint: Any) -> str:
    """A hint for people: "int or str", "'replace' or 'append'", "list", "object"."""
    origin = get_origin(hint)
    if origin in (Literal, Union, UnionType):
        return " or ".join(repr(arm) if origin is Literal else _words(arm) for arm in get_args(hint))
    return "object" if origin is dict or is_dataclass(hint) else "list" if origin is tuple else str(hint.__name__)
