"""A segment of the folder index: some thousand passages in files that are written once and then only read.

Files: ``passages.arrow`` (the entries, by id), ``documents.npy`` and ``document_rows.npy`` (document hash -> rows),
``vectors.npy`` (N, D) float32 or float16, for int8 also ``codes.npy`` and ``scales.npy``, for binary ``bits.npy``, and
the postings.

int8 keeps, beside float16 vectors, codes = round(vector / scale) with a scale for each row (largest number / 127).
A search multiplies the codes, takes every row that could still be among the best (the distance between a row and its
codes is known when it is written, and bounds the error), and scores those rows by their float16 vectors: the result
is exactly that of float16, in half the memory traffic.

binary keeps, beside float16 vectors, a bit for every number (``bits``). A search counts different bits and scores the
nearest rows by their float16 vectors, which alone are read from the disk: a sixteenth of the traffic, and an answer
that may miss some of the exact one. How many rows are scored is settled by measuring (``FolderStore.tune_bits``).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from koret.data.columns import make_places
from koret.data.tables import make_array
from koret.retrieval.bits import pack_signs
from koret.retrieval.exact import TopK, multiply
from koret.retrieval.manifest import explain_damage
from koret.retrieval.postings import Postings, hash_text
from koret.retrieval.store import Condition, Entry, Found, name_kind

DTYPES = ("float32", "float16", "int8", "binary")
COLUMNS = ("id", "document", "heading", "text", "version", "metadata")
CHUNK = 16384  # rows multiplied together
FOR_ONE = 64  # times as many rows, for a lone query
RECENT_ROWS = 16384  # passages of a store whose strings are kept once they were results, with at most so many
RECENT_CHARACTERS = 16 << 20  # characters: 32 MB of Hangul at two bytes each, and 10 MB for the strings around them
WIDENED = 4096  # rows widened and multiplied together: they stay in the cache between the two
_SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])
_LONGEST = 1.01  # no stored vector is longer: unit vectors, rounded


def write_segment(
    folder: Path, entries: Sequence[Entry], vectors: np.ndarray, dtype: str, postings: dict[str, Postings]
) -> None:
    """Write the files of a segment; ``entries`` are in the order of their ids."""
    columns = [[getattr(entry, name) for entry in entries] for name in COLUMNS[:-1]]
    metadata = [json.dumps(entry.metadata, ensure_ascii=False, sort_keys=True) for entry in entries]
    arrays = [make_array(column, pa.string()) for column in (*columns, metadata)]
    with pa.OSFile(str(folder / "passages.arrow"), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
    hashes = np.array([hash_text(document) for document in columns[1]], np.uint64)
    order = np.argsort(hashes, kind="stable")
    np.save(folder / "documents.npy", hashes[order])
    np.save(folder / "document_rows.npy", order.astype(np.int32))
    kept = np.ascontiguousarray(vectors, np.float32 if dtype == "float32" else np.float16)
    np.save(folder / "vectors.npy", kept)
    if dtype == "int8":
        codes, scales = _quantise(kept)
        np.save(folder / "codes.npy", codes)
        np.save(folder / "scales.npy", scales)
    if dtype == "binary":
        np.save(folder / "bits.npy", pack_signs(kept))
    for tokenizer, part in postings.items():
        part.save(folder, tokenizer)


def _quantise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) -> int8 codes (N, D), and (N, 2) float32: each row's scale and its distance from scale * codes."""
    wide = vectors.astype(np.float32)
    scale = np.maximum(np.abs(wide).max(axis=1, initial=0.0), np.finfo(np.float32).tiny) / 127
    codes = np.rint(wide / scale[:, None]).astype(np.int8)
    distance = np.linalg.norm(wide - codes * scale[:, None], axis=1)
    return codes, np.stack([scale, distance], axis=1).astype(np.float32)


class Recent:
    """The strings of passages that were results not long ago, of all segments of a store; safe between threads.

    ``strings`` may be replaced at any time: a reader takes it once, and reads what it lacks from the disk. A segment's
    rows have the keys from what ``reserve`` gave it on.
    """

    def __init__(self) -> None:
        self.strings: dict[int, tuple[str, ...]] = {}
        self._characters = 0
        self._reserved = 0
        self._changing = threading.Lock()

    def reserve(self, rows: int) -> int:
        """The first of ``rows`` keys that nobody else has."""
        with self._changing:
            self._reserved += rows
            return self._reserved - rows

    def keep(self, found: dict[int, tuple[str, ...]]) -> None:
        """Keep these too, or alone where all together would be too many; nothing where they alone are."""
        characters = sum(len(text) for values in found.values() for text in values)
        with self._changing:
            if len(self.strings) + len(found) > RECENT_ROWS or self._characters + characters > RECENT_CHARACTERS:
                self.strings, self._characters = {}, 0
            if len(found) <= RECENT_ROWS and characters <= RECENT_CHARACTERS:
                self.strings.update(found)
                self._characters += characters


