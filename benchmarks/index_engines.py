"""The engines that index_speed.py compares: each builds an index in a folder and opens it again.

``load()`` imports what it needs, ``build(data, count, folder)`` writes, ``open(folder, count)`` gives a search and how
many bytes a query must read (None for graphs). ``data`` is the folder that index_speed.py wrote the vectors to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

DIMENSIONS, DEPTH, PIECE, THREADS = 384, 10, 4096, 2
SPREAD = 0.7  # length of the noise around a unit centre
NPROBE = 32  # of plain faiss; koret chooses its own
WORDS = 30  # of a passage, where words are indexed
EXTRA: dict[str, Any] = {}  # what an engine wants noted beside the figures

Search = Callable[[np.ndarray], Any]  # a query (D,) -> the rows of its ten best


def make_unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def read_pieces(data: Path, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Read, not mapped: pages of a mapped input would count as memory of the builder."""
    with open(data / "vectors", "rb") as file:
        for start in range(0, count, PIECE):
            wanted = min(PIECE, count - start)
            yield start, np.fromfile(file, np.float32, wanted * DIMENSIONS).reshape(wanted, DIMENSIONS)


class Koret:
    def __init__(self, dtype: str, lexical: tuple[str, ...] = ()) -> None:
        self.dtype, self.lexical = dtype, lexical

    def load(self) -> None:
        import koret.retrieval.folder  # noqa: F401

    def build(self, data: Path, count: int, folder: Path) -> None:
        from koret.retrieval.folder import FolderStore

        store = FolderStore.create(folder / "index", {"dtype": self.dtype, "lexical": self.lexical}, DIMENSIONS)
        fill_store(store, data, count, bool(self.lexical))
        self.settle(store, data, count)
        store.close()

    def settle(self, store: Any, data: Path, count: int) -> None:
        """What is measured on sample queries once everything is kept."""

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        from koret.retrieval.folder import WIDE_BYTES, FolderStore

        store = FolderStore.open(folder / "index")
        wide = count * DIMENSIONS * 4 <= WIDE_BYTES
        width = 4 if wide else {"float32": 4, "float16": 2, "int8": 1}[self.dtype]
        return search_store(store), count * DIMENSIONS * width


def draw_queries(data: Path, count: int) -> np.ndarray:
    """Sample queries to settle a search on: stored vectors, moved a little."""
    sample = np.random.default_rng(1).choice(count, 64, replace=False)
    mapped = np.memmap(data / "vectors", np.float32, "r", shape=(count, DIMENSIONS))
    noise = np.random.default_rng(2).standard_normal((64, DIMENSIONS), np.float32) * np.float32(DIMENSIONS**-0.5)
    return make_unit(mapped[np.sort(sample)] + SPREAD * noise)


class KoretBits(Koret):
    def settle(self, store: Any, data: Path, count: int) -> None:
        store.tune_bits(draw_queries(data, count))

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        from koret.retrieval.folder import FolderStore

        store = FolderStore.open(folder / "index")
        EXTRA.update({name: store.bits[name] for name in ("oversample", "recall@10")})
        return search_store(store), count * DIMENSIONS // 8 + 10 * store.bits["oversample"] * DIMENSIONS * 2


class KoretApproximate(Koret):
    def load(self) -> None:
        import faiss  # noqa: F401

        super().load()

    def settle(self, store: Any, data: Path, count: int) -> None:
        store.build_approximate(draw_queries(data, count))

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        search, _ = super().open(folder, count)
        info = json.loads((folder / "index" / "approximate" / "ivf.json").read_bytes())
        EXTRA.update({name: info[name] for name in ("cells", "nprobe", "recall@10")})
        return search, count_ivf_bytes(count, info["cells"], info["nprobe"])


class MilvusLite:
    def load(self) -> None:
        import pymilvus  # noqa: F401

        import koret.retrieval.milvus  # noqa: F401

    def build(self, data: Path, count: int, folder: Path) -> None:
        from koret.retrieval.milvus import MilvusStore

        store = MilvusStore.create(f"milvus:{folder}/index.db", {"dtype": "float32"}, DIMENSIONS)
        fill_store(store, data, count, False)
        store.close()

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        from koret.retrieval.milvus import MilvusStore

        return search_store(MilvusStore.open(f"milvus:{folder}/index.db")), count * DIMENSIONS * 4


