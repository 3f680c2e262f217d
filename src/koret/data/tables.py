"""The three tables of a prepared data set, written batch by batch from plain lists, without loading pandas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ARTICLES = pa.schema(
    [
        ("title", pa.string()),
        ("url", pa.string()),
        ("source", pa.string()),  # file, or zip!member
        ("first_passage", pa.int64()),  # its passages are rows first_passage .. first_passage + passage_count - 1
        ("passage_count", pa.int32()),
        ("characters", pa.int64()),  # of clean text
        ("html", pa.bool_()),
    ]
)
PASSAGES = pa.schema(
    [
        ("article", pa.int64()),  # row in ARTICLES
        ("heading", pa.string()),  # 제목 > 절, empty for ready-made paragraphs
        ("text", pa.string()),  # what is encoded is heading + newline + text (passages.join_heading)
        ("start", pa.int64()),  # code points in the article's clean text (in the paragraph for plain ones)
        ("end", pa.int64()),
        ("tokens", pa.int32()),  # by the tokenizer the set was prepared with, heading included; -1 unknown
        ("text_key", pa.int64()),  # hash of the normalised text: equal texts have equal keys
    ]
)
QUESTIONS = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("article", pa.int64()),
        ("answers", pa.list_(pa.string())),  # clean texts, the first is the reference answer
        ("answer_kind", pa.string()),  # short | sentence | list | table
        ("gold", pa.list_(pa.int64())),  # every passage that overlaps an answer, ascending
        ("best", pa.int64()),  # the one with the largest overlap
        ("known", pa.list_(pa.int64())),  # gold plus same-article passages containing an answer text: never negatives
        ("negatives", pa.list_(pa.int64())),  # passages the source names as hard negatives
        ("question_key", pa.int64()),  # hash of the normalised question
        ("answer_key", pa.int64()),  # hash of the normalised reference answer
        ("answer_start", pa.int64()),  # in the article's clean text (paragraph's for plain ones); -1 unknown
        ("answer_end", pa.int64()),
    ]
)

_BATCH_CHARACTERS, _ROW_CHARACTERS = 1_000_000, 100  # of a batch; of the numbers in a row


def make_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow array of strings, integers, booleans or lists of them; no nulls.

    ``pa.array`` does the same but imports pandas when it is installed: 50 MB in every worker.
    """
    count = len(values)
    if pa.types.is_list(kind):
        offsets = pa.Array.from_buffers(pa.int32(), count + 1, [None, pa.py_buffer(_make_offsets(values))])
        return pa.ListArray.from_arrays(offsets, make_array([v for row in values for v in row], kind.value_type))
    if pa.types.is_string(kind):
        encoded = [value.encode() for value in values]
        buffers = _make_offsets(encoded), b"".join(encoded)
    elif pa.types.is_boolean(kind):
        buffers = (np.packbits(np.array(values, bool), bitorder="little"),)
    else:
        buffers = (np.array(values, kind.to_pandas_dtype()),)
    return pa.Array.from_buffers(kind, count, [None, *map(pa.py_buffer, buffers)])


def _make_offsets(values: Sequence[Any]) -> np.ndarray:
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    return offsets


class TableWriter:
    """Rows of one table, written to an Arrow IPC file in batches of a few megabytes."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows = 0
        self._schema = schema
        self._waiting: list[tuple[Any, ...]] = []
        self._characters = 0
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, schema)

    def append(self, row: tuple[Any, ...], characters: int = 0) -> int:
        """Add a row with about this many characters of text; returns its number."""
        self._waiting.append(row)
        self._characters += characters + _ROW_CHARACTERS
        self.rows += 1
        if self._characters > _BATCH_CHARACTERS:
            self._flush()
        return self.rows - 1

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        if self._waiting:
            columns = zip(zip(*self._waiting, strict=True), self._schema, strict=True)
            arrays = [make_array(values, field.type) for values, field in columns]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
            self._waiting, self._characters = [], 0
