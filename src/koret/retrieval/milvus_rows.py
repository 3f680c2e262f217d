"""The rows of a Milvus collection: passages as its fields, and conditions as the engine's expressions."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from koret.retrieval.store import Condition, Entry, Value, name_kind

LONGEST = 65_535  # bytes of a text field: the engine's limit
ENTRY = ("id", "document", "heading", "text", "version", "metadata")
_SPECIAL = re.compile(r"\W")


def translate(where: Sequence[Condition]) -> str:
    """Conditions as an expression of the engine with the meaning of ``Condition.accept``.

    Numbers, texts and truth values lie under different keys of the JSON field (``_split_values``), so they never meet;
    'not' is put around a whole test of presence and value, because engines disagree about != on what is missing.
    Collections made before truth values had keys of their own hold them as numbers, which no condition finds.
    """
    return " and ".join(_translate(condition) for condition in where)


def _translate(condition: Condition) -> str:
    field = f'values["{_name_key(condition.key, condition.value)}"]'
    sign = "==" if condition.sign in ("=", "!=") else condition.sign
    test = f"(exists {field} and {field} {sign} {_quote(condition.value)})"
    return f"(not {test})" if condition.sign == "!=" else test


def _name_key(key: str, value: Value) -> str:
    """A key without characters that mean something to the engine; one to one."""
    kind = {"text": "t", "truth": "b", "number": "n"}[name_kind(value)]
    return kind + _SPECIAL.sub(lambda found: f"%{ord(found[0]):x};", key)


def _quote(value: Value) -> str:
    if not isinstance(value, str):
        return repr(_plain_number(value))
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        value = value.replace(plain, escaped)
    return f'"{value}"'


def _plain_number(value: int | float | bool) -> int | float:
    """Truth values as 1 and 0; numbers stay within what the engine's JSON can hold."""
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else float(value)
    return math.copysign(np.finfo(np.float64).max.item(), value) if math.isinf(value) else value


def _split_values(entry: Entry) -> dict[str, Value]:
    """What conditions look at; a NaN meets what a missing value meets and is left out."""
    values = {**entry.metadata, "document": entry.document, "heading": entry.heading}
    return {
        _name_key(key, value): value if isinstance(value, str) else _plain_number(value)
        for key, value in values.items()
        if value == value
    }


def make_rows(entries: Sequence[Entry], vectors: np.ndarray) -> list[dict[str, Any]]:
    parts = collections.Counter(entry.document for entry in entries)
    numbers: dict[str, int] = collections.defaultdict(int)
    rows, keys = [], set()
    for entry, vector in zip(entries, vectors, strict=True):
        numbers[entry.document] += 1
        check_length(entry)
        row = _list_texts(entry)
        row |= {"key": hash_name(entry.id), "owner": hash_name(entry.document), "values": _split_values(entry)}
        keys.add(row["key"])
        rows.append(row | {"number": numbers[entry.document], "parts": parts[entry.document], "vector": vector})
    if len(keys) < len(rows):
        raise ValueError("two passages have the same id")
    return rows


def _list_texts(entry: Entry) -> dict[str, str]:
    return {name: getattr(entry, name) for name in ENTRY} | {"metadata": json.dumps(entry.metadata, ensure_ascii=False)}


def check_length(entry: Entry) -> None:
    """Raises ValueError for a passage with a text longer than the engine holds."""
    for name, text in _list_texts(entry).items():
        if (size := len(text.encode())) > LONGEST:
            raise ValueError(f"{name} of {entry.id[:80]!r} takes {size:,} bytes; Milvus holds at most {LONGEST:,}")


def make_entry(row: dict[str, Any]) -> Entry:
    return Entry(**{name: row[name] for name in ENTRY} | {"metadata": json.loads(row["metadata"])})


def agree(rows: Sequence[tuple[str, int]]) -> str | None:
    """The version of a document from (version, parts) of its passages; None unless all of one version are there."""
    return rows[0][0] if len(set(rows)) == 1 and rows[0][1] == len(rows) else None


def hash_name(name: str) -> str:
    """A key without characters that need quoting, whatever the id holds."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
