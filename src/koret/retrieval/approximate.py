"""Approximate search of a folder index by faiss: cells of near vectors (IVF), and what recall that costs, measured.

Files in ``DIR/approximate``, replaced together once the recall is measured: ``ivf.faiss`` (one byte for each number,
memory-mapped when searched) and ``ivf.json``. Cells are 2 * sqrt(N), after faiss's guidelines (Johnson, Douze, Jégou:
Billion-scale similarity search with GPUs, 2017). The search takes more candidates than asked for and scores them by the
stored vectors, so the scores are exact; what can be missed is a passage in a cell that was not looked at.

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
from koret.retrieval.manifest import SEAL, Damaged, hash_file, is_sealed, seal
from koret.retrieval.segment import CHUNK, Segment

TARGET, DEPTH = 0.97, 10  # recall@10 aimed at
WIDER = 4  # candidates taken for each result
_TRAINED_ON = 50  # vectors for each cell

Search = Callable[[np.ndarray, int], list[list[str]]]  # query vectors, k -> ids


class Approximate:
    """An IVF index opened for reading; safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        self.info = json.loads((folder / "ivf.json").read_bytes())
        self.info.pop(SEAL, None)
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


def build_approximate(
    segments: Sequence[Segment],
    folder: Path,
    queries: np.ndarray,
    exact: Search,
    search: Callable[[Approximate], Search],
    seed: int = 0,
) -> None:
    """Train cells, fill them with the vectors of every segment, ``tune`` them, and only then put them in ``folder``."""
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
            "sha256": hash_file(staging / "ivf.faiss"),
        }
        files.write_json(staging / "ivf.json", seal(info))
        tune(staging, queries, exact, search)


def tune(folder: Path, queries: np.ndarray, exact: Search, search: Callable[[Approximate], Search]) -> None:
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
    files.write_json(folder / "ivf.json", seal(opened.info))


def open_approximate(folder: Path) -> Approximate | None:
    """The approximate index in ``folder``; None where there is none, or one of unknown recall. Raises Damaged."""
    if not (folder / "ivf.json").is_file():
        return None
    try:
        info = json.loads((folder / "ivf.json").read_bytes())
        if (folder / "ivf.faiss").stat().st_size != info["size"]:
            raise ValueError("its size changed")
        # a koret that published before it tuned was killed in between: nobody has chosen nprobe
        return Approximate(folder) if "recall@10" in info else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, MissingFaiss):
            raise
        raise _explain_damage(folder / "ivf.faiss", str(error)[:80]) from None


def verify_approximate(folder: Path) -> list[str]:
    """Read the files of an approximate index once; returns those that cannot be checked. Raises Damaged."""
    if not (folder / "ivf.json").is_file():
        return []
    info = json.loads((folder / "ivf.json").read_bytes())
    if is_sealed(info) is None:
        return [f"{folder.name}/ivf.faiss", f"{folder.name}/ivf.json"]
    if not is_sealed(info):
        raise _explain_damage(folder / "ivf.json", "its content changed")
    if hash_file(folder / "ivf.faiss") != info["sha256"]:
        raise _explain_damage(folder / "ivf.faiss", "its content changed")
    return []


def _explain_damage(file: Path, what: str) -> Damaged:
    return Damaged(
        f"the approximate index {file} is damaged ({what}): delete the folder {file.parent}, and build it again with "
        "koret index --approximate"
    )


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
