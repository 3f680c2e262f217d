"""The ``evaluation`` folder of a run: what each model scored, question by question."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from koret.evaluation.metrics import PRIMARY, mark_hits
from koret.evaluation.scores import Scores
from koret.evaluation.tasks import RetrievalTask
from koret.files import write_json


def write_scores(path: Path, step: int, scores: list[Scores], tasks: list[RetrievalTask]) -> None:
    """One model's scores; per question the deciding metrics and the rank of its first right text (null: not found)."""
    first, *others = [_describe(s, t) for s, t in zip(scores, tasks, strict=True)]
    write_json(path, {"step": step, **first, "others": others})


def _describe(scores: Scores, task: RetrievalTask) -> dict:
    hits = mark_hits(scores.rankings, task.relevant)[0]
    ranks = [int(row.argmax()) + 1 if row.any() else None for row in hits]
    return {
        **{key: value for key, value in scores.to_dict().items() if key != "seconds"},
        "per_query": {"id": task.query_ids, "rank": ranks}
        | {name: [float(v) for v in scores.per_query[name]] for name in PRIMARY},
    }


def read_scores(path: Path) -> Scores:
    """The deciding metrics of every question as written by ``write_scores``, without rankings."""
    record = json.loads(path.read_bytes())
    values = {name: np.array(record["per_query"][name]) for name in PRIMARY}
    empty = np.zeros((len(record["per_query"]["id"]), 0))
    return Scores(record["system"], record["task"], values, empty.astype(np.int64), empty)
