"""How fast, exact and lean are koret's indexes next to other stores, at 10,000 to 1,000,000 x 384 vectors?

    python benchmarks/index_speed.py [--sizes 10000 100000 1000000] [--engines NAME ...] [--queries 50]

Building and searching run in a process of their own each, with two threads; the searching process opens what the
building one left on disk. Vectors are generated from a seed: unit vectors around N / 50 centres (cosine 0.82 to their
centre, 0.67 to each other), so every query has near neighbours; real text is less tidy, so recall of approximate
engines may be lower there. The builders read them from a plain file in pieces of 4,096, koret's own. Answers and the
table go to results/index_speed.json; rows measured before and not asked for stay in it.

build s      from vectors on disk to an index on disk, imports not counted
build MB     most memory held (VmHWM of /proc/self/status) less that held before the first vector was read
open s       from nothing to the first answer, imports not counted; koret widens small indexes here
search MB    the same as build MB, for the searching process; mapped files count as far as they were touched
private MB   of these, what the system cannot take back without swapping (RssAnon), less the same before
p50, p99 ms  one query at a time, ten results, every query asked at least once, then for two seconds or 20 rounds
best ms      the fastest of them: what other work on the machine cannot slow down
CPU ms       user and system time of a query, waiting threads that spin included
recall@10    share of the true ten best by float32 product, averaged over the queries
bandwidth    bytes that a query must read / p50 / read rate. Exact: N * 384 * bytes of a number; IVF: the centres and
             nprobe / cells of N * 384; none for graphs. The read rate is the best of five sums of 1 GiB of float32 by
             torch with two threads. Above 1 where vectors stay in the processor's cache.

An engine is not run where ten times the size is expected to take ten times its last building time and that is above
--limit seconds (koret, NumPy and faiss: --own-limit), and stopped after --timeout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results" / "index_speed.json"
DIMENSIONS, DEPTH, PIECE, THREADS = 384, 10, 4096, 2
SPREAD = 0.7  # length of the noise around a unit centre
NPROBE = 32  # of plain faiss; koret chooses its own
WORDS = 30  # of a passage, where words are indexed

Search = Callable[[np.ndarray], Any]  # a query (D,) -> the rows of its ten best


# ---- data


def write_vectors(folder: Path, count: int, queries: int) -> None:
    """``vectors`` (N, D) and ``queries`` (Q, D) as plain float32, and ``truth`` (Q, 10) rows, all from one seed."""
    rng = np.random.default_rng(count)
    centres = _make_unit(rng.standard_normal((max(10, count // 50), DIMENSIONS), np.float32))

    def draw(number: int) -> np.ndarray:
        noise = rng.standard_normal((number, DIMENSIONS), np.float32) * np.float32(SPREAD / DIMENSIONS**0.5)
        return _make_unit(centres[rng.integers(len(centres), size=number)] + noise)

    asked = draw(queries)
    asked.tofile(folder / "queries")
    best = np.full((queries, DEPTH), -np.inf, np.float32)
    rows = np.zeros((queries, DEPTH), np.int64)
    with open(folder / "vectors", "wb") as file:
        for start in range(0, count, PIECE):
            piece = draw(min(PIECE, count - start))
            piece.tofile(file)
            scores = np.concatenate([best, asked @ piece.T], axis=1)
            names = np.concatenate([rows, np.tile(np.arange(start, start + len(piece)), (queries, 1))], axis=1)
            kept = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
            best, rows = np.take_along_axis(scores, kept, 1), np.take_along_axis(names, kept, 1)
    rows.tofile(folder / "truth")


def _make_unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def read_pieces(data: Path, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Read, not mapped: pages of a mapped input would count as memory of the builder."""
    with open(data / "vectors", "rb") as file:
        for start in range(0, count, PIECE):
            wanted = min(PIECE, count - start)
            yield start, np.fromfile(file, np.float32, wanted * DIMENSIONS).reshape(wanted, DIMENSIONS)


# ---- engines: build(data, count, folder) writes; open(folder, count) -> (search, bytes a query must read or None)


