"""Exact nearest neighbours in bounded memory, the same whatever the chunk size.

Letters: Q queries, N corpus rows, D dimensions, K results.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_FEW, _PIECES = 64, 8  # queries that may be multiplied with a block in so many pieces
_NUMBERS_AT_ONCE = 1 << 19  # float64 numbers gathered together: they stay in the cache


def find_top_k(
    queries: np.ndarray, corpus: np.ndarray, k: int, chunk: int = 16384, query_chunk: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """The K corpus rows with the largest dot product for each query: rows (Q, K) int64 and scores (Q, K) float32.

    K is min(k, N). Order is (score descending, row ascending). ``corpus`` may be memory-mapped; at most ``chunk`` of
    its rows are looked at together, so memory is about ``query_chunk * chunk * 16`` bytes beside the result.

    A float32 matrix product gives last bits that depend on the shape of the block a row happens to sit in, which
    would let the chunk size decide ties. So it only picks candidates, with a margin above its error bound; what is
    ranked is each candidate's own float64 dot product.

    Raises ValueError for shapes that do not fit, an empty corpus, k below 1, or a vector that is not finite
    (naming its row).
    """
    queries, corpus = np.asanyarray(queries), np.asanyarray(corpus)
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise ValueError(f"query vectors {queries.shape} and corpus vectors {corpus.shape} do not fit together")
    if not len(corpus):
        raise ValueError("the corpus is empty: there is nothing to search")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    _require_finite(queries, 0, "query")
    k = min(k, len(corpus))
    heaps = [TopK(queries[i : i + query_chunk], k) for i in range(0, len(queries), query_chunk)]
    for start in range(0, len(corpus), chunk):
        block = np.ascontiguousarray(corpus[start : start + chunk], np.float32)
        _require_finite(block, start, "corpus")
        longest = float(np.sqrt(np.einsum("nd,nd->n", block, block).max()))
        for best in heaps:
            best.add(block, np.arange(start, start + len(block)), longest)
    rows = np.concatenate([np.zeros((0, k), np.int64), *(best.rows for best in heaps)])
    scores = np.concatenate([np.zeros((0, k)), *(best.scores for best in heaps)])
    return rows, scores.astype(np.float32)


def multiply(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The dot products (Q, B) of float32 vectors (Q, D) and (B, D), on torch's threads.

    NumPy's library keeps threads of its own, and two pools that take turns wait for each other: with both, a search
    took eight times as long as with one. Few queries are multiplied in the way that is fastest here (``WAYS``).
    """
    block = block if block.flags.writeable else block.copy()  # torch takes no arrays that are only to be read
    # A copy has ordinary strides; of a lone row NumPy lets them be anything, and torch then takes a slow path
    left, right = torch.from_numpy(queries.copy()), torch.from_numpy(block)
    few = 0 < len(left) <= _FEW and len(right) >= _PIECES
    way = _choose_way(left, right) if few else _multiply_whole
    return way(left, right).numpy()


Way = Callable[[Tensor, Tensor], Tensor]  # (Q, D) and (B, D) -> (Q, B)


def _multiply_whole(left: Tensor, right: Tensor) -> Tensor:
    return left @ right.T


def _multiply_from_left(left: Tensor, right: Tensor) -> Tensor:
    """The block in pieces, as a batch of products with the queries on the left."""
    pieces, rest = _cut_pieces(right)
    products = torch.bmm(left.expand(_PIECES, -1, -1), pieces.transpose(1, 2)).transpose(0, 1).reshape(len(left), -1)
    return torch.cat([products, left @ rest.T], dim=1) if len(rest) else products


def _multiply_from_right(left: Tensor, right: Tensor) -> Tensor:
    """The block in pieces, as a batch of products with the queries on the right."""
    pieces, rest = _cut_pieces(right)
    products = torch.bmm(pieces, left.T.expand(_PIECES, -1, -1)).reshape(-1, len(left))
    return (torch.cat([products, rest @ left.T]) if len(rest) else products).T.contiguous()


def _cut_pieces(block: Tensor) -> tuple[Tensor, Tensor]:
    """(_PIECES, B // _PIECES, D), and the rows left over."""
    even = len(block) // _PIECES * _PIECES
    return block[:even].reshape(_PIECES, -1, block.shape[1]), block[even:]


WAYS: tuple[Way, ...] = (_multiply_whole, _multiply_from_left, _multiply_from_right)
_chosen: dict[tuple[int, int, int], Way] = {}  # by how many queries and rows, as powers of two, and threads


