"""Columns of the prepared tables as NumPy arrays; lists of different lengths as offsets and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Csr:
    """Lists of int64 of different lengths: list ``i`` is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: np.ndarray
    values: np.ndarray

    @classmethod
    def from_lists(cls, lists: Sequence[Iterable[int]]) -> Csr:
        rows = [np.fromiter(items, dtype=np.int64) for items in lists]
        offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        return cls(offsets, np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))

    @classmethod
    def from_groups(cls, groups: np.ndarray, values: np.ndarray) -> Csr:
        """The different values of every group, ascending. Groups are numbered 0 .. max without gaps."""
        order = np.lexsort((values, groups))
        groups, values = groups[order], values[order]
        first = np.ones(len(groups), dtype=bool)
        first[1:] = (groups[1:] != groups[:-1]) | (values[1:] != values[:-1])
        counts = np.bincount(groups[first])
        return cls(np.cumsum(np.concatenate([[0], counts]), dtype=np.int64), values[first].astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def take(self, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in ``lists``, value) of every value of the given lists."""
        starts = self.offsets[lists]
        lengths = self.offsets[np.asarray(lists) + 1] - starts
        owner = np.repeat(np.arange(len(lengths)), lengths)
        inside = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return owner, self.values[np.repeat(starts, lengths) + inside]


def make_places(rows: np.ndarray) -> pa.Array:
    """Row numbers for Arrow to take by. Its own conversions, here and below, import pandas where it is: 45 MB."""
    rows = np.ascontiguousarray(rows, dtype=np.int64)
    return pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)])


def read_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Integers, none of them null, as (N,) int64."""
    kind = np.dtype(str(column.type))
    parts = [
        np.frombuffer(chunk.buffers()[1], kind)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.zeros(0, kind)
    return whole.astype(np.int64, copy=False)


def read_column(table: pa.Table, name: str) -> np.ndarray:
    """An integer column as (N,) int64."""
    return read_numbers(table.column(name))


def read_lists(table: pa.Table, name: str) -> Csr:
    """A column of integer lists; a null is an empty list."""
    column = table.column(name)
    zero = make_places(np.zeros(1))[0]
    lengths = read_numbers(pc.fill_null(pc.list_value_length(column).cast(zero.type), zero))
    values = read_numbers(pc.list_flatten(column))
    return Csr(np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64), values)


def take_rows(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The given rows of a table, in the order given, copying nothing else.

    ``Table.take`` joins all chunks of a string column first: a copy of every text of a mapped set for a few rows, and
    an error where the texts are more than 2 GB.
    """
    rows = np.asarray(rows, dtype=np.int64)
    batches = table.to_batches()
    if not batches:
        return table.take(make_places(rows))
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    cuts = [0, *np.searchsorted(ascending, starts[1:-1]), len(rows)]
    parts = [
        batch.take(make_places(ascending[first:last] - start))
        for batch, start, first, last in zip(batches, starts, cuts, cuts[1:], strict=False)
        if first < last
    ]
    taken = pa.Table.from_batches(parts, table.schema)
    return taken if (rows == ascending).all() else taken.take(make_places(np.argsort(order)))
