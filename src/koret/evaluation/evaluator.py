"""Encode, rank, score: base, tuned and BM25 on the same queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from koret.evaluation.metrics import DEPTH, KS, compute_metrics
from koret.evaluation.scores import Scores
from koret.evaluation.tasks import RetrievalTask
from koret.retrieval.exact import find_top_k
from koret.retrieval.lexical import LexicalIndex, Tokenizer, fuse_ranks, fuse_scores

ARTICLE_DEPTH = 10
LEXICAL_NAMES = {"bigram": "BM25 bigrams", "kiwi": "BM25 morphemes", "whitespace": "BM25 words"}
#: (query rows, k) -> corpus rows (Q, K), -1 where there is none, and scores (Q, K)
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Encoder(Protocol):
    """What is evaluated: texts -> (N, D) float32 vectors; ``kind`` is 'query' or 'passage'."""

    def encode(self, texts: Sequence[str], kind: str, *, progress: bool = False) -> np.ndarray: ...


class Evaluator:
    """Scores any number of systems on one fixed task."""

    def __init__(self, task: RetrievalTask, depth: int = DEPTH, ks: Sequence[int] = KS) -> None:
        self.task, self.depth, self.ks = task, depth, tuple(ks)

    def score(
        self, encoder: Encoder, name: str | None = None, *, queries: Sequence[str] | None = None, progress: bool = False
    ) -> Scores:
        """Encode queries and corpus, search exactly, score. ``queries`` replaces the task's query texts (probes).

        Raises ValueError (or the encoder's own error) when a vector is not finite.
        """
        start = time.perf_counter()
        corpus = encoder.encode(self.task.corpus, "passage", progress=progress)
        asked = encoder.encode(self.task.queries if queries is None else queries, "query", progress=progress)
        encoded = time.perf_counter() - start
        self._require_shape(corpus, len(self.task.corpus), "corpus")
        self._require_shape(asked, len(self.task.queries), "query")
        return self._score(
            name or getattr(encoder, "name", "model"), lambda rows, k: find_top_k(asked[rows], corpus, k), encoded
        )

    def score_lexical(self, tokenizer: Tokenizer = "bigram", queries: Sequence[str] | None = None) -> Scores:
        """BM25 on the same queries and corpus."""
        asked = self.task.queries if queries is None else queries
        start = time.perf_counter()
        index = LexicalIndex(self.task.corpus, tokenizer)
        indexed = time.perf_counter() - start
        return self._score(
            LEXICAL_NAMES[tokenizer], lambda rows, k: index.search([asked[row] for row in rows], k), indexed
        )

    def score_fusion(self, dense: Scores, lexical: Scores, weight: float | None = None) -> Scores:
        """Dense and BM25 rankings together: by reciprocal rank, or by ``weight`` (dense) when one is given."""
        start = time.perf_counter()
        if weight is None:
            how, ranked = "RRF", fuse_ranks([dense.rankings, lexical.rankings], self.depth)
        else:
            pair = [(scores.rankings, scores.similarities) for scores in (dense, lexical)]
            how, ranked = f"w={weight:.1f}", fuse_scores(*pair, weight, self.depth)
        values = compute_metrics(ranked[0], self.task.relevant, self.ks)
        name = f"{dense.system} + BM25 ({how})"
        return Scores(name, self.task.name, values, *ranked, {"encode": 0.0, "search": time.perf_counter() - start})

    def _score(self, system: str, search: Search, encoded: float) -> Scores:
        start = time.perf_counter()
        rows, scores = search(np.arange(len(self.task.queries)), self.depth)
        values = compute_metrics(rows, self.task.relevant, self.ks)
        if self.task.has_articles:
            values |= self._score_articles(search, rows)
        seconds = {"encode": encoded, "search": time.perf_counter() - start}
        return Scores(system, self.task.name, values, rows, scores, seconds)

    def _score_articles(self, search: Search, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics of finding the right article, whose rank is that of its best text; names begin with ``article/``.

        Queries whose results hold too few different articles are searched deeper, so the ten articles are exact.
        """
        owners = self.task.corpus_articles
        ranked = np.full((len(rows), ARTICLE_DEPTH), -1, np.int64)
        ranked[:, : rows.shape[1]] = rank_articles(rows, owners)[:, :ARTICLE_DEPTH]
        depth = rows.shape[1]
        open_ = np.flatnonzero((ranked[:, -1] < 0) & (rows[:, -1] >= 0))
        while len(open_) and depth < len(owners):
            depth = min(4 * depth, len(owners))
            deeper = search(open_, depth)[0]
            found = rank_articles(deeper, owners)[:, :ARTICLE_DEPTH]
            ranked[open_, : found.shape[1]] = found
            open_ = open_[(ranked[open_, -1] < 0) & (deeper[:, -1] >= 0)]
        relevant = [np.unique(owners[rows]) for rows in self.task.relevant]
        values = compute_metrics(ranked, relevant, [k for k in self.ks if k <= ARTICLE_DEPTH])
        return {f"article/{name}": column for name, column in values.items() if not name.startswith(("map", "pre"))}

    def _require_shape(self, vectors: Any, rows: int, what: str) -> None:
        if getattr(vectors, "ndim", 0) != 2 or len(vectors) != rows:
            shape = getattr(vectors, "shape", type(vectors).__name__)
            raise ValueError(f"the encoder gave {shape} for {rows} {what} texts; ({rows}, dimensions) was expected")


def rank_articles(rows: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Texts' rows (Q, K) -> their different articles in the order of their best text (Q, K), -1 behind them."""
    articles = np.where(rows >= 0, owners[rows], -1)
    order = np.argsort(articles, axis=1, kind="stable")
    ordered = np.take_along_axis(articles, order, axis=1)
    first = np.ones(articles.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_first = np.zeros(articles.shape, bool)
    np.put_along_axis(is_first, order, first, axis=1)
    is_first &= articles >= 0
    ranked = np.full(articles.shape, -1, np.int64)
    query, place = np.nonzero(is_first)
    ranked[query, (np.cumsum(is_first, axis=1) - 1)[query, place]] = articles[query, place]
    return ranked
