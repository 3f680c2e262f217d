"""BM25 postings of one segment on disk, scored with statistics of all live passages: the scores of LexicalIndex.

A term is kept as the first 64 bits of its BLAKE2 hash (among ten million terms two share one with a chance of 3 in a
million), a posting as row and count. Files, memory-mapped, for each tokenizer NAME: ``NAME.terms.npy`` (T,) uint64
ascending, ``NAME.offsets.npy`` (T + 1,), ``NAME.rows.npy`` and ``NAME.counts.npy`` (postings, by term then row),
``NAME.lengths.npy`` (N,) tokens of each passage.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from koret.retrieval.exact import rank_scores
from koret.retrieval.lexical import Tokenizer, tokenize

K1, B = 1.2, 0.75  # Lucene's, as in lexical.LexicalIndex
AT_ONCE = 1 << 20  # postings of a query scored together: some 40 MB
PARTS = ("terms", "offsets", "rows", "counts", "lengths")


class Postings:
    """Which passages of a segment hold which terms, and how often."""

    def __init__(self, parts: dict[str, np.ndarray]) -> None:
        self.terms, self.offsets, self.rows, self.counts, self.lengths = (parts[name] for name in PARTS)

    @classmethod
    def build(cls, texts: Sequence[str], tokenizer: Tokenizer) -> Postings:
        """Tokenise the passages of a segment."""
        tokens = tokenize(texts, tokenizer)
        numbers: dict[str, int] = {}
        term = np.array([numbers.setdefault(t, len(numbers)) for row in tokens for t in row], np.int64)
        lengths = np.array([len(row) for row in tokens], np.int32)
        row = np.repeat(np.arange(len(texts)), lengths)
        hashes = np.array([hash_text(t) for t in numbers], np.uint64)
        keys, counts = np.unique(term * max(len(texts), 1) + row, return_counts=True)
        term, row = np.divmod(keys, max(len(texts), 1))
        return cls.pack(hashes[term], row, counts, lengths)

    @classmethod
    def pack(cls, term: np.ndarray, row: np.ndarray, count: np.ndarray, lengths: np.ndarray) -> Postings:
        """Postings from (term hash, row, count) in any order."""
        order = np.lexsort((row, term))
        terms, sizes = np.unique(term[order], return_counts=True)
        offsets = np.zeros(len(terms) + 1, np.int64)
        np.cumsum(sizes, out=offsets[1:])
        kind = np.uint16 if count.max(initial=0) < 1 << 16 else np.uint32
        parts = (terms, offsets, row[order].astype(np.int32), count[order].astype(kind), lengths.astype(np.int32))
        return cls(dict(zip(PARTS, parts, strict=True)))

    @classmethod
    def merge(cls, parts: Sequence[Postings], places: Sequence[np.ndarray], size: int) -> Postings:
        """Postings of several segments as those of one of ``size`` passages, without tokenising again.

        ``places`` says where each old row goes, -1: nowhere.
        """
        term, row, count, lengths = [], [], [], np.zeros(size, np.int32)
        for part, place in zip(parts, places, strict=True):
            moved = place[part.rows]
            kept = moved >= 0
            term.append(np.repeat(part.terms, np.diff(part.offsets))[kept])
            row.append(moved[kept])
            count.append(part.counts[kept])
            lengths[place[place >= 0]] = part.lengths[place >= 0]
        return cls.pack(np.concatenate(term), np.concatenate(row), np.concatenate(count), lengths)

    @classmethod
    def open(cls, folder: Path, tokenizer: str) -> Postings:
        """The files of one tokenizer, memory-mapped."""
        # Plain arrays over the mapped files: a slice of NumPy's memmap class costs three times as much.
        return cls({name: np.asarray(np.load(folder / f"{tokenizer}.{name}.npy", mmap_mode="r")) for name in PARTS})

    def save(self, folder: Path, tokenizer: str) -> None:
        for name in PARTS:
            np.save(folder / f"{tokenizer}.{name}.npy", getattr(self, name))

    def find(self, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the postings of term hashes (T,) begin and end in ``rows`` and ``counts``; unknown ones have none."""
        if not len(self.terms):
            return np.zeros(len(terms), np.int64), np.zeros(len(terms), np.int64)
        i = np.minimum(np.searchsorted(self.terms, terms), len(self.terms) - 1)
        starts = self.offsets[i]
        return starts, np.where(self.terms[i] == terms, self.offsets[i + 1], starts)


class Statistics:
    """What BM25 needs to know of all live passages together: how many, and their mean length.

    ``live`` (N,) bool says which rows of each segment count; None: all.
    """

    def __init__(self, segments: Sequence[Postings], live: Sequence[np.ndarray | None]) -> None:
        self.segments, self.live = segments, live
        lengths = [s.lengths if mask is None else s.lengths[mask] for s, mask in zip(segments, live, strict=True)]
        self.size = sum(map(len, lengths))
        self.mean_length = sum(int(part.sum(dtype=np.int64)) for part in lengths) / max(self.size, 1)

    def score(self, tokens: Sequence[str]) -> list[np.ndarray]:
        """The BM25 score of every row of each segment, (N,) float64; see ``lexical.LexicalIndex`` for the formula."""
        repeats = Counter(tokens)
        terms = np.array([hash_text(token) for token in repeats], np.uint64)
        places = [segment.find(terms) for segment in self.segments]
        found = sum((self._count_live(i, *place) for i, place in enumerate(places)), np.zeros(len(terms), np.int64))
        idf = np.log(1 + (self.size - found + 0.5) / (found + 0.5))
        weights = np.array(list(repeats.values()), np.int64) * idf
        known = np.flatnonzero(found)  # with deleted passages alone a term would count, and their mean length may be 0
        return [self._score_segment(*own, known, weights) for own in zip(self.segments, places, strict=True)]

    def _score_segment(
        self, segment: Postings, place: tuple[np.ndarray, np.ndarray], known: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """The terms one after another, or all at once to the same bits: few calls hold up other threads for less."""
        starts, ends, weights = place[0][known], place[1][known], weights[known]
        if len(known) and (ends - starts).sum() <= AT_ONCE:
            rows, shares = self._weigh(segment, starts, ends, weights)
            return np.bincount(rows, weights=shares, minlength=len(segment.lengths))  # adds in the order of the terms
        scores = np.zeros(len(segment.lengths))
        for i in range(len(known)):
            own = slice(i, i + 1)
            rows, shares = self._weigh(segment, starts[own], ends[own], weights[own])
            scores[rows] += shares
        return scores

    def _weigh(
        self, segment: Postings, starts: np.ndarray, ends: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the postings of some terms, and what each adds to its row's score."""
        spans = list(map(slice, starts.tolist(), ends.tolist()))
        rows = np.concatenate([segment.rows[span] for span in spans])
        counts = np.concatenate([segment.counts[span] for span in spans]).astype(np.float64)
        length = 1 - B + B * segment.lengths[rows] / self.mean_length
        return rows, np.repeat(weights, ends - starts) * counts / (counts + K1 * length)

    def _count_live(self, i: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """How many live passages of a segment hold each term (T,)."""
        mask = self.live[i]
        if mask is None:
            return ends - starts
        rows = self.segments[i].rows
        return np.array([np.count_nonzero(mask[rows[a:b]]) for a, b in zip(starts, ends, strict=True)], np.int64)


def take_best(scores: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the k largest positive scores among the allowed, (score descending, row ascending)."""
    if allowed is not None:
        scores = np.where(allowed, scores, 0.0)
    rows = rank_scores(scores, k)
    rows = rows[scores[rows] > 0]
    return rows, scores[rows]


def hash_text(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
