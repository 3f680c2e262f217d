"""Ranks -> nDCG, MAP, MRR, recall, precision, accuracy: one value per query, the tie rule written down.

Letters: Q queries, K ranks, N corpus texts.

**Tie rule.** Texts with equal scores are ranked by ascending corpus position. ``retrieval.exact`` and
``retrieval.lexical`` order by (score descending, position ascending), so a ranking depends neither on how the corpus
was cut into chunks nor on a sort's whims. (sentence-transformers orders ties by ascending id too, trec_eval and mteb
by descending id; with duplicate texts the choice moves scores, so it has to be named.)

Relevance is binary. The formulas are trec_eval's:

- ``ndcg@k``: sum of 1 / log2(rank + 1) over relevant texts in the first k, divided by the best such sum possible
- ``map``: mean over the R relevant texts of the precision at their rank, 0 for those not in the ranking. Its depth is
  the ranking's (``DEPTH`` = 100 everywhere in koret). sentence-transformers' ``map@100`` divides by min(R, 100) instead
- ``mrr@k``: 1 / rank of the first relevant text, 0 where it is not in the first k
- ``recall@k``: relevant texts in the first k / R;  ``precision@k``: the same / k
- ``accuracy@k``: 1 where any of the first k is relevant
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

DEPTH = 100
KS = (1, 3, 5, 10, 100)
#: what decides which model is better, in this order
PRIMARY = ("ndcg@10", "map", "recall@10", "mrr@10")


def compute_metrics(
    rankings: np.ndarray, relevant: Sequence[Collection[int] | np.ndarray], ks: Sequence[int] = KS
) -> dict[str, np.ndarray]:
    """Every metric for every query.

    ``rankings`` (Q, K) holds corpus rows, best first, padded with -1 where a query has fewer than K results;
    ``relevant`` names each query's relevant rows (repeats count once). A k beyond K or beyond the corpus is fine:
    the missing ranks hold nothing.

    Returns (Q,) float64 arrays by name: ``ndcg@k``, ``mrr@k``, ``recall@k``, ``precision@k``, ``accuracy@k`` for each
    of ``ks``, and ``map``. Raises ValueError when a query has no relevant row, when a ranking lists a row twice, when
    shapes do not fit, or for a k below 1.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"metrics need cut-offs of at least 1, not {min(ks)}")
    hits, counts = mark_hits(rankings, relevant)
    ranks = np.arange(1, hits.shape[1] + 1)
    found = np.cumsum(hits, axis=1)
    gains = np.cumsum(hits / np.log2(ranks + 1), axis=1)
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, max(ks) + 2)))])
    first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, np.inf)
    values = {"map": (hits * found / ranks).sum(axis=1) / counts}
    for k in ks:
        last = min(k, hits.shape[1]) - 1
        within = found[:, last] if last >= 0 else np.zeros(len(hits))
        values[f"ndcg@{k}"] = (gains[:, last] if last >= 0 else np.zeros(len(hits))) / ideal[np.minimum(counts, k)]
        values[f"mrr@{k}"] = np.where(first <= k, 1 / first, 0.0)
        values[f"recall@{k}"] = within / counts
        values[f"precision@{k}"] = within / k
        values[f"accuracy@{k}"] = (within > 0).astype(np.float64)
    return values


def mark_hits(rankings: np.ndarray, relevant: Sequence[Collection[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which ranks hold a relevant row: (Q, K) bool, and how many relevant rows each query has: (Q,).

    Raises ValueError as described in ``compute_metrics``.
    """
    rankings = np.asarray(rankings)
    if rankings.ndim != 2 or len(rankings) != len(relevant):
        raise ValueError(f"rankings of shape {rankings.shape} do not fit {len(relevant)} lists of relevant rows")
    gold = [np.unique(np.fromiter(rows, np.int64)) for rows in relevant]
    counts = np.array([len(rows) for rows in gold], np.int64)
    if (counts == 0).any():
        raise ValueError(f"query {int(counts.argmin())} has no relevant text; leave such queries out before scoring")
    ordered = np.sort(rankings, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        query = int(repeated.any(axis=1).argmax())
        row = int(ordered[query, 1:][repeated[query]][0])
        raise ValueError(f"the ranking of query {query} lists corpus row {row} more than once")
    stride = max(rankings.max(initial=0), max((rows[-1] for rows in gold), default=0)) + 1
    keys = np.concatenate([np.zeros(0, np.int64), *(q * stride + rows for q, rows in enumerate(gold))])
    own = rankings + stride * np.arange(len(rankings))[:, None]
    return np.isin(own, keys) & (rankings >= 0), counts


def measure_recall_curve(rankings: np.ndarray, relevant: Sequence[Collection[int] | np.ndarray]) -> np.ndarray:
    """Recall of every query at every depth: (Q, K); column k - 1 is ``recall@k``."""
    hits, counts = mark_hits(rankings, relevant)
    return np.cumsum(hits, axis=1) / counts[:, None]


def average(values: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over queries of each metric."""
    return {name: float(column.mean()) for name, column in values.items()}
