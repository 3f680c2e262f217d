"""Rows of mapped tables: the right ones, in the order asked, without a copy of the rest."""

import numpy as np
import pyarrow as pa
import pytest

from koret.data.columns import read_column, read_lists, take_rows


@pytest.fixture
def table():
    """Rows 0 .. 99 in batches of different sizes, one of them empty."""
    schema = pa.schema([("text", pa.string()), ("gold", pa.list_(pa.int64()))])
    edges = [0, 1, 30, 30, 75, 100]
    batches = [
        pa.record_batch([pa.array([f"글 {i}" for i in r]), pa.array([[i] * (i % 3) for i in r])], schema=schema)
        for r in (range(a, b) for a, b in zip(edges, edges[1:], strict=False))
    ]
    return pa.Table.from_batches(batches, schema)


def test_rows_are_those_of_take(table):
    rng = np.random.default_rng(0)
    for rows in ([], [0], [99, 0], [5, 5, 29, 30], range(100), *(rng.integers(0, 100, 40) for _ in range(20))):
        assert take_rows(table, np.array(rows, np.int64)).equals(table.take(pa.array(rows, pa.int64())))
    assert take_rows(table.slice(100), np.array([], np.int64)).num_rows == 0


def test_numbers_are_those_of_to_numpy(table):
    lists = read_lists(table.slice(28), "gold")
    assert [list(lists[i]) for i in range(len(lists))] == table.slice(28).column("gold").to_pylist()
    nulls = pa.chunked_array(
        [pa.array([[1, 2], None, []], pa.list_(pa.int64())), pa.array([None, [3]], pa.list_(pa.int64()))]
    )
    lists = read_lists(pa.table({"gold": nulls}), "gold")
    assert [list(lists[i]) for i in range(len(lists))] == [row or [] for row in nulls.to_pylist()]
    for kind in (pa.int32(), pa.int64(), pa.uint8()):
        numbers = pa.chunked_array([pa.array(range(5), kind), pa.array([], kind), pa.array([9, 7, 8], kind).slice(1)])
        for column in (numbers, numbers.slice(3), numbers.slice(8), pa.chunked_array([], kind)):
            found = read_column(pa.table({"n": column}), "n")
            assert found.dtype == np.int64 and found.tolist() == column.to_pylist()


@pytest.mark.parametrize("rows", [[100], [-1], [3, 100]])
def test_rows_that_are_not_there_are_refused(table, rows):
    with pytest.raises(IndexError):
        take_rows(table, rows)
    with pytest.raises(IndexError):
        take_rows(table.slice(100), [0])


def test_texts_of_more_than_two_gigabytes():
    """Arrow's own take would join them first, which strings of 32-bit offsets do not allow."""
    chunk = pa.array(["가" * 350_000] * 3)
    table = pa.table({"text": pa.chunked_array([chunk] * 720)})
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert [len(text) for text in take_rows(table, [2159, 0]).column("text").to_pylist()] == [350_000] * 2
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 20_000_000
