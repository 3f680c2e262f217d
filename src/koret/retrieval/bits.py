"""Vectors as the signs of their numbers, a bit each: what lies near a query is found by counting different bits.

The share of different signs of two vectors estimates the angle between them (Charikar, STOC 2002), so the vectors of
fewest different bits are candidates, which are then scored by their own numbers. A bit vector of 384 dimensions takes
48 bytes, a sixteenth of float16. The numbers of a query against signs rank better by themselves (docs/EXPORT.md), but
need a product of full width; counting is done by the word, and more candidates make up for it.

Letters: Q queries, N passages, D dimensions, W = ceil(D / 64) words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_AT_ONCE = 1 << 15  # passages looked at together: a word of each stays in the cache
NOWHERE = np.iinfo(np.uint16).max  # the distance of what is not to be found


def pack_signs(vectors: np.ndarray) -> np.ndarray:
    """Whether each number of (N, D) is above zero, as (W, N) uint64; bits beyond D are 0 in every vector."""
    count, dimensions = vectors.shape
    words = -(-dimensions // 64)
    packed = np.zeros((count, words * 8), np.uint8)
    packed[:, : -(-dimensions // 8)] = np.packbits(vectors > 0, axis=1)
    return np.ascontiguousarray(packed.view(np.uint64).T)


def count_different(bits: np.ndarray, query: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """The number of bits in which each of ``bits`` (W, N) differs from ``query`` (W,): (N,) uint16.

    ``allowed`` (N,) bool: the others are NOWHERE.
    """
    distances = np.empty(bits.shape[1], np.uint16)
    for start in range(0, len(distances), _AT_ONCE):
        own = distances[start : start + _AT_ONCE]
        own[:] = 0
        for word, wanted in zip(bits, query, strict=True):
            own += np.bitwise_count(word[start : start + _AT_ONCE] ^ wanted)
    if allowed is not None:
        distances[~allowed] = NOWHERE
    return distances


def find_radius(distances: Iterable[np.ndarray], wanted: int) -> int:
    """The smallest distance within which ``wanted`` of all passages lie; the largest there is where fewer do.

    Everything within it is a candidate, ties included, so what is found does not depend on how passages are stored.
    """
    counts = [np.bincount(own)[:NOWHERE] for own in distances]
    total = np.zeros(max(map(len, counts), default=0), np.int64)
    for own in counts:
        total[: len(own)] += own
    return int(np.searchsorted(np.cumsum(total), wanted).clip(0, NOWHERE - 1))
