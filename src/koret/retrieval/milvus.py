"""Passages in Milvus, by URL: a server or cluster, or the embedded build of the same engine in a file.

    milvus://host:19530/collection         a server (milvus+https://... over TLS; token in KORET_MILVUS_TOKEN)
    milvus:file.db, milvus:///abs/file.db  the embedded build (Milvus Lite), one process at a time

``?collection=NAME`` names the collection (default koret) and ``?index=HNSW`` chooses how a new one is searched; FLAT,
the default, is exact. What the index says about itself stands in the collection's properties and description, so any
machine can open it.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from koret.retrieval.milvus_connection import DEEPEST, INDEXES, Address, Connection, Patience, parse_url
from koret.retrieval.milvus_rows import (
    ENTRY,
    LONGEST,
    agree,
    check_length,
    hash_name,
    make_entry,
    make_rows,
    translate,
)
from koret.retrieval.milvus_words import STAMP, Words, describe_words, find_words
from koret.retrieval.store import Condition, Entry, Found

ROWS, OWNERS = 1000, 256  # rows sent together, documents asked about together
SPARE = 16  # results fetched beyond k, so that ties at the edge are rarely cut
INFO = "koret.info"  # the property that holds what the index says about itself


class MilvusStore:
    """Passages in a collection. See ``store.Store``; searching is safe from several threads.

    Vectors are kept as float32; an index of another dtype rounds them to float16 first, like the folder index, so that
    scores agree. The engine has no transactions: replacing a document writes the new passages, then removes what is
    left of the old. A crash between leaves a document whose version is not known, so the next build does it again.
    """

    def __init__(self, address: Address, info: dict[str, Any], dimensions: int, connection: Connection) -> None:
        self.address, self.info, self.dimensions, self._connection = address, info, dimensions, connection
        self._words = Words(connection, info.get("lexical", ()))

    @classmethod
    def create(
        cls, url: str, info: dict[str, Any], dimensions: int, *, patience: Patience | None = None
    ) -> MilvusStore:
        """An empty collection. Raises ValueError where it exists, RuntimeError where the engine cannot be reached."""
        address = parse_url(url)
        if address.file:
            Path(address.file).parent.mkdir(parents=True, exist_ok=True)
        connection = Connection(address, patience or Patience())
        try:
            if connection.call("has_collection"):
                raise ValueError(f"{url}: the collection '{address.collection}' exists; open it, or name another")
            info = {**info, "dimensions": dimensions, "milvus_index": address.index}
            schema, indexes = _describe_collection(connection, info, dimensions, address.index)
            connection.call(
                "create_collection", schema=schema, index_params=indexes, consistency_level="Strong",
                properties={INFO: schema.description, STAMP: "kept"},
            )  # fmt: skip
        except BaseException:
            connection.close()
            raise
        return cls(address, info, dimensions, connection)

    @classmethod
    def open(cls, url: str, *, patience: Patience | None = None) -> MilvusStore:
        """Raises FileNotFoundError where there is no such collection, ValueError where koret did not make it, and
        RuntimeError where the engine cannot be reached."""
        address = parse_url(url)
        missing = FileNotFoundError(f"{url} holds no collection '{address.collection}'; make it with: koret index")
        if address.file and not os.path.exists(address.file):
            raise missing
        connection = Connection(address, patience or Patience())
        try:
            if not connection.call("has_collection"):
                raise missing
            try:
                described = connection.call("describe_collection")
                info = _read_info(described)
                dimensions = int(info["dimensions"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{url}: koret did not make the collection '{address.collection}'") from None
            connection.call("load_collection")
        except BaseException:
            connection.close()
            raise
        # A collection made before collections had words says nonetheless that it has them
        info["lexical"] = find_words(described, info.get("lexical", ()))
        return cls(address, info, dimensions, connection)

    # ---- reading

    def count(self) -> int:
        return int(self._connection.call("query", filter="", output_fields=["count(*)"])[0]["count(*)"])

    def search(self, vectors: np.ndarray, k: int, where: Sequence[Condition] = ()) -> list[Found]:
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise ValueError(f"query vectors {vectors.shape} do not fit an index of {self.dimensions} dimensions")
        if not np.isfinite(vectors).all():
            raise ValueError("a query vector holds NaN or infinite values")
        _check_k(k)
        condition = translate(where)
        limit = min(k + SPARE, DEEPEST)
        together = max(1, 2000 // limit)
        found: list[Found] = []
        for start in range(0, len(vectors), together):
            block = vectors[start : start + together]
            results = self._fetch(block, limit, condition)
            found += [self._rank(query, hits, k, condition) for query, hits in zip(block, results, strict=True)]
        return found

    def search_lexical(
        self, queries: Sequence[str], k: int, where: Sequence[Condition] = (), tokenizer: str | None = None
    ) -> list[Found]:
        """The K passages of largest BM25 score (``lexical.LexicalIndex``), as ``folder.FolderStore`` finds them.

        Where more than 16,384 passages come close to the best K, those are taken that the engine holds to be best.
        """
        tokenizer = tokenizer or next(iter(self._words.tokenizers), None)
        if tokenizer not in self._words.tokenizers:
            raise ValueError(f"the index was built without {tokenizer or 'a'} lexical part: build it with --lexical")
        found = self._words.search(queries, _check_k(k), translate(where), tokenizer)
        keys = list(dict.fromkeys(key for best in found for key, _ in best))
        entries: dict[str, Entry] = {}
        for start in range(0, len(keys), ROWS):
            rows = self._connection.call("get", ids=keys[start : start + ROWS], output_fields=["key", *ENTRY])
            entries.update((row["key"], make_entry(row)) for row in rows)
        # One that was deleted meanwhile is no result
        return [[(entries[key], score) for key, score in best if key in entries] for best in found]

    def find_versions(self, documents: Sequence[str]) -> list[str | None]:
        rows: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
        for row in self._scan_documents(documents, ["document", "version", "parts"]):
            rows[row["document"]].append((row["version"], row["parts"]))
        return [agree(rows.get(name, [])) for name in documents]

    def list_documents(self) -> Iterator[str]:
        for row in self._connection.scan("number == 1", ["document"]):
            yield row["document"]

    def read_document(self, document: str) -> list[Entry]:
        """The passages of a document, in the order of its text; empty where it is unknown."""
        rows = self._scan_documents([document], [*ENTRY, "number"])
        return [make_entry(row) for row in sorted(rows, key=lambda row: row["number"])]

    def _fetch(self, queries: np.ndarray, limit: int, condition: str) -> list[list[dict]]:
        depth = max(2 * limit, 64)
        parameters = {"HNSW": {"ef": depth}, "DISKANN": {"search_list": depth}}.get(self.info.get("milvus_index"), {})
        return self._connection.call(
            "search", data=queries.tolist(), anns_field="vector", limit=limit, filter=condition,
            output_fields=[*ENTRY, "vector"], search_params={"metric_type": "IP", "params": parameters},
        )  # fmt: skip

    def _rank(self, query: np.ndarray, hits: list[dict], k: int, condition: str) -> Found:
        """The K best by their own float64 products; fetches further while the edge may have cut a tie."""
        margin = 2 * float(np.linalg.norm(query)) * self.dimensions * float(np.finfo(np.float32).eps)
        limit = min(k + SPARE, DEEPEST)
        while len(hits) == limit < DEEPEST and hits[k - 1]["distance"] - hits[-1]["distance"] <= margin:
            limit = min(4 * limit, DEEPEST)
            hits = self._fetch(query[None], limit, condition)[0]
        if not hits:
            return []
        rows = [hit["entity"] for hit in hits]
        kept = np.array([row["vector"] for row in rows], np.float32).astype(np.float64)
        scores = np.einsum("nd,nd->n", np.broadcast_to(query.astype(np.float64), kept.shape), kept)
        pairs = [(make_entry(row), score) for row, score in zip(rows, scores.tolist(), strict=True)]
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0].id))[:k]

    def _scan_documents(self, documents: Sequence[str], fields: Sequence[str]) -> list[dict]:
        owners = sorted({hash_name(name) for name in documents})
        rows = []
        for start in range(0, len(owners), OWNERS):
            listed = ", ".join(f'"{owner}"' for owner in owners[start : start + OWNERS])
            condition = f"owner in [{listed}]"
            rows += self._connection.try_again(
                lambda condition=condition: list(self._connection.scan(condition, fields))
            )
        return rows

    # ---- writing

    def add(self, entries: Sequence[Entry], vectors: np.ndarray) -> None:
        """See ``store.Store``. Raises ValueError for a text of more than 65,535 bytes, or of more different words than
        a row holds, before anything is sent."""
        vectors = np.asarray(vectors, np.float32)
        if vectors.shape != (len(entries), self.dimensions):
            raise ValueError(f"vectors {vectors.shape} do not fit {len(entries)} passages of {self.dimensions}")
        if not np.isfinite(vectors).all() or (np.abs(np.linalg.norm(vectors, axis=1) - 1) > 0.009).any():
            raise ValueError("the vectors must be finite and of unit length")
        if self.info.get("dtype", "float16") != "float32":
            vectors = vectors.astype(np.float16).astype(np.float32)
        rows = make_rows(entries, vectors)
        self._words.fill(rows)
        names = list(dict.fromkeys(entry.document for entry in entries))
        before = {row["key"] for row in self._scan_documents(names, ["key"])}
        stale = sorted(before - {row["key"] for row in rows})
        with self._words.changing():
            for start in range(0, len(rows), ROWS):
                self._connection.call("upsert", data=rows[start : start + ROWS])
            self._remove(stale)

    def explain_unfit(self, entries: Sequence[Entry]) -> str | None:
        """Why the passages of a document cannot be kept, in words; None where they can."""
        try:
            for entry in entries:
                check_length(entry)
                self._words.check_count(entry)
        except ValueError as error:
            return str(error)
        return None

    def delete(self, documents: Sequence[str]) -> int:
        found = self._scan_documents(documents, ["key", "number"])
        places = {row["key"]: (row["number"] == 1, row["key"]) for row in found}
        keys = sorted(places, key=places.get)  # a document is listed by its first passage: it goes last
        if keys:
            with self._words.changing():
                self._remove(keys)
        return len(keys)

    def _remove(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), ROWS):
            self._connection.call("delete", ids=keys[start : start + ROWS])

    def discard(self) -> None:
        """Remove the collection, unless it holds passages, and close."""
        if not self.count():
            self._connection.call("drop_collection")
        self.close()

    def close(self) -> None:
        self._connection.close()


# ---- details


def _check_k(k: int) -> int:
    if not 1 <= k <= DEEPEST:
        raise ValueError(f"k must lie between 1 and {DEEPEST:,} in a Milvus collection, not {k}")
    return k


def _read_info(described: dict[str, Any]) -> dict[str, Any]:
    """Servers keep properties and description, the embedded build only the properties."""
    return json.loads(described.get("properties", {}).get(INFO) or described["description"])


def _describe_collection(connection: Connection, info: dict[str, Any], dimensions: int, index: str) -> tuple[Any, Any]:
    pymilvus = connection.pymilvus
    kinds = pymilvus.DataType
    description = json.dumps(info, ensure_ascii=False)
    schema = pymilvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
    schema.add_field("key", kinds.VARCHAR, is_primary=True, max_length=32)
    schema.add_field("owner", kinds.VARCHAR, max_length=32)
    for name in ENTRY:
        schema.add_field(name, kinds.VARCHAR, max_length=LONGEST)
    schema.add_field("values", kinds.JSON)
    schema.add_field("number", kinds.INT64)
    schema.add_field("parts", kinds.INT64)
    schema.add_field("vector", kinds.FLOAT_VECTOR, dim=dimensions)
    indexes = pymilvus.MilvusClient.prepare_index_params()
    indexes.add_index("vector", index_type=index, metric_type="IP", params=INDEXES[index])
    describe_words(pymilvus, schema, indexes, info.get("lexical", ()), connection.is_lite)
    return schema, indexes
