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
from pathlib import Path
from typing import Any

import numpy as np

from index_engines import DEPTH, DIMENSIONS, ENGINES, EXTRA, PIECE, SPREAD, THREADS, make_unit

RESULTS = Path(__file__).resolve().parent / "results" / "index_speed.json"


# ---- data


def write_vectors(folder: Path, count: int, queries: int) -> None:
    """``vectors`` (N, D) and ``queries`` (Q, D) as plain float32, and ``truth`` (Q, 10) rows, all from one seed."""
    rng = np.random.default_rng(count)
    centres = make_unit(rng.standard_normal((max(10, count // 50), DIMENSIONS), np.float32))

    def draw(number: int) -> np.ndarray:
        noise = rng.standard_normal((number, DIMENSIONS), np.float32) * np.float32(SPREAD / DIMENSIONS**0.5)
        return make_unit(centres[rng.integers(len(centres), size=number)] + noise)

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
    "p99 ms": ("p99_ms", ".2f"), "best ms": ("best_ms", ".2f"), "CPU ms": ("cpu_ms", ".2f"),
    "recall@10": ("recall", ".3f"), "bandwidth": ("bandwidth", ".2f"),
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
