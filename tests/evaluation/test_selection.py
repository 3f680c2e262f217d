"""Which questions are asked: what a run held out, what two runs held out together, and what leaks."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_examples import HashEncoder, make_dataset
from tokenizers import Tokenizer, models

from koret import runs
from koret.config import TrainingConfig
from koret.data.columns import read_column
from koret.data.pairs import split_articles
from koret.evaluation.comparison import compare_models
from koret.evaluation.evaluator import evaluate
from koret.evaluation.selection import find_runs, find_trained, open_data, select_questions


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
    chosen = select_questions(dataset, {"other": other}, trained=[run])
    assert chosen.split == "all" and len(chosen.asked) == 10
    titles = {f.what: f.same for f in chosen.audit().findings}
    trained_on = other.articles.column("title")[int(split_articles(other, 0.5, 1)[0][0])].as_py()
    assert titles["titles"] == (trained_on == "지리산")
    unknown = select_questions(dataset, None, trained=[run]).audit()
    assert unknown.clean is None and unknown.sentence.startswith("What run_1 was trained on is not known here, so ")


def test_without_a_run_everything_is_asked_or_the_default_split(dataset):
    assert select_questions(dataset).split == "all" and select_questions(dataset).audit().clean is None
    held_out = select_questions(dataset, split="held-out")
    default = TrainingConfig()
    assert held_out.asked.tolist() == split_articles(dataset, default.train_split, default.seed)[1].tolist()
    assert set(read_column(dataset.questions, "article")[held_out.tasks[0].question_rows]) == set(held_out.asked)
    with pytest.raises(ValueError, match="split must be one of auto, all, held-out, not 'test'"):
        select_questions(dataset, split="test")


def test_runs_are_found_by_their_model_directory(tmp_path):
    run = _make_run(tmp_path / "run_1", "x")
    assert [r.path for r in find_runs(tmp_path / "run_1" / "model", "no/such-model", None, HashEncoder())] == [run.path]


def test_a_base_that_is_no_longer_where_it_was_is_found_beside_its_run_or_missed(dataset, tmp_path):
    first = _make_run(tmp_path / "run_1", dataset.fingerprint)
    second = _make_run(tmp_path / "run_2", dataset.fingerprint, model_name="gone/run_1")
    assert find_runs(second.path) == [second]  # nothing says that its base was a run
    (second.path / "environment.json").write_text(json.dumps({"model": {"name": "gone/run_1", "run": "run_1"}}))
    second = runs.read_run(second.path)
    assert find_runs(second.path) == [second, first]
    assert find_trained(second.path) == {"trained": [second, first], "unknown": []}
    first.path.rename(tmp_path / "run_9")  # another run's name is another run
    assert find_runs(second.path) == [second]
    found = find_trained(second.path)
    assert found == {"trained": [second], "unknown": ["run_1"]}
    audit = select_questions(dataset, **found).audit()
    assert audit.clean is None and audit.sentence.startswith("What run_1 was trained on is not known here, so ")


def test_the_embedded_sample_opens_as_the_models_tokens_cut_it():
    dataset, other = open_data("sample", HashEncoder(), progress=False)
    assert other == {} and dataset.questions.num_rows > 500
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
        assert other == {"x": "a.json now gives other data"}
        counts.append(dataset.passages.num_rows)
    assert counts[1] > counts[0] > 1


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """Writes a file of question-answer pairs, an article each; ``of(path)`` is its fingerprint."""
    monkeypatch.setenv("KORET_CACHE", str(tmp_path / "cache"))

    def write(name, numbers, word="질문"):
        lines = [
            {"query": f"{word} {i} 번은 무엇에 관한 것인가?", "positive": f"{i}번 글은 {word} {i * 7919} 이야기이다.",
             "article": f"{word}{i}"} for i in numbers
        ]  # fmt: skip
        (tmp_path / name).write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
        return tmp_path / name

    write.of = lambda path: open_data(path, HashEncoder())[0].fingerprint
    return write


def _evaluate(path, model, baseline=None):
    return evaluate(model, path, baseline=baseline, bm25=False, kinds=["passage"], num_workers=0)


@pytest.fixture
def opened(monkeypatch):
    """Every run loads as the same untrained encoder."""
    import koret.retrieval.encoder

    monkeypatch.setattr(koret.retrieval.encoder, "load_encoder", lambda name, **settings: HashEncoder(str(name)))


def test_an_unknown_model_is_not_clean_because_its_baseline_is(pairs, tmp_path, opened):
    asked = pairs("eval.jsonl", range(20))
    run = _make_run(tmp_path / "run_b", pairs.of(asked), dataset_root=str(asked))
    report = _evaluate(asked, HashEncoder("somebody/unknown"), str(run.path))
    assert report.to_dict()["clean"] is None and report.audit.findings  # the baseline's side was compared
    assert report.cleanness == (
        "What unknown was trained on is not known here, so these numbers cannot be called clean "
        "(no whole leakage audit)."
    )
    assert json.loads(json.dumps(report.to_dict()))["audit"]["clean"] is None
    for base in ("offline", "hub/base", HashEncoder("base")):
        assert _evaluate(asked, str(run.path), base).cleanness.startswith("Clean: training has seen none of 6 titles")
    found = compare_models("hub/base", str(run.path), asked, num_workers=0)
    assert found.cleanness.startswith("Clean") and found.to_dict()["cleanness"] == found.cleanness
    assert "cannot be called clean" in compare_models(str(run.path), "hub/base", asked, num_workers=0).cleanness


def test_what_the_model_or_its_baseline_has_seen_counts(pairs, tmp_path, opened):
    asked, trained_on = pairs("eval.jsonl", range(20)), pairs("train.jsonl", range(40))
    a = _make_run(tmp_path / "run_a", pairs.of(trained_on), dataset_root=str(trained_on))
    b = _make_run(tmp_path / "run_b", pairs.of(asked), dataset_root=str(asked))
    apart = pairs("apart.jsonl", range(30), word="낱말")
    c = _make_run(tmp_path / "run_c", pairs.of(apart), dataset_root=str(apart))
    for pair in ((a, b), (b, a), (a, c), (c, a)):
        report = _evaluate(asked, *(str(run.path) for run in pair))
        assert report.to_dict()["clean"] is False and "NOT CLEAN: training has seen " in report.cleanness
    report = _evaluate(asked, str(c.path), str(b.path))
    assert report.data["split"] == "held-out" and report.audit.clean
    assert report.audit.training == "the runs' training articles and training articles of apart.jsonl"
    assert "NOT CLEAN" in compare_models(str(b.path), str(a.path), asked, num_workers=0).cleanness


@pytest.mark.parametrize("change", ["changed", "elsewhere", "gone"])
def test_training_data_that_is_not_what_it_was_is_not_audited(pairs, tmp_path, opened, change, monkeypatch):
    asked, trained_on = pairs("eval.jsonl", range(20)), pairs("train.jsonl", range(40))
    monkeypatch.chdir(tmp_path)
    a = _make_run(tmp_path / "run_a", pairs.of(trained_on), dataset_root="train.jsonl")
    b = _make_run(tmp_path / "run_b", pairs.of(asked), dataset_root=str(asked))
    assert "NOT CLEAN" in _evaluate(asked, str(a.path)).cleanness
    if change == "changed":
        pairs("train.jsonl", range(40), word="새말")
    elif change == "elsewhere":
        (tmp_path / "other").mkdir()
        pairs("other/train.jsonl", range(40), word="새말")
        monkeypatch.chdir(tmp_path / "other")
    else:
        trained_on.unlink()
    why = "cannot be read" if change == "gone" else "now gives other data"
    report = _evaluate(asked, str(a.path))
    assert report.to_dict()["clean"] is None and report.cleanness == (
        f"What run_a was trained on is not known here (train.jsonl {why}), so these numbers cannot be called clean "
        "(no leakage audit)."
    )
    for pair in ((a, b), (b, a)):
        report = _evaluate(asked, *(str(run.path) for run in pair))
        assert report.audit.clean is None and f"What run_a was trained on is not known here (train.jsonl {why})" in (
            report.cleanness
        )


def test_a_baseline_with_another_tokenizer_is_audited_by_its_own(pairs, tmp_path, monkeypatch):
    import koret.retrieval.encoder

    class Counting(HashEncoder):
        def export_tokenizer(self, folder):
            letters = {"가": 0, "[UNK]": 1, Path(self.name).name: 2}
            backend = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
            folder.mkdir(parents=True, exist_ok=True)
            backend.save(str(folder / f"{Path(self.name).name}.json"))
            return folder / f"{Path(self.name).name}.json"

    def load(name, **settings):
        path = Path(str(name))
        return Counting(str(path.parent if path.name == "model" else path))

    monkeypatch.setattr(koret.retrieval.encoder, "load_encoder", load)
    asked = pairs("eval.jsonl", range(20))
    a, b = (
        _make_run(tmp_path / name, open_data(asked, Counting(name))[0].fingerprint, dataset_root=str(asked), seed=seed)
        for name, seed in (("run_a", 1), ("run_b", 2))
    )
    assert a.data != b.data
    assert "NOT CLEAN" in _evaluate(asked, str(a.path), str(b.path)).cleanness
    same = _make_run(tmp_path / "same" / "run_b", b.data["fingerprint"], dataset_root=str(asked))
    report = _evaluate(asked, str(a.path), str(same.path))
    assert report.data["split"] == "held-out" and report.audit.clean


def test_a_runs_own_data_stays_its_own_when_every_byte_is_validated(pairs, tmp_path):
    path = pairs("pairs.jsonl", range(40))
    run = _make_run(tmp_path / "run_a", pairs.of(path), dataset_root=str(path))
    plain, strict = (open_data(path, HashEncoder(), [run], strict=strict) for strict in (False, True))
    assert plain[0].fingerprint == strict[0].fingerprint and plain[0].directory != strict[0].directory
    chosen = select_questions(*strict, trained=[run])
    assert chosen.split == "held-out" and chosen.audit().clean


def test_models_are_compared_by_name(dataset, encoder, weak_encoder):
    found = compare_models(weak_encoder, encoder, dataset, moves=3)
    assert found.names == ("weak", "hash") and found.wins > found.losses and found.task == "question → passage"
    same = compare_models(encoder, HashEncoder(), dataset, kind="answer", max_queries=10)
    assert same.names == ("A", "B") and same.ties == len(same.query_ids) <= 10