class Segment:
    """A segment opened for reading; safe to share between threads. ``live`` (N,) bool or None: every row counts."""

    def __init__(
        self, folder: Path, name: str, tokenizers: Sequence[str], live: np.ndarray | None, recent: Recent
    ) -> None:
        self.folder, self.name, self.live = folder, name, live
        table = pa.ipc.open_file(pa.memory_map(str(folder / "passages.arrow"))).read_all()
        self.columns = {c: table.column(c).chunk(0) for c in COLUMNS}
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="c")
        self.rows = len(self.vectors)
        self.codes = np.load(folder / "codes.npy", mmap_mode="r") if (folder / "codes.npy").exists() else None
        if self.codes is not None:
            self.scale, distance = np.load(folder / "scales.npy").T.copy()
            self.error = float(distance.max(initial=0.0))
        has_bits = (folder / "bits.npy").exists()
        self.bits = np.asarray(np.load(folder / "bits.npy", mmap_mode="r")) if has_bits else None
        self.hashes = np.load(folder / "documents.npy", mmap_mode="r")
        self.hash_rows = np.load(folder / "document_rows.npy", mmap_mode="r")
        self.postings = {name: Postings.open(folder, name) for name in tokenizers}
        self._masks: dict[tuple[tuple[Condition, str], ...], np.ndarray] = {}
        self._wide: np.ndarray | None = None
        self._recent, self._first = recent, recent.reserve(self.rows)

    @property
    def count(self) -> int:
        return self.rows if self.live is None else int(self.live.sum())

    def list_live(self) -> np.ndarray:
        """(``count``,) the rows that are not deleted, ascending."""
        return np.arange(self.rows) if self.live is None else np.flatnonzero(self.live)

    def read_entry(self, row: int) -> Entry:
        return self.read_entries(np.array([row]))[0]

    def read_entries(self, rows: np.ndarray) -> list[Entry]:
        return list(map(_make_entry, self._read_strings(rows)))

    def read_results(self, rows: Sequence[int]) -> list[Entry]:
        """As ``read_entries``; the same passages come up again and again, so their strings are kept."""
        first, kept = self._first, self._recent.strings
        found = {row: kept.get(first + row) for row in rows}
        missing = [row for row, values in found.items() if values is None]
        if missing:
            fresh = dict(zip(missing, self._read_strings(np.array(missing)), strict=True))
            self._recent.keep({first + row: values for row, values in fresh.items()})
            found |= fresh
        return [_make_entry(found[row]) for row in rows]

    def _read_strings(self, rows: np.ndarray) -> Iterator[tuple[str, ...]]:
        places = make_places(np.asarray(rows))
        return zip(*(self.columns[name].take(places).to_pylist() for name in COLUMNS), strict=True)

    def read_id(self, row: int) -> str:
        kept = self._recent.strings.get(self._first + row)
        return self.columns["id"][row].as_py() if kept is None else kept[0]

    def find_rows(self, documents: Sequence[str], hashes: np.ndarray) -> dict[str, np.ndarray]:
        """The live rows of each of the documents that has any here."""
        starts, ends = (np.searchsorted(self.hashes, hashes, side) for side in ("left", "right"))
        found = {}
        for i in np.flatnonzero(ends > starts):
            rows = self.hash_rows[starts[i] : ends[i]]
            rows = rows[[self._is_live(r) and self.columns["document"][r].as_py() == documents[i] for r in rows]]
            if len(rows):
                found[documents[i]] = rows
        return found

    def _is_live(self, row: int) -> bool:
        return self.live is None or bool(self.live[row])

    def allow(self, where: Sequence[Condition]) -> np.ndarray | None:
        """Which rows are live and meet every condition, (N,) bool; None: all."""
        if not where:
            return self.live
        key = tuple((condition, name_kind(condition.value)) for condition in where)  # 1 equals True
        mask = self._masks.get(key)  # another thread may clear them at any time
        if mask is None:
            if len(self._masks) > 16:
                self._masks.clear()
            mask = np.ones(self.rows, bool)
            for condition in where:
                mask &= self._test(condition)
            self._masks[key] = mask
        return mask if self.live is None else mask & self.live

    def _test(self, condition: Condition) -> np.ndarray:
        """Each distinct value is tested once."""
        own = condition.key if condition.key in ("document", "heading") else "metadata"
        encoded = self.columns[own].dictionary_encode()
        values = encoded.dictionary.to_pylist()
        read: Callable[[str], dict] = json.loads if own == "metadata" else lambda value: {own: value}
        accepted = np.array([condition.accept(read(value)) for value in values], bool)
        return accepted[encoded.indices.to_numpy()]

    def search(self, best: TopK, allowed: np.ndarray | None, keep_wide: bool) -> None:
        """Add this segment's rows to ``best``; ``keep_wide`` holds a float32 copy for the next search."""
        if keep_wide and self._wide is None and self.vectors.dtype != np.float32:
            self._wide = _widen(self.vectors)
        vectors = self.vectors if self._wide is None else self._wide
        widened = torch.empty(WIDENED, self.vectors.shape[1]) if vectors.dtype == np.float16 else None
        step = CHUNK if widened is None or self.codes is not None else WIDENED
        if vectors.dtype == np.float32:  # threads wait for each other after every product: few queries, few products
            step *= max(1, FOR_ONE // max(1, len(best.queries)))
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            rows = np.arange(start, stop) if allowed is None else start + np.flatnonzero(allowed[start:stop])
            if not len(rows):
                continue
            chosen: slice | np.ndarray = slice(start, stop) if len(rows) == stop - start else rows
            if self.codes is None or self._wide is not None:
                best.add(_widen(vectors[chosen], widened), rows, _LONGEST)
            else:
                rough = multiply(best.queries, self.codes[chosen].astype(np.float32)) * self.scale[chosen]
                best.add_scored(rough, rows, _LONGEST, self.error, lambda i, rows=rows: self.vectors[rows[i]])

    def search_rows(self, best: TopK, rows: np.ndarray) -> None:
        """Add the given rows, ascending, to ``best``."""
        for start in range(0, len(rows), WIDENED):
            chosen = rows[start : start + WIDENED]
            best.add(_widen(self.vectors[chosen]), chosen, _LONGEST)


def open_segment(folder: Path, record: dict[str, Any], tokenizers: Sequence[str], recent: Recent) -> Segment:
    """The segment in ``folder`` as the manifest's ``record`` has it; raises Damaged where a file is not of its size."""
    for name, (size, _) in record["files"].items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            raise explain_damage(folder / name, "it is missing") from None
        if found != size:
            raise explain_damage(folder / name, f"{found:,} bytes instead of {size:,}")
    live = None
    if record["deleted"]:
        name, digest = record["deleted"]
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            raise explain_damage(folder / name, "it is missing") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise explain_damage(folder / name, "its content changed")
        live = np.unpackbits(np.frombuffer(content, np.uint8), count=record["rows"]).astype(bool)
    try:
        return Segment(folder, record["name"], tokenizers, live, recent)
    except (OSError, ValueError) as error:
        raise explain_damage(folder, str(error)) from None


def rank_hits(hits: list[tuple[float, Segment, int]], k: int) -> Found:
    """The K best of (score, segment, row) from several segments, by (score descending, id ascending)."""
    if len(hits) > k:
        last = sorted((hit[0] for hit in hits), reverse=True)[k - 1]
        best = [hit for hit in hits if hit[0] > last]
        tied = [hit for hit in hits if hit[0] == last]
        if len(best) + len(tied) > k:  # ids are needed of those alone that tie for the last places
            tied.sort(key=lambda hit: hit[1].read_id(hit[2]))
        hits = best + tied[: k - len(best)]
    places: dict[Segment, tuple[list[int], list[float]]] = {}
    for score, segment, row in hits:
        rows, scores = places.setdefault(segment, ([], []))
        rows.append(row)
        scores.append(score)
    found: Found = []
    for segment, (rows, scores) in places.items():
        found += zip(segment.read_results(rows), scores, strict=True)
    found.sort(key=lambda pair: (-pair[1], pair[0].id))
    return found


def _make_entry(values: tuple[str, ...]) -> Entry:
    return Entry(*values[:-1], {} if values[-1] == "{}" else json.loads(values[-1]))


def _widen(vectors: np.ndarray, into: torch.Tensor | None = None) -> np.ndarray:
    """float32 of vectors read from the disk; torch converts float16 several times as fast as NumPy."""
    if vectors.dtype != np.float16:
        return np.ascontiguousarray(vectors, np.float32)
    half = torch.from_numpy(np.array(vectors))
    return (half.float() if into is None else into[: len(half)].copy_(half)).numpy()
