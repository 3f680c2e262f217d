"""Shards of many sources -> the three tables of one data set, with row numbers that count through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from koret.data.korquad import REPEATED
from koret.data.prepare import SHARDS, SourceReport, shard_path

IDENTICAL, CONFLICTING = REPEATED, "duplicate id, conflicting"
# Which table's rows a column counts.
_COUNTS = {
    "articles": {"first_passage": "passages"},
    "passages": {"article": "articles"},
    "questions": dict.fromkeys(("gold", "best", "known", "negatives"), "passages") | {"article": "articles"},
}


def assemble(staging: Path, target: Path, reports: Sequence[SourceReport]) -> str:
    """Join the shards in ``staging`` into articles, passages, questions (.arrow) and rejects.jsonl in ``target``.

    Questions with the same id are all kept when they are one question with different passages, but only the first of
    those with the same passages, and none when they are different questions; ``reports`` are corrected for it.
    Returns a SHA-256 over the tables. Memory holds one batch at a time.
    """
    shards = range(len(reports))
    drop = _find_duplicates(staging, shards)
    digest = hashlib.sha256()
    starts = {
        "articles": list(accumulate((report.articles_kept for report in reports), initial=0)),
        "passages": list(accumulate((report.passages for report in reports), initial=0)),
    }
    for name in SHARDS:
        gone = drop if name == "questions" else {}
        digest.update(_join(staging, shards, target / f"{name}.arrow", name, starts, gone))
    with open(target / "rejects.jsonl", "wb") as file:
        for number, report in enumerate(reports):
            file.write(shard_path(staging, number, "rejects").read_bytes())
            for row in sorted(drop.get(number, {})):
                file.write(msgspec.json.encode(_count_duplicate(report, drop[number][row])) + b"\n")
    return digest.hexdigest()


class _Duplicate(NamedTuple):
    """A question that is left out because its id comes twice."""

    id: str
    article: str
    reason: str


class _Place(NamedTuple):
    """Where a question whose id comes twice stands, and what it asks for."""

    shard: int
    row: int
    title: str
    question: int
    answer: int | None  # None: the source gives none
    passages: tuple[frozenset[int], ...]  # text keys of its gold passages and of its negatives


def _count_duplicate(report: SourceReport, found: _Duplicate) -> dict[str, object]:
    report.questions_kept -= 1
    report.questions_rejected += 1
    report.reasons[found.reason] = report.reasons.get(found.reason, 0) + 1
    path, _, member = report.name.partition("!")
    return {
        "file": path, "member": member, "article": found.article, "position": -1, "id": found.id, "questions": 1,
        "reason": found.reason,
    }  # fmt: skip


def _find_duplicates(staging: Path, shards: range) -> dict[int, dict[int, _Duplicate]]:
    """Question rows to leave out: shard -> row -> what it is.

    64 bits of every id are kept in mind; the rest is read again where those come twice.
    """
    hashes = [np.fromiter(map(hash, _read_column(staging, number, "id")), np.int64) for number in shards]
    values, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *hashes]), return_counts=True)
    places: dict[str, list[_Place]] = {}
    for number in shards:
        rows = np.flatnonzero(np.isin(hashes[number], values[counts > 1])).tolist()
        if not rows:
            continue
        titles = _read_column(staging, number, "title", "articles")
        keys = np.fromiter(_iterate_column(staging, number, "text_key", "passages"), np.int64)
        for row, found in zip(rows, _read_rows(staging, number, rows), strict=True):
            passages = tuple(frozenset(keys[found[name]].tolist()) for name in ("gold", "negatives"))
            answer = found["answer_key"] if found["answered"] else None
            place = _Place(number, row, titles[found["article"]], found["question_key"], answer, passages)
            places.setdefault(found["id"], []).append(place)
    drop: dict[int, dict[int, _Duplicate]] = {}
    for identity, found in places.items():
        same = len({p.question for p in found}) == 1 and len({p.answer for p in found} - {None}) < 2
        first = {p.passages: p for p in reversed(found)}
        for place in found if len(found) > 1 else ():
            if not same or first[place.passages] is not place:
                duplicate = _Duplicate(identity, place.title, IDENTICAL if same else CONFLICTING)
                drop.setdefault(place.shard, {})[place.row] = duplicate
    return drop


def _read_column(staging: Path, number: int, column: str, table: str = "questions") -> list:
    return list(_iterate_column(staging, number, column, table))


def _iterate_column(staging: Path, number: int, column: str, table: str) -> Iterator:
    for batch in _read(shard_path(staging, number, table)):
        yield from batch.column(column).to_pylist()


def _read_rows(staging: Path, number: int, rows: Sequence[int]) -> Iterator[dict]:
    """What tells questions with the same id apart, of the given rows (ascending)."""
    names = ["id", "question_key", "answer_key", "answered", "article", "gold", "negatives"]
    start, wanted = 0, np.array(rows, np.int64)
    for batch in _read(shard_path(staging, number, "questions")):
        own = wanted[(wanted >= start) & (wanted < start + batch.num_rows)] - start
        start += batch.num_rows
        if len(own):
            yield from _take(batch.select(names), own).to_pylist()


def _join(
    staging: Path, shards: range, path: Path, name: str, starts: dict[str, list[int]], drop: dict[int, dict]
) -> bytes:
    with _HashedFile(path) as file, pa.ipc.new_file(pa.PythonFile(file, "w"), SHARDS[name]) as writer:
        for number in shards:
            row = 0
            for batch in _read(shard_path(staging, number, name)):
                shifts = {column: starts[table][number] for column, table in _COUNTS[name].items()}
                columns = [_shift(batch.column(c), shifts.get(c, 0)) for c in SHARDS[name].names]
                moved = pa.record_batch(columns, schema=SHARDS[name])
                gone = [r - row for r in drop.get(number, ()) if row <= r < row + batch.num_rows]
                row += batch.num_rows
                writer.write_batch(_without(moved, gone) if gone else moved)
    return file.digest.digest()


def _shift(column: pa.Array, by: int) -> pa.Array:
    if by == 0:
        return column
    if pa.types.is_list(column.type):
        return pa.ListArray.from_arrays(column.offsets, _shift(column.values, by))
    kind = np.dtype(column.type.to_pandas_dtype())  # (to_numpy would import pandas: 50 MB)
    numbers = np.frombuffer(column.buffers()[1], kind, len(column), column.offset * kind.itemsize)
    return pa.Array.from_buffers(column.type, len(column), [None, pa.py_buffer(numbers + by)])


def _without(batch: pa.RecordBatch, rows: list[int]) -> pa.RecordBatch:
    return _take(batch, np.setdiff1d(np.arange(batch.num_rows), rows))


def _take(batch: pa.RecordBatch, rows: np.ndarray) -> pa.RecordBatch:
    return batch.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)]))


def _read(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a shard, read one at a time (a memory map would count as memory in use)."""
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
            pa.default_memory_pool().release_unused()


class _HashedFile:
    """A file object for Arrow that hashes what is written."""

    def __init__(self, path: Path) -> None:
        self._file, self.digest, self.closed = open(path, "wb"), hashlib.sha256(), False
        self.tell: Callable[[], int] = self._file.tell
        self.flush: Callable[[], None] = self._file.flush

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
