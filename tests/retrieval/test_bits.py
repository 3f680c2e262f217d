"""Vectors of bits: distances against a count by hand, candidates against brute force, recall as it is measured."""

from __future__ import annotations

import numpy as np
import pytest

from koret.retrieval import folder as folder_module
from koret.retrieval.approximate import measure_recall
from koret.retrieval.bits import NOWHERE, count_different, find_radius, pack_signs
from koret.retrieval.folder import FolderStore
from koret.retrieval.store import Entry, parse_condition


def draw(count: int, dimensions: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def name(count: int) -> list[Entry]:
    return [Entry(f"문서{i}#1", f"문서{i}", "", f"본문 {i}", "1", {"year": 1990 + i % 30}) for i in range(count)]


def make_store(path, entries, vectors, pieces: int = 1, lexical=()) -> FolderStore:
    store = FolderStore.create(path, {"dtype": "binary", "lexical": list(lexical)}, vectors.shape[1])
    for rows in np.array_split(np.arange(len(entries)), pieces):
        store.add([entries[i] for i in rows], vectors[rows])
    return store


def search_brutally(entries, vectors, query, k, wanted) -> list[tuple[str, float]]:
    """The nearest ``wanted`` by different signs, and all as near as the last of them, by their float16 vectors."""
    different = ((vectors > 0) != (query > 0)).sum(axis=1)
    near = different <= np.sort(different)[min(wanted, len(vectors)) - 1]
    kept = vectors.astype(np.float16).astype(np.float64) @ query.astype(np.float64)
    return sorted(((entries[i].id, kept[i]) for i in np.flatnonzero(near)), key=lambda hit: (-hit[1], hit[0]))[:k]


@pytest.mark.parametrize("dimensions", [1, 7, 64, 65, 100, 384])
def test_different_bits_are_counted(dimensions):
    vectors, query = draw(300, dimensions), draw(1, dimensions, seed=1)
    vectors[3, 0] = 0.0  # zero counts as not above zero
    bits, wanted = pack_signs(vectors), pack_signs(query)[:, 0]
    assert bits.shape == (-(-dimensions // 64), 300) and bits.dtype == np.uint64
    assert count_different(bits, wanted).tolist() == ((vectors > 0) != (query > 0)).sum(axis=1).tolist()
    allowed = np.arange(300) % 3 == 0
    assert (count_different(bits, wanted, allowed) == NOWHERE).tolist() == (~allowed).tolist()


def test_pieces_that_fit_the_cache_are_counted_as_one(monkeypatch):
    bits = pack_signs(draw(1000, 128))
    whole = count_different(bits, bits[:, 5])
    monkeypatch.setattr("koret.retrieval.bits._AT_ONCE", 64)
    assert count_different(bits, bits[:, 5]).tolist() == whole.tolist()
    assert whole[5] == 0


def test_the_radius_holds_as_many_as_wanted_and_no_fewer():
    first, second = np.array([3, 1, 9, NOWHERE], np.uint16), np.array([1, 4], np.uint16)
    assert [find_radius([first, second], wanted) for wanted in (1, 2, 3, 4, 5)] == [1, 1, 3, 4, 9]
    assert find_radius([first, second], 6) >= 9  # all there are, but never what is not allowed
    assert find_radius([first, second], 6) < NOWHERE


@pytest.mark.parametrize("dimensions", [65, 384])
def test_a_search_is_that_of_brute_force_however_passages_are_stored(tmp_path, dimensions):
    entries, vectors, queries = name(900), draw(900, dimensions), draw(15, dimensions, seed=1)
    whole = make_store(tmp_path / "one", entries, vectors)
    parts = make_store(tmp_path / "five", entries, vectors, pieces=5)
    for query, found, again in zip(queries, whole.search(queries, 12), parts.search(queries, 12), strict=True):
        expected = search_brutally(entries, vectors, query, 12, 12 * folder_module.OVERSAMPLES[0])
        assert [entry.id for entry, _ in found] == [own for own, _ in expected]
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-7)
        assert found == again
    assert [len(found) for found in whole.search(queries[:2], 5000)] == [900, 900]


def test_deleted_and_filtered_passages_make_room_for_others(tmp_path):
    entries, vectors, (query,) = name(400), draw(400, 64), draw(1, 64, seed=2)
    store = make_store(tmp_path / "i", entries, vectors, pieces=3)
    nearest = [entry.document for entry, _ in store.search(query[None], 10)[0]]
    store.delete(nearest)
    left = [i for i, entry in enumerate(entries) if entry.document not in nearest]
    expected = search_brutally([entries[i] for i in left], vectors[left], query, 10, 40)
    assert [entry.id for entry, _ in store.search(query[None], 10)[0]] == [own for own, _ in expected]
    rows = [i for i in left if entries[i].metadata["year"] >= 2010]
    expected = search_brutally([entries[i] for i in rows], vectors[rows], query, 10, 40)
    found = store.search(query[None], 10, [parse_condition("year>=2010")])[0]
    assert [entry.id for entry, _ in found] == [own for own, _ in expected]
    assert store.search(query[None], 10, [parse_condition("year>=3000")]) == [[]]


def test_equal_bits_are_scored_all_and_equal_scores_ordered_by_id(tmp_path):
    entries, vectors = name(200), np.tile(draw(1, 64), (200, 1))
    store = make_store(tmp_path / "i", entries, vectors, pieces=4)
    found = store.search(vectors[:1], 30)[0]
    assert [entry.id for entry, _ in found] == sorted(entry.id for entry in entries)[:30]


def test_the_number_scored_is_settled_by_recall_and_kept(tmp_path):
    entries, vectors, queries = name(3000), draw(3000, 64), draw(40, 64, seed=3)
    store = make_store(tmp_path / "i", entries, vectors)
    assert not store.is_tuned
    store.tune_bits(queries)
    chosen = store.bits["oversample"]
    assert chosen in folder_module.OVERSAMPLES[1:]  # four times as many miss some, at random
    assert store.is_tuned
    store.close()
    store = FolderStore.open(tmp_path / "i")
    kept = vectors.astype(np.float16).astype(np.float64)
    exact = [np.argsort(-(kept @ q.astype(np.float64)), kind="stable")[:10] for q in queries[1::2]]
    found = [[entry.id for entry, _ in own] for own in store.search(queries[1::2], 10)]
    recall = measure_recall([[entries[i].id for i in rows] for rows in exact], found)
    assert store.bits["recall@10"] == pytest.approx(recall, abs=1e-4)
    assert recall >= 0.97
    assert store.bits["queries"] == 40
    store.add(name(3001)[3000:], draw(1, 64, seed=9))
    assert not store.is_tuned  # what was measured was said of other passages


def test_one_passage_and_none(tmp_path):
    vectors = draw(1, 64)
    store = make_store(tmp_path / "i", name(1), vectors)
    store.tune_bits(vectors)
    assert [entry.id for entry, _ in store.search(vectors, 10)[0]] == ["문서0#1"]
    store.delete(["문서0"])
    assert store.search(vectors, 10) == [[]]
    empty = FolderStore.create(tmp_path / "empty", {"dtype": "binary"}, 64)
    assert empty.search(vectors, 10) == [[]]


def test_merged_segments_and_a_reopened_index_find_the_same(tmp_path):
    entries, vectors, queries = name(300), draw(300, 100), draw(5, 100, seed=1)
    store = make_store(tmp_path / "i", entries, vectors, pieces=6, lexical=("bigram",))
    before = store.search(queries, 10)
    store.compact()
    assert store.search(queries, 10) == before
    store.close()
    store = FolderStore.open(tmp_path / "i")
    store.verify()
    assert store.search(queries, 10) == before
    (bits,) = (tmp_path / "i" / "segments").glob("*/bits.npy")
    content = bytearray(bits.read_bytes())
    content[-1] ^= 1
    bits.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="bits.npy"):
        store.verify()