class Koret:
    def __init__(self, dtype: str, lexical: tuple[str, ...] = ()) -> None:
        self.dtype, self.lexical = dtype, lexical

    def load(self) -> None:
        import koret.retrieval.folder  # noqa: F401

    def build(self, data: Path, count: int, folder: Path) -> None:
        from koret.retrieval.folder import FolderStore

        store = FolderStore.create(folder / "index", {"dtype": self.dtype, "lexical": self.lexical}, DIMENSIONS)
        fill_store(store, data, count, bool(self.lexical))
        store.close()

    def open(self, folder: Path, count: int) -> tuple[Search, int | None]:
        from koret.retrieval.folder import WIDE_BYTES, FolderStore

        store = FolderStore.open(folder / "index")
        wide = count * DIMENSIONS * 4 <= WIDE_BYTES
        width = 4 if wide else {"float32": 4, "float16": 2, "int8": 1}[self.dtype]
        return search_store(store), count * DIMENSIONS * width


class KoretApproximate(Koret):
    def load(self) -> None:
        import faiss  # noqa: F401

        super().load()

    def build(self, data: Path, count: int, folder: Path) -> None:
        from koret.retrieval.folder import FolderStore

        super().build(data, count, folder)
        store = FolderStore.open(folder / "index")
        sample = np.random.default_rng(1).choice(count, 64, replace=False)
        mapped = np.memmap(data / "vectors", np.float32, "r", shape=(count, DIMENSIONS))
        noise = np.random.default_rng(2).standard_normal((64, DIMENSIONS), np.float32) * np.float32(DIMENSIONS**-0.5)
        store.build_approximate(_make_unit(mapped[np.sort(sample)] + SPREAD * noise))
        store.close()

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
EXTRA: dict[str, Any] = {}


# ---- one task in its process


def measure_memory(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def run_build(name: str, data: Path, count: int, folder: Path) -> dict[str, Any]:
    ENGINES[name].load()
    held, start = measure_memory("VmRSS"), time.perf_counter()
    ENGINES[name].build(data, count, folder)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"build_seconds": seconds, "build_peak_mb": measure_memory("VmHWM") - held, "disk_mb": size / 1e6}


def run_search(name: str, data: Path, count: int, folder: Path) -> dict[str, Any]:
    ENGINES[name].load()
    queries = np.fromfile(data / "queries", np.float32).reshape(-1, DIMENSIONS)
    truth = np.fromfile(data / "truth", np.int64).reshape(-1, DEPTH)
    held, private, start = measure_memory("VmRSS"), measure_memory("RssAnon"), time.perf_counter()
    search, size = ENGINES[name].open(folder, count)
    search(queries[0])
    opened = time.perf_counter() - start
    times, shares, used = [], [], time.process_time()
    while not times or (sum(times) < 2 and len(times) < 20 * len(queries)):
        for query, expected in zip(queries, truth, strict=True):
            start = time.perf_counter()
            found = search(query)
            times.append(time.perf_counter() - start)
            shares.append(len(set(map(int, found)) & set(expected.tolist())) / DEPTH)
    used = time.process_time() - used
    p50, p99 = (float(np.percentile(times, share)) for share in (50, 99))
    return {
        "open_seconds": opened,
        "search_peak_mb": measure_memory("VmHWM") - held,
        "search_private_mb": measure_memory("RssAnon") - private,
        "p50_ms": 1000 * p50,
        "p99_ms": 1000 * p99,
        "best_ms": 1000 * min(times),
        "cpu_ms": 1000 * used / len(times),
        "asked": len(times),
        "recall": float(np.mean(shares)),
        "bytes_read": size,
        **EXTRA,
    }


def run_rate(*_: Any) -> dict[str, Any]:
    import torch

    torch.set_num_threads(THREADS)
    block, times = torch.ones(1 << 28), []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return {"bytes_per_second": block.nbytes / min(times)}


TASKS = {"build": run_build, "search": run_search, "rate": run_rate}


