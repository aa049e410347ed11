"""Ways to spoil an input: its bytes, the values of its JSON, the members of its zip archive, its pickle.

All take a `random.Random`, so that a number gives the same input again.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

INTEGERS = (0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (*INTEGERS, -(2**63), 10**9, 10**12, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320)
TEXTS = (
    *("[/b]", "[red]", "<b>&", "", " ", ".", "..", "../../escape", "/etc/passwd", "a/b", "a\\b", "C:x", "CON", "nul\0"),
    *("é" * 200, "\u202e", "\ud800", "\U0001d518", "a\nb", "%s%n", "{0}", "x" * 5000, "NaN", "Infinity", "object"),
    *("chunk", "chunk/0", "batch", "context/-1", "chunk/²", "chunk/" + "9" * 5000),
    *("float128", "int64", "bool", "<U8", "replace", "append"),
)
WORDS = ("NaN", "Infinity", "-Infinity", "1e999", "-", "tru", "'a'", "0x10", "01", "1" * 5000, "[1,]", "\\u0000")


class Payload:
    """Unpickling it writes the file that is named."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


class Sized:
    """Unpickling it asks for so many bytes, by a name that torch allows."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (self.size,)


def spoiled(random: Random, content: bytes, other: bytes = b"") -> bytes:
    """One to three changes of bytes; `other` is what pieces may be taken from besides the content itself."""
    for _ in range(random.choice((1, 1, 2, 3))):
        content = random.choice(BYTES)(random, content or b"\0", other or content)
    return content


def _flipped(random: Random, content: bytes, _: bytes) -> bytes:
    changed = bytearray(content)
    for _n in range(random.choice((1, 1, 3, 30))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncated(random: Random, content: bytes, _: bytes) -> bytes:
    return content[: random.randrange(len(content))]


def _spliced(random: Random, content: bytes, other: bytes) -> bytes:
    begin, end = sorted(random.randrange(len(other) + 1) for _ in range(2))
    at, until = sorted(random.randrange(len(content) + 1) for _ in range(2))
    return content[:at] + other[begin:end] + content[random.choice((at, until)) :]


def _numbered(random: Random, content: bytes, _: bytes) -> bytes:
    """A number that means something to whoever adds sizes, as two, four or eight bytes."""
    number, form = random.choice(INTEGERS), random.choice(("<H", "<I", "<Q", ">I"))
    written = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
    at = random.choice((0, random.randrange(len(content)), max(0, len(content) - random.randrange(1, 80))))
    return content[:at] + written + content[at + len(written) :]


def _filled(random: Random, content: bytes, _: bytes) -> bytes:
    at = random.randrange(len(content))
    run = bytes([random.choice((0, 255, 0x80, random.randrange(256)))]) * random.choice((1, 8, 300, 5000))
    return content[:at] + run + content[at + random.choice((0, len(run))) :]


BYTES: tuple[Callable[[Random, bytes, bytes], bytes], ...] = (_flipped, _truncated, _spliced, _numbered, _filled)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    waiting = [value]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict | list):
            for key in list(container) if isinstance(container, dict) else range(len(container)):
                yield container, key
                waiting.append(container[key])


def replaced(random: Random, value: Any) -> Any:
    """A JSON value with one to three values inside it changed; the value itself is changed in place."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if found := list(places(value)):
            container, key = random.choice(found)
            other, there = random.choice(found)
            _change(random, container, key, other[there])
    return value


def _change(random: Random, container: Any, key: Any, other: Any) -> None:
    kind = random.randrange(12)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[random.choice(TEXTS)] = container.pop(key)
    elif kind == 2 and isinstance(container, list):
        container[key : key + 1] = [container[key]] * random.choice((0, 2, 100))
    elif kind == 3:
        container[key] = json.loads(json.dumps(other))
    elif kind == 4:
        container[key] = nested(random.choice((10, 60, 200)), random.choice(("list", "dict")))
    else:
        container[key] = plain(random, container[key])


def plain(random: Random, old: Any) -> Any:
    """Another value, often of the same type."""
    same: tuple[Any, ...] = TEXTS if isinstance(old, str) else NUMBERS
    return random.choice(random.choice((same, same, NUMBERS, TEXTS, (None, True, False, [], {}, [[]], {"": {}}))))


def nested(depth: int, kind: str) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def json_text(random: Random, value: Any) -> bytes:
    """A changed JSON value as text, at times with what no JSON value can say: keys twice, NaN, depth without end."""
    text = json.dumps(replaced(random, value) if random.randrange(8) else value, indent=random.choice((None, 2)))
    kind = random.randrange(10)
    if kind == 0 and (keys := list(re.finditer(r'"[^"]*": ', text))):
        key = random.choice(keys)
        text = text[: key.start()] + key[0] + random.choice(("null, ", "1, ", '"x", ')) + text[key.start() :]
    elif kind == 1 and (numbers := list(re.finditer(r"-?\b\d+(\.\d+)?\b", text))):
        number = random.choice(numbers)
        text = text[: number.start()] + random.choice(WORDS) + text[number.end() :]
    elif kind == 2:
        at = random.randrange(len(text))
        text = text[:at] + random.choice(("[", '{"a":')) * random.choice((10, 1000, 100_000)) + text[at:]
    return text.encode("utf-8", "surrogatepass") if kind != 3 else spoiled(random, text.encode("utf-8", "replace"))


def zipped(random: Random, content: bytes, other: bytes) -> bytes:
    """A zip archive whose members are changed, pressed, doubled, left out, or said to be larger than they are."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    for _ in range(random.choice((0, 1, 1, 2))):
        index = random.randrange(len(members))
        name, data = members[index]
        change = random.randrange(6)
        if change == 0:
            del members[index]
        elif change == 1:
            members.append((name, data))
        elif change == 2:
            members[index] = (random.choice((random.choice(TEXTS), f"{name}x")).replace("\ud800", ""), data)
        else:
            members[index] = (name, spoiled(random, data, other))
        if not members:
            return content[:100]
    pressed = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", pressed) as archive:
        for name, data in members:
            bomb = pressed == zipfile.ZIP_DEFLATED and not random.randrange(4)
            archive.writestr(zipfile.ZipInfo(name), data + bytes(2**24 if bomb else 0), pressed)
    return oversized(random, buffer.getvalue()) if not random.randrange(3) else buffer.getvalue()


def oversized(random: Random, archive: bytes) -> bytes:
    """One entry of the directory of a zip archive claims another size, offset or length of name."""
    entries = [found.start() for found in re.finditer(rb"PK\x01\x02", archive)]
    if not entries:
        return archive
    at = random.choice(entries) + random.choice((20, 24, 28, 30, 42))  # two sizes, two lengths, the offset
    return archive[:at] + struct.pack("<I", random.choice(INTEGERS) % 2**32) + archive[at + 4 :]
