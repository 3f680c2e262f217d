"""Which recipe? The grid of trainings behind koret's defaults: three seeds an arm, compared question by question.

    python benchmarks/recipes.py KorQuAD_v1.0_dev.json [--seeds 1 2 3] [--groups positives rate ...] [--log-dir DIR]
                                 [--threads N] [--jobs N] [--report]

Every arm changes one thing of the reference recipe (benchmarks/recipe_arms.py) and trains by ``koret train`` on the
same questions for the same number of pair visits. The seed splits the articles, so arms are compared within a seed.
A finished run is not run again: the grid may be stopped and started. ``--report`` trains nothing. Writes
results/recipes.json after every run; tables, picture and the section of docs/RESULTS.md come from that file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from koret import runs
from koret.evaluation.significance import compare_paired
from koret.files import remove_folder, write_json
from recipe_arms import DEFAULT, PAIR_VISITS, QUESTIONS, REFERENCE, ROOT, Arm, list_arms, make_key
from recipe_report import align, format_tables, pool_seeds, write_section

RESULT = ROOT / "benchmarks" / "results" / "recipes.json"
NEGATIVES = "negatives.jsonl"
METRIC = "ndcg@10"
METRICS = (METRIC, "map", "mrr@10", "recall@10")


class ArmFailed(RuntimeError):
    """A run of an arm ended with an error."""


class Grid:
    """Arms and seeds, and where their runs lie: ``<log_dir>/<key of the settings>/seed-<n>``."""

    def __init__(self, data: Path, log_dir: Path, seeds: Sequence[int], threads: int, max_steps: int | None) -> None:
        self.data, self.log_dir, self.seeds, self.threads = data, log_dir, list(seeds), threads
        self.limit = {} if max_steps is None else {"max_steps": max_steps}

    def settings(self, arm: Arm) -> dict[str, Any]:
        return {**arm.settings, **self.limit}

    def folder(self, arm: Arm, seed: int) -> Path:
        return self.log_dir / make_key(self.settings(arm)) / f"seed-{seed}"

    def is_done(self, arm: Arm, seed: int) -> bool:
        return (self.folder(arm, seed) / "cost.json").is_file()

    def train(self, arm: Arm, seed: int) -> None:
        """One ``koret train`` in a process of its own, and what it cost; a failure leaves its last words."""
        folder = self.folder(arm, seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings, costs = self.settings(arm), []
        given = ["--dataset-root", str(self.data), "--seed", str(seed)]
        try:
            if "hard_negatives" in settings:
                costs.append(self.call(folder, "mine", *self.say_mining(settings, folder, seed), *given))
                settings = {**settings, "hard_negatives": str(folder / NEGATIVES)}
            write_json(folder / "settings.json", settings)
            config = str(folder / "settings.json")
            costs.append(self.call(folder, "train", "--config", config, "--log-dir", str(folder), *given))
        except ArmFailed as error:
            write_json(folder / "failure.json", {"reason": str(error)})
            return
        run = runs.find_runs(folder)[-1]
        cost = {**costs[-1], "trained_weights": count_checkpoint(run.path), "threads": self.threads}
        if len(costs) > 1:
            cost["mining_cpu_seconds"] = costs[0]["cpu_seconds"]
        # Scores stay; the weights of a whole grid would fill a disk, but the reference mines for other arms.
        for name in ("checkpoints",) if arm.name == DEFAULT else ("checkpoints", "model"):
            remove_folder(run.path / name)
        write_json(folder / "cost.json", cost)

    def say_mining(self, settings: dict[str, Any], folder: Path, seed: int) -> list[str]:
        """The options of ``koret mine`` for an arm: by BM25, or by the model the reference arm of this seed tuned."""
        if settings["hard_negatives"] == "bm25":
            model = [settings["model_name"], "--source", "bm25"]
        else:
            tuned = runs.find_runs(self.folder(Arm(DEFAULT, DEFAULT), seed))
            if not tuned or tuned[-1].model is None:
                raise ArmFailed("the reference arm of this seed has no model to mine with")
            model = [str(tuned[-1].path)]
        shared = [f"--{name.replace('_', '-')}={settings[name]}" for name in ("train_split", "max_seq_length")]
        return [*model, "--out", str(folder / NEGATIVES), *shared]

    def call(self, folder: Path, *words: str) -> dict[str, float]:
        """Run one koret command and say what it cost. Raises ArmFailed with its last words."""
        command = [sys.executable, "-m", "koret.cli", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        began = time.perf_counter()
        with open(folder / "output.txt", "ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said = (folder / "output.txt").read_text("utf-8", "replace").strip().splitlines()
            raise ArmFailed(said[-1] if said else f"exit {process.returncode}")
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }

    def read(self, arm: Arm, seed: int) -> dict[str, Any]:
        """What is known of one run, without its scores per question."""
        folder = self.folder(arm, seed)
        if (folder / "failure.json").is_file():
            return {"seed": seed, "state": "failed", **json.loads((folder / "failure.json").read_bytes())}
        if not self.is_done(arm, seed):
            return {"seed": seed, "state": "not run"}
        run = runs.find_runs(folder)[-1]
        report = json.loads((run.path / "evaluation" / "report.json").read_bytes())
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text("utf-8").splitlines()]
        systems = {row["role"]: row["metrics"] for row in report["tasks"][0]["systems"]}
        return {
            "seed": seed,
            "state": "finished",
            "steps": run.data["steps"],
            "pairs": run.data["pairs"],
            "questions": run.verdict["queries"],
            "articles": run.verdict["groups"],
            "corpus": run.data["evaluation"][0]["corpus"],
            "pairs_per_second": float(np.median([x["train/pairs_per_second"] for x in lines if "train/loss" in x])),
            "last_loss": [x["train/loss"] for x in lines if "train/loss" in x][-1],
            **json.loads((folder / "cost.json").read_bytes()),
            **{role: {m: systems[role][m]["mean"] for m in METRICS} for role in systems},
            "interval": systems["model"][METRIC],
            "verdict": run.verdict["verdict"],
            "answers": {
                row["role"]: row["metrics"][METRIC]["mean"] for task in report["tasks"][1:] for row in task["systems"]
            },
        }

    def read_questions(self, arm: Arm, seed: int) -> dict[str, tuple[float, int]]:
        """nDCG@10 of the tuned model and the article, by question id."""
        run = runs.find_runs(self.folder(arm, seed))[-1]
        lines = (run.path / "evaluation" / "queries-question-passage.jsonl").read_text("utf-8").splitlines()
        return {r["id"]: (r["systems"]["tuned"][METRIC], r["group"]) for r in map(json.loads, lines)}

    def describe(self, arm: Arm, others: dict[tuple[str, str], Arm]) -> dict[str, Any]:
        """An arm with its runs, and its differences to the arm it is compared with, by seed and over seeds."""
        reason = arm.explain_impossible()
        found = [] if reason else [self.read(arm, seed) for seed in self.seeds]
        states = {run["state"] for run in found}
        state = "not run" if reason or states == {"not run"} else "finished" if states == {"finished"} else "partly run"
        entry = {
            "group": arm.group,
            "name": arm.name,
            "against": None if arm.name == DEFAULT else arm.against,
            "settings": self.settings(arm),
            "state": "failed" if states == {"failed"} else state,
            "reason": reason or next((run["reason"] for run in found if "reason" in run), None),
            "runs": found,
            "difference": None,
        }
        if entry["against"] is None:
            return entry
        other = others.get((arm.group, arm.against)) or others[DEFAULT, DEFAULT]
        gaps, groups = [], []
        for run in found:
            if run["state"] != "finished" or not self.is_done(other, run["seed"]):
                continue
            pair = align(self.read_questions(other, run["seed"]), self.read_questions(arm, run["seed"]))
            run["difference"] = compare_paired(*pair).to_dict()
            gaps.append(pair[1] - pair[0])
            groups.append(pair[2])
        if gaps:
            entry["difference"] = pool_seeds(gaps, groups).to_dict()
        return entry

    def write(self, arms: Sequence[Arm]) -> dict[str, Any]:
        """results/recipes.json from everything that is finished; also of groups that are not asked for now."""
        others = {(arm.group, arm.name): arm for arm in arms}
        result = {
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": self.threads},
            "budget": {"questions": QUESTIONS, "pair_visits": PAIR_VISITS, **self.limit},
            "seeds": self.seeds,
            "reference": REFERENCE,
            "arms": [self.describe(arm, others) for arm in arms],
        }
        write_json(self.log_dir / "recipes.json" if self.limit else RESULT, result)
        return result


def count_checkpoint(run: Path) -> int:
    """How many weights a run trained, from the header of its newest checkpoint."""
    file = sorted((run / "checkpoints").glob("step-*"))[-1] / "weights.safetensors"
    with open(file, "rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    return sum(int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")


def run_grid(grid: Grid, arms: Sequence[Arm], chosen: Sequence[Arm], jobs: int) -> None:
    """Train what is not finished, the reference first; results are written after every run."""
    waiting: dict[Path, tuple[Arm, int]] = {}
    for arm in chosen:
        if reason := arm.explain_impossible():
            print(f"not run: {arm.group} / {arm.name}: {reason}")
            continue
        for seed in grid.seeds:
            if not grid.is_done(arm, seed):
                waiting.setdefault(grid.folder(arm, seed), (arm, seed))
    print(f"{len(waiting)} runs to go", flush=True)
    number = 0
    for first in (True, False):  # other arms mine with the reference's model
        with ThreadPoolExecutor(jobs) as pool:
            due = [(arm, seed) for arm, seed in waiting.values() if (arm.name == DEFAULT) == first]
            running = {pool.submit(grid.train, *run): run for run in due}
            try:
                for future in as_completed(running):
                    future.result()
                    number += 1
                    arm, seed = running[future]
                    run = grid.read(arm, seed)
                    said = run.get("reason") or f"{METRIC} {run['model'][METRIC]:.4f}, {run['seconds']:.0f} s"
                    print(f"[{number}/{len(waiting)}] {arm.group} / {arm.name}, seed {seed}: {said}", flush=True)
                    grid.write(arms)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = list_arms()
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--groups", nargs="+", choices=list(dict.fromkeys(arm.group for arm in arms)))
    parser.add_argument("--arms", nargs="+", help="only arms of these names, and the reference")
    parser.add_argument("--log-dir", type=Path, default=ROOT / "logs" / "recipes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="threads of a run; default: the cores shared between the jobs")
    parser.add_argument("--max-steps", type=int, help="another budget, for a trial; such runs stand apart")
    parser.add_argument("--report", action="store_true", help="train nothing; also write docs/RESULTS.md's section")
    options = parser.parse_args()
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    grid = Grid(options.data, options.log_dir, options.seeds, threads, options.max_steps)
    asked = [arm for arm in arms if not options.groups or arm.group in (DEFAULT, *options.groups)]
    chosen = [arm for arm in asked if not options.arms or arm.name in (DEFAULT, *options.arms)]
    if not options.report:
        run_grid(grid, arms, chosen, options.jobs)
    result = grid.write(arms)
    print(format_tables(result))
    if options.report:
        print(write_section(result))


if __name__ == "__main__":
    main()