def fill_store(store: Any, data: Path, count: int, words: bool) -> None:
    """Passages of one short line each, or of ``WORDS`` made-up Korean words of falling frequency."""
    from koret.retrieval.store import Entry

    rng = np.random.default_rng(3)
    syllables = np.array([chr(code) for code in range(0xAC00, 0xAC00 + 11172, 28)])
    vocabulary = ["".join(word) for word in rng.choice(syllables, (20000, 3))]
    for start, vectors in read_pieces(data, count):
        entries = []
        for row in range(start, start + len(vectors)):
            text = f"passage {row}"
            if words:
                text = " ".join(vocabulary[i] for i in np.minimum(rng.zipf(1.2, WORDS) - 1, 19999))
            entries.append(Entry(f"{row:08d}#1", f"{row:08d}", "", text, "1"))
        store.add(entries, vectors)


def search_store(store: Any) -> Search:
    return lambda query: [int(entry.document) for entry, _ in store.search(query[None], DEPTH)[0]]


class Numpy:
    def load(self) -> None:
        pass

    def build(self, data: Path, count: int, folder: Path) -> None:
        with open(folder / "vectors", "wb") as file:
            for _, vectors in read_pieces(data, count):
                vectors.tofile(file)

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        vectors = np.fromfile(folder / "vectors", np.float32).reshape(count, DIMENSIONS)

        def search(query: np.ndarray) -> np.ndarray:
            scores = vectors @ query
            best = np.argpartition(-scores, DEPTH)[:DEPTH]
            return best[np.argsort(-scores[best])]

        return search, vectors.nbytes