def _choose_way(left: Tensor, right: Tensor) -> Way:
    """Times all ways, in turns, for the first product of about this size.

    One takes up to ten times as long as another, and which is fastest depends on the processor: for a lone query
    torch's library takes one thread and packs the block first on some, on others pieces are what it is slow with.
    """
    key = len(left).bit_length(), len(right).bit_length(), torch.get_num_threads()
    if key not in _chosen:
        best = dict.fromkeys(WAYS, float("inf"))
        for _ in range(3):
            for way in WAYS:
                began = time.perf_counter()
                way(left, right)
                best[way] = min(best[way], time.perf_counter() - began)
        _chosen[key] = min(best, key=lambda way: best[way])
    return _chosen[key]


class TopK:
    """The best k rows so far of one block of queries (Q, D): ``rows`` (Q, k), -1 where none, ``scores`` float64.

    ``floor`` (Q,): what scores below it need not be kept.
    """

    def __init__(self, queries: np.ndarray, k: int, floor: np.ndarray | None = None) -> None:
        self.queries = np.ascontiguousarray(queries, np.float32)
        self.norms = np.sqrt(np.einsum("qd,qd->q", self.queries, self.queries))
        self.k = k
        self.rows = np.full((len(queries), k), -1, np.int64)
        self.scores = np.full((len(queries), k), -np.inf)
        self.floor = np.full(len(queries), -np.inf) if floor is None else floor

    def add(self, block: np.ndarray, rows: np.ndarray, longest: float) -> None:
        """Look at more vectors, (B, D) float32 with ascending row numbers (B,), none longer than ``longest``."""
        self.add_scored(multiply(self.queries, block), rows, longest, 0.0, lambda chosen: block[chosen])

    def add_scored(
        self,
        rough: np.ndarray,
        rows: np.ndarray,
        longest: float,
        error: float,
        fetch: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Look at more vectors by their rough scores (Q, B).

        ``error`` is how far, at most, what was multiplied lies from the vectors themselves; ``fetch`` gives the
        vectors of chosen positions, whose products are what counts.
        """
        margin = self.norms * (longest * self.queries.shape[1] * np.finfo(np.float32).eps + error)
        floor = np.maximum(self.scores[:, -1], self.floor)
        if np.isneginf(self.scores[:, -1]).any() and rough.shape[1] > self.k:
            within = np.partition(rough, rough.shape[1] - self.k, axis=1)[:, rough.shape[1] - self.k]
            floor = np.maximum(floor, within - margin)
        query, chosen = np.nonzero(rough >= (floor - margin)[:, None])
        if not len(query):
            return
        scores = np.empty(len(query))
        pairs = max(1, _NUMBERS_AT_ONCE // max(1, self.queries.shape[1]))
        for i in range(0, len(query), pairs):
            piece = slice(i, i + pairs)
            left, right = self.queries[query[piece]].astype(np.float64), fetch(chosen[piece]).astype(np.float64)
            scores[piece] = np.einsum("nd,nd->n", left, right)
        self._merge(query, rows[chosen], scores)

    def _merge(self, query: np.ndarray, row: np.ndarray, score: np.ndarray) -> None:
        touched = np.unique(query)
        query = np.concatenate([query, np.repeat(touched, self.k)])
        row = np.concatenate([row, self.rows[touched].ravel()])
        score = np.concatenate([score, self.scores[touched].ravel()])
        # rows still empty (-1, -inf) sort behind everything; among equals the smaller row comes first
        order = np.lexsort((row, -score, query))
        starts = np.searchsorted(query[order], touched)
        keep = order[starts[:, None] + np.arange(self.k)]
        self.rows[touched], self.scores[touched] = row[keep], score[keep]


def rank_scores(scores: np.ndarray, k: int) -> np.ndarray:
    """The positions of the k largest of ``scores`` (N,), by (score descending, position ascending)."""
    k = min(k, len(scores))
    if k < len(scores):
        floor = np.partition(scores, len(scores) - k)[len(scores) - k]
        kept = np.flatnonzero(scores >= floor)
    else:
        kept = np.arange(len(scores))
    return kept[np.argsort(-scores[kept], kind="stable")[:k]]


def _require_finite(vectors: np.ndarray, start: int, kind: str) -> None:
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} {kind} vectors hold NaN or infinite values, the first in row "
            f"{start + int(bad.argmax())}; the encoder produced them, so check its weights and precision"
        )
