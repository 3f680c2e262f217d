"""Scores written by a run read back exactly, so that a resumed run gives the same verdict."""

import json

import numpy as np

from koret.evaluation.evaluator import Evaluator
from koret.evaluation.tasks import build_held_out_tasks
from koret.retrieval.encoder import load_encoder
from koret.training.scorebook import read_scores, write_scores


def test_scores_read_back_exactly(tiny_model, toy_data, tmp_path):
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    tasks = build_held_out_tasks(toy_data, np.arange(8), np.arange(8, 12))
    scores = [Evaluator(task).score(encoder, "base") for task in tasks]
    write_scores(tmp_path, "base", 0, scores, tasks)
    for before, after in zip(scores, read_scores(tmp_path, "base"), strict=True):
        assert (after.system, after.task) == (before.system, before.task) and after.metrics == before.metrics
        assert np.array_equal(after.rankings, before.rankings)
        assert np.array_equal(after.similarities, before.similarities)
        assert all(np.array_equal(after.per_query[name], values) for name, values in before.per_query.items())
    record = json.loads((tmp_path / "base.json").read_text())
    first = record["per_query"]
    for query, rank in enumerate(first["rank"]):
        right = [int(np.flatnonzero(scores[0].rankings[query] == row)[0]) + 1 for row in tasks[0].relevant[query]]
        assert rank == min(right) and first["id"][query] == tasks[0].query_ids[query]
