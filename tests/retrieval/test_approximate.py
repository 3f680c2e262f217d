"""The approximate index: its recall is what it says, filters stay exact, additions and deletions are seen at once."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from test_folder import DIMENSIONS, ids, make_entries, make_store, make_vectors

from koret.retrieval import approximate as approximate_module
from koret.retrieval.folder import Damaged, FolderStore
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


@pytest.mark.parametrize("name", ["ivf.faiss", "ivf.json"])
def test_a_file_of_the_same_size_with_another_content_is_found(store, tmp_path, name):
    store.build_approximate(make_vectors(20))
    assert store.verify() == []
    file = tmp_path / "i" / "approximate" / name
    content = bytearray(file.read_bytes())
    if name == "ivf.json":
        content = content.replace(b'"cells"', b'"cellz"')
    else:
        content[len(content) // 2 : len(content) // 2 + 1000] = bytes(1000)
    file.write_bytes(content)
    with pytest.raises(Damaged, match=f"{name}.*content changed.*--approximate"):
        store.verify()


def test_one_written_before_there_were_checksums_is_searched_and_named_as_unchecked(store, tmp_path):
    info = store.build_approximate(make_vectors(20))
    file = tmp_path / "i" / "approximate" / "ivf.json"
    file.write_text(json.dumps({k: v for k, v in info.items() if k != "sha256"}))
    again = FolderStore.open(tmp_path / "i")
    assert again.approximate["recall@10"] == info["recall@10"]
    assert again.verify() == ["approximate/ivf.faiss", "approximate/ivf.json"]


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_build_killed_before_its_recall_is_known_leaves_the_search_as_it_was(store, tmp_path, monkeypatch):
    def die(*arguments):
        raise Killed

    queries = make_clusters(50, seed=7)
    with monkeypatch.context() as broken, pytest.raises(Killed):
        broken.setattr(approximate_module, "tune", die)
        broken.setattr(approximate_module.files.shutil, "rmtree", lambda *a, **k: None)  # the dead tidy nothing up
        store.build_approximate(queries)
    store.close()
    again = FolderStore.open(tmp_path / "i")
    assert not (tmp_path / "i" / "approximate").exists() and again.approximate is None
    assert again.search(queries, 10) == search_exactly(again, queries)
    assert again.build_approximate(queries)["recall@10"] >= 0.9
    assert not list((tmp_path / "i").glob(".*"))


def test_one_of_unknown_recall_counts_as_none(store, tmp_path):
    """As older versions left it when they were killed: published, one cell looked at, nothing measured."""
    info = store.build_approximate(make_clusters(100, seed=1))
    store.close()
    untuned = {k: v for k, v in info.items() if k not in ("recall@10", "queries", "sha256")} | {"nprobe": 1}
    (tmp_path / "i" / "approximate" / "ivf.json").write_text(json.dumps(untuned))
    again, queries = FolderStore.open(tmp_path / "i"), make_clusters(50, seed=8)
    assert again.approximate is None and again.search(queries, 10) == search_exactly(again, queries)
    assert again.build_approximate(make_clusters(100, seed=1)) == info and again.verify() == []


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
