"""The embedded default: passages and vectors in one folder, crash-safe, searched exactly; nothing to install.

    DIR/index.json     what the index is: encoder, prefixes, dimensions, ... (``index.IndexInfo``)
    DIR/manifest.json  the segments that count, their files' sizes and hashes, and what is deleted in them
    DIR/segments/NAME/ immutable files (``segment``)

A write prepares new segments beside the old ones, then replaces the manifest in one step: a reader sees the state
before or after, a killed writer leaves only files nobody names, which the next one removes. ``compaction`` keeps the
segments few.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from koret import files
from koret.data.passages import join_heading
from koret.retrieval.approximate import (
    DEPTH,
    Approximate,
    MissingFaiss,
    Search,
    build_approximate,
    measure_recall,
    open_approximate,
    verify_approximate,
)  # fmt: skip
from koret.retrieval.bits import count_different, find_radius, pack_signs
from koret.retrieval.compaction import choose_segments, merge_segments
from koret.retrieval.exact import TopK
from koret.retrieval.lexical import tokenize
from koret.retrieval.manifest import (
    SEAL,
    Damaged,
    explain_damage,
    hash_file,
    read_manifest,
    seal,
    take_lock,
    verify_files,
    write_manifest,
)  # fmt: skip
from koret.retrieval.postings import Postings, Statistics, hash_text, take_best
from koret.retrieval.segment import CHUNK, DTYPES, Recent, Segment, open_segment, rank_hits, write_segment
from koret.retrieval.store import Condition, Entry, Found

WIDE_BYTES = 256 << 20  # below this, float32 copies of the vectors are held in memory
QUERIES_AT_ONCE = 64
OVERSAMPLES = (4, 8, 16, 32, 64, 128, 256)  # times K passages near in bits that may be scored
BITS_RECALL = 0.99  # recall@10 aimed at
log = logging.getLogger(__name__)


class FolderStore:
    """Passages in a folder. See ``store.Store``; searching is safe from several threads, writing from one process."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path, self.info = Path(path), info
        self.dtype, self.lexical = info.get("dtype", "float16"), tuple(info.get("lexical", ()))
        self.dimensions = int(info["dimensions"])
        self._lock: int | None = None
        self._writing = threading.Lock()
        self._recent = Recent()
        self._approximate: Approximate | None = None
        self._load()
        try:
            self._approximate = open_approximate(self.path / "approximate")
        except MissingFaiss as error:
            log.warning("%s is searched exactly: %s", self.path, error)

    @classmethod
    def create(cls, path: str | Path, info: dict[str, Any], dimensions: int) -> FolderStore:
        """An empty index; raises ValueError where something else lies."""
        path = Path(path)
        if path.exists() and not _is_unborn(path):
            raise ValueError(f"{path} exists and is no index: name a new or empty folder")
        if info.get("dtype", "float16") not in DTYPES:
            raise ValueError(f"unknown dtype {info['dtype']!r}; choose one of {', '.join(DTYPES)}")
        (path / "segments").mkdir(parents=True, exist_ok=True)
        files.write_json(path / "index.json", seal({**info, "dimensions": dimensions}))
        write_manifest(path, {"generation": 0, "segments": []})
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> FolderStore:
        """Raises FileNotFoundError where there is no index and Damaged naming the file that is not whole."""
        path = Path(path)
        if not (path / "index.json").is_file():
            raise FileNotFoundError(f"{path} is no index (it holds no index.json); make one with: koret index")
        try:
            info = json.loads((path / "index.json").read_bytes())
            info["dimensions"] = int(info["dimensions"])
            info.pop(SEAL, None)
        except (ValueError, KeyError, TypeError) as error:
            raise explain_damage(path / "index.json", str(error)) from None
        return cls(path, info)

    # ---- reading

    def count(self) -> int:
        return sum(segment.count for segment in self._segments)

    def search(self, vectors: np.ndarray, k: int, where: Sequence[Condition] = ()) -> list[Found]:
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise ValueError(f"query vectors {vectors.shape} do not fit an index of {self.dimensions} dimensions")
        if not np.isfinite(vectors).all():
            raise ValueError("a query vector holds NaN or infinite values")
        segments, approximate = self._segments, None if where else self._approximate
        found: list[Found] = []
        for i in range(0, len(vectors), QUERIES_AT_ONCE):
            queries = vectors[i : i + QUERIES_AT_ONCE]
            if self.dtype == "binary" and approximate is None:
                wanted = max(_check_k(k), DEPTH) * self.bits.get("oversample", OVERSAMPLES[0])
                found += [self._search_bits(segments, query, k, wanted, where) for query in queries]
            else:
                found += self._search_dense(segments, queries, _check_k(k), where, approximate)
        return found

    def search_lexical(
        self, queries: Sequence[str], k: int, where: Sequence[Condition] = (), tokenizer: str | None = None
    ) -> list[Found]:
        """The K passages of largest BM25 score (``lexical.LexicalIndex``); those sharing no token are no results."""
        tokenizer = tokenizer or (self.lexical[0] if self.lexical else None)
        if tokenizer not in self.lexical:
            raise ValueError(f"the index was built without {tokenizer or 'a'} lexical part: build it with --lexical")
        segments = self._segments
        parts = [segment.postings[tokenizer] for segment in segments]
        statistics = Statistics(parts, [segment.live for segment in segments])
        allowed = [segment.allow(where) for segment in segments]
        found = []
        for tokens in tokenize(queries, tokenizer):
            hits = []
            for segment, scores, mask in zip(segments, statistics.score(tokens), allowed, strict=True):
                rows, scores = take_best(scores, _check_k(k), mask)
                hits += zip(scores.tolist(), itertools.repeat(segment), rows.tolist())
            found.append(rank_hits(hits, k))
        return found

    def find_versions(self, documents: Sequence[str]) -> list[str | None]:
        found = self._find_rows(self._segments, documents)
        versions = {
            name: segment.columns["version"][int(rows[0])].as_py()
            for segment, places in found
            for name, rows in places.items()
        }
        return [versions.get(name) for name in documents]

    def list_documents(self) -> Iterator[str]:
        for segment in self._segments:
            rows = np.asarray(segment.hash_rows)
            rows = rows if segment.live is None else rows[segment.live[rows]]
            last = None
            for start in range(0, len(rows), CHUNK):
                for name in segment.columns["document"].take(rows[start : start + CHUNK]).to_pylist():
                    if name != last:
                        yield name
                    last = name

    def read_document(self, document: str) -> list[Entry]:
        """The passages of a document, in the order of its text; empty where it is unknown."""
        found = [s.read_entries(rows) for s, places in self._find_rows(self._segments, [document]) for rows in
                 places.values()]  # fmt: skip
        return sorted(sum(found, []), key=lambda entry: int(entry.id.rpartition("#")[2]))

    def sample_entries(self, count: int, seed: int = 0) -> list[Entry]:
        """Passages drawn at random."""
        rng = np.random.default_rng(seed)
        places = [(s, r) for s in self._segments for r in self._draw(s, count, rng)]
        chosen = rng.permutation(len(places))[:count]
        return [segment.read_entry(int(row)) for segment, row in (places[i] for i in chosen)]

    def _draw(self, segment: Segment, count: int, rng: np.random.Generator) -> np.ndarray:
        """Live rows of a segment, as many as its share of ``count`` rounded up."""
        live = segment.list_live()
        return rng.choice(live, min(len(live), -(-count * len(live) // self.count())), replace=False)

    def read_segments(self) -> Iterator[tuple[list[Entry], np.ndarray]]:
        """Everything kept, a piece at a time: passages and their vectors (N, D) float32."""
        for segment in self._segments:
            rows = segment.list_live()
            yield segment.read_entries(rows), np.asarray(segment.vectors[rows], np.float32)

    def _search_dense(
        self,
        segments: Sequence[Segment],
        queries: np.ndarray,
        k: int,
        where: Sequence[Condition] = (),
        approximate: Approximate | None = None,
    ) -> list[Found]:
        """Exact over every segment, or over those alone that the approximate index has not."""
        if not segments:
            return [[] for _ in queries]
        hits: list[list[tuple[float, Segment, int]]] = [[] for _ in queries]
        covered = set()
        if approximate:
            covered, hits = set(approximate.names), approximate.search(queries, segments, k)
        keep_wide = sum(segment.rows for segment in segments) * self.dimensions * 4 <= WIDE_BYTES
        floor = np.full(len(queries), -np.inf)
        for segment in segments:
            if segment.name in covered:
                continue
            best = TopK(queries, min(k, segment.rows), floor)
            segment.search(best, segment.allow(where), keep_wide)
            if segment.rows >= k:
                floor = np.maximum(floor, best.scores[:, -1])
            for own, rows, scores in zip(hits, best.rows.tolist(), best.scores.tolist(), strict=True):
                own += [(s, segment, r) for s, r in zip(scores, rows, strict=True) if r >= 0]
        if approximate and min(map(len, hits)) < min(k, sum(segment.count for segment in segments)):
            return self._search_dense(segments, queries, k)  # most of what it knew is gone
        return [rank_hits(own, k) for own in hits]

    def _search_bits(
        self, segments: Sequence[Segment], query: np.ndarray, k: int, wanted: int, where: Sequence[Condition] = ()
    ) -> Found:
        """The best of the ``wanted`` passages whose bits differ least from those of the query (D,), ties included."""
        bits = pack_signs(query[None])[:, 0]
        distances = [count_different(segment.bits, bits, segment.allow(where)) for segment in segments]
        radius = find_radius(distances, wanted) if segments else 0
        hits = []
        for segment, own in zip(segments, distances, strict=True):
            rows = np.flatnonzero(own <= radius)
            if not len(rows):
                continue
            best = TopK(query[None], min(k, len(rows)))
            segment.search_rows(best, rows)
            found = zip(best.rows[0].tolist(), best.scores[0].tolist(), strict=True)
            hits += [(score, segment, row) for row, score in found if row >= 0]
        return rank_hits(hits, k)

    @staticmethod
    def _find_rows(segments: Sequence[Segment], documents: Sequence[str]) -> list[tuple[Segment, dict]]:
        hashes = np.array([hash_text(name) for name in documents], np.uint64)
        return [(segment, segment.find_rows(documents, hashes)) for segment in segments]

    # ---- writing

    def add(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        vectors = np.asarray(vectors, np.float32)
        self._check_new(entries, vectors)
        if not entries:
            return
        with self._write() as state:
            order = sorted(range(len(entries)), key=lambda i: entries[i].id)
            entries = [entries[i] for i in order]
            texts = [join_heading(entry.heading, entry.text) for entry in entries]
            postings = {name: Postings.build(texts, name) for name in self.lexical}
            self._delete(state, list(dict.fromkeys(entry.document for entry in entries)))
            state["segments"].append(self._make_segment(state, entries, vectors[order], postings))
            self._compact(state)

    def delete(self, documents: Sequence[str]) -> int:
        with self._write() as state:
            removed = self._delete(state, list(dict.fromkeys(documents)))
            if removed:
                self._compact(state)
            else:
                state.clear()
        return removed

    def compact(self) -> None:
        """Merge small segments and forget deleted passages for good."""
        with self._write() as state:
            self._compact(state, everything=True)

    def build_approximate(self, queries: np.ndarray) -> dict[str, Any]:
        """Build the approximate index anew, unless it holds nine of ten passages already.

        ``queries`` (Q, D) are sample queries to measure its recall on. Searches without conditions use it from now on,
        together with an exact search of what it does not hold. Returns its description (cells, nprobe, recall@10).
        """
        with self._write() as state:
            state.clear()
            segments, folder = self._segments, self.path / "approximate"
            held = set(self._approximate.names) if self._approximate else set()
            known = sum(segment.count for segment in segments if segment.name in held)
            if self._approximate is None or known < 0.9 * self.count():

                def search(own: Approximate | None) -> Search:
                    return lambda vectors, k: [
                        [entry.id for entry, _ in found]
                        for found in self._search_dense(segments, vectors, k, approximate=own)
                    ]

                build_approximate(segments, folder, np.asarray(queries, np.float32), search(None), search)
                self._approximate = open_approximate(folder)
        return self._approximate.info

    def tune_bits(self, queries: np.ndarray) -> None:
        """Settle how many passages a search of bits scores, and measure what part of the exact answer it then finds.

        ``queries`` (Q, D) are sample queries: one half chooses the number (times K, doubled until BITS_RECALL of the
        exact ten are found or it is the largest), the other gives the recall. ``bits`` keeps both.
        """
        segments = self._segments
        found = self._search_dense(segments, np.asarray(queries, np.float32), DEPTH)
        exact = [[entry.id for entry, _ in own] for own in found]

        def measure(chosen: slice, times: int) -> float:
            near = [self._search_bits(segments, query, DEPTH, DEPTH * times) for query in queries[chosen]]
            return measure_recall(exact[chosen], [[entry.id for entry, _ in own] for own in near])

        first, second = slice(0, None, 2), slice(1, None, 2) if len(queries) > 1 else slice(None)
        times = next((own for own in OVERSAMPLES if measure(first, own) >= BITS_RECALL), OVERSAMPLES[-1])
        measured = {"oversample": times, "recall@10": round(measure(second, times), 4), "queries": len(queries)}
        self.update_info(bits={**measured, "aim": BITS_RECALL, "generation": self._manifest["generation"]})

    @property
    def bits(self) -> dict[str, Any]:
        """What ``tune_bits`` settled; empty where nothing was, or vectors are not kept as bits."""
        return self.info.get("bits") or {}

    @property
    def is_tuned(self) -> bool:
        """Whether what ``tune_bits`` measured is true of the passages as they are now."""
        return self.dtype != "binary" or self.bits.get("generation") == self._manifest["generation"]

    @property
    def approximate(self) -> dict[str, Any] | None:
        """What the approximate index is like; None without one."""
        return self._approximate.info if self._approximate else None

    def update_info(self, **values: Any) -> None:
        """Change what the index says about itself."""
        with self._write() as state:
            state.clear()
            self.info = {**self.info, **values}
            files.write_json(self.path / "index.json", seal(self.info))

    def close(self) -> None:
        self._segments = []
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove the index from the disk, unless anybody put passages into it, and close it."""
        with self._write() as state:  # nobody else writes until it is gone
            state.clear()
            if not self.count():
                shutil.rmtree(self.path)
        self.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[dict[str, Any]]:
        """The manifest to change; on leaving it replaces the old one (unless emptied) and is what is searched."""
        with self._writing:
            if self._lock is None:
                self._lock = take_lock(self.path / "lock")
                self._load()  # another writer may have been here since
                self._remove_leftovers()
            state = json.loads(json.dumps(self._manifest))
            state["generation"] += 1
            yield state
            if state:
                write_manifest(self.path, state)
                self._load()
                self._remove_leftovers()

    def _check_new(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        if vectors.shape != (len(entries), self.dimensions):
            raise ValueError(f"vectors {vectors.shape} do not fit {len(entries)} passages of {self.dimensions}")
        if not np.isfinite(vectors).all() or (np.abs(np.linalg.norm(vectors, axis=1) - 1) > 0.009).any():
            raise ValueError("the vectors must be finite and of unit length")
        if len({entry.id for entry in entries}) < len(entries):
            raise ValueError("two passages have the same id")

    def _make_segment(
        self, state: dict, entries: Sequence[Entry], vectors: np.ndarray, postings: dict[str, Postings]
    ) -> dict:
        number = 1 + max([int(record["name"]) for record in state["segments"]] + [state.get("last", 0)])
        state["last"] = number
        name = f"{number:08d}"
        with files.stage_folder(self.path / "segments" / name) as folder:
            write_segment(folder, entries, vectors, self.dtype, postings)
            record = {"name": name, "rows": len(entries), "files": {}, "deleted": None}
            for file in sorted(folder.iterdir()):
                record["files"][file.name] = [file.stat().st_size, hash_file(file)]
        return record

    def _delete(self, state: dict, documents: Sequence[str]) -> int:
        """Mark the passages of documents as deleted in the manifest to come; returns how many."""
        removed = 0
        for record, (segment, places) in zip(
            state["segments"], self._find_rows(self._segments, documents), strict=True
        ):
            if places:
                gone = np.concatenate(list(places.values()))
                live = np.ones(segment.rows, bool) if segment.live is None else segment.live.copy()
                live[gone] = False
                removed += len(gone)
                file = f"deleted-{state['generation']:08d}.bits"
                content = np.packbits(live).tobytes()
                files.write_file(segment.folder / file, content)
                record["deleted"] = [file, hashlib.sha256(content).hexdigest()]
                record["live"] = int(live.sum())
        state["segments"] = [record for record in state["segments"] if record.get("live", 1)]
        return removed

    def _compact(self, state: dict, everything: bool = False) -> None:
        """Merge what ``compaction`` chooses of the manifest to come."""
        chosen = choose_segments(state["segments"], everything)
        if chosen:
            merged = merge_segments([self._open_segment(record) for record in chosen], self.lexical)
            record = self._make_segment(state, *merged)
            state["segments"] = [r for r in state["segments"] if r not in chosen] + [record]

    # ---- files

    def _load(self) -> None:
        """Map the segments of the newest manifest; a writer may replace it meanwhile."""
        for _ in range(5):
            manifest = read_manifest(self.path)
            try:
                segments = [self._open_segment(record) for record in manifest["segments"]]
            except Damaged:
                if read_manifest(self.path)["generation"] == manifest["generation"]:
                    raise
                continue
            self._manifest, self._segments = manifest, segments
            return
        raise RuntimeError(f"{self.path} is being changed faster than it can be opened: try again")

    def _open_segment(self, record: dict) -> Segment:
        return open_segment(self.path / "segments" / record["name"], record, self.lexical, self._recent)

    def verify(self) -> list[str]:
        """Read every file once and compare it with what was written; raises Damaged naming the first that differs.

        Returns the files that an older koret wrote without a checksum, which cannot be compared.
        """
        return verify_files(self.path, self._manifest) + verify_approximate(self.path / "approximate")

    def _remove_leftovers(self) -> None:
        """Delete what no manifest names: left by a killed writer, or merged. Only with the lock held."""
        files.remove_leftovers(self.path)
        known = {record["name"]: record for record in self._manifest["segments"]}
        for folder in (self.path / "segments").iterdir():
            if not folder.is_dir():  # a desktop's or file system's own, such as .DS_Store or .nfs0001
                continue
            if folder.name not in known:
                shutil.rmtree(folder)
                continue
            keep = {*known[folder.name]["files"], *(known[folder.name]["deleted"] or ())}
            for file in folder.iterdir():
                if file.name not in keep and file.is_file():
                    file.unlink()


def _is_unborn(path: Path) -> bool:
    """Whether a folder is empty or holds what a process killed while making an index leaves."""
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir() if not p.name.startswith(files.STAGING)}
    return names <= {"index.json", "lock", "segments"} and not any((path / "segments").glob("*"))


def _check_k(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    return k
