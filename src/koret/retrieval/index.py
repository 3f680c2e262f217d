"""Build an index of a corpus and search it: by vectors, by words, or by both.

The pipeline, each step a function that others (``distributed``) may run elsewhere: ``corpus.read_corpus`` ->
``skip_unchanged`` -> ``corpus.cut_document`` -> ``gather_segments`` -> ``encode_entries`` -> ``store.add``.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from koret.data.korquad import Reject
from koret.data.loader import find_cache_dir
from koret.data.passages import LEAST_BUDGET, join_heading, make_token_counter
from koret.data.sources import DataError
from koret.retrieval.census import Census
from koret.retrieval.corpus import Document, cut_document, read_corpus
from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.retrieval.lexical import fuse_lists
from koret.retrieval.places import IndexInfo, create_store, describe_encoder, exists, open_store, resolve_model
from koret.retrieval.store import Condition, Entry, Found, Store

MODES = ("dense", "lexical", "hybrid")
DEPTH = 100  # results of each kind that a hybrid search fuses
LONGEST_QUERY = 10_000  # characters; the rest of a query is not looked at
SEGMENT = 4096  # passages encoded and kept together: what a kill can cost
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
LISTED = 1000  # rejected records kept word for word


class Hit(msgspec.Struct, frozen=True):
    """One result; ``parts`` are the scores it is made of: dense (cosine) and lexical (BM25), as far as it has them."""

    rank: int  # from 1
    score: float
    entry: Entry
    parts: dict[str, float] = {}


class BuildReport(msgspec.Struct):
    """What a build did. ``rejects`` lists the first records that could not be used."""

    added: int = 0  # documents
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    spared: int = 0  # documents met again without a usable text: what is kept of them stays
    unpruned: str = ""  # why pruning removed nothing
    gone: int = 0  # documents of the index that are not in the corpus and stay, for pruning was not asked for
    encoded: int = 0  # passages
    cut_texts: int = 0  # texts longer than the window, cut into several passages
    rejected: int = 0
    rejects: list[Reject] = []
    seconds: float = 0.0

    def note_reject(self, reject: Reject) -> None:
        self.rejected += 1
        self.rejects += [reject] if len(self.rejects) < LISTED else []


class Index:
    """Passages that can be searched. Searching is safe from several threads."""

    def __init__(
        self,
        store: Store,
        location: str,
        model: str | Path | TextEncoder | None = None,
        *,
        fingerprint: str | None = None,
    ) -> None:
        """``fingerprint``: of an encoder given as ``model``, where known; taking it means to read every weight."""
        self.store, self.location, self._model = store, location, model
        self.info = msgspec.convert(store.info, IndexInfo)
        self.report = BuildReport()
        self._encoder: TextEncoder | None = None
        if isinstance(model, TextEncoder):
            self._encoder = self._check_encoder(model, fingerprint)

    @property
    def encoder(self) -> TextEncoder:
        """The encoder the index was made with, loaded on first use; another one is a ValueError."""
        if self._encoder is None:
            self._encoder = self._check_encoder(load_encoder(
                self._model or resolve_model(self.info, self.location),
                max_seq_length=self.info.max_seq_length,
                query_prefix=self.info.prefixes["query"],
                passage_prefix=self.info.prefixes["passage"],
            ))  # fmt: skip
        return self._encoder

    @property
    def has_words(self) -> bool:
        """Whether it can be searched by words too."""
        return bool(self.info.lexical)

    def search(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        mode: str = "dense",
        where: Sequence[Condition] = (),
        weight: float | None = None,
        tokenizer: str | None = None,
    ) -> list[list[Hit]]:
        """The K best passages of each query.

        ``hybrid`` fuses the best 100 (or K) of either kind: by ``weight`` of the dense score, else the weight the index
        holds, else by reciprocal rank. ``tokenizer``: the words to search by, by default the first of
        ``info.lexical``. Raises ValueError for an empty query, an unknown mode, or a lexical search of an index without
        lexical part, or without that one.
        """
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
        _check_queries(queries)
        if mode == "lexical":
            return self.search_lexical(queries, k, where, tokenizer)
        depth = max(k, DEPTH) if mode == "hybrid" else k
        lexical = self.search_lexical(queries, depth, where, tokenizer) if mode == "hybrid" else None
        dense = self.search_vectors(self.encoder.encode(list(queries), "query"), depth, where)
        if lexical is None:
            return dense
        return [self.fuse(*pair, k, weight) for pair in zip(dense, lexical, strict=True)]

    def search_vectors(self, vectors: np.ndarray, k: int, where: Sequence[Condition] = ()) -> list[list[Hit]]:
        """The K nearest passages of query vectors (Q, D)."""
        return [_make_hits(found, "dense") for found in self.store.search(vectors, k, where)]

    def search_lexical(
        self, queries: Sequence[str], k: int, where: Sequence[Condition] = (), tokenizer: str | None = None
    ) -> list[list[Hit]]:
        """The K passages of largest BM25 score; those that share no word with the query are no results."""
        _check_queries(queries)
        if not self.has_words:
            raise ValueError(
                f"{self.location} has no lexical part: search it with the mode dense, or build a new index with "
                "--lexical"
            )
        if tokenizer is not None and tokenizer not in self.info.lexical:
            raise ValueError(
                f"{self.location} holds no {tokenizer} words, only {' and '.join(self.info.lexical)}: search it by "
                "those, or build a new index with another --lexical"
            )
        clipped = [query[:LONGEST_QUERY] for query in queries]
        return [_make_hits(found, "lexical") for found in self.store.search_lexical(clipped, k, where, tokenizer)]

    def fuse(self, dense: list[Hit], lexical: list[Hit], k: int, weight: float | None = None) -> list[Hit]:
        """One list of two: see ``search``."""
        weight = self.info.hybrid_weight if weight is None else weight
        near = {hit.entry.id: hit for hit in dense}
        worded = {hit.entry.id: hit for hit in lexical}
        scores = ({name: hit.score for name, hit in own.items()} for own in (near, worded))
        return [
            _join_hits(rank, score, near.get(name), worded.get(name))
            for rank, (name, score) in enumerate(fuse_lists(*scores, weight, k), 1)
        ]

    def add(self, documents: Iterable[Document | Reject], progress: Callable[[int], None] | None = None) -> BuildReport:
        """Keep documents: new ones are added, changed ones replaced, unchanged ones passed over."""
        report, started = self.report, time.perf_counter()
        count_tokens = make_token_counter(self.encoder.export_tokenizer(find_cache_dir(None) / "tokenizers"))
        changed = skip_unchanged(self.store, documents, report)
        explain_unfit = getattr(self.store, "explain_unfit", None)
        for entries in gather_segments(
            changed, self.info.passage_tokens, count_tokens, report, explain_unfit=explain_unfit
        ):
            self.store.add(entries, encode_entries(self.encoder, entries, progress is not None))
            report.encoded += len(entries)
            if progress:
                progress(report.encoded)
        report.seconds += time.perf_counter() - started
        return report

    def delete(self, documents: Sequence[str]) -> int:
        """Forget documents by id; returns how many passages went."""
        return self.store.delete(documents)

    def count(self) -> int:
        return self.store.count()

    def close(self) -> None:
        self.store.close()

    def _check_encoder(self, encoder: TextEncoder, fingerprint: str | None = None) -> TextEncoder:
        if (fingerprint or encoder.fingerprint()) != self.info.fingerprint:
            changed = " as it is now (weights, prefixes or length)" if encoder.name == self.info.encoder else ""
            raise ValueError(
                f"{self.location} was made with another model ({self.info.encoder}) than {encoder.name}{changed}: "
                "search it with that one, or build an index of this one"
            )
        return encoder


def build_index(
    model: str | Path | TextEncoder,
    corpus: str | Path | Iterable[Document | Reject],
    out: str | Path,
    *,
    dtype: str | None = None,
    lexical: Sequence[str] | None = None,
    approximate: bool = False,
    max_seq_length: int | None = None,
    passage_tokens: int | None = None,
    hybrid_weight: float | None = None,
    prune: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """Make the index ``out`` (a folder, or milvus:...) of a corpus, or bring it up to date.

    Documents whose content is in the index already are passed over, so the same command after a kill goes on where it
    was. ``dtype`` (float16 unless said; the recall of binary is measured at the end) and ``lexical`` (('bigram',)
    unless said; Kiwi's morphemes cost minutes for each 100,000 passages) are fixed when the index is made, like
    ``passage_tokens`` (the encoder's length unless said, and at most that). ``prune`` removes the documents that are
    not in the corpus; one that is there and cannot be read stays (``census``). ``progress`` is told the passages
    encoded so far. ``Index.report`` says what was done. Raises ValueError for another model or other settings than the
    index was made with, passages longer than the encoder reads, or a dtype that ``out`` cannot keep, and DataError for
    a corpus without a document; a new index that holds nothing by then is removed.
    """
    encoder = model if isinstance(model, TextEncoder) else load_encoder(model, max_seq_length=max_seq_length)
    documents = iter(read_corpus(corpus) if isinstance(corpus, (str, Path)) else corpus)
    first = list(itertools.islice(documents, 1))  # a corpus that cannot be read leaves no empty index
    documents = itertools.chain(first, documents)
    wanted = {"dtype": dtype, "lexical": None if lexical is None else tuple(lexical), "passage_tokens": passage_tokens}
    store = open_store(out) if exists(out) else None
    is_new = store is None
    if store is None:
        check_budget(passage_tokens, encoder)
        info = describe_encoder(encoder, out, {**wanted, "hybrid_weight": hybrid_weight})
        store = create_store(out, info)
    try:
        index = Index(store, str(out), encoder)
        _bring_up_to_date(index, corpus, documents, wanted, prune, progress)
        if approximate:
            _add_approximate(index)
        if not getattr(store, "is_tuned", True):
            store.tune_bits(encoder.encode(sample_queries(store), "query"))
    except BaseException as error:
        if is_new and isinstance(error, Exception):  # empty, it would fix settings that nobody chose for good
            with contextlib.suppress(Exception):  # what went wrong first is what is to be told
                store.discard()
        store.close()
        raise
    return index


def check_budget(tokens: int | None, encoder: TextEncoder) -> None:
    """Raise ValueError for passages of a number of tokens that the encoder does not read, or that nothing fits into."""
    if tokens is not None and not LEAST_BUDGET <= tokens <= encoder.max_seq_length:
        raise ValueError(
            f"passage_tokens must lie between {LEAST_BUDGET} and {encoder.max_seq_length}, the tokens of a text that "
            f"the model reads, not {tokens}"
        )


def _bring_up_to_date(
    index: Index,
    corpus: Any,
    documents: Iterable[Document | Reject],
    wanted: dict[str, Any],
    prune: bool,
    progress: Callable[[int], None] | None,
) -> None:
    for name, value in wanted.items():
        kept = getattr(index.info, name)
        if value is not None and value != kept:
            raise ValueError(
                f"{index.location} was made with {name} {kept}, not {value}: build another index, or leave it out"
            )
    census = Census()
    report = index.add(census.watch(documents), progress)
    if not report.added + report.changed + report.unchanged:
        why = [f"; the first of {report.rejected} skipped: {r.source}: {r.reason}" for r in report.rejects[:1]]
        raise DataError(f"{corpus} holds no document to index{''.join(why)}")
    _settle_gone(index, census, prune)


def _settle_gone(index: Index, census: Census, prune: bool) -> None:
    """Remove what left the corpus, or count it where removing was not asked for."""
    gone, unread = census.find_gone(index.store)
    if not prune:
        index.report.gone = 0 if census.nameless else len(gone)
        return
    index.report.spared += unread
    if gone and census.nameless:
        lost = census.nameless
        where = f"{lost.source}:{lost.position}" if lost.position else lost.source
        index.report.unpruned = (
            f"nothing removed: {len(gone):,} documents of the index are not in the corpus, or are records in it that "
            f"cannot be read and have no id, such as {where}; mend those, or name the documents with --delete"
        )
        return
    index.store.delete(gone)
    index.report.removed = len(gone)


def _add_approximate(index: Index) -> None:
    if not hasattr(index.store, "build_approximate"):
        raise ValueError(f"{index.location} has approximate indexes of its own: leave --approximate out")
    index.store.build_approximate(index.encoder.encode(sample_queries(index.store), "query"))


def open_index(location: str | Path, model: str | Path | TextEncoder | None = None) -> Index:
    """Open an index (a folder, or milvus:...) for searching.

    ``model``: an encoder, or where to find it; default: what the index says. Raises FileNotFoundError where there is
    none, ValueError where it is damaged, and ValueError for another model (a named one once it is first needed).
    """
    return Index(open_store(location), str(location), model)


# ---- the pipeline


def skip_unchanged(
    store: Store, documents: Iterable[Document | Reject], report: BuildReport, together: int = 256
) -> Iterator[tuple[Document, bool]]:
    """The documents that the store has not (True), or has otherwise (False); the rest is counted in ``report``."""
    for batch in _cut(documents, together):
        fresh = []
        for item in batch:
            if isinstance(item, Reject):
                report.note_reject(item)
            else:
                fresh.append(item)
        for document, version in zip(fresh, store.find_versions([d.id for d in fresh]), strict=True):
            if version == document.version:
                report.unchanged += 1
            else:
                yield document, version is None


def gather_segments(
    documents: Iterable[tuple[Document, bool]],
    budget: int,
    count_tokens: Callable,
    report: BuildReport,
    size: int = SEGMENT,
    *,
    explain_unfit: Callable[[list[Entry]], str | None] | None = None,
) -> Iterator[list[Entry]]:
    """Passages of whole documents, about ``size`` together.

    A document without any, or that ``explain_unfit`` gives a reason not to keep, is a reject: what was kept of it
    stays.
    """
    waiting: list[Entry] = []
    for document, is_new in documents:
        entries, cut = cut_document(document, budget, count_tokens)
        unfit = "no text in it" if not entries else explain_unfit(entries) if explain_unfit else None
        if unfit:
            lost = Reject(document.id, unfit, 0, document.title, document.id, is_article=True)
            report.note_reject(lost)
            report.spared += not is_new
            continue
        report.added += is_new
        report.changed += not is_new
        report.cut_texts += cut
        if waiting and len(waiting) + len(entries) > size:
            yield waiting
            waiting = []
        waiting += entries
    if waiting:
        yield waiting


def encode_entries(encoder: TextEncoder, entries: Sequence[Entry], progress: bool = False) -> np.ndarray:
    """(N, D) float32 unit vectors of passages, in length-sorted batches."""
    return encoder.encode([join_heading(e.heading, e.text) for e in entries], "passage", progress=progress)


def sample_queries(store: Store, count: int = 400, seed: int = 0) -> list[str]:
    """Texts like queries, to measure recall on: a sentence each of passages drawn at random."""
    queries = []
    for entry in store.sample_entries(count, seed):
        sentences = [s for s in _SENTENCE_END.split(entry.text) if 10 <= len(s) <= 80]
        queries.append(sentences[len(sentences) // 2] if sentences else entry.text[:80])
    return queries


def _cut(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---- details


def _check_queries(queries: Sequence[str]) -> None:
    if isinstance(queries, str):
        raise ValueError("queries: expected a list of texts, got one text; wrap it in a list")
    for query in queries:
        if not query.strip():
            raise ValueError("the query is empty")


def _make_hits(found: Found, part: str) -> list[Hit]:
    return [Hit(rank, score, entry, {part: score}) for rank, (entry, score) in enumerate(found, 1)]


def _join_hits(rank: int, score: float, dense: Hit | None, lexical: Hit | None) -> Hit:
    """A passage that one or both rankings found, with the scores it has in them."""
    if dense is None or lexical is None:
        own = dense or lexical
        return Hit(rank, score, own.entry, own.parts)
    return Hit(rank, score, lexical.entry, {**dense.parts, **lexical.parts})