def spawn(task: str, name: str, data: Path, count: int, folder: Path, timeout: float) -> dict[str, Any]:
    """What the task measured, or {"not_run": why}."""
    command = [sys.executable, __file__, "--task", task, name, str(data), str(count), str(folder)]
    threads = {f"{library}_NUM_THREADS": str(THREADS) for library in ("OMP", "OPENBLAS", "MKL")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **threads})
    except subprocess.TimeoutExpired:
        return {"not_run": f"{task} stopped after {timeout:.0f} s"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"not_run": f"{task} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1][:120]}"}
    return json.loads(done.stdout.splitlines()[-1])


# ---- the comparison


def measure(name: str, data: Path, count: int, folder: Path, timeout: float) -> dict[str, Any]:
    folder.mkdir()
    result = {"load": os.getloadavg()[0], **spawn("build", name, data, count, folder, timeout)}
    if "not_run" not in result:
        result |= spawn("search", name, data, count, folder, timeout)
    shutil.rmtree(folder)
    return result


def expect_seconds(rows: dict[str, dict], count: int) -> float:
    """Building time in proportion to that of the largest smaller size measured; 0 where there is none."""
    smaller = [int(size) for size, row in rows.items() if int(size) < count and "build_seconds" in row]
    return rows[str(max(smaller))]["build_seconds"] * count / max(smaller) if smaller else 0.0


def compare(found: dict[str, Any], options: argparse.Namespace, scratch: Path) -> None:
    """Fill ``found`` and write it after every row."""
    found["read_rate"] = spawn("rate", "", scratch, 0, scratch, options.timeout)["bytes_per_second"]
    for count in options.sizes:
        data = scratch / f"data-{count}"
        data.mkdir()
        write_vectors(data, count, options.queries)
        for name in options.engines:
            rows = found["engines"].setdefault(name, {})
            own = name.startswith(("koret", "NumPy", "faiss"))
            limit, expected = options.own_limit if own else options.limit, expect_seconds(rows, count)
            if name == "koret float16, bigram words" and count > 10_000:
                row = {"not_run": "measured at 10,000 only"}
            elif expected > limit:
                row = {"not_run": f"building would take about {expected:.0f} s"}
            else:
                row = measure(name, data, count, scratch / "index", options.timeout)
            if row.get("bytes_read"):
                row["bandwidth"] = row["bytes_read"] / (row["p50_ms"] / 1000) / found["read_rate"]
            rows[str(count)] = {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}
            options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{count:>9,} {name}: {rows[str(count)]}", flush=True)
        shutil.rmtree(data)


COLUMNS = {
    "build s": ("build_seconds", ".1f"), "build MB": ("build_peak_mb", ",.0f"), "disk MB": ("disk_mb", ",.0f"),
    "open s": ("open_seconds", ".2f"), "search MB (private)": ("search_peak_mb", ",.0f"), "p50 ms": ("p50_ms", ".2f"),
    "p99 ms": ("p99_ms", ".2f"), "best ms": ("best_ms", ".2f"), "CPU ms": ("cpu_ms", ".2f"), "recall@10": ("recall", ".3f"), "bandwidth": ("bandwidth", ".2f"),
}  # fmt: skip


def format_table(found: dict[str, Any], count: int) -> str:
    lines = [f"| {count:,} | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, sizes in found["engines"].items():
        row = sizes.get(str(count), {"not_run": "not asked for"})
        if "not_run" in row:
            cells = [f"not run: {row['not_run']}", *[""] * (len(COLUMNS) - 1)]
        else:
            cells = [f"{row[key]:{form}}" if row.get(key) is not None else "-" for key, form in COLUMNS.values()]
            cells[4] += f" ({row['search_private_mb']:,.0f})"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--own-limit", type=float, default=180)
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one building or searching process")
    parser.add_argument("--scratch", type=Path, help="where vectors and indexes are written; default: the system's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--task", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, name, data, count, folder = options.task
        print(json.dumps(TASKS[task](name, Path(data), int(count), Path(folder))))
        return
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"engines": {}}
    found["machine"] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                        "python": platform.python_version(), "threads": THREADS}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="koret-bench-", dir=options.scratch) as scratch:
        compare(found, options, Path(scratch))
    for count in sorted({int(size) for rows in found["engines"].values() for size in rows}):
        print(f"\n{format_table(found, count)}")


if __name__ == "__main__":
    main()
