"""BM25 against its formula written out, tokenizers by hand, and fusion by hand and by brute force."""

import math
import random
import unicodedata
from collections import Counter

import numpy as np
import pytest

from koret.retrieval.lexical import LexicalIndex, fuse_lists, fuse_ranks, fuse_scores, tokenize

TEXTS = [
    "한라산은 제주도에 있는 산이다",
    "백두산은 가장 높은 산이다",
    "제주도는 섬이다 제주도의 한라산",
    "세종대왕은 한글을 만들었다",
    "세종대왕은 한글을 만들었다",
    "...!?",
]


def _score_by_formula(query, texts, k1=1.2, b=0.75):
    documents = [Counter(tokens) for tokens in texts]
    mean = sum(sum(d.values()) for d in documents) / len(documents)
    scores = []
    for document in documents:
        total = 0.0
        for token in query:
            df = sum(token in d for d in documents)
            tf = document[token]
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + k1 * (1 - b + b * sum(document.values()) / mean))
        scores.append(total)
    return scores


@pytest.mark.parametrize("tokenizer", ["bigram", "kiwi", "whitespace"])
def test_scores_follow_the_formula(tokenizer):
    index = LexicalIndex(TEXTS, tokenizer)
    queries = ["제주도에 있는 한라산", "세종대왕은 한글을", "높은 산이다 산이다"]
    rows, scores = index.search(queries, 10)
    for i, query in enumerate(queries):
        wanted = _score_by_formula(tokenize([query], tokenizer)[0], tokenize(TEXTS, tokenizer))
        found = rows[i] >= 0
        assert set(rows[i][found]) == {n for n, score in enumerate(wanted) if score > 0}
        assert np.allclose(scores[i][found], [wanted[n] for n in rows[i][found]], rtol=1e-5)
        assert (np.diff(scores[i]) <= 0).all()


def test_equal_texts_come_in_corpus_order_and_unmatched_texts_are_no_results():
    rows, scores = LexicalIndex(TEXTS).search(["한글을 만들었다", "zzz", ""], 4)
    assert rows.tolist() == [[3, 4, -1, -1], [-1] * 4, [-1] * 4]
    assert scores[0, 0] == scores[0, 1] > 0 and not scores[1:].any()


def test_bigrams_stay_inside_words_and_drop_punctuation():
    assert tokenize(["한국어, AI는 1"], "bigram") == [["한국", "국어", "ai", "i는", "1"]]


def test_kiwi_drops_particles_endings_and_punctuation():
    assert tokenize(["한라산은 제주도에 있다."], "kiwi") == [["한라산", "제주도", "있"]]


@pytest.mark.parametrize("tokenizer", ["bigram", "kiwi", "whitespace"])
def test_decomposed_jamo_find_the_same_texts(tokenizer):
    index = LexicalIndex(TEXTS, tokenizer)
    query = "제주도의 한라산"
    plain, decomposed = index.search([query], 5), index.search([unicodedata.normalize("NFD", query)], 5)
    assert (plain[0] == decomposed[0]).all() and (plain[1] == decomposed[1]).all()


def test_clear_errors_and_a_corpus_without_tokens():
    with pytest.raises(ValueError, match="corpus is empty"):
        LexicalIndex([])
    with pytest.raises(ValueError, match="unknown tokenizer 'mecab'; choose one of bigram"):
        LexicalIndex(TEXTS, "mecab")
    with pytest.raises(ValueError, match="k must be at least 1"):
        LexicalIndex(TEXTS).search(["산"], 0)
    assert LexicalIndex(["...", "!"]).search(["산"], 5)[0].tolist() == [[-1, -1]]


def test_reciprocal_ranks_by_hand():
    rows, scores = fuse_ranks([np.array([[4, 2, 9]]), np.array([[2, 7, -1]])], k=10)
    assert rows.tolist() == [[2, 4, 7, 9]]
    assert np.allclose(scores, [[1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63]])


def test_weighted_scores_by_hand():
    dense = np.array([[1, 2, 3]]), np.array([[0.9, 0.8, 0.7]])
    lexical = np.array([[2, 5, -1]]), np.array([[12.0, 4.0, 0.0]])
    rows, scores = fuse_scores(dense, lexical, 0.4, k=10)
    assert rows.tolist() == [[2, 1, 3, 5]]  # 3 and 5 tie at 0: by row
    assert np.allclose(scores, [[0.4 * 0.5 + 0.6, 0.4, 0.0, 0.0]])
    assert fuse_scores(dense, lexical, 1.0, k=3)[0].tolist() == [[1, 2, 3]]
    assert fuse_scores(dense, lexical, 0.0, k=1)[0].tolist() == [[2]]
    with pytest.raises(ValueError, match="weight must lie between 0 and 1"):
        fuse_scores(dense, lexical, 1.5, k=3)


def test_fusion_equals_a_dictionary_loop():
    rng = random.Random(0)
    lists = [np.array([rng.sample(range(60), 20) for _ in range(30)]) for _ in range(2)]
    lists[1][:5, 10:] = -1
    lists[1][7] = -1
    rows, scores = fuse_ranks(lists, k=15)
    for q in range(30):
        totals = Counter()
        for ranking in lists:
            for rank, row in enumerate(ranking[q], 1):
                if row >= 0:
                    totals[int(row)] += 1 / (60 + rank)
        wanted = sorted(totals, key=lambda row: (-totals[row], row))[:15]
        assert [row for row in rows[q] if row >= 0] == wanted
        assert np.allclose(scores[q][: len(wanted)], [totals[row] for row in wanted])


@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
def test_fusing_lists_is_fusing_arrays_to_the_last_bit(weight):
    rng = random.Random(1)
    names = sorted(f"{rng.choice('가나다라')}{i}#{rng.randint(1, 12)}" for i in range(80))
    for trial in range(200):
        lists = []
        for _ in range(2):
            count = rng.choice([0, 1, 7, 30])
            steps = rng.choice([1, 3, 1000])  # few different scores tie a lot
            scores = sorted((rng.randint(-steps, steps) / 7 for _ in range(count)), reverse=True)
            lists.append(dict(zip(rng.sample(names, count), scores, strict=True)))
        arrays = [
            (np.array([[names.index(name) for name in own]], np.int64), np.array([list(own.values())], np.float64))
            for own in lists
        ]
        k = rng.choice([1, 10, 100])
        fused = fuse_ranks([rows for rows, _ in arrays], k) if weight is None else fuse_scores(*arrays, weight, k)
        wanted = [(names[row], score) for row, score in zip(*(x[0].tolist() for x in fused), strict=True) if row >= 0]
        assert fuse_lists(*lists, weight, k) == wanted, trial
    with pytest.raises(ValueError, match="weight must lie between 0 and 1"):
        fuse_lists({}, {}, 1.5, 3)
