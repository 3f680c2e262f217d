"""Exact search: equal to a stable sort of all float64 scores, whatever the chunk, with ties in the data."""

import tracemalloc

import numpy as np
import pytest
import torch

from koret.retrieval.exact import WAYS, find_top_k, multiply, rank_scores


def _vectors(count, seed, dimensions=48):
    vectors = np.random.default_rng(seed).standard_normal((count, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def corpus():
    vectors = _vectors(1500, 0)
    vectors[300:700] = vectors[7]  # 400 duplicates: more than k, across several chunks
    vectors[900:1000] = vectors[0:100]
    return vectors


def _sort_everything(queries, corpus, k):
    scores = np.einsum("qd,nd->qn", queries.astype(np.float64), corpus.astype(np.float64))
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("chunk,query_chunk", [(7, 3), (64, 50), (1500, 512), (1499, 1), (100000, 512)])
def test_equals_a_stable_sort_for_every_chunk_size(corpus, chunk, query_chunk):
    queries = np.concatenate([corpus[:60], _vectors(20, 1)])
    rows, scores = find_top_k(queries, corpus, 30, chunk=chunk, query_chunk=query_chunk)
    assert (rows == _sort_everything(queries, corpus, 30)).all()
    assert np.allclose(scores, np.take_along_axis(queries @ corpus.T, rows, axis=1), atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3, 64, 65])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_products_are_those_of_every_pair(count, size):
    rng = np.random.default_rng(count + size)
    queries, block = (rng.standard_normal((n, 33)).astype(np.float32) for n in (count, size))
    block.setflags(write=False)
    products = multiply(queries, block)
    assert products.shape == (count, size) and products.flags.c_contiguous
    assert products == pytest.approx(queries.astype(np.float64) @ block.T.astype(np.float64), abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count,size", [(1, 8), (1, 4099), (5, 64), (64, 4100)])
def test_every_way_of_multiplying_gives_the_same_products(way, count, size):
    queries, block = _vectors(count, 1), _vectors(size, 2)
    products = way(torch.from_numpy(queries), torch.from_numpy(block)).numpy()
    assert products.shape == (count, size) and products.flags.c_contiguous
    assert products == pytest.approx(queries.astype(np.float64) @ block.T.astype(np.float64), abs=1e-6)
    assert multiply(queries, block) == pytest.approx(products, abs=1e-6)


def test_duplicates_come_in_corpus_order(corpus):
    rows, scores = find_top_k(corpus[7:8], corpus, 20)
    assert rows[0].tolist() == [7, *range(300, 319)]
    assert len(set(scores[0].tolist())) == 1


def test_k_beyond_the_corpus_gives_the_whole_corpus(corpus):
    rows, scores = find_top_k(corpus[:3], corpus[:5], 100)
    assert rows.shape == scores.shape == (3, 5)
    assert sorted(rows[0].tolist()) == [0, 1, 2, 3, 4]


def test_vectors_of_any_length_are_compared_by_dot_product():
    queries, corpus = _vectors(10, 2) * 100, _vectors(200, 3) * np.linspace(0.01, 50, 200, dtype=np.float32)[:, None]
    assert (find_top_k(queries, corpus, 9, chunk=13)[0] == _sort_everything(queries, corpus, 9)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_named(corpus, bad):
    corpus[1203, 5] = bad
    with pytest.raises(ValueError, match="corpus vectors hold NaN or infinite values, the first in row 1203"):
        find_top_k(corpus[:2], corpus, 5, chunk=100)
    with pytest.raises(ValueError, match="query vectors .* row 3"):
        find_top_k(corpus[1200:], corpus[:100], 5)


def test_clear_errors(corpus):
    with pytest.raises(ValueError, match="corpus is empty"):
        find_top_k(corpus[:2], corpus[:0], 5)
    with pytest.raises(ValueError, match="do not fit together"):
        find_top_k(corpus[:2, :3], corpus, 5)
    with pytest.raises(ValueError, match="k must be at least 1"):
        find_top_k(corpus[:2], corpus, 0)


def test_no_queries_give_an_empty_result(corpus):
    assert find_top_k(corpus[:0], corpus, 5)[0].shape == (0, 5)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """A memory-mapped corpus of 200,000 rows (77 MB) is searched in a few chunks' worth of memory."""
    path = tmp_path / "corpus.npy"
    corpus = np.lib.format.open_memmap(path, "w+", np.float32, (200_000, 96))
    for i in range(0, len(corpus), 20_000):
        corpus[i : i + 20_000] = _vectors(20_000, i, 96)
    queries = np.array(corpus[::10_000])
    tracemalloc.start()
    rows, _ = find_top_k(queries, np.load(path, mmap_mode="r"), 10, chunk=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (rows[:, 0] == np.arange(0, 200_000, 10_000)).all()
    assert peak < 8_000_000


def test_rank_scores_orders_ties_by_position():
    scores = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert rank_scores(scores, 4).tolist() == [1, 3, 2, 4]
    assert rank_scores(scores, 10).tolist() == [1, 3, 2, 4, 5, 0]
