"""Slices and probes: labels by hand, numbers against the plain scores of the same questions."""

import unicodedata

import numpy as np
import pytest

from koret.evaluation.evaluator import Evaluator
from koret.evaluation.probes import change_queries, run_probes
from koret.evaluation.slices import label_queries, measure_slices
from koret.evaluation.tasks import build_task


@pytest.fixture
def task(dataset):
    return build_task(dataset, np.arange(dataset.questions.num_rows), np.arange(dataset.passages.num_rows), "passage")


def test_labels_by_hand(dataset, task):
    labels = label_queries(dataset, task)
    assert all(len(names) == 30 for names in labels.values())
    assert labels["question type"][:3] == ["몇/얼마", "무엇", "몇/얼마"]
    assert set(labels["answer kind"]) == {"short"}
    # 한라산은 제주도에 있는 산이다. 해발 고도는 1500미터이며 ...: character 25 of 41
    assert labels["answer in"][0] == "middle third"
    overlap = labels["word overlap"]
    assert overlap[0].startswith(("low: to ", "middle: to ", "high: above ")) and "%" in overlap[0]
    thirds = sorted({name for name in labels["passage length"]})
    assert len(thirds) == 3 and all("characters" in name for name in thirds)


def test_slices_hold_the_scores_of_their_questions(dataset, task, encoder, weak_encoder):
    evaluator = Evaluator(task)
    base, model, lexical = evaluator.score(weak_encoder, "base"), evaluator.score(encoder), evaluator.score_lexical()
    labels = {"question type": label_queries(dataset, task)["question type"]}
    labels |= {"same": ["x"] * 30, "few": ["y"] * 3 + [""] * 27}
    found = measure_slices(labels, task.groups, model, base, lexical, [base, model, lexical])
    assert {part.dimension for part in found} == {"question type"}  # one label for all, and three questions: no slice
    assert [(part.name, part.queries, part.groups) for part in found] == [("몇/얼마", 20, 10), ("무엇", 10, 10)]
    chosen = np.array(labels["question type"]) == "무엇"
    part = found[1]
    assert part.means["hash"].mean == pytest.approx(model.per_query["ndcg@10"][chosen].mean())
    gap = (model.per_query["ndcg@10"] - base.per_query["ndcg@10"])[chosen].mean()
    assert part.gap.mean == pytest.approx(gap) and part.lexical_gap.queries == 10
    alone = measure_slices(labels, task.groups, model, None, None, [model])[0]
    assert alone.gap is None and alone.to_dict()["against_bm25"] is None


def test_probes_change_questions_as_they_say():
    queries = ["한라산의 높이는 얼마인가?", "누가 한글을 만들었는가?"]
    assert change_queries(queries, "nfd") == [unicodedata.normalize("NFD", query) for query in queries]
    assert change_queries(queries, "spacing") == ["한라산의높이는얼마인가?", "누가한글을만들었는가?"]
    assert change_queries(queries, "particles") == ["한라산 높이가 얼마인가?", "누가 한글 만들었는가?"]
    typed = change_queries(queries, "typos")
    for before, after in zip(queries, typed, strict=True):
        assert len(before) == len(after) and sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert typed == change_queries(queries, "typos") and change_queries(["no Hangul 1"], "typos") == ["no Hangul 1"]
    with pytest.raises(ValueError, match="unknown probe 'case'; choose from nfd"):
        change_queries(queries, "case")


def test_every_vowel_has_another_vowel_as_its_mistake():
    for vowel in range(21):
        syllable = chr(0xAC00 + vowel * 28)
        (wrong,) = change_queries([syllable], "typos")
        assert wrong != syllable and 0xAC00 <= ord(wrong) < 0xAC00 + 21 * 28 and (ord(wrong) - 0xAC00) % 28 == 0


def test_probes_measure_the_paired_loss(task, encoder):
    evaluator = Evaluator(task)
    dense, lexical = evaluator.score(encoder), evaluator.score_lexical()
    systems = [
        (dense, lambda queries: evaluator.score(encoder, queries=queries)),
        (lexical, lambda queries: evaluator.score_lexical("bigram", queries)),
    ]
    nfd, spacing = run_probes(task, systems, ["nfd", "spacing"])
    assert nfd.changed == 1.0 and nfd.examples[0][0] == task.queries[0]
    assert nfd.drops["BM25 bigrams"].mean == 0  # BM25 composes jamo
    assert nfd.drops["hash"].mean < -0.3 and nfd.drops["hash"].outcome == "worse"  # the hash encoder does not
    assert spacing.drops["hash"].mean == pytest.approx(0, abs=0.05)  # it reads no spaces
    assert nfd.to_dict()["systems"]["hash"]["outcome"] == "worse"
