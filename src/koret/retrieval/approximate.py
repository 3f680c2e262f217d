"""Approximate search of a folder index by faiss: cells of near vectors (IVF), and what recall that costs, measured.

Files in ``DIR/approximate``, replaced together: ``ivf.faiss`` (one byte for each number, memory-mapped when searched)
and ``ivf.json``. Cells are 2 * sqrt(N), after faiss's guidelines (Johnson, Douze, Jégou: Billion-scale similarity
search with GPUs, 2017). The search takes more candidates than asked for and scores them by the stored vectors, so the
scores are exact; what can be missed is a passage in a cell that was not looked at.

The number of cells looked at (nprobe) is the smallest that finds the target share of the exact 10 best for one half of
the sample queries; the recall reported is that of the other half.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from koret import files
from koret.retrieval.segment import CHUNK, Segment

TARGET, DEPTH = 0.97, 10  # recall@10 aimed at
WIDER = 4  # candidates taken for each result
_TRAINED_ON = 50  # vectors for each cell

Search = Callable[[np.ndarray, int], list[list[str]]]  # query vectors, k -> ids


class Approximate:
    """An IVF index opened for reading; safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        self.info = json.loads((folder / "ivf.json").read_bytes())
        self._ivf = _import_faiss().read_index(str(folder / "ivf.faiss"), _import_faiss().IO_FLAG_MMAP)
        self._ivf.nprobe = self.info["nprobe"]
        self.offsets = np.cumsum([0, *(rows for _, rows in self.info["segments"])])
        self.names = [name for name, _ in self.info["segments"]]

    def search(
        self, queries: np.ndarray, segments: Sequence[Segment], k: int
    ) -> list[list[tuple[float, Segment, int]]]:
        """For each query (score, segment, row) of candidates that are still live, at least the K best seen."""
        known = {segment.name: segment for segment in segments}
        _, found = self._ivf.search(queries, min(WIDER * k + 16, self._ivf.ntotal))
        return [self._score(query, row[row >= 0], known) for query, row in zip(queries, found, strict=True)]

    def _score(
        self, query: np.ndarray, places: np.ndarray, known: dict[str, Segment]
    ) -> list[tuple[float, Segment, int]]:
        hits: list[tuple[float, Segment, int]] = []
        owner = np.searchsorted(self.offsets, places, "right") - 1
        for i in np.unique(owner):
            segment = known.get(self.names[i])
            if segment is None:  # merged into another since
                continue
            rows = np.sort(places[owner == i] - self.offsets[i])
            rows = rows if segment.live is None else rows[segment.live[rows]]
            scores = segment.vectors[rows].astype(np.float64) @ query.astype(np.float64)
            hits += [(s, segment, r) for s, r in zip(scores.tolist(), rows.tolist(), strict=True)]
        return hits


def build_approximate(segments: Sequence[Segment], folder: Path, seed: int = 0) -> None:
    """Train cells, fill them with the vectors of every segment, and write the files; ``tune`` chooses nprobe."""
    faiss = _import_faiss()
    total = sum(segment.rows for segment in segments)
    if not total:
        raise ValueError("the index is empty: there is nothing to build an approximate index of")
    dimensions = segments[0].vectors.shape[1]
    cells = max(1, min(round(2 * total**0.5), total // _TRAINED_ON))
    share = min(1.0, cells * _TRAINED_ON / total)
    rng = np.random.default_rng(seed)
    sample = [
        np.asarray(s.vectors[np.sort(rng.choice(s.rows, max(1, round(share * s.rows)), replace=False))], np.float32)
        for s in segments
    ]
    quantiser = faiss.IndexFlatIP(dimensions)
    ivf = faiss.IndexIVFScalarQuantizer(
        quantiser, dimensions, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    ivf.train(np.concatenate(sample))
    del sample
    for segment in segments:
        for start in range(0, segment.rows, CHUNK):
            ivf.add(np.asarray(segment.vectors[start : start + CHUNK], np.float32))
    with files.stage_folder(folder) as staging:
        faiss.write_index(ivf, str(staging / "ivf.faiss"))
        info = {
            "segments": [[segment.name, segment.rows] for segment in segments],
            "cells": cells,
            "nprobe": 1,
            "size": (staging / "ivf.faiss").stat().st_size,
        }
        files.write_json(staging / "ivf.json", info)


def tune(folder: Path, queries: np.ndarray, exact: Search, search: Callable[[Approximate], Search]) -> dict[str, Any]:
    """Choose nprobe on one half of the sample queries (Q, D), measure on the other, note both in ``ivf.json``."""
    opened = Approximate(folder)
    expected = exact(queries, DEPTH)
    first, second = slice(0, None, 2), slice(1, None, 2)
    nprobe = 1
    while True:
        opened._ivf.nprobe = nprobe
        found = search(opened)(queries, DEPTH)
        if measure_recall(expected[first], found[first]) >= TARGET or nprobe >= opened.info["cells"]:
            break
        nprobe = min(nprobe * 2, opened.info["cells"])
    recall = measure_recall(expected[second], found[second])
    opened.info |= {"nprobe": nprobe, "recall@10": round(recall, 4), "queries": len(queries)}
    files.write_json(folder / "ivf.json", opened.info)
    return opened.info


def open_approximate(folder: Path) -> Approximate | None:
    """The approximate index in ``folder``; None where there is none. Raises ValueError for a damaged one."""
    if not (folder / "ivf.json").is_file():
        return None
    try:
        size = json.loads((folder / "ivf.json").read_bytes())["size"]
        if (folder / "ivf.faiss").stat().st_size != size:
            raise ValueError("its size changed")
        return Approximate(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, MissingFaiss):
            raise
        raise ValueError(
            f"the approximate index {folder / 'ivf.faiss'} is damaged ({str(error)[:80]}): delete the folder "
            f"{folder}, and build it again with koret index --approximate"
        ) from None


class MissingFaiss(RuntimeError):
    """The extra that approximate search needs is not installed."""


def measure_recall(expected: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """Mean share of the exact results that were found."""
    shares = [len(set(e) & set(f)) / len(e) for e, f in zip(expected, found, strict=True) if e]
    return float(np.mean(shares)) if shares else 1.0


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingFaiss("an approximate index needs faiss: pip install 'koret[faiss]'") from None
    return faiss