class Faiss:
    def __init__(self, cells: bool) -> None:
        self.cells = cells

    def load(self) -> None:
        import faiss  # noqa: F401

    def build(self, data: Path, count: int, folder: Path) -> None:
        import faiss

        index = faiss.IndexFlatIP(DIMENSIONS)
        if self.cells:  # as many as koret takes, trained on as many vectors
            cells = min(round(2 * count**0.5), count // 50)
            index = faiss.IndexIVFScalarQuantizer(
                index, DIMENSIONS, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            )
            mapped = np.memmap(data / "vectors", np.float32, "r", shape=(count, DIMENSIONS))
            chosen = np.sort(np.random.default_rng(0).choice(count, min(count, 50 * cells), replace=False))
            index.train(np.asarray(mapped[chosen]))
            del mapped
        for _, vectors in read_pieces(data, count):
            index.add(vectors)
        faiss.write_index(index, str(folder / "index"))

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        import faiss

        index = faiss.read_index(str(folder / "index"))
        size = count * DIMENSIONS * 4
        if self.cells:
            index.nprobe = min(NPROBE, index.nlist)
            EXTRA.update(cells=index.nlist, nprobe=index.nprobe)
            size = count_ivf_bytes(count, index.nlist, index.nprobe)
        return lambda query: index.search(query[None], DEPTH)[1][0], size


def count_ivf_bytes(count: int, cells: int, nprobe: int) -> int:
    """Every centre in float32, and the looked-at share of the one-byte codes."""
    return cells * DIMENSIONS * 4 + count * DIMENSIONS * nprobe // cells


class Hnswlib:
    def load(self) -> None:
        import hnswlib  # noqa: F401

    def build(self, data: Path, count: int, folder: Path) -> None:
        import hnswlib

        index = hnswlib.Index("ip", DIMENSIONS)
        index.init_index(count, M=32, ef_construction=200, random_seed=1)
        for start, vectors in read_pieces(data, count):
            index.add_items(vectors, np.arange(start, start + len(vectors)), num_threads=THREADS)
        index.save_index(str(folder / "index"))

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        import hnswlib

        index = hnswlib.Index("ip", DIMENSIONS)
        index.load_index(str(folder / "index"))
        index.set_ef(100)
        return lambda query: index.knn_query(query, DEPTH, num_threads=THREADS)[0][0], None


class Usearch:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def load(self) -> None:
        import usearch.index  # noqa: F401

    def build(self, data: Path, count: int, folder: Path) -> None:
        from usearch.index import Index

        index = Index(ndim=DIMENSIONS, metric="cos", dtype=self.dtype)
        for start, vectors in read_pieces(data, count):
            index.add(np.arange(start, start + len(vectors)), vectors, threads=THREADS)
        index.save(str(folder / "index"))

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        from usearch.index import Index

        index = Index.restore(str(folder / "index"))
        return lambda query: index.search(query, DEPTH).keys, None


class LanceDB:
    def load(self) -> None:
        import lancedb  # noqa: F401

    def build(self, data: Path, count: int, folder: Path) -> None:
        import lancedb

        schema = make_table(0, np.zeros((1, DIMENSIONS), np.float32)).schema
        pieces = (make_table(*piece).to_batches()[0] for piece in read_pieces(data, count))
        lancedb.connect(folder).create_table("vectors", pieces, schema=schema)

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        import lancedb

        table = lancedb.connect(folder).open_table("vectors")

        def search(query: np.ndarray) -> list:
            asked = table.search(query, vector_column_name="vector").distance_type("dot").select(["id"])
            return asked.limit(DEPTH).to_arrow()["id"].to_pylist()

        return search, count * DIMENSIONS * 4


class DuckDB:
    def load(self) -> None:
        import duckdb  # noqa: F401

    def build(self, data: Path, count: int, folder: Path) -> None:
        import duckdb

        connection = duckdb.connect(folder / "index.db", config={"threads": THREADS})
        connection.execute(f"CREATE TABLE vectors (id INTEGER, vector FLOAT[{DIMENSIONS}])")
        for piece in read_pieces(data, count):
            connection.register("piece", make_table(*piece))
            connection.execute("INSERT INTO vectors SELECT * FROM piece")
        connection.close()

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        import duckdb

        connection = duckdb.connect(folder / "index.db", read_only=True, config={"threads": THREADS})
        order = f"array_inner_product(vector, ?::FLOAT[{DIMENSIONS}]) DESC LIMIT {DEPTH}"

        def search(query: np.ndarray) -> list:
            return [
                row for (row,) in connection.execute(f"SELECT id FROM vectors ORDER BY {order}", [query]).fetchall()
            ]

        return search, count * DIMENSIONS * 4


def make_table(start: int, vectors: np.ndarray) -> Any:
    import pyarrow as pa

    rows = pa.array(np.arange(start, start + len(vectors)), pa.int32())
    return pa.table({"id": rows, "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), DIMENSIONS)})


class SqliteVec:
    def load(self) -> None:
        import sqlite_vec  # noqa: F401

    def connect(self, folder: Path) -> Any:
        import sqlite3

        import sqlite_vec

        connection = sqlite3.connect(folder / "index.db")
        if not hasattr(connection, "enable_load_extension"):
            raise RuntimeError("this Python's sqlite3 was built without loading extensions")
        connection.enable_load_extension(True)
        sqlite_vec.load(connection)
        return connection

    def build(self, data: Path, count: int, folder: Path) -> None:
        connection = self.connect(folder)
        connection.execute(f"CREATE VIRTUAL TABLE v USING vec0(vector float[{DIMENSIONS}] distance_metric=cosine)")
        for start, vectors in read_pieces(data, count):
            rows = ((start + i, vector.tobytes()) for i, vector in enumerate(vectors))
            with connection:
                connection.executemany("INSERT INTO v(rowid, vector) VALUES (?, ?)", rows)
        connection.close()

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        connection = self.connect(folder)
        ask = f"SELECT rowid FROM v WHERE vector MATCH ? AND k = {DEPTH} ORDER BY distance"
        return lambda query: [r for (r,) in connection.execute(ask, [query.tobytes()])], count * DIMENSIONS * 4


ENGINES: dict[str, Any] = {
    "koret float32": Koret("float32"),
    "koret float16": Koret("float16"),
    "koret int8": Koret("int8"),
    "koret binary": KoretBits("binary"),
    "koret float16, bigram words": Koret("float16", ("bigram",)),
    "koret approximate": KoretApproximate("float16"),
    "NumPy product": Numpy(),
    "faiss flat": Faiss(False),
    "faiss IVF int8": Faiss(True),
    "hnswlib": Hnswlib(),
    "usearch float32": Usearch("f32"),
    "usearch int8": Usearch("i8"),
    "LanceDB, no index": LanceDB(),
    "DuckDB": DuckDB(),
    "sqlite-vec": SqliteVec(),
    "Milvus Lite FLAT, through koret": MilvusLite(),
}
