"""Tasks from a data set that can be counted by hand."""

import numpy as np
import pytest
from evaluation_examples import make_dataset

from koret.data.columns import read_column
from koret.evaluation.tasks import build_held_out_tasks, build_task


def _everything(dataset):
    return np.arange(dataset.questions.num_rows), np.arange(dataset.passages.num_rows)


def test_passage_task_merges_duplicates_and_lists_exclusions(dataset):
    task = build_task(dataset, *_everything(dataset), "passage")
    assert len(task.corpus) == len(set(task.corpus)) == 30  # 31 rows, one text twice
    assert len(task.queries) == 30 and task.notes == ["1 repeated questions count once"]
    assert task.excluded == [("설악산-3", "no passage holds its answer"), ("북한산-3", "empty question")]
    first = task.queries.index("한라산의 높이는 얼마인가?")
    # asked in article 0 of its first passage and again in article 2: both passages are right
    assert [task.corpus[row][:3] for row in task.relevant[first]] == ["한라산", "지리산"]
    assert task.groups[first] == 0 and len(set(task.groups.tolist())) == 10
    assert task.has_articles and task.corpus_articles.tolist().count(1) == 3


def test_gold_text_elsewhere_counts_as_right():
    """The gold row itself is not in the corpus, an equal text under another heading is."""
    dataset = make_dataset([("가", ["같은 글이다"], [("무엇인가?", "글", 0)]), ("나", ["같은  글이다", "다른 글"], [])])
    task = build_task(dataset, np.array([0]), np.array([1, 2]), "passage")
    assert task.relevant[0].tolist() == [0] and task.corpus == ["같은  글이다", "다른 글"]


def test_gold_outside_the_corpus_is_an_exclusion(dataset):
    task = build_task(dataset, np.array([0, 4]), np.array([4, 5]), "passage")
    assert task.query_ids == ["백두산-1"] and task.excluded == [("한라산-0", "its passage is not in the corpus")]


def test_answer_task_has_each_answer_once(dataset):
    task = build_task(dataset, *_everything(dataset), "answer")
    assert len(task.corpus) == 31 and task.corpus.count("1500미터") == 1  # 30 answers, and 서울 of the empty question
    assert ("설악산-3", "no answer text") in task.excluded
    assert not task.has_articles
    variants = make_dataset([("가", ["글"], [("하나?", "한라산", 0), ("둘?", "한라산은", 0), ("셋?", "백두산", 0)])])
    task = build_task(variants, np.arange(3), np.arange(1), "answer")
    assert task.corpus == ["한라산", "백두산"] and [r.tolist() for r in task.relevant] == [[0], [0], [1]]


def test_held_out_tasks_ask_held_out_questions_and_fill_the_corpus(dataset):
    train, held = np.arange(7), np.arange(7, 10)
    passage, answer = build_held_out_tasks(dataset, train, held, corpus_size=20)
    assert len(passage.queries) == len(answer.queries) == 9
    assert set(read_column(dataset.questions, "article")[passage.question_rows]) == {7, 8, 9}
    assert len(passage.passage_rows) == 20 and set(range(22, 31)) <= set(passage.passage_rows.tolist())
    small = build_held_out_tasks(dataset, train, held, ["passage"], corpus_size=1, samples=4)[0]
    assert len(small.queries) == 4 and len(small.corpus) == 9
    again = build_held_out_tasks(dataset, train, held, ["passage"], corpus_size=1, samples=4)[0]
    other = build_held_out_tasks(dataset, train, held, ["passage"], corpus_size=1, samples=4, seed=1)[0]
    assert small.fingerprint() == again.fingerprint() != other.fingerprint()


def test_clear_errors(dataset):
    with pytest.raises(ValueError, match="kind must be passage or answer, not 'title'"):
        build_task(dataset, np.array([0]), np.array([0]), "title")
    with pytest.raises(ValueError, match="the corpus is empty"):
        build_task(dataset, np.array([0]), np.array([], np.int64), "passage")
    with pytest.raises(ValueError, match=r"no query can be scored \(2 with its passage is not in the corpus\)"):
        build_task(dataset, np.array([0, 1]), np.array([9]), "passage")


def test_description_counts(dataset):
    facts = build_task(dataset, *_everything(dataset), "passage").describe()
    assert (facts["queries"], facts["corpus"], facts["groups"], len(facts["excluded"])) == (30, 30, 10, 2)
    assert facts["relevant_per_query"] == pytest.approx(31 / 30)
