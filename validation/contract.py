"""Two stream contracts side by side: in what a bundle departs from an export of its checkpoint, or an older bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mscompile.contracts import StreamSpec


def differences(found: StreamSpec, wanted: StreamSpec, other: str = "the export") -> tuple[str, ...]:
    """One line for each difference, such as `states.layer00.mems.initial is 1.0, the export says 0.0`."""
    return tuple(_differing("", _named(asdict(found)), _named(asdict(wanted)), other))


def _named(value: Any) -> Any:
    """Lists of things that have names, by name."""
    if isinstance(value, dict):
        return {key: _named(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple) and value and all(isinstance(each, dict) and "name" in each for each in value):
        return {each["name"]: _named(each) for each in value}
    if isinstance(value, list | tuple) and any(isinstance(each, dict) for each in value):
        return {str(number): _named(each) for number, each in enumerate(value)}
    return list(value) if isinstance(value, tuple) else value


def _differing(place: str, found: Any, wanted: Any, other: str) -> Iterator[str]:
    if found == wanted:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys((*wanted, *found)):
            inner = f"{place}.{key}" if place else key
            if key not in found:
                yield f"{inner} is missing"
            elif key not in wanted:
                yield f"{inner} is not in {other}"
            else:
                yield from _differing(inner, found[key], wanted[key], other)
        return
    yield f"{place} is {found}, {other} says {wanted}"
