"""The leakage audit against brute force over all pairs, and what it lets a report say."""

import random

import numpy as np
import pytest

from koret.evaluation.audit import Texts, audit_overlap, find_near, take_evaluated, take_task, take_training
from koret.evaluation.tasks import build_task

LETTERS = "가나다라마바사아자차카타파하거너더러머버서어저처커터퍼허"


def _write(rng, length):
    return "".join(rng.choice(LETTERS) for _ in range(length))


def _pieces(text, size):
    text = "".join(text.split())
    return {text[i : i + size] for i in range(max(1, len(text) - size + 1))}


@pytest.mark.parametrize("symmetric,threshold", [(False, 0.8), (True, 0.6), (False, 0.3)])
def test_equals_comparing_every_pair(symmetric, threshold):
    rng = random.Random(0)
    seen = [_write(rng, rng.randint(5, 120)) for _ in range(60)]
    texts = []
    for i in range(60):  # copies with more and more letters changed, parts of texts, and new ones
        source = list(seen[i] if i % 3 else seen[i] + _write(rng, 40))
        for place in rng.sample(range(len(source)), min(len(source), i // 12)):
            source[place] = rng.choice(LETTERS)
        text = "".join(source)
        texts.append(text[: len(text) // 2] if i % 5 == 0 else text)
    found = find_near(texts, [seen[:7], seen[7:]], 5, threshold, symmetric)
    wanted = {}
    for i, text in enumerate(texts):
        for other in seen:
            mine, theirs = _pieces(text, 5), _pieces(other, 5)
            share = len(mine & theirs) / (len(mine | theirs) if symmetric else len(mine))
            if share >= threshold and share > wanted.get(i, ("", 0))[1]:
                wanted[i] = other, share
    assert {i: share for i, (_, share) in found.items()} == pytest.approx({i: s for i, (_, s) in wanted.items()})
    assert 15 < len(found) < 60


def test_spelling_does_not_hide_a_copy_and_empty_texts_match_nothing():
    seen = ["제주도에 있는 한라산은, 높이 1,947m의 산이다."]
    assert 0 in find_near(["제주도에 있는 한라산은 높이 1947M의   산이다"], [seen], 8, 0.8)
    assert find_near(["", "...", "다른 글이다"], [["", "!!", *seen]], 8, 0.8) == {}
    assert find_near([], [seen], 8, 0.8) == {}


def test_audit_lists_what_is_shared(dataset):
    training = take_training(dataset, np.arange(5))
    assert len([text for batch in training.read_passages() for text in batch]) == 16
    clean = audit_overlap(training, [take_evaluated(dataset, np.arange(7, 10))])
    shared = {finding.what: (finding.same, finding.checked) for finding in clean.findings}
    assert shared == {"titles": (0, 3), "passages": (0, 9), "questions": (0, 9)}
    leaking = audit_overlap(training, [take_evaluated(dataset, np.array([0, 9]), "the data set")])
    assert not leaking.clean
    assert leaking.sentence.startswith("NOT CLEAN: training has seen 1 of 2 titles (1 the same, 0 nearly), 3 of 6")
    found = {finding.what: finding for finding in leaking.findings}
    assert (found["passages"].same, found["questions"].same) == (3, 3)
    assert found["titles"].examples == [("한라산", "한라산", 1.0)]
    assert leaking.to_dict()["clean"] is False and len(leaking.to_dict()["findings"]) == 3


def test_clean_means_nothing_shared():
    training = Texts("training", ["가"], ["무엇인가?"], ["한라산은 제주도에 있는 높은 산이다"])
    other = Texts("panel", ["나"], ["누가 만들었는가?"], ["세종대왕은 한글을 만든 조선의 왕이다"])
    audit = audit_overlap(training, [other])
    assert audit.clean
    assert audit.sentence == "Clean: training has seen none of 1 titles, 1 passages, 1 questions of panel."
    near = Texts("panel", ["다"], [], ["한라산은 제주도에 있는 높은 산이었다"])
    assert [f.near for f in audit_overlap(training, [near]).findings] == [0, 0]  # 8 of 11 pieces: 73%


def test_tasks_are_audited_by_their_right_texts(dataset):
    task = build_task(dataset, np.array([0]), np.arange(31), "passage")
    texts = take_task(task)
    assert texts.questions == ["한라산의 높이는 얼마인가?"] and len(texts.passages) == 1
