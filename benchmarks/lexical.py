"""BM25 for Korean: which tokenizer and which k1, b, on KorQuAD 1.0 question -> paragraph.

    python benchmarks/lexical.py DATA.json

DATA is KorQuAD 1.0 dev. Asked are all its questions, and those of the 40 articles held out by the fixed split (titles
sorted by code point, shuffled with random.Random(0), first 100 for training). The corpus is every distinct paragraph.
koret's k1 = 1.2, b = 0.75 are Lucene's defaults and were not chosen by this table. Writes results/lexical.json.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np

from koret.data.columns import read_column
from koret.data.loader import load_dataset
from koret.evaluation.metrics import PRIMARY, compute_metrics
from koret.evaluation.tasks import build_task
from koret.retrieval.lexical import LexicalIndex, load_kiwi

RESULTS = Path(__file__).parent / "results"
PARAMETERS = ((0.9, 0.4), (0.9, 0.75), (1.2, 0.4), (1.2, 0.75), (1.5, 0.75))


def find_held_out(titles: list[str]) -> np.ndarray:
    """Rows of the 40 held-out articles of the fixed split."""
    order = sorted(range(len(titles)), key=lambda row: titles[row])
    random.Random(0).shuffle(order)
    return np.array(order[100:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    dataset = load_dataset(options.data)
    everything = np.arange(dataset.questions.num_rows)
    held_out = np.isin(
        read_column(dataset.questions, "article"), find_held_out(dataset.articles.column("title").to_pylist())
    )
    passages = np.arange(dataset.passages.num_rows)
    tasks = {
        "all": build_task(dataset, everything, passages, "passage"),
        "held-out": build_task(dataset, everything[held_out], passages, "passage"),
    }
    load_kiwi()
    rows = []
    for tokenizer in ("bigram", "kiwi", "whitespace"):
        for k1, b in PARAMETERS:
            start = time.process_time()
            index = LexicalIndex(tasks["all"].corpus, tokenizer, k1, b)
            built = time.process_time()
            row = {"tokenizer": tokenizer, "k1": k1, "b": b, "cpu_seconds_index": built - start}
            for name, task in tasks.items():
                start = time.process_time()
                ranked, _ = index.search(task.queries, 100)
                row[f"cpu_seconds_{name}"] = time.process_time() - start
                values = compute_metrics(ranked, task.relevant)
                row[name] = {metric: float(values[metric].mean()) for metric in PRIMARY}
            rows.append(row)
            scores = "   ".join(f"{name} " + " ".join(f"{m} {row[name][m]:.4f}" for m in PRIMARY) for name in tasks)
            print(f"{tokenizer:<11} k1 {k1} b {b:<5} {scores}   index {row['cpu_seconds_index']:.1f} s", flush=True)
    result = {"tasks": {name: task.describe() | {"excluded": len(task.excluded)} for name, task in tasks.items()}}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lexical.json").write_text(json.dumps(result | {"rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
