"""What an index needs of a place that keeps passages and their vectors, and the conditions a search may set.

The folder index (``folder``) and the doors to database engines keep this contract, so that they give the same results
on the same data. Letters: Q queries, N passages, D dimensions, K results.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

Value = str | int | float | bool


class Entry(msgspec.Struct, frozen=True):
    """A passage as it is kept: what is encoded is ``passages.join_heading(heading, text)``."""

    id: str  # unique: the document's id, '#' and the passage's number in it, from 1
    document: str  # id of the document it was cut from
    heading: str  # 제목 > 절; may be empty
    text: str
    version: str  # hash of the whole document: equal versions need not be encoded again
    metadata: dict[str, Value] = {}


Found = list[tuple[Entry, float]]  # best first, with cosine similarities or BM25 scores


class Condition(msgspec.Struct, frozen=True):
    """One condition on a passage's metadata; 'document' and 'heading' are understood as keys too."""

    key: str
    sign: str  # = != < <= > >=
    value: Value

    def accept(self, values: dict[str, Value]) -> bool:
        """Whether ``values`` meet the condition; a missing key or a value of another type meets only '!='."""
        own = values.get(self.key)
        if own is None or name_kind(own) != name_kind(self.value):
            return self.sign == "!="
        return bool(_SIGNS[self.sign](own, self.value))


def name_kind(value: Value) -> str:
    """text, truth or number: only values of one kind are compared."""
    return "text" if isinstance(value, str) else "truth" if isinstance(value, bool) else "number"


def read_value(entry: Entry, key: str) -> Value | None:
    """The value a condition on ``key`` is tested against."""
    own = {"document": entry.document, "heading": entry.heading}
    return own.get(key, entry.metadata.get(key))


class Store(Protocol):
    """Passages with their vectors, kept safely.

    ``info`` is what the index wrote about itself when it was made (``index.IndexInfo`` as a plain dict).
    """

    info: dict[str, Any]

    def add(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        """Keep passages and their unit vectors (N, D) float32; once this returns, no crash loses them.

        All passages of a document come in one call and replace, in one step, those the document had.
        """

    def delete(self, documents: Sequence[str]) -> int:
        """Forget documents; returns how many passages went. Unknown documents are passed over."""

    def search(self, vectors: np.ndarray, k: int, where: Sequence[Condition] = ()) -> list[Found]:
        """The K passages of largest cosine for each of the query vectors (Q, D), among those that meet ``where``.

        Order is (score descending, id ascending).
        """

    def search_lexical(
        self, queries: Sequence[str], k: int, where: Sequence[Condition] = (), tokenizer: str | None = None
    ) -> list[Found]:
        """The K passages of largest BM25 score (``lexical.LexicalIndex``); those sharing no token are no results.

        ``tokenizer``: one of ``info["lexical"]``, by default the first. Raises ValueError for another one. Order is
        (score descending, id ascending).
        """

    def count(self) -> int:
        """How many passages are kept."""

    def find_versions(self, documents: Sequence[str]) -> list[str | None]:
        """The version kept of each document, None where it is unknown."""

    def list_documents(self) -> Iterator[str]:
        """The id of every document kept, in no particular order."""

    def close(self) -> None:
        """Let go of files and connections; the store cannot be used afterwards."""


_SIGNS = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(r"\s*([^=!<>\s](?:[^=!<>]*[^=!<>\s])?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
TEXT_KEYS = ("document", "heading", "title")  # text in every passage, whatever it looks like


def parse_condition(text: str) -> Condition:
    """``key=value``, ``key!=value``, ``year>=1990`` -> Condition.

    What a value stands for says ``parse_value``; one compared with ``TEXT_KEYS`` is text. Raises ValueError showing
    the forms.
    """
    found = _CONDITION.fullmatch(text)
    if not found or not found[3]:
        raise ValueError(f"cannot read the condition {text!r}; write key=value, key!=value or key>=number")
    key, sign, value = found.groups()
    return Condition(key, sign, _unquote(value) if key in TEXT_KEYS else parse_value(value))


def parse_value(text: str) -> Value:
    """What a value written as text stands for: true or false, a finite number, or (quoted, if need be) the text.

    A number is written as JSON writes it, so that none loses anything: 007, 1_990 and +5 are text.
    """
    if text in ("true", "false"):
        return text == "true"
    number = _NUMBER.fullmatch(text.strip())
    if number and math.isfinite(float(number[0])):
        return float(number[0]) if number[1] or number[2] else int(number[0])
    return _unquote(text)


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
