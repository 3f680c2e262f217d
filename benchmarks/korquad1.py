"""Three seeds of koret train on KorQuAD 1.0 dev with the offline base: base, tuned, BM25 on held-out articles.

    python benchmarks/korquad1.py KorQuAD_v1.0_dev.json [--seeds 1 2 3] [--log-dir DIR]

Each seed splits by article anew and trains with recipes/korquad1_offline.yaml. A seed that has a finished run in
the log directory is not trained again. Writes results/korquad1.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from koret import runs
from koret.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "korquad1_offline.yaml"
METRICS = ("ndcg@10", "map", "mrr@10", "recall@10")


def find_finished(log_dir: Path, seed: int) -> runs.Run | None:
    for run in reversed(runs.find_runs(log_dir)):
        if run.state == "finished" and run.config["seed"] == seed:
            return run
    return None


def train(data: Path, log_dir: Path, seed: int) -> runs.Run:
    command = [sys.executable, "-m", "koret.cli", "train", "--config", str(RECIPE), "--dataset-root", str(data)]
    process = subprocess.Popen([*command, "--log-dir", str(log_dir), "--seed", str(seed)])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"koret train ended with {process.returncode}")
    run = find_finished(log_dir, seed)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    write_json(run.path / "cost.json", {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": peak})
    return run


def read_result(run: runs.Run) -> dict:
    report = json.loads((run.path / "evaluation" / "report.json").read_text(encoding="utf-8"))
    task = report["tasks"][0]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [line["train/pairs_per_second"] for line in lines if "train/pairs_per_second" in line]
    return {
        "seed": run.config["seed"],
        "task": task["task"],
        "pairs": run.data["pairs"],
        "steps": run.data["steps"],
        "pairs_per_second": float(np.median(speeds)),
        "systems": {row["role"]: {m: row["metrics"][m] for m in METRICS} for row in task["systems"]},
        "verdict": run.verdict,
        **json.loads((run.path / "cost.json").read_bytes()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--log-dir", type=Path, default=ROOT / "logs" / "korquad1")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        run = find_finished(options.log_dir, seed) or train(options.data, options.log_dir, seed)
        results.append(read_result(run))
    machine = {"processor": platform.machine(), "cores": os.cpu_count()}
    write_json(ROOT / "benchmarks" / "results" / "korquad1.json", {"machine": machine, "runs": results})
    for role in ("base", "model", "lexical"):
        means = {m: np.mean([r["systems"][role][m]["mean"] for r in results]) for m in METRICS}
        print(f"{role:<8}", "  ".join(f"{m} {value:.4f}" for m, value in means.items()))
    for result in results:
        cost = f"{result['cpu_seconds'] / 60:.1f} CPU minutes, {result['peak_bytes'] / 2**20:,.0f} MB"
        print(f"seed {result['seed']}: {result['verdict']['sentence']} ({cost})")


if __name__ == "__main__":
    main()
