"""How much of an evaluation is spent outside the encoder, and what exact search over a million vectors takes.

    python benchmarks/evaluation_speed.py evaluation DATA.json   # offline base, every question, with and without Kiwi
    python benchmarks/evaluation_speed.py search [--rows 1000000] [--queries 1000]

``search`` keeps the corpus in a file and maps it, so the peak shows what the search itself holds. Writes
results/evaluation_speed_*.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


def measure_evaluation(data: Path) -> dict:
    """Seconds in and outside the encoder for the whole of ``koret.evaluate`` but loading the data and the model."""
    import torch

    from koret.data.loader import load_dataset
    from koret.evaluation.evaluator import evaluate
    from koret.retrieval.encoder import load_encoder

    encoder = load_encoder("offline", max_seq_length=256)
    dataset = load_dataset(data)
    rows = []
    for name, tokenizers in (("BM25 bigrams", ["bigram"]), ("BM25 bigrams and morphemes", ["bigram", "kiwi"])):
        began = time.process_time()
        report = evaluate(encoder, dataset, bm25=tokenizers, kinds=["passage"])
        cpu = time.process_time() - began
        inside, outside = report.seconds["encoding"], report.seconds["rest"]
        share = outside / (inside + outside)
        rows.append({"baselines": name, "encoding": inside, "rest": outside, "share": share, "cpu": cpu})
        print(f"{name}: {inside:.1f} s in the encoder, {outside:.1f} s outside ({share:.1%})", flush=True)
    task = report.sections[0].task
    return {"queries": len(task.queries), "corpus": len(task.corpus), "threads": torch.get_num_threads(), "rows": rows}


def measure_search(rows: int, queries: int, dimensions: int = 384) -> dict:
    """Time and peak memory of exact top 100 over ``rows`` unit vectors in a mapped file."""
    from koret.retrieval.exact import find_top_k

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.npy"
        corpus = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dimensions))
        for start in range(0, rows, 50_000):
            block = rng.standard_normal((min(50_000, rows - start), dimensions), np.float32)
            corpus[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
        asked = np.array(corpus[:: rows // queries][:queries])
        del corpus
        mapped = np.load(path, mmap_mode="r")
        before = read_private_mb()
        start, cpu = time.perf_counter(), time.process_time()
        with Watch() as watch:
            found, _ = find_top_k(asked, mapped, 100)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        right = bool((found[:, 0] == np.arange(rows)[:: rows // queries][:queries]).all())
    result = {"rows": rows, "queries": queries, "dimensions": dimensions, "seconds": seconds, "cpu_seconds": cpu,
              "private_mb": watch.peak - before, "each_finds_itself": right}  # fmt: skip
    print(result)
    return result


class Watch(threading.Thread):
    """The peak of this process's own memory, mapped files left out, looked at every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stopped = 0.0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, read_private_mb())

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()


def read_private_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("evaluation").add_argument("data", type=Path)
    search = parts.add_parser("search")
    search.add_argument("--rows", type=int, default=1_000_000)
    search.add_argument("--queries", type=int, default=1000)
    options = parser.parse_args()
    if options.part == "evaluation":
        result = measure_evaluation(options.data)
    else:
        result = measure_search(options.rows, options.queries)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"evaluation_speed_{options.part}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
