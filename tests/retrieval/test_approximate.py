"""The approximate index: its recall is what it says, filters stay exact, additions and deletions are seen at once."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from test_folder import DIMENSIONS, ids, make_entries, make_store, make_vectors

from koret.retrieval.folder import FolderStore
from koret.retrieval.store import parse_condition

pytest.importorskip("faiss")


def make_clusters(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, DIMENSIONS))
    vectors = centres[rng.integers(0, 40, count)] + 0.5 * rng.normal(size=(count, DIMENSIONS))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def store(tmp_path) -> FolderStore:
    store = make_store(tmp_path / "i", "float16")
    entries, vectors = make_entries(4000, 1), make_clusters(4000)
    for start in range(0, 4000, 1000):
        store.add(entries[start : start + 1000], vectors[start : start + 1000])
    return store


def search_exactly(store: FolderStore, queries: np.ndarray, k: int = 10):
    return store._search_dense(store._segments, queries, k)


def test_the_recall_is_what_it_says_and_scores_are_exact(store, tmp_path):
    info = store.build_approximate(make_clusters(200, seed=1))
    assert 1 <= info["nprobe"] < info["cells"] and info["recall@10"] >= 0.9
    queries = make_clusters(300, seed=2)
    exact, found = search_exactly(store, queries), store.search(queries, 10)
    recall = np.mean([len(set(ids(a)) & set(ids(b))) / 10 for a, b in zip(exact, found, strict=True)])
    assert recall == pytest.approx(info["recall@10"], abs=0.03) and recall < 1
    truth = [{e.id: s for e, s in f} for f in search_exactly(store, queries[:20], 4000)]
    assert all(s == pytest.approx(own[e.id], abs=1e-12) for own, f in zip(truth, found, strict=False) for e, s in f)
    store.close()
    again = FolderStore.open(tmp_path / "i")
    assert again.search(queries, 10) == found and again.approximate == info


def test_filters_are_exact_beside_an_approximate_index(store):
    store.build_approximate(make_clusters(100, seed=1))
    where = [parse_condition("year=1993"), parse_condition("kind=짝")]
    queries = make_clusters(50, seed=3)
    assert store.search(queries, 10, where) == store._search_dense(store._segments, queries, 10, where)


def test_additions_changes_and_deletions_are_seen(store):
    store.build_approximate(make_clusters(100, seed=1))
    query = make_clusters(1, seed=4)
    first = store.search(query, 3)[0]
    store.delete([first[0][0].document])
    assert ids(store.search(query, 2)[0]) == ids(first[1:])
    new = make_entries(1, 1, first=9000)
    store.add(new, query)
    assert ids(store.search(query, 2)[0]) == [new[0].id, first[1][0].id]
    store.compact()  # every segment it knew is gone
    assert ids(store.search(query, 2)[0]) == [new[0].id, first[1][0].id]
    store.build_approximate(make_clusters(100, seed=1))
    assert ids(store.search(query, 2)[0]) == [new[0].id, first[1][0].id]


def test_when_most_is_deleted_results_are_still_complete(store):
    store.build_approximate(make_clusters(100, seed=1))
    store.delete([f"문서{d}" for d in range(4000) if d % 100])
    query = make_clusters(5, seed=5)
    assert [ids(f) for f in store.search(query, 40)] == [ids(f) for f in search_exactly(store, query, 40)]


def test_a_damaged_file_is_named(store, tmp_path):
    store.build_approximate(make_vectors(20))
    store.close()
    file = tmp_path / "i" / "approximate" / "ivf.faiss"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="ivf.faiss.*--approximate"):
        FolderStore.open(tmp_path / "i")


def test_without_faiss_building_names_the_extra_and_searching_goes_on_exactly(store, tmp_path, monkeypatch):
    store.build_approximate(make_clusters(100, seed=1))
    queries = make_clusters(10, seed=6)
    expected = search_exactly(store, queries)
    store.close()
    monkeypatch.setitem(sys.modules, "faiss", None)
    again = FolderStore.open(tmp_path / "i")
    assert again.search(queries, 10) == expected
    with pytest.raises(RuntimeError, match=r"koret\[faiss\]"):
        again.build_approximate(queries)


def test_an_empty_index_has_nothing_to_approximate(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        make_store(tmp_path / "e").build_approximate(make_vectors(2))
