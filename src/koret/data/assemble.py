"""Shards of many sources -> the three tables of one data set, with row numbers that count through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from koret.data.prepare import SHARDS, SourceReport, shard_path

IDENTICAL, CONFLICTING = "duplicate id, identical", "duplicate id, conflicting"
# Which table's rows a column counts.
_COUNTS = {
    "articles": {"first_passage": "passages"},
    "passages": {"article": "articles"},
    "questions": dict.fromkeys(("gold", "best", "known", "negatives"), "passages") | {"article": "articles"},
}


def assemble(staging: Path, target: Path, reports: Sequence[SourceReport]) -> str:
    """Join the shards in ``staging`` into articles, passages, questions (.arrow) and rejects.jsonl in ``target``.

    A question id that comes twice keeps its first occurrence when all are the same question and none when they
    differ; ``reports`` are corrected for it. Returns a SHA-256 over the tables. Memory holds one batch at a time.
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
                file.write(msgspec.json.encode(_count_duplicate(report, *drop[number][row])) + b"\n")
    return digest.hexdigest()


def _count_duplicate(report: SourceReport, identity: str, reason: str) -> dict[str, object]:
    report.questions_kept -= 1
    report.questions_rejected += 1
    report.reasons[reason] = report.reasons.get(reason, 0) + 1
    path, _, member = report.name.partition("!")
    return {
        "file": path, "member": member, "article": "", "position": -1, "id": identity, "questions": 1, "reason": reason,
    }  # fmt: skip


def _find_duplicates(staging: Path, shards: range) -> dict[int, dict[int, tuple[str, str]]]:
    """Question rows to leave out: shard -> row -> (id, reason)."""
    seen: dict[str, list[tuple[int, int, tuple]]] = {}
    first: dict[str, tuple[int, int, tuple]] = {}
    for number in shards:
        row = 0
        for batch in _read(shard_path(staging, number, "questions")):
            keys = zip(batch.column("question_key").to_pylist(), batch.column("answer_key").to_pylist(), strict=True)
            for identity, key in zip(batch.column("id").to_pylist(), keys, strict=True):
                here = (number, row, key)
                if identity in first:
                    seen.setdefault(identity, [first[identity]]).append(here)
                else:
                    first[identity] = here
                row += 1
    drop: dict[int, dict[int, tuple[str, str]]] = {}
    for identity, places in seen.items():
        same = len({key for *_, key in places}) == 1
        for number, row, _ in places[1:] if same else places:
            drop.setdefault(number, {})[row] = (identity, IDENTICAL if same else CONFLICTING)
    return drop


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
    keep = np.setdiff1d(np.arange(batch.num_rows), rows)
    return batch.take(pa.Array.from_buffers(pa.int64(), len(keep), [None, pa.py_buffer(keep)]))


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
