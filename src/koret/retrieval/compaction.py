"""Which segments of a folder index are merged, and what they are merged into.

Writes come in small pieces, and a search asks every segment: small ones are joined once there are many, and those that
are mostly deleted are written again without what is deleted. The idea is that of log-structured merge trees (O'Neil et
al. 1996).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from koret.retrieval.postings import Postings
from koret.retrieval.segment import Segment
from koret.retrieval.store import Entry

SMALL, MANY = 16384, 8  # segments of fewer passages are merged once there are more of them than this
LARGEST_MERGE = 32768


def choose_segments(records: Sequence[dict[str, Any]], everything: bool = False) -> list[dict[str, Any]]:
    """The segments of a manifest to be merged into one now; empty where all stay as they are.

    ``everything``: small ones even where they are few, a lone one where something is deleted in it.
    """
    sizes = [record.get("live", record["rows"]) for record in records]
    small = [size < SMALL for size in sizes]
    thin = [2 * size < record["rows"] > 64 for size, record in zip(sizes, records, strict=True)]
    if sum(small) <= MANY and not any(thin) and not everything:
        return []
    chosen, rows = [], 0
    for record, size, *reasons in zip(records, sizes, small, thin, strict=True):
        if any(reasons) and (not chosen or rows + size <= LARGEST_MERGE):
            chosen.append(record)
            rows += size
    return chosen if len(chosen) > 1 or any(record["deleted"] for record in chosen) else []


def merge_segments(
    segments: Sequence[Segment], tokenizers: Sequence[str]
) -> tuple[list[Entry], np.ndarray, dict[str, Postings]]:
    """What lives in the segments, in the order of its ids: passages, vectors (N, D), postings by tokenizer."""
    rows = [segment.list_live() for segment in segments]
    entries = list(itertools.chain.from_iterable(s.read_entries(own) for s, own in zip(segments, rows, strict=True)))
    vectors = np.concatenate([s.vectors[own] for s, own in zip(segments, rows, strict=True)])
    order = sorted(range(len(entries)), key=lambda i: entries[i].id)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    places, start = [], 0
    for segment, own in zip(segments, rows, strict=True):
        place = np.full(segment.rows, -1, np.int64)
        place[own] = rank[start : start + len(own)]
        places.append(place)
        start += len(own)
    postings = {name: Postings.merge([s.postings[name] for s in segments], places, len(order)) for name in tokenizers}
    return [entries[i] for i in order], vectors[order], postings
