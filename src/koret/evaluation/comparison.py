"""Two models, query by query: who wins where, by how much, and what each put first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from koret.evaluation.evaluator import Encoder, Evaluator, open_encoder
from koret.evaluation.metrics import PRIMARY, mark_hits
from koret.evaluation.scores import Scores, Verdict, judge
from koret.evaluation.selection import find_trained, open_data, select_questions
from koret.evaluation.tasks import Kind, RetrievalTask

if TYPE_CHECKING:
    from koret.data.loader import Dataset


@dataclass(frozen=True)
class Move:
    """One query whose score changed: its right text, and what each model put first (ranks count from 1)."""

    query_id: str
    query: str
    difference: float
    rank_a: int | None
    rank_b: int | None
    relevant: str
    top_a: str
    top_b: str


@dataclass(frozen=True)
class Comparison:
    """B against A on one task; ``gains`` and ``drops`` are B's largest moves up and down."""

    names: tuple[str, str]
    task: str
    metric: str
    wins: int
    losses: int
    ties: int
    verdict: Verdict
    gains: list[Move]
    drops: list[Move]
    query_ids: list[str]
    values: tuple[np.ndarray, np.ndarray]  # (Q,) of A and of B
    scores: tuple[Scores, Scores]
    cleanness: str = ""  # what the leakage audit says; "" without one

    def to_dict(self) -> dict[str, Any]:
        a, b = self.values
        return {
            "a": self.names[0],
            "b": self.names[1],
            "task": self.task,
            "metric": self.metric,
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "verdict": self.verdict.to_dict(),
            "cleanness": self.cleanness or None,
            "metrics": {name: s.metrics for name, s in zip(("a", "b"), self.scores, strict=True)},
            "gains": [asdict(move) for move in self.gains],
            "drops": [asdict(move) for move in self.drops],
            "queries": [
                {"id": id_, "a": float(x), "b": float(y)} for id_, x, y in zip(self.query_ids, a, b, strict=True)
            ],
        }


def compare_models(
    model_a: str | Path | Encoder,
    model_b: str | Path | Encoder,
    dataset_root: str | Path | Dataset,
    *,
    kind: Kind = "passage",
    split: str = "auto",
    max_queries: int | None = None,
    max_seq_length: int | None = None,
    moves: int = 20,
    progress: bool = False,
    **loading: Any,
) -> Comparison:
    """Compare two models on a data set; arguments as for ``evaluator.evaluate``.

    With ``split`` 'auto', models trained on this data are asked what all of them held out. ``cleanness`` says whether
    training has seen the questions; ``model_a``, as a baseline, may be one that was not trained.
    """
    names = _tell_apart(model_a, model_b)
    a, b = open_encoder(model_a, max_seq_length), open_encoder(model_b, max_seq_length)
    scored = find_trained(model_b, model_a)
    chosen = select_questions(
        *open_data(dataset_root, b.encoder, scored["trained"], progress=progress, **loading),
        **scored, kinds=(kind,), split=split, max_queries=max_queries,
    )  # fmt: skip
    found = compare(a, b, chosen.tasks[0], names=names, moves=moves, progress=progress)
    return replace(found, cleanness=chosen.audit().sentence)


def compare(
    encoder_a: Encoder,
    encoder_b: Encoder,
    task: RetrievalTask,
    *,
    names: tuple[str, str] | None = None,
    moves: int = 20,
    progress: bool = False,
) -> Comparison:
    """Score both encoders on the task and compare them; ``moves`` is how many queries are listed either way.

    Two models of the same name are called A and B.
    """
    names = names or _tell_apart(encoder_a, encoder_b)
    evaluator = Evaluator(task)
    a = evaluator.score(encoder_a, names[0], progress=progress)
    b = evaluator.score(encoder_b, names[1], progress=progress)
    return compare_scores(task, a, b, moves=moves)


def compare_scores(
    task: RetrievalTask, a: Scores, b: Scores, *, metric: str = PRIMARY[0], moves: int = 20
) -> Comparison:
    """Compare two results on one task. Ties are equal scores to within 1e-9."""
    values = a.per_query[metric], b.per_query[metric]
    gaps = values[1] - values[0]
    gaps[np.abs(gaps) < 1e-9] = 0
    order = np.argsort(-gaps, kind="stable")
    up, down = order[gaps[order] > 0][:moves], order[::-1][gaps[order[::-1]] < 0][:moves]
    ranks = _find_ranks(a, task), _find_ranks(b, task)

    def describe(query: int) -> Move:
        right = next((int(row) for row in b.rankings[query] if row in task.relevant[query]), None)
        tops = [task.corpus[s.rankings[query, 0]] if s.rankings[query, 0] >= 0 else "" for s in (a, b)]
        return Move(
            task.query_ids[query], task.queries[query], float(gaps[query]), ranks[0][query], ranks[1][query],
            task.corpus[int(task.relevant[query][0]) if right is None else right], *tops,
        )  # fmt: skip

    return Comparison(
        names=(a.system, b.system),
        task=task.name,
        metric=metric,
        wins=int((gaps > 0).sum()),
        losses=int((gaps < 0).sum()),
        ties=int((gaps == 0).sum()),
        verdict=judge(a, b, task.groups, metric),
        gains=[describe(int(query)) for query in up],
        drops=[describe(int(query)) for query in down],
        query_ids=task.query_ids,
        values=values,
        scores=(a, b),
    )


def _find_ranks(scores: Scores, task: RetrievalTask) -> list[int | None]:
    """The rank of the first right text of every query, None where it is not among the results."""
    hits, _ = mark_hits(scores.rankings, task.relevant)
    return [int(row.argmax()) + 1 if row.any() else None for row in hits]


def _tell_apart(model_a: Any, model_b: Any) -> tuple[str, str]:
    """Two names for two models: last parts of their paths, or A and B where those are equal."""
    names = [str(getattr(model, "name", model)).rstrip("/") for model in (model_a, model_b)]
    short = [Path(name.removesuffix("/model")).name for name in names]
    return ("A", "B") if short[0] == short[1] else (short[0], short[1])
