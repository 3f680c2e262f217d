"""BM25 for Korean, the honest baseline, and its fusion with dense scores.

Letters: Q queries, N texts, K results.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from koret.data.markup import normalize_text
from koret.retrieval.exact import rank_scores

Tokenizer = Literal["bigram", "kiwi", "whitespace"]
RANK_CONSTANT = 60  # of reciprocal rank fusion
_WORD = re.compile(r"\w+")
# Kiwi's tags for particles (J), endings (E), unfinished pieces (Z) and punctuation; what is left carries meaning
_FUNCTION_TAGS = ("J", "E", "Z", "SF", "SP", "SS", "SE", "SO", "SW", "SB", "UN")


class LexicalIndex:
    """BM25 over ``texts``.

    score(query, text) = sum over the query's tokens t of idf(t) * tf / (tf + k1 * (1 - b + b * length / mean length)),
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5)): Robertson's formula as Lucene computes it (Kamphuis et al. 2020,
    "Which BM25 do you mean?"), by the library bm25s, with Lucene's k1 = 1.2 and b = 0.75. A token that a query
    repeats counts each time.

    ``tokenizer``: ``bigram`` cuts words into overlapping pairs of characters (한국어 -> 한국, 국어), so that particles
    cost little; ``kiwi`` keeps Kiwi's morphemes without particles, endings and punctuation; ``whitespace`` is the naive
    choice. All fold case and compose jamo (NFC).

    Raises ValueError for an empty corpus or an unknown tokenizer.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer = "bigram", k1: float = 1.2, b: float = 0.75) -> None:
        import bm25s

        if not len(texts):
            raise ValueError("the corpus is empty: there is nothing to search")
        if tokenizer not in _TOKENIZERS:
            raise ValueError(f"unknown tokenizer {tokenizer!r}; choose one of {', '.join(_TOKENIZERS)}")
        self.tokenizer = tokenizer
        self.size = len(texts)
        self._vocabulary: dict[str, int] = {}
        number = self._vocabulary
        documents = [
            [number.setdefault(token, len(number)) for token in tokens] for tokens in tokenize(texts, tokenizer)
        ]
        self._bm25 = bm25s.BM25(method="lucene", k1=k1, b=b) if self._vocabulary else None
        if self._bm25 is not None:
            self._bm25.index((documents, self._vocabulary), create_empty_token=False, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The K = min(k, N) best texts of each query: rows (Q, K) int64 and scores (Q, K) float32.

        Order is (score descending, row ascending). Texts that share no token with the query are not results: the
        row is -1 and the score 0 there.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        k = min(k, self.size)
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.zeros((len(queries), k), np.float32)
        for i, tokens in enumerate(tokenize(queries, self.tokenizer)):
            known = [self._vocabulary[token] for token in tokens if token in self._vocabulary]
            if known:
                own = self._bm25.get_scores_from_ids(known)
                best = rank_scores(own, k)
                best = best[own[best] > 0]
                rows[i, : len(best)], scores[i, : len(best)] = best, own[best]
        return rows, scores


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[str]]:
    """The tokens of each text."""
    return _TOKENIZERS[tokenizer]([normalize_text(text).lower() for text in texts])


def _cut_bigrams(texts: list[str]) -> list[list[str]]:
    return [[word[i : i + 2] for word in _WORD.findall(text) for i in range(max(1, len(word) - 1))] for text in texts]


def _cut_morphemes(texts: list[str]) -> list[list[str]]:
    return [
        [token.form for token in tokens if not token.tag.startswith(_FUNCTION_TAGS)]
        for tokens in load_kiwi().tokenize(texts)
    ]


@functools.cache
def load_kiwi() -> Any:
    """The morphological analyser, loaded once (1.5 s)."""
    from kiwipiepy import Kiwi

    return Kiwi()


_TOKENIZERS: dict[str, Callable[[list[str]], list[list[str]]]] = {
    "bigram": _cut_bigrams,
    "kiwi": _cut_morphemes,
    "whitespace": lambda texts: [text.split() for text in texts],
}

Ranked = tuple[np.ndarray, np.ndarray]  # rows (Q, K), -1 where there is none, and scores (Q, K)


