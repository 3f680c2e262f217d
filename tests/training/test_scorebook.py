"""Scores written by a run read back exactly; those of a base are kept for the next run on the same data."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from koret.evaluation.evaluator import Evaluator
from koret.evaluation.tasks import build_held_out_tasks
from koret.retrieval.encoder import load_encoder
from koret.training.scorebook import read_scores, write_scores
from koret.training.trainer import EmbeddingTrainer


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


def train(config, data):
    console = Console(file=io.StringIO(), width=200)
    run = EmbeddingTrainer(config, dataset=data, console=console).train()
    return run, console.file.getvalue()


KNOWN = "as measured in an earlier run"


def test_the_base_is_scored_once_for_runs_on_the_same_data(make_config, toy_data, tmp_path):
    """The second run finds the first one's scores and says so; every figure of it is the same."""
    data = replace(toy_data, directory=tmp_path)
    first, said = train(make_config(), data)
    assert KNOWN not in said
    second, said = train(make_config(seed=42), data)
    assert said.count(KNOWN) == 1
    assert first.base == second.base and first.final == second.final
    one, two = (read_scores(run.path / "evaluation", "base") for run in (first, second))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.rankings, b.rankings) and np.array_equal(a.similarities, b.similarities)
    one, two = (json.loads((run.path / "evaluation" / "base.json").read_text()) for run in (first, second))
    assert one == two


@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"train_split": 0.5}, {"eval_samples": 5}, {"precision": "bf16"}, {"max_seq_length": 16}]
)
def test_kept_scores_serve_the_same_questions_and_model_only(make_config, toy_data, tmp_path, change):
    data = replace(toy_data, directory=tmp_path)
    train(make_config(max_steps=1), data)
    assert KNOWN not in train(make_config(max_steps=1, **change), data)[1]
    assert KNOWN in train(make_config(max_steps=1, batch_size=4, learning_rate=1e-4, use_lora=False), data)[1]


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
def test_damaged_scores_are_measured_again(make_config, toy_data, tmp_path, ending):
    data = replace(toy_data, directory=tmp_path)
    first, _ = train(make_config(max_steps=1), data)
    (kept,) = tmp_path.glob(f"base-scores-*{ending}")
    kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
    again, said = train(make_config(max_steps=1), data)
    assert KNOWN not in said and again.base == first.base
    assert KNOWN in train(make_config(max_steps=1), data)[1]
