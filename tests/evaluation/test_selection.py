"""Which questions are asked: what a run held out, what two runs held out together, and what leaks."""

import dataclasses
import json

import numpy as np
import pytest
from evaluation_examples import HashEncoder, make_dataset

from koret import runs
from koret.config import TrainingConfig
from koret.data.columns import read_column
from koret.data.pairs import split_articles
from koret.evaluation.comparison import compare_models
from koret.evaluation.evaluator import evaluate
from koret.evaluation.selection import find_runs, open_data, select_questions


def _make_run(folder, fingerprint, **settings):
    """A finished run as its files tell it."""
    (folder / "model").mkdir(parents=True)
    config = TrainingConfig(**{"train_split": 0.7, "seed": 1, **settings})
    for name, value in (
        ("status.json", {"state": "finished"}), ("data.json", {"fingerprint": fingerprint}),
        ("model/modules.json", []), ("model/training_config.json", config.to_dict()),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(value))
    return runs.read_run(folder)


def test_a_run_is_asked_what_it_held_out(dataset, tmp_path):
    run = _make_run(tmp_path / "run_1", dataset.fingerprint)
    chosen = select_questions(dataset, trained=[run])
    held_out = split_articles(dataset, 0.7, 1)[1]
    assert chosen.split == "held-out" and chosen.asked.tolist() == held_out.tolist()
    assert set(chosen.tasks[0].groups.tolist()) <= set(held_out.tolist())
    assert chosen.audit().clean and chosen.describe()["articles_asked"] == len(held_out)


def test_asking_everything_of_a_run_is_not_clean(dataset, tmp_path):
    run = _make_run(tmp_path / "run_1", dataset.fingerprint)
    chosen = select_questions(dataset, trained=[run], split="all")
    assert len(chosen.asked) == 10
    assert not chosen.audit().clean and "NOT CLEAN" in chosen.audit().sentence


def test_two_runs_are_asked_what_both_held_out(dataset, tmp_path):
    a = _make_run(tmp_path / "run_1", dataset.fingerprint, train_split=0.5)
    b = _make_run(tmp_path / "run_2", dataset.fingerprint, train_split=0.5, seed=2)
    both = np.intersect1d(split_articles(dataset, 0.5, 1)[1], split_articles(dataset, 0.5, 2)[1])
    chosen = select_questions(dataset, trained=[a, b])
    assert 0 < len(both) < 5 and chosen.asked.tolist() == both.tolist()
    assert chosen.audit().clean
    rivals = [_make_run(tmp_path / f"run_{s}", dataset.fingerprint, train_split=0.7, seed=s) for s in range(3, 15)]
    with pytest.raises(ValueError, match="held out no article in common"):
        select_questions(dataset, trained=rivals)


def test_a_run_on_other_data_is_asked_everything_and_audited(dataset, tmp_path):
    articles = [
        ("지리산", ["다른 글이 여기에 있다."], [("어디인가?", "여기", 0)]),
        ("호수", ["호수는 물이 고인 곳이다."], [("무엇인가?", "물", 0)]),
    ]
    other = dataclasses.replace(make_dataset(articles), fingerprint="other")
    run = _make_run(tmp_path / "run_1", "other", train_split=0.5)
    chosen = select_questions(dataset, other, trained=[run])
    assert chosen.split == "all" and len(chosen.asked) == 10
    titles = {f.what: f.same for f in chosen.audit().findings}
    trained_on = other.articles.column("title")[int(split_articles(other, 0.5, 1)[0][0])].as_py()
    assert titles["titles"] == (trained_on == "지리산")
    assert select_questions(dataset, None, trained=[run]).audit() is None


def test_without_a_run_everything_is_asked_or_the_default_split(dataset):
    assert select_questions(dataset).split == "all" and select_questions(dataset).audit() is None
    held_out = select_questions(dataset, split="held-out")
    default = TrainingConfig()
    assert held_out.asked.tolist() == split_articles(dataset, default.train_split, default.seed)[1].tolist()
    assert set(read_column(dataset.questions, "article")[held_out.tasks[0].question_rows]) == set(held_out.asked)
    with pytest.raises(ValueError, match="split must be one of auto, all, held-out, not 'test'"):
        select_questions(dataset, split="test")


def test_runs_are_found_by_their_model_directory(tmp_path):
    run = _make_run(tmp_path / "run_1", "x")
    assert [r.path for r in find_runs(tmp_path / "run_1" / "model", "no/such-model", None, HashEncoder())] == [run.path]


def test_the_embedded_sample_opens_as_the_models_tokens_cut_it():
    dataset, other = open_data("sample", HashEncoder(), progress=False)
    assert other is None and dataset.questions.num_rows > 500
    report = evaluate(HashEncoder(), "sample", bm25=["bigram"], max_queries=60, kinds=["passage"], split="held-out")
    section = report.sections[0]
    assert len(section.task.queries) <= 60 and section.rows[0].system == "model"
    assert 0.3 < section.find_row("lexical").metrics["ndcg@10"].mean < 0.95  # neither trivial nor hopeless
    assert report.data["source"] == "sample" and report.data["fusion_weight"] in [w / 10 for w in range(11)]


def test_pages_are_cut_as_the_run_cut_them(tmp_path):
    lines = "".join(f"<p>이것은 {number}번째 문장이다.</p>" for number in range(60))
    page = {"title": "글", "context": lines, "qas": [
        {"id": "1", "question": "몇 번째인가?", "answer": {"text": "7번째", "answer_start": lines.index("7번째")}}
    ]}  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [page]}), encoding="utf-8")
    counts = []
    for number, overlap in enumerate((0.0, 0.3)):
        run = _make_run(tmp_path / f"run_{number}", "x", passage_overlap=overlap, dataset_root=str(path))
        dataset, other = open_data(path, HashEncoder(), [run], cache_dir=tmp_path, progress=False)
        assert other.fingerprint == dataset.fingerprint
        counts.append(dataset.passages.num_rows)
    assert counts[1] > counts[0] > 1


def test_models_are_compared_by_name(dataset, encoder, weak_encoder):
    found = compare_models(weak_encoder, encoder, dataset, moves=3)
    assert found.names == ("weak", "hash") and found.wins > found.losses and found.task == "question → passage"
    same = compare_models(encoder, HashEncoder(), dataset, kind="answer", max_queries=10)
    assert same.names == ("A", "B") and same.ties == len(same.query_ids) <= 10