def fuse_ranks(rankings: Sequence[np.ndarray], k: int, constant: int = RANK_CONSTANT) -> Ranked:
    """Reciprocal rank fusion: the score of a text is the sum over rankings of 1 / (constant + rank).

    Cormack, Clarke and Büttcher, SIGIR 2009, whose constant is 60. Rankings are (Q, K) rows, -1 where there is none.
    Order is (score descending, row ascending).
    """
    return _sum_scores(
        [(rows, np.broadcast_to(1 / (constant + 1 + np.arange(rows.shape[1])), rows.shape)) for rows in rankings], k
    )


def fuse_scores(dense: Ranked, lexical: Ranked, weight: float, k: int) -> Ranked:
    """``weight`` * dense + (1 - weight) * lexical, each stretched to 0..1 over its own list, query by query.

    The convex combination of Bruch, Gai and Ingber, TOIS 2023, with min-max normalisation; a text missing from one
    list has 0 there, the score of that list's last result. Order is (score descending, row ascending).
    """
    _check_weight(weight)
    parts = [(dense, weight), (lexical, 1 - weight)]
    return _sum_scores([(rows, share * _stretch(rows, scores)) for (rows, scores), share in parts], k)


def fuse_lists(
    dense: Mapping[str, float], lexical: Mapping[str, float], weight: float | None, k: int
) -> list[tuple[str, float]]:
    """The K best (name, score) of one query's two rankings (name -> score, best first).

    ``fuse_scores``, or ``fuse_ranks`` without a ``weight``, with names for rows: the same to the last bit. For some
    hundred results loops are several times as fast as arrays.
    """
    if weight is None:
        parts = [_share_ranks(len(dense)), _share_ranks(len(lexical))]
    else:
        _check_weight(weight)
        parts = [_stretch_list(dense, weight), _stretch_list(lexical, 1 - weight)]
    totals: dict[str, float] = {}
    for names, shares in zip((dense, lexical), parts, strict=True):
        for name, share in zip(names, shares, strict=True):
            totals[name] = totals.get(name, 0.0) + share
    best = sorted(totals)
    best.sort(key=totals.__getitem__, reverse=True)  # equal ones stay in the order of their names
    del best[k:]
    return list(zip(best, np.array([totals[name] for name in best], np.float32).tolist(), strict=True))


@functools.lru_cache(64)  # lists are nearly always of the same length
def _share_ranks(count: int) -> tuple[float, ...]:
    return tuple(1 / (RANK_CONSTANT + rank) for rank in range(1, count + 1))


def _stretch_list(scores: Mapping[str, float], weight: float) -> list[float]:
    """``weight`` times what ``_stretch`` gives."""
    low, high = min(scores.values(), default=0.0), max(scores.values(), default=0.0)
    return [weight * ((score - low) / (high - low) if high > low else 1.0) for score in scores.values()]


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie between 0 and 1, not {weight}")


def _stretch(rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Scores moved to 0..1 within each query's results; 1 where all are equal."""
    scores = scores.astype(np.float64)
    low = np.where(rows >= 0, scores, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    high = np.where(rows >= 0, scores, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(high > low, (scores - low) / (high - low), 1.0)


def _sum_scores(parts: Sequence[Ranked], k: int) -> Ranked:
    """Add up the scores each (query, row) has in the lists and rank them."""
    count = len(parts[0][0])
    listed = [rows >= 0 for rows, _ in parts]
    query = np.concatenate([np.nonzero(there)[0] for there in listed])
    row = np.concatenate([rows[there] for (rows, _), there in zip(parts, listed, strict=True)])
    score = np.concatenate([scores[there] for (_, scores), there in zip(parts, listed, strict=True)])
    stride = row.max(initial=0) + 1
    keys, place = np.unique(query * stride + row, return_inverse=True)
    totals = np.bincount(place, weights=score, minlength=len(keys))
    query, row = keys // stride, keys % stride
    order = np.lexsort((row, -totals, query))
    rank = np.arange(len(order)) - np.searchsorted(query, query)  # sorted by query both before and after
    kept = rank < k
    width = min(k, int(rank.max(initial=-1)) + 1)
    rows, scores = np.full((count, width), -1, np.int64), np.zeros((count, width), np.float32)
    best = order[kept]
    rows[query[best], rank[kept]], scores[query[best], rank[kept]] = row[best], totals[best]
    return rows, scores
