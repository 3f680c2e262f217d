"""Vectors of bits and bytes: what searching them costs in ranking, with and without scoring the best again.

Letters: Q queries, N corpus rows, D dimensions, K results.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from koret.evaluation.metrics import PRIMARY, compute_metrics
from koret.evaluation.significance import Difference, compare_paired
from koret.evaluation.tasks import RetrievalTask
from koret.retrieval.exact import find_top_k
from koret.retrieval.folder import FolderStore
from koret.retrieval.store import Entry

DEPTH, OVERSAMPLE = 10, 4  # results, and how many times as many candidates are scored again
RECOMMENDED = "binary, int8 rescoring"


@dataclass(frozen=True)
class Stored:
    """One way to keep vectors: nDCG@10, its paired difference to exact float32 search of the original's vectors.

    ``searched`` bytes of a vector are read for every query, ``kept`` bytes are kept in all.
    """

    name: str
    searched: int
    kept: int
    ndcg: float
    difference: Difference

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "difference": self.difference.to_dict()}


def measure_stored(task: RetrievalTask, queries: np.ndarray, corpus: np.ndarray, original: np.ndarray) -> list[Stored]:
    """Every way to keep ``corpus`` (N, D), searched with ``queries`` (Q, D).

    ``original`` (Q,) is the nDCG@10 of each query before the export.
    """
    width = corpus.shape[1]
    bits = -(-width // 8)
    codes = quantise(corpus)
    ways: list[tuple[str, int, int, Callable[[], np.ndarray]]] = [
        ("float32", 4 * width, 4 * width, lambda: find_top_k(queries, corpus, DEPTH)[0]),
        ("int8 index", width + 8, 3 * width + 8, lambda: search_folder(queries, corpus, "int8")),
        ("binary index", bits, bits + 2 * width, lambda: search_folder(queries, corpus, "binary")),
        ("binary", bits, bits, lambda: find_top_k(sign(queries), sign(corpus), DEPTH)[0]),
        ("binary, float query", bits, bits, lambda: rescore(queries, corpus, sign(corpus))),
        (RECOMMENDED, bits, bits + width + 4, lambda: rescore(queries, corpus, codes)),
        ("binary, float32 rescoring", bits, bits + 4 * width, lambda: rescore(queries, corpus, corpus)),
    ]
    found = []
    for name, searched, kept, search in ways:
        values = compute_metrics(search(), task.relevant, (DEPTH,))[PRIMARY[0]]
        gap = compare_paired(original, values, task.groups)
        found.append(Stored(name, searched, kept, float(values.mean()), gap))
    return found


def sign(vectors: np.ndarray) -> np.ndarray:
    """1 where a number is above 0, else -1: the bit that ``quantize_embeddings(..., 'ubinary')`` keeps.

    The product of two such vectors is D - 2 * their Hamming distance.
    """
    return np.where(vectors > 0, np.float32(1), np.float32(-1))


def quantise(vectors: np.ndarray) -> np.ndarray:
    """Each row rounded to 255 steps of its own scale (largest number / 127), as float32."""
    scale = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
    return (np.rint(vectors / scale) * scale).astype(np.float32)


def rescore(queries: np.ndarray, corpus: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The best DEPTH of the OVERSAMPLE * DEPTH nearest by bits, by their product with ``kept`` (N, D): rows (Q, K)."""
    rows = np.sort(find_top_k(sign(queries), sign(corpus), DEPTH * OVERSAMPLE)[0], axis=1)
    scores = np.einsum("qd,qkd->qk", queries.astype(np.float64), kept[rows].astype(np.float64))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
    return np.take_along_axis(rows, best, axis=1)


def search_folder(queries: np.ndarray, corpus: np.ndarray, dtype: str) -> np.ndarray:
    """The best DEPTH rows by koret's own index: rows (Q, K). How many rows bits offer is settled on these queries."""
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore.create(Path(folder) / "index", {"dtype": dtype}, corpus.shape[1])
        names = [f"{row:09d}" for row in range(len(corpus))]
        store.add([Entry(f"{name}#1", name, "", "", "") for name in names], corpus)
        if not store.is_tuned:
            store.tune_bits(queries)
        found = store.search(queries, DEPTH)
        store.close()
    return np.array([[int(entry.document) for entry, _ in hits] for hits in found], np.int64)
