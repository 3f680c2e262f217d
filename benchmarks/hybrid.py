"""Does dense search add to BM25 on KorQuAD 1.0 dev? Base, tuned, BM25 and both fusions on held-out questions.

    python benchmarks/hybrid.py KorQuAD_v1.0_dev.json [--seeds 1] [--log-dir DIR] [--model RUN]

Each seed uses the run that ``benchmarks/korquad1.py`` trains with recipes/korquad1_offline.yaml (trained here where
the log directory holds none); ``--model`` takes one finished run instead. Questions are those of the articles the run
held out, the corpus is every different paragraph. The weight of the dense score is learned for each question on the
questions of other articles; the scores of every weight are reported beside it, and what a weight learned on training
questions, whose passages the model knows, would have come to. Writes results/hybrid.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from koret import runs
from koret.data.columns import read_column
from koret.data.loader import load_dataset
from koret.data.pairs import split_articles
from koret.evaluation.evaluator import WEIGHTS, Evaluator, evaluate
from koret.evaluation.metrics import PRIMARY
from koret.evaluation.scores import Scores
from koret.evaluation.significance import compare_paired
from koret.evaluation.tasks import build_task
from koret.files import write_json
from koret.retrieval.encoder import load_encoder
from korquad1 import ROOT, find_finished, train

METRIC = PRIMARY[0]


def measure(run: runs.Run, data: Path) -> dict[str, Any]:
    """Every system on the run's held-out questions, fusions against each BM25, and the whole curve of weights."""
    report = evaluate(run.path, data, baseline="offline", bm25=["bigram", "kiwi"], kinds=["passage"], progress=True)
    task = report.sections[0].task
    base, tuned, bigram, kiwi = report.sections[0].scores[:4]
    evaluator = Evaluator(task)
    systems = {"base": base, "tuned": tuned, "BM25 bigrams": bigram, "BM25 morphemes": kiwi}
    for name, lexical in (("bigrams", bigram), ("morphemes", kiwi)):
        systems[f"tuned + {name}, reciprocal rank"] = evaluator.score_fusion(tuned, lexical)
        systems[f"tuned + {name}, learned weight"] = evaluator.score_learned_fusion(tuned, lexical)
    curve = {f"{w:g}": evaluator.score_fusion(tuned, bigram, w).metrics[METRIC] for w in WEIGHTS}
    gaps = {
        name: {
            against: compare_paired(systems[against].per_query[METRIC], scores.per_query[METRIC], task.groups).to_dict()
            for against in ("BM25 bigrams", "BM25 morphemes", "tuned")
        }
        for name, scores in systems.items()
        if " + " in name
    }
    return {
        "seed": run.config["seed"],
        "steps": run.data["steps"],
        "task": task.describe(),
        "weight": report.data["fusion_weight"],
        "weight_of_training_questions": learn_on_training(run, data),
        "systems": {name: describe(scores, task.groups) for name, scores in systems.items()},
        "differences": gaps,
        "weights": curve,
        "missed_by_bm25": count_rescued(tuned, bigram),
    }


def learn_on_training(run: runs.Run, data: Path, most: int = 300) -> float:
    """The weight that questions the run was trained on would choose, over the passages of the training articles."""
    dataset, config = load_dataset(data), run.config
    train, _ = split_articles(dataset, config["train_split"], config["seed"])
    rng = np.random.default_rng(config["seed"])
    articles = read_column(dataset.questions, "article")
    questions = np.sort(rng.choice(np.flatnonzero(np.isin(articles, train)), most, replace=False))
    passages = np.flatnonzero(np.isin(read_column(dataset.passages, "article"), train))
    evaluator = Evaluator(build_task(dataset, questions, passages, "passage"))
    encoder = load_encoder(run.model, max_seq_length=config["max_seq_length"])
    return evaluator.choose_weight(evaluator.score(encoder), evaluator.score_lexical())


def describe(scores: Scores, groups: np.ndarray) -> dict[str, Any]:
    return {name: interval.to_dict() for name, interval in scores.measure_intervals(groups).items() if name in PRIMARY}


def count_rescued(tuned: Scores, lexical: Scores) -> dict[str, int]:
    """Questions whose passage BM25 leaves out of its first ten, and how many of those the tuned model has there."""
    missed = lexical.per_query["recall@10"] == 0
    return {"questions": int(missed.sum()), "found_by_tuned": int((tuned.per_query["recall@10"][missed] > 0).sum())}


def show(result: dict[str, Any]) -> None:
    """The tables of docs/RESULTS.md."""
    print(
        f"\nseed {result['seed']}: weight {result['weight']}, by training questions "
        f"{result['weight_of_training_questions']}, {result['task']['queries']:,} questions\n"
    )
    print("| system | nDCG@10 | MAP | recall@10 | minus BM25 bigrams, nDCG@10 |\n|---|---|---|---|---|")
    for name, row in result["systems"].items():
        cells = [
            f"{row[m]['mean']:.3f} ({row[m]['low']:.3f}–{row[m]['high']:.3f})" for m in (METRIC, "map", "recall@10")
        ]
        gap = result["differences"].get(name, {}).get("BM25 bigrams")
        said = f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}], {gap['outcome']}" if gap else ""
        print(f"| {name} | {' | '.join(cells)} | {said} |")
    print("\nweight of the dense score:", "  ".join(f"{w}: {v:.4f}" for w, v in result["weights"].items()))
    print("questions BM25 misses in its first ten:", result["missed_by_bm25"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--log-dir", type=Path, default=ROOT / "logs" / "korquad1")
    parser.add_argument("--model", help="a finished run on this data, by path or name")
    options = parser.parse_args()
    if options.model:
        found = [runs.read_run(runs.resolve_model(options.model))]
    else:
        logs = options.log_dir
        found = [find_finished(logs, seed) or train(options.data, logs, seed) for seed in options.seeds]
    results = [measure(run, options.data) for run in found]
    for result in results:
        show(result)
    write_json(ROOT / "benchmarks" / "results" / "hybrid.json", {"runs": results})


if __name__ == "__main__":
    main()
