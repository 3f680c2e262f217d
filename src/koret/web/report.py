"""A run's evaluation as the page shows it: scores, verdict, wins and losses, slices, curves."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from koret.evaluation.metrics import PRIMARY
from koret.evaluation.report import make_name
from koret.evaluation.scores import Scores
from koret.evaluation.slices import label_queries, measure_slices
from koret.evaluation.tasks import RetrievalTask
from koret.runs import Run

if TYPE_CHECKING:
    from koret.data.loader import Dataset

CURVES = ("train/loss", "eval/ndcg@10", "train/learning_rate", "train/pairs_per_second")
POINTS = 400  # of a curve; longer ones are thinned
TIE = 1e-9
KINDS = ("wins", "losses", "ties", "all")
NOTHING = np.zeros((0, 0))


class RunReport:
    """What a finished run found out. ``task`` and ``dataset`` allow slices where the run wrote none."""

    def __init__(self, run: Run, task: RetrievalTask | None = None, dataset: Dataset | None = None) -> None:
        """Raises FileNotFoundError where the run holds no evaluation."""
        self.run, self._task, self._dataset = run, task, dataset
        file = run.path / "evaluation" / "report.json"
        if not file.is_file():
            raise FileNotFoundError(f"{run.path} holds no evaluation: it is {run.state}")
        self._report = json.loads(file.read_bytes())
        self._first = self._report["tasks"][0]
        self._records = _read_records(run.path / "evaluation", self._first["task"]["name"])
        self._roles = {row["role"]: row["system"] for row in self._first["systems"]}
        self._slices: list[dict[str, Any]] | None = None
        self._measuring = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """Everything but the questions."""
        data = self._report["data"]
        return {
            "run": self.run.name,
            "model": self.run.config.get("model_name"),
            "positives": self.run.config.get("positives"),
            "data": {
                "source": Path(str(data.get("source", ""))).name,
                "held_out_articles": data.get("held_out_articles"),
                "training_articles": data.get("training_articles"),
            },
            "task": {key: self._first["task"][key] for key in ("name", "queries", "corpus", "groups")},
            "verdict": self._first["verdict"],
            "against_bm25": self._first["against_bm25"],
            "conclusion": self._report["conclusion"],
            "clean": self._report["clean"],
            "cleanness": self._report["cleanness"],
            "systems": self._first["systems"],
            "differences": self._first["differences"],
            "counts": {kind: len(self._choose(kind, "")) for kind in KINDS},
            "slices": self._find_slices(),
            "curves": read_curves(self.run.path / "metrics.jsonl"),
        }

    def list_questions(self, kind: str, text: str, start: int, count: int) -> dict[str, Any]:
        """Questions the tuning won, lost or left as they were, the largest change first, ``count`` from ``start``."""
        chosen = self._choose(kind, text)
        base, tuned, lexical = (self._roles.get(role) for role in ("base", "model", "lexical"))
        rows = [
            {
                "query": record["query"],
                "change": round(self._change(record), 4),
                "ranks": {
                    kind: record["systems"][system]["rank"]
                    for kind, system in (("base", base), ("tuned", tuned), ("bm25", lexical))
                    if system in record["systems"]
                },
            }
            for record in chosen[start : start + count]
        ]
        return {"total": len(chosen), "start": start, "questions": rows}

    def _choose(self, kind: str, text: str) -> list[dict[str, Any]]:
        sign = {"wins": 1, "losses": -1, "ties": 0}.get(kind)
        chosen = [
            record
            for record in self._records
            if text.casefold() in record["query"].casefold()
            and (sign is None or np.sign(np.round(self._change(record), 9)) == sign)
        ]
        return sorted(chosen, key=lambda record: self._change(record), reverse=kind != "losses")

    def _change(self, record: dict[str, Any]) -> float:
        """nDCG@10 of the tuned model less the base's; 0 where there is only one of them."""
        scores = [record["systems"].get(self._roles.get(role), {}).get(PRIMARY[0]) for role in ("base", "model")]
        gap = 0.0 if None in scores else scores[1] - scores[0]
        return 0.0 if abs(gap) < TIE else gap

    def _find_slices(self) -> list[dict[str, Any]]:
        """The run's own slices, else measured from its questions, once."""
        with self._measuring:
            if self._slices is None:
                self._slices = self._first["slices"] or self._measure_slices()
        return self._slices

    def _measure_slices(self) -> list[dict[str, Any]]:
        task = self._task
        if task is None or self._dataset is None or [r["id"] for r in self._records] != task.query_ids:
            return []
        scores = {role: self._take_scores(system) for role, system in self._roles.items()}
        if "model" not in scores:
            return []
        labels = label_queries(self._dataset, task)
        found = measure_slices(
            labels, task.groups, scores["model"], scores.get("base"), scores.get("lexical"), list(scores.values())
        )
        return [part.to_dict() for part in found]

    def _take_scores(self, system: str) -> Scores:
        values = np.array([record["systems"][system][PRIMARY[0]] for record in self._records])
        return Scores(system, self._first["task"]["name"], {PRIMARY[0]: values}, NOTHING, NOTHING)


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """[step, value] of every curve a run recorded, thinned to POINTS; a line cut short by a kill is passed over."""
    curves: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for name in CURVES:
            if name in record:
                curves[name].append([record["step"], record[name]])
    return {name: _thin(points) for name, points in curves.items() if len(points) > 1}


def _thin(points: Sequence[list[float]]) -> list[list[float]]:
    step = max(1, -(-len(points) // POINTS))
    return [*points[:-1:step], points[-1]]


def _read_records(folder: Path, task: str) -> list[dict[str, Any]]:
    path = folder / f"queries-{make_name(task)}.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
