"""Where a model is good and where it is not: questions by kind, length, word overlap, place of the answer.

Letters: Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from koret.data.columns import read_column, take_rows
from koret.data.statistics import classify_question
from koret.evaluation.metrics import PRIMARY
from koret.evaluation.scores import Scores
from koret.evaluation.significance import Difference, Interval, bootstrap_intervals, compare_paired
from koret.evaluation.tasks import RetrievalTask
from koret.retrieval.lexical import tokenize

if TYPE_CHECKING:
    from koret.data.loader import Dataset

LEAST = 10  # questions in a slice; smaller ones say nothing
RESAMPLES = 2000
THIRDS = ("first third", "middle third", "last third")


@dataclass(frozen=True)
class Slice:
    """The queries that share a label. Gaps are model - base and model - the strongest BM25, on nDCG@10."""

    dimension: str
    name: str
    queries: int
    groups: int
    means: dict[str, Interval]  # per system
    gap: Difference | None
    lexical_gap: Difference | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "dimension": self.dimension,
            "name": self.name,
            "queries": self.queries,
            "groups": self.groups,
            "systems": {system: interval.to_dict() for system, interval in self.means.items()},
            "difference": self.gap.to_dict() if self.gap else None,
            "against_bm25": self.lexical_gap.to_dict() if self.lexical_gap else None,
        }


def label_queries(dataset: Dataset, task: RetrievalTask) -> dict[str, list[str]]:
    """Per dimension one label for each of the task's queries; '' where it does not apply.

    Lengths and word overlap are cut into thirds of the queries, with the edges in the label. Overlap is the share of
    a question's character bigrams that occur in its passage.
    """
    questions = take_rows(dataset.questions, task.question_rows)
    best = read_column(questions, "best")
    passages = take_rows(dataset.passages, np.maximum(best, 0))
    texts = passages.column("text").to_pylist()
    lengths = np.array([len(text) for text in texts], np.float64)
    starts = read_column(questions, "answer_start") - read_column(passages, "start")
    characters = read_column(dataset.articles, "characters")[read_column(questions, "article")]
    known = best >= 0
    located = known & (read_column(questions, "answer_start") >= 0)
    place = np.clip((starts / np.maximum(lengths, 1) * 3).astype(int), 0, 2)
    return {
        "question type": [classify_question(text) for text in task.queries],
        "answer kind": questions.column("answer_kind").to_pylist(),
        "word overlap": _cut_thirds(_measure_overlap(task.queries, texts), known, "{:.0%}"),
        "answer in": [THIRDS[p] if there else "" for p, there in zip(place, located, strict=True)],
        "passage length": _cut_thirds(lengths, known, "{:,.0f} characters"),
        "article length": _cut_thirds(characters.astype(np.float64), np.ones(len(best), bool), "{:,.0f} characters"),
    }


def measure_slices(
    labels: dict[str, list[str]],
    groups: np.ndarray,
    model: Scores,
    base: Scores | None,
    lexical: Scores | None,
    systems: Sequence[Scores],
    metric: str = PRIMARY[0],
) -> list[Slice]:
    """One Slice per label with at least ``LEAST`` queries; the largest first, thirds in their order."""
    found = []
    for dimension, names in labels.items():
        names = np.array(names)
        counted = zip(*np.unique(names[names != ""], return_counts=True), strict=True)
        for name, size in sorted(counted, key=lambda item: (_order_third(item[0]), -item[1], item[0])):
            if size < LEAST or size == len(names):
                continue
            chosen = names == name
            own = groups[chosen]
            columns = np.stack([scores.per_query[metric][chosen] for scores in systems], axis=1)
            intervals = bootstrap_intervals(columns, own, resamples=RESAMPLES)

            def compare(other: Scores | None, chosen=chosen, own=own) -> Difference | None:
                if other is None:
                    return None
                pair = other.per_query[metric][chosen], model.per_query[metric][chosen]
                return compare_paired(*pair, own, resamples=RESAMPLES)

            means = dict(zip([scores.system for scores in systems], intervals, strict=True))
            count = len(np.unique(own))
            found.append(Slice(dimension, str(name), int(size), count, means, compare(base), compare(lexical)))
    return found


def _measure_overlap(queries: Sequence[str], passages: Sequence[str]) -> np.ndarray:
    asked, told = tokenize(queries, "bigram"), tokenize(passages, "bigram")
    return np.array([len({*q} & {*p}) / max(len({*q}), 1) for q, p in zip(asked, told, strict=True)])


def _cut_thirds(values: np.ndarray, known: np.ndarray, form: str) -> list[str]:
    """'low: to X', 'middle: X to Y', 'high: above Y'; all '' where the values hardly differ."""
    if not known.any():
        return [""] * len(values)
    low, high = np.quantile(values[known], [1 / 3, 2 / 3])
    if not values[known].min() <= low < high < values[known].max():
        return [""] * len(values)
    low_text, high_text = form.format(low), form.format(high)
    names = (f"low: to {low_text}", f"middle: to {high_text}", f"high: above {high_text}")
    parts = (values > low).astype(int) + (values > high)
    return [names[part] if there else "" for part, there in zip(parts, known, strict=True)]


def _order_third(name: str) -> int:
    """Thirds keep their order; other labels come by size."""
    for rank, starts in enumerate((("low:", "first third"), ("middle:", "middle third"), ("high:", "last third"))):
        if name.startswith(starts):
            return rank
    return 0
