"""Vectors of bits and bytes against brute force and sentence-transformers' own quantisation."""

from __future__ import annotations

import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings

from koret.evaluation.tasks import RetrievalTask
from koret.export import binary
from koret.retrieval.exact import find_top_k


def make_vectors(seed: int, rows: int, width: int = 24) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_products_of_signs_are_hamming_distances_of_the_librarys_bits():
    vectors = make_vectors(0, 20)
    bits = np.unpackbits(quantize_embeddings(vectors, precision="ubinary"), axis=1).astype(int)
    hamming = (bits[:, None] != bits[None]).sum(axis=2)
    assert np.array_equal(binary.sign(vectors) @ binary.sign(vectors).T, 24 - 2 * hamming)


def test_rounding_moves_no_number_by_more_than_half_a_step():
    vectors = make_vectors(1, 50)
    step = np.abs(vectors).max(axis=1, keepdims=True) / 127
    assert (np.abs(binary.quantise(vectors) - vectors) <= step / 2 + 1e-7).all()


def test_rescoring_orders_the_candidates_by_their_own_products():
    queries, corpus = make_vectors(2, 6), make_vectors(3, 300)
    found = binary.rescore(queries, corpus, corpus)
    for query, rows in zip(queries, found, strict=True):
        bits = (np.sign(query) == np.sign(corpus)).sum(axis=1)
        candidates = sorted(range(300), key=lambda i: (-bits[i], i))[:40]
        assert rows.tolist() == sorted(candidates, key=lambda i: -float(query @ corpus[i]))[:10]


def test_koret_s_int8_index_finds_what_exact_search_finds():
    queries, corpus = make_vectors(4, 5), make_vectors(5, 200)
    half = corpus.astype(np.float16).astype(np.float32)
    assert np.array_equal(binary.search_folder(queries, corpus, "int8"), find_top_k(queries, half, 10)[0])


def test_every_way_is_measured_against_the_original_with_its_bytes():
    queries, corpus = make_vectors(6, 40), make_vectors(7, 80)
    corpus[:40] = queries + 0.05 * make_vectors(8, 40)
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    names = [str(i) for i in range(80)]
    task = RetrievalTask(
        "toy", names[:40], names[:40], names, names, [np.array([i]) for i in range(40)], np.arange(40), np.full(80, -1)
    )
    ways = {way.name: way for way in binary.measure_stored(task, queries, corpus, np.ones(40))}
    assert ways["float32"].ndcg == 1 and ways["float32"].difference.mean == 0
    assert (ways["binary"].searched, ways["binary"].kept) == (3, 3)
    assert (ways[binary.RECOMMENDED].searched, ways[binary.RECOMMENDED].kept) == (3, 3 + 24 + 4)
    assert ways["binary, float32 rescoring"].ndcg >= ways["binary"].ndcg
    assert ways["binary"].difference.mean == ways["binary"].ndcg - 1
