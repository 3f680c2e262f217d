"""Search by words in Milvus: a sparse vector finds candidates, the words kept with them give the folder's BM25 scores.

For each tokenizer NAME a row has ``NAME_terms``, the hashes of its different words, with the numbers of the bits set in
its length (below 64, no hash is); ``NAME_counts``, how often each occurs; and ``NAME``, a sparse vector of the words'
weights by a mean length fixed with the first passages (``Known.excess`` says what came of that).

How many passages hold a word, and the sum of their lengths, are asked of the engine, never estimated, and remembered
until the collection's stamp says that somebody wrote.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from koret.data.passages import join_heading
from koret.retrieval.lexical import tokenize
from koret.retrieval.milvus_connection import DEEPEST, Connection
from koret.retrieval.postings import K1, B, hash_text
from koret.retrieval.store import Entry

CAPACITY = 4096  # numbers in an array field: the engine's limit
BITS = 18  # of a length: two texts of 65,535 bytes have fewer words
WHOLE = 20_000  # passages of which all words are read at once; of more, each word of a query is counted
TOGETHER = 4096  # of these, as many at a time
REMEMBERED = 200_000  # words whose counts are kept
SETTLE = 60.0  # seconds that counts are believed while somebody writes, or after a writer died
SPARE = 16  # candidates fetched beyond k
STAMP, MEAN = "koret.words", "koret.mean"  # properties: who wrote last; mean lengths that weights were made with
_DIMENSIONS = 4_294_967_291  # of sparse vectors, besides 0: the largest prime below 2 ** 32


class Words:
    """The lexical part of a collection; searching is safe from several threads."""

    def __init__(self, connection: Connection, tokenizers: Sequence[str]) -> None:
        self.tokenizers, self._connection = tuple(tokenizers), connection
        self._means: dict[str, float] = {}  # of the weights this process writes
        self._known: dict[str, Known] = {}
        self._counting = threading.Lock()

    # ---- writing

    def fill(self, rows: Sequence[dict[str, Any]]) -> None:
        """Give rows their words; raises ValueError for a passage of more different words than a row holds."""
        texts = [join_heading(row["heading"], row["text"]) for row in rows]
        counted = {name: [Counter(tokens) for tokens in tokenize(texts, name)] for name in self.tokenizers}
        for name, counts in counted.items():
            for row, own in zip(rows, counts, strict=True):
                _check_count(row["id"], len(own), name)
        if not counted:
            return
        kept = self._read_properties()
        for name, counts in counted.items():
            lengths = [own.total() for own in counts]
            first = max(1.0, round(sum(lengths) / max(len(lengths), 1), 1))
            mean = self._means[name] = min(_read_means(kept, name), default=first)
            for row, own, length in zip(rows, counts, lengths, strict=True):
                terms = [hash_term(token) for token in own]
                row[f"{name}_terms"] = terms + [bit for bit in range(BITS) if length >> bit & 1]
                row[f"{name}_counts"] = list(own.values())
                row[name] = _make_sparse(
                    (term, count / (count + K1 * (1 - B + B * length / mean)))
                    for term, count in zip(terms, own.values(), strict=True)
                ) | {0: 1.0}  # the engine refuses an empty one; no query asks for 0

    def check_count(self, entry: Entry) -> None:
        """Raises ValueError for a passage of more different words than a row holds."""
        text = join_heading(entry.heading, entry.text)
        if len(text) > CAPACITY - BITS:  # a word begins at a character of its own
            for name in self.tokenizers:
                _check_count(entry.id, len(set(tokenize([text], name)[0])), name)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Around every change of rows: what others have counted is void, before and after. An error leaves it open."""
        self._stamp("writing")
        yield
        self._stamp("kept")

    def _stamp(self, state: str) -> None:
        if not self.tokenizers:
            return
        means = {f"{MEAN}.{name}:{mean!r}": repr(mean) for name, mean in self._means.items()}
        self._connection.call("alter_collection_properties", properties={STAMP: f"{state} {uuid.uuid4().hex}", **means})

    # ---- searching

    def search(self, queries: Sequence[str], k: int, condition: str, tokenizer: str) -> list[list[tuple[str, float]]]:
        """Keys and BM25 scores of the K best rows of each query, (score descending, id ascending)."""
        known = self._recall(tokenizer)
        asked = [known.weigh(tokens) for tokens in tokenize(queries, tokenizer)]

        def fetch(some: Sequence[Terms], limit: int) -> list[list[Candidate]]:
            results = self._connection.call(
                "search", data=[_make_sparse(terms) for terms in some], anns_field=tokenizer, limit=limit,
                filter=condition, output_fields=["id", f"{tokenizer}_terms", f"{tokenizer}_counts"],
                search_params={"metric_type": "IP"},
            )  # fmt: skip
            return [[_make_candidate(hit, tokenizer) for hit in hits] for hits in results]

        limit = min(k + SPARE, DEEPEST)
        together = max(1, 2000 // limit)
        meant = [i for i, terms in enumerate(asked) if terms]
        found: list[list[tuple[str, float]]] = [[] for _ in queries]
        for start in range(0, len(meant), together):
            block = meant[start : start + together]
            for i, hits in zip(block, fetch([asked[i] for i in block], limit), strict=True):
                found[i] = _rank(known, asked[i], hits, k, limit, fetch)
        return found

    def _recall(self, tokenizer: str) -> Known:
        properties = self._read_properties()
        stamp = properties.get(STAMP, "")
        with self._counting:
            known = self._known.get(tokenizer)
            if not known or known.stamp != stamp or (not stamp.startswith("kept") and known.age > SETTLE):
                means = _read_means(properties, tokenizer)
                known = self._known[tokenizer] = self._count(tokenizer, stamp, min(means, default=1.0))
            return known

    def _count(self, tokenizer: str, stamp: str, reference: float) -> Known:
        field, call, born = f"{tokenizer}_terms", self._connection.call, time.monotonic()
        if self._connection.address.file:
            call("flush")  # the embedded build makes an index of sealed rows once, of others with every search
        size = _read_count(call("query", filter="", output_fields=["count(*)"]))
        if not (self._connection.is_lite or size <= WHOLE):

            def ask(term: int) -> int:
                return _read_count(call("query", filter=f"array_contains({field}, {term})", output_fields=["count(*)"]))

            return Known(stamp, reference, born, size, ask)
        rows, terms, passages = self._connection.try_again(
            lambda: _add_up(row[field] for row in self._connection.scan("number >= 1", [field]))
        )

        def look_up(term: int) -> int:
            i = int(np.searchsorted(terms, term))
            return int(passages[i]) if i < len(terms) and terms[i] == term else 0

        return Known(stamp, reference, born, rows, look_up)

    def _read_properties(self) -> dict[str, str]:
        return self._connection.call("describe_collection").get("properties", {})


Terms = list[tuple[int, float]]  # what a query asks for, in its order: hash, and repeats * idf


class Candidate(NamedTuple):
    key: str
    id: str
    distance: float  # the sparse product
    counts: dict[int, int]  # of each of its terms


@dataclass
class Known:
    """What is known of all passages together, as the stamp stood.

    ``reference`` is the smallest mean length that weights were made with, ``ask`` counts the passages with a term.
    """

    stamp: str
    reference: float
    born: float
    size: int
    ask: Callable[[int], int]

    def __post_init__(self) -> None:
        self._counts: dict[int, int] = {}
        bits = [self.find(bit) for bit in range(BITS)]
        self.mean_length = sum(found << bit for bit, found in enumerate(bits)) / max(self.size, 1)
        longest = 1 << max((bit + 1 for bit, found in enumerate(bits) if found), default=0)
        heaviest = [1 + K1 * (1 - B + B * longest / mean) for mean in (self.reference, self.mean_length or 1.0)]
        # A weight by the reference is too small by most for a single word of the longest passage
        self.excess = max(1.0, heaviest[0] / heaviest[1])

    @property
    def age(self) -> float:
        return time.monotonic() - self.born

    def find(self, term: int) -> int:
        """How many passages hold a term."""
        found = self._counts.get(term)
        if found is None:
            if len(self._counts) > REMEMBERED:
                self._counts.clear()
            found = self._counts[term] = min(self.ask(term), self.size)  # more were added since ``size`` was asked
        return found

    def weigh(self, tokens: Sequence[str]) -> Terms:
        """The terms of a query that some passage holds."""
        terms = []
        for token, repeats in Counter(tokens).items():
            found = self.find(hash_term(token))
            if found:
                terms.append((hash_term(token), repeats * np.log(1 + (self.size - found + 0.5) / (found + 0.5))))
        return terms

    def score(self, asked: Terms, held: Sequence[dict[int, int]]) -> np.ndarray:
        """The BM25 score (N,) float64 of rows by the counts of their words, as ``postings.Statistics`` adds it up."""
        scores = np.zeros(len(held))
        length = 1 - B + B * np.array([sum(own.values()) for own in held], np.int64) / (self.mean_length or 1.0)
        for term, weight in asked:
            counts = np.array([own.get(term, 0) for own in held], np.float64)
            scores += weight * counts / (counts + K1 * length)
        return scores

    def bound(self, asked: Terms, distance: float) -> float:
        """What no row scores more than whose sparse product, a sum of float32 numbers, is at most ``distance``."""
        return distance * self.excess * (1 + (len(asked) + 8) * float(np.finfo(np.float32).eps))


def _rank(
    known: Known,
    asked: Terms,
    candidates: list[Candidate],
    k: int,
    limit: int,
    fetch: Callable[[Sequence[Terms], int], list[list[Candidate]]],
) -> list[tuple[str, float]]:
    """Score the candidates exactly; fetch further while one that was not fetched might be among the K best."""
    while True:
        scores = known.score(asked, [candidate.counts for candidate in candidates])
        if len(candidates) < limit or limit == DEEPEST:
            break
        if np.sort(scores)[-k] > known.bound(asked, candidates[-1].distance):
            break
        limit = min(4 * limit, DEEPEST)
        (candidates,) = fetch([asked], limit)
    places = sorted((-score, own.id, own.key) for score, own in zip(scores.tolist(), candidates, strict=True))
    return [(key, -score) for score, _, key in places[:k] if score < 0]


def _make_candidate(hit: dict[str, Any], tokenizer: str) -> Candidate:
    row = hit["entity"]
    # The terms are followed by the bits of the length, which have no counts
    counts = dict(zip(row[f"{tokenizer}_terms"], row[f"{tokenizer}_counts"], strict=False))
    return Candidate(hit["key"], row["id"], hit["distance"], counts)


def _check_count(name: str, count: int, tokenizer: str) -> None:
    if count > CAPACITY - BITS:
        raise ValueError(
            f"{name[:80]!r} has {count:,} different words ({tokenizer}); Milvus holds at most {CAPACITY - BITS:,}: "
            "build an index of shorter passages (--passage-tokens), or one without words (--lexical none)"
        )


def _add_up(lists: Iterable[Sequence[int]]) -> tuple[int, np.ndarray, np.ndarray]:
    """How many lists there are, the different numbers in them, ascending, and in how many lists each stands."""
    rows, terms, counts = 0, np.zeros(0, np.int64), np.zeros(0, np.int64)
    lists = iter(lists)
    while piece := [np.array(own, np.int64) for own in itertools.islice(lists, TOGETHER)]:
        rows += len(piece)
        found, often = np.unique(np.concatenate(piece), return_counts=True)
        terms, place = np.unique(np.concatenate([terms, found]), return_inverse=True)
        counts = np.bincount(place, weights=np.concatenate([counts, often]), minlength=len(terms)).astype(np.int64)
    return rows, terms, counts


def hash_term(token: str) -> int:
    """63 bits that stand for a word, none of the numbers that stand for bits of a length."""
    return max(hash_text(token) >> 1, 64)


def _make_sparse(terms: Any) -> dict[int, float]:
    """A sparse vector; of two terms in one dimension both count, so that products are never too small."""
    sparse: dict[int, float] = {}
    for term, weight in terms:
        dimension = 1 + term % _DIMENSIONS
        sparse[dimension] = sparse.get(dimension, 0.0) + float(weight)
    return sparse


def _read_means(properties: dict[str, str], tokenizer: str) -> list[float]:
    return [float(value) for key, value in properties.items() if key.startswith(f"{MEAN}.{tokenizer}:")]


def _read_count(rows: Sequence[dict[str, Any]]) -> int:
    return int(rows[0]["count(*)"])


def describe_words(pymilvus: Any, schema: Any, indexes: Any, tokenizers: Sequence[str], is_lite: bool) -> None:
    """The fields and indexes of a lexical part; the embedded build has no index over arrays."""
    kinds = pymilvus.DataType
    for name in tokenizers:
        schema.add_field(name, kinds.SPARSE_FLOAT_VECTOR)
        schema.add_field(f"{name}_terms", kinds.ARRAY, element_type=kinds.INT64, max_capacity=CAPACITY)
        schema.add_field(f"{name}_counts", kinds.ARRAY, element_type=kinds.INT32, max_capacity=CAPACITY)
        indexes.add_index(name, index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
        if not is_lite:
            indexes.add_index(f"{name}_terms", index_type="INVERTED")


def find_words(described: dict[str, Any], tokenizers: Sequence[str]) -> list[str]:
    """The tokenizers whose fields a collection has; one made before there were any has none."""
    fields = {field["name"] for field in described["fields"]}
    return [name for name in tokenizers if {name, f"{name}_terms", f"{name}_counts"} <= fields]
