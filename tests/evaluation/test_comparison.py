"""Wins, losses and the moves that are shown, counted from the per-query scores."""

import json

import numpy as np
import pytest
from rich.console import Console

from koret.evaluation.comparison import compare
from koret.evaluation.tables import format_comparison
from koret.evaluation.tasks import build_task


@pytest.fixture
def task(dataset):
    return build_task(dataset, np.arange(dataset.questions.num_rows), np.arange(dataset.passages.num_rows), "passage")


def test_wins_losses_and_moves(task, encoder, weak_encoder):
    found = compare(weak_encoder, encoder, task, moves=5)
    a, b = (scores.per_query["ndcg@10"] for scores in found.scores)
    assert (found.wins, found.losses) == (int((b > a).sum()), int((b < a).sum()))
    assert found.wins + found.losses + found.ties == 30 and found.wins > found.losses
    assert found.names == ("weak", "hash") and found.verdict.verdict == "better"
    assert [move.difference for move in found.gains] == sorted(b - a, reverse=True)[: len(found.gains)]
    assert all(move.difference < 0 for move in found.drops) and len(found.gains) == 5
    move = found.gains[0]
    query = task.queries.index(move.query)
    ranks = [list(s.rankings[query]).index(next(r for r in s.rankings[query] if r in task.relevant[query])) + 1
             for s in found.scores]  # fmt: skip
    assert [move.rank_a, move.rank_b] == ranks
    assert move.relevant in [task.corpus[row] for row in task.relevant[query]]
    assert move.top_b == task.corpus[found.scores[1].rankings[query, 0]]


def test_a_model_against_itself_only_ties(task, encoder):
    found = compare(encoder, encoder, task)
    assert (found.wins, found.losses, found.ties) == (0, 0, 30) and found.names == ("A", "B")
    assert found.gains == found.drops == [] and found.verdict.verdict == "not distinguishable"


def test_shown_and_written(task, encoder, weak_encoder):
    found = compare(weak_encoder, encoder, task, names=("base", "tuned"), moves=3)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(format_comparison(found))
    text = console.export_text()
    assert f"tuned wins {found.wins}, loses {found.losses}, ties {found.ties}" in text
    assert found.gains[0].query in text and "tuned better than base, the 3 largest moves" in text
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["gains"][0]["query_id"] == found.gains[0].query_id and len(record["queries"]) == 30
