"""Text to token ids and back, for models whose vocabulary is single characters: `tokenizer.json` in a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mscompile import codec
from mscompile.atomic import explained
from mscompile.errors import BundleError, InputError

SIZE_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Tokenizer:
    """The text of every token, by id. Texts are distinct; InputError where they are not."""

    kind: Literal["char"]
    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for token in self.tokens:
            if token in seen:
                raise InputError(f"the vocabulary has {token!r} twice; every token needs a text of its own")
            seen.add(token)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of `text`, (len(text),); InputError naming the first character the vocabulary lacks."""
        for index, token in enumerate(self.tokens):
            if len(token) != 1:
                raise InputError(
                    f"this vocabulary is not of single characters: token {index} is {token!r}; "
                    "give token ids from the tokenizer that the model was trained with"
                )
        for position, character in enumerate(text):
            if character not in self._ids:
                raise InputError(
                    f"the vocabulary has no {character!r} (position {position} of the text); "
                    "leave it out or replace it with a character that the model knows"
                )
        return np.array([self._ids[character] for character in text], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; InputError naming the first id that is out of range."""
        texts, count = [], len(self.tokens)
        for index in ids:
            if not 0 <= index < count:
                raise InputError(f"token id {index} is out of range: the vocabulary has ids 0 to {count - 1}")
            texts.append(self.tokens[index])
        return "".join(texts)

    def save(self, path: Path) -> None:
        """Write tokenizer.json; the same tokenizer gives the same bytes."""
        with explained(f"cannot write {path.name}"):
            path.write_bytes((json.dumps(codec.encode(self)) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read tokenizer.json; BundleError in one sentence where it is missing or not right."""
        try:
            if (size_bytes := path.stat().st_size) > SIZE_LIMIT_BYTES:
                raise BundleError(f"{path} has {size_bytes} bytes, more than the limit of {SIZE_LIMIT_BYTES}")
            return codec.decode(cls, json.loads(path.read_bytes()), "tokenizer")
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not a tokenizer of this format: {error}; export the bundle again") from error
