"""Postings on disk score as BM25 does, whatever the segments they lie in."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from koret.retrieval import postings
from koret.retrieval.lexical import tokenize
from koret.retrieval.postings import K1, B, Postings, Statistics, hash_text, take_best

WORDS = "한국어 문장을 찾는 색인 서울 부산 김치 학교 나무 바다 하늘 역사 음악 영화 과학 수학 a ab ABC".split()


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 20))) for _ in range(count)]


def score_by_hand(texts: list[str], query: str) -> list[float]:
    documents = tokenize(texts, "bigram")
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for tokens in documents:
        counts, total = Counter(tokens), 0.0
        for token in tokenize([query], "bigram")[0]:
            df = sum(token in d for d in documents)
            tf = counts[token]
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + K1 * (1 - B + B * len(tokens) / mean))
        scores.append(total)
    return scores


def join(parts: list[list[float]]) -> list[float]:
    return [float(x) for part in parts for x in part]


@pytest.mark.parametrize("sizes", [[60], [1, 30, 29], [20, 20, 20]])
def test_scores_do_not_depend_on_segments(tmp_path, sizes):
    texts = make_texts(60)
    segments, start = [], 0
    for i, size in enumerate(sizes):
        folder = tmp_path / str(i)
        folder.mkdir()
        Postings.build(texts[start : start + size], "bigram").save(folder, "bigram")
        segments.append(Postings.open(folder, "bigram"))
        start += size
    statistics = Statistics(segments, [None] * len(segments))
    for query in ("서울 바다", "역사 역사 abc", "없는말", "한국어를 찾는 색인"):
        found = join(statistics.score(tokenize([query], "bigram")[0]))
        assert found == pytest.approx(score_by_hand(texts, query))


def test_deleted_passages_do_not_count():
    texts = make_texts(50, seed=1)
    live = np.arange(50) % 3 > 0
    statistics = Statistics([Postings.build(texts, "bigram")], [live])
    (scores,) = statistics.score(tokenize(["서울 바다 학교"], "bigram")[0])
    kept = [text for text, own in zip(texts, live, strict=True) if own]
    assert scores[live] == pytest.approx(score_by_hand(kept, "서울 바다 학교"))


@pytest.mark.parametrize("at_once", [1 << 20, 60, 0])
@pytest.mark.parametrize("deleted", [False, True])
def test_all_terms_at_once_are_term_after_term_to_the_last_bit(deleted, at_once, monkeypatch):
    monkeypatch.setattr(postings, "AT_ONCE", at_once)
    texts = make_texts(90, seed=3)
    parts = [Postings.build(own, "bigram") for own in (texts[:50], texts[50:], ["", "?"], [])]
    live = [np.arange(len(part.lengths)) % 4 > 0 if deleted else None for part in parts]
    statistics = Statistics(parts, live)
    for query in make_texts(30, seed=4):
        tokens = tokenize([f"{query} 없는말 {query[:9]}"], "bigram")[0]
        for own, mask, scores in zip(parts, live, statistics.score(tokens), strict=True):
            wanted = np.zeros(len(own.lengths))
            for token, repeats in Counter(tokens).items():
                found = sum(count_term(*pair, token) for pair in zip(parts, live, strict=True))
                rows, counts = find_term(own, token)
                if found:
                    idf = np.log(1 + (statistics.size - found + 0.5) / (found + 0.5))
                    length = 1 - B + B * own.lengths[rows] / statistics.mean_length
                    wanted[rows] += repeats * idf * counts / (counts + K1 * length)
            assert scores.shape == wanted.shape and (scores == wanted)[slice(None) if mask is None else mask].all()


def find_term(part: Postings, token: str) -> tuple[np.ndarray, np.ndarray]:
    own = np.repeat(part.terms, np.diff(part.offsets)) == hash_text(token)
    return part.rows[own], part.counts[own].astype(np.float64)


def count_term(part: Postings, live: np.ndarray | None, token: str) -> int:
    rows, _ = find_term(part, token)
    return len(rows) if live is None else int(live[rows].sum())


def test_merging_is_the_same_as_building_anew():
    texts = make_texts(40, seed=2)
    parts = [Postings.build(texts[:25], "bigram"), Postings.build(texts[25:], "bigram")]
    places = [np.arange(25) * 2, np.where(np.arange(15) < 10, np.arange(15) * 2 + 1, -1)]
    order = {int(p): t for place, own in zip(places, (texts[:25], texts[25:]), strict=True)
             for p, t in zip(place, own, strict=True) if p >= 0}  # fmt: skip
    ranks = {p: i for i, p in enumerate(sorted(order))}
    places = [np.array([ranks.get(int(p), -1) for p in place]) for place in places]
    merged = Postings.merge(parts, places, len(order))
    anew = Postings.build([order[p] for p in sorted(order)], "bigram")
    for name in ("terms", "offsets", "rows", "counts", "lengths"):
        assert getattr(merged, name).tolist() == getattr(anew, name).tolist(), name


def test_a_segment_of_empty_texts_finds_nothing():
    statistics = Statistics([Postings.build(["", "..."], "bigram")], [None])
    assert join(statistics.score(["서울"])) == [0, 0]


def test_best_rows_are_positive_allowed_and_in_order():
    rows, scores = take_best(np.array([1.0, 3.0, 0.0, 3.0, 2.0]), 3, np.array([True, True, True, True, False]))
    assert rows.tolist() == [1, 3, 0] and scores.tolist() == [3.0, 3.0, 1.0]
