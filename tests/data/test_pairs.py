"""Pairs and their known positives; the split by article."""

import random
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from koret.data.keys import normalize_answer, text_key
from koret.data.loader import Dataset
from koret.data.pairs import assert_no_leak, build_pairs, count_leaks, known_mask, split_articles
from koret.data.passages import join_heading
from koret.data.tables import ARTICLES, PASSAGES, QUESTIONS


def make_dataset(titles, passages, questions):
    """``passages``: (article, heading, text); ``questions``: dicts with text, article and what differs from none."""
    articles = [{"title": title, "url": "", "source": "", "html": False} for title in titles]
    passage_rows = [
        {"article": a, "heading": h, "text": t, "start": 0, "end": len(t), "tokens": -1, "text_key": text_key(t)}
        for a, h, t in passages
    ]
    question_rows = []
    for i, q in enumerate(questions):
        answers = q.get("answers", [])
        reference = next((a for a in answers if a), "")
        gold = q.get("gold", [])
        question_rows.append(
            {
                "id": str(i),
                "text": q["text"],
                "article": q["article"],
                "answers": answers,
                "answer_kind": "short",
                "gold": gold,
                "best": gold[0] if gold else -1,
                "known": sorted({*gold, *q.get("known", [])}),
                "negatives": q.get("negatives", []),
                "question_key": text_key(q["text"]),
                "answer_key": text_key(normalize_answer(reference)),
                "answer_start": -1,
                "answer_end": -1,
            }
        )
    return Dataset(
        pa.Table.from_pylist(articles, ARTICLES),
        pa.Table.from_pylist(passage_rows, PASSAGES),
        pa.Table.from_pylist(question_rows, QUESTIONS),
        fingerprint="",
    )


@pytest.fixture
def crafted():
    """Three articles. Question 2 is question 0 asked again, 3 has the same answer, 4 and 5 have duplicate passages."""
    return make_dataset(
        ["한글", "세종", "한강"],
        [
            (0, "한글 > 창제", "세종은 1443년에 한글을 만들었다."),  # 0
            (0, "한글 > 반포", "1446년에 세종이 반포하였다."),  # 1, holds the answer of questions 0 and 2
            (1, "세종", "세종은 조선의 네 번째 왕이다."),  # 2
            (2, "한강", "한강은 서울을 지난다."),  # 3
            (2, "한강 > 다리", "한강은  서울을 지난다."),  # 4: a duplicate of 3 under another heading
        ],
        [
            {"text": "한글을 만든 이?", "article": 0, "answers": ["세종"], "gold": [0], "known": [1], "negatives": [3]},
            {"text": "한글을 반포한 해는?", "article": 0, "answers": ["1446년"], "gold": [1]},
            {"text": "한글을  만든 이?", "article": 1, "answers": ["세종은"], "gold": [2], "negatives": [2]},
            {"text": "조선의 넷째 왕은?", "article": 1, "answers": ["세종은"], "gold": [2]},
            {"text": "서울을 지나는 강은?", "article": 2, "answers": ["한강"], "gold": [3], "negatives": [4, 0]},
            {"text": "다리가 놓인 강은?", "article": 2, "answers": ["한강"], "gold": [4], "negatives": [2]},
        ],
    )


ALL = np.arange(3)


def test_hand_counted_mask(crafted):
    table = build_pairs(crafted, ALL)
    assert [table.texts[t] for t in table.targets] == [
        "한글 > 창제\n세종은 1443년에 한글을 만들었다.",
        "한글 > 반포\n1446년에 세종이 반포하였다.",
        "세종\n세종은 조선의 네 번째 왕이다.",
        "세종\n세종은 조선의 네 번째 왕이다.",
        "한강\n한강은 서울을 지난다.",
        "한강 > 다리\n한강은  서울을 지난다.",
    ]
    rows = np.arange(6)
    # columns: targets of the six pairs = passages 0 1 2 2 3 4
    expected = [
        [1, 1, 1, 1, 0, 0],  # own, known, asked again
        [0, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0, 0],  # passage 0 through the same answer; passage 1 is only known to the other question
        [0, 0, 0, 0, 1, 1],  # duplicate passage and same answer
        [0, 0, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(known_mask(table, rows, table.targets[rows]), np.array(expected, dtype=bool))
    # question 2 names passage 2 and question 4 passage 4 as negatives: both are known positives
    assert table.dropped_negatives == 2
    named = [[table.texts[i][:2] for i in table.negatives[row]] for row in range(6)]
    assert named == [["한강"], [], ["한강"], [], ["한글"], ["세종"]]


def test_curated_negative_is_not_masked_by_a_common_answer():
    data = make_dataset(
        ["가", "나"],
        [(0, "", "서울은 수도이다."), (1, "", "서울은 예전에 한양이었다.")],
        [
            {"text": "수도는?", "article": 0, "answers": ["서울"], "gold": [0], "negatives": [1]},
            {"text": "한양이었던 곳은?", "article": 1, "answers": ["서울"], "gold": [1]},
        ],
    )
    table = build_pairs(data, np.arange(2))
    mask = known_mask(table, np.array([0, 1]), table.targets)
    np.testing.assert_array_equal(mask, [[True, False], [True, True]])
    assert table.dropped_negatives == 0
    assert table.known_of(0).tolist() == [table.targets[0]]
    assert table.known_of(1).tolist() == sorted(table.targets.tolist())


def test_both_targets_of_a_question_are_never_negatives(crafted):
    table = build_pairs(crafted, ALL, "both")
    assert len(table) == 12
    mask = known_mask(table, np.arange(12), table.targets)
    for i in range(12):
        for j in range(12):
            if table.question[i] == table.question[j]:
                assert mask[i, j]


def test_answers_that_differ_by_a_particle_are_one(crafted):
    table = build_pairs(crafted, ALL, "answer")
    assert [table.texts[t] for t in table.targets] == ["세종", "1446년", "세종은", "세종은", "한강", "한강"]
    mask = known_mask(table, np.array([0, 1]), table.targets)
    np.testing.assert_array_equal(mask, np.array([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=bool))


def test_questions_without_answers_do_not_mask_each_other():
    data = make_dataset(
        ["", ""],
        [(0, "", "첫째 글"), (1, "", "둘째 글")],
        [{"text": "하나?", "article": 0, "gold": [0]}, {"text": "둘?", "article": 1, "gold": [1]}],
    )
    table = build_pairs(data, np.arange(2))
    np.testing.assert_array_equal(known_mask(table, np.arange(2), table.targets), np.eye(2, dtype=bool))
    assert build_pairs(data, np.arange(2), "answer").skipped == {"empty answer": 2}


def test_skipped_questions_are_counted():
    data = make_dataset(
        ["가"],
        [(0, "", "글")],
        [
            {"text": " ", "article": 0, "answers": ["글"], "gold": [0]},
            {"text": "무엇?", "article": 0, "answers": ["글"], "gold": []},
            {"text": "무엇?", "article": 0, "answers": ["글"], "gold": [0]},
            {"text": "무엇?", "article": 0, "answers": ["글"], "gold": [0]},
        ],
    )
    table = build_pairs(data, np.array([0]))
    assert len(table) == 1
    assert table.skipped == {"empty question": 1, "no passage holds the answer": 1, "repeated pair": 1}
    empty = build_pairs(data, np.array([], dtype=np.int64))
    assert len(empty) == 0 and known_mask(empty, np.array([], dtype=int), np.array([], dtype=int)).shape == (0, 0)
    with pytest.raises(ValueError, match="positives"):
        build_pairs(data, np.array([0]), "context")


def random_dataset(rng, articles=12):
    titles = [rng.choice(["", "가", "나", "다"]) + (str(i) if rng.random() < 0.8 else "") for i in range(articles)]
    passages, questions, of_article = [], [], defaultdict(list)
    for a in range(articles):
        for _ in range(rng.randrange(1, 5)):
            of_article[a].append(len(passages))
            passages.append((a, rng.choice(["", "절"]), f"글 {rng.randrange(40)}"))
    for _ in range(60):
        a = rng.randrange(articles)
        gold = sorted(rng.sample(of_article[a], k=rng.randrange(0, len(of_article[a]) + 1)))
        questions.append(
            {
                "text": f"질문 {rng.randrange(45)}",
                "article": a,
                "answers": rng.sample(["서울", "서울은", "부산", "1945년", "한강", "글 3", ""], k=rng.randrange(0, 3)),
                "gold": gold,
                "known": [p for p in of_article[a] if rng.random() < 0.2],
                "negatives": [rng.randrange(len(passages)) for _ in range(rng.randrange(3))],
            }
        )
    return make_dataset(titles, passages, questions)


def is_usable(question, positives):
    has_answer = any(a.strip() for a in question["answers"])
    return (positives == "answer" or question["best"] >= 0) and (positives == "passage" or has_answer)


def is_same(a, b):
    return normalize_answer(a) == normalize_answer(b)


def brute_force_mask(data, table, positives):
    """The definition, question by question and text by text: known positives, curated negatives (P, T)."""
    passages = data.passages.to_pylist()
    usable = [q for q in data.questions.to_pylist() if is_usable(q, positives)]
    encoded = [join_heading(p["heading"], p["text"]) for p in passages]
    reference = {q["id"]: next((a for a in q["answers"] if a.strip()), None) for q in usable}

    def targets(q):
        passage, answer = encoded[q["best"]], reference[q["id"]]
        return {"passage": {passage}, "answer": {answer}, "both": {passage, answer}}[positives]

    def is_known(q, text):
        plain = {p["text"] for p, e in zip(passages, encoded, strict=True) if e == text}
        is_answer = text in reference.values() and any(a and is_same(a, text) for a in q["answers"])
        return (
            text in targets(q)
            or bool(plain & {passages[p]["text"] for p in q["known"]})
            or (positives != "passage" and is_answer)
        )

    masks = np.zeros((len(table), len(table.texts)), dtype=bool)
    curated = np.zeros_like(masks)
    for i, query in enumerate(table.queries):
        same = [q for q in usable if q["text"] == query]
        answer = reference[data.questions["id"][int(table.question[i])].as_py()]
        for j, text in enumerate(table.texts):
            known = any(is_known(q, text) for q in same)
            curated[i, j] = not known and any(text == encoded[n] for q in same for n in q["negatives"])
            fellows = [q for q in usable if answer and reference[q["id"]] and is_same(reference[q["id"]], answer)]
            common = any(text in targets(q) for q in fellows)
            masks[i, j] = known or (common and not curated[i, j])
    return masks, curated


@pytest.mark.parametrize("positives", ["passage", "answer", "both"])
def test_masks_equal_brute_force(positives):
    rng = random.Random(3)
    for _ in range(4):
        data = random_dataset(rng)
        table = build_pairs(data, np.arange(12), positives)
        masks, curated = brute_force_mask(data, table, positives)
        rows = np.array([rng.randrange(len(table)) for _ in range(20)])
        ids = np.array([rng.randrange(len(table.texts)) for _ in range(30)])
        np.testing.assert_array_equal(known_mask(table, rows, ids), masks[rows][:, ids])
        for i in range(len(table)):
            assert sorted(table.negatives[i]) == np.flatnonzero(curated[i]).tolist()
            assert table.known_of(i).tolist() == np.flatnonzero(masks[i]).tolist()


def test_max_samples_takes_questions_by_seed(crafted):
    small = build_pairs(crafted, ALL, "both", max_samples=3, seed=5)
    again = build_pairs(crafted, ALL, "both", max_samples=3, seed=5)
    assert len(set(small.question.tolist())) == 3
    assert small.question.tolist() == again.question.tolist() == sorted(small.question.tolist())
    drawn = {tuple(build_pairs(crafted, ALL, max_samples=3, seed=s).question) for s in range(10)}
    assert len(drawn) > 3


def test_only_the_given_articles(crafted):
    table = build_pairs(crafted, np.array([2]))
    assert set(table.article.tolist()) == {2} and table.question.tolist() == [4, 5]


# ---- the split


def shuffle_rows(data, rng):
    """The same data with articles, passages and questions in another order."""
    order = rng.sample(range(data.articles.num_rows), data.articles.num_rows)
    place = {old: new for new, old in enumerate(order)}
    passage_order = rng.sample(range(data.passages.num_rows), data.passages.num_rows)
    passage_place = {old: new for new, old in enumerate(passage_order)}
    titles = data.articles.column("title").to_pylist()
    passages = data.passages.to_pylist()
    questions = data.questions.to_pylist()
    rng.shuffle(questions)
    for q in questions:
        q["article"] = place[q["article"]]
        q["gold"] = [passage_place[p] for p in q["gold"]]
    moved = [(place[passages[p]["article"]], passages[p]["heading"], passages[p]["text"]) for p in passage_order]
    return make_dataset([titles[a] for a in order], moved, questions), order


def chain_dataset(articles=200):
    """Articles tied in chains: 0-1 by title, 1-2 by an answering passage, 2-3 by a question; the others are free."""
    titles = [f"제목 {i}" for i in range(articles)]
    titles[1] = titles[0]
    texts = [f"글 {i}" for i in range(articles)]
    texts[2] = texts[1]
    passages = [(a, "", texts[a]) for a in range(articles)] + [(a, "", "공식 웹사이트") for a in range(articles)]
    questions = [
        {"text": "같은 질문?" if a in (2, 3) else f"질문 {a}?", "article": a, "answers": ["글"], "gold": [a]}
        for a in range(articles)
    ]
    return make_dataset(titles, passages, questions)


def test_split_keeps_chains_together_and_nothing_leaks():
    data = chain_dataset()
    for seed in range(20):
        train, held_out = split_articles(data, 0.9, seed)
        assert sorted([*train, *held_out]) == list(range(200))
        assert len(held_out) in range(17, 25)
        assert len({a in held_out for a in range(4)}) == 1
        assert_no_leak(data, train, held_out)
    assert len({tuple(split_articles(data, 0.9, seed)[1]) for seed in range(20)}) == 20


def test_leaks_are_counted():
    data = chain_dataset(8)
    apart = np.array([0, 2, 4, 6]), np.array([1, 3, 5, 7])
    assert count_leaks(data, *apart) == {"articles": 0, "titles": 1, "passages": 1, "questions": 1}
    assert count_leaks(data, np.arange(8), np.array([7])) == {"articles": 1, "titles": 1, "passages": 1, "questions": 1}
    with pytest.raises(RuntimeError, match="1 titles, 1 passages, 1 questions"):
        assert_no_leak(data, *apart)


def test_split_does_not_depend_on_row_order():
    rng = random.Random(11)
    data = chain_dataset()
    _, held_out = split_articles(data, 0.8, 3)
    moved, order = shuffle_rows(data, rng)
    _, held_out_moved = split_articles(moved, 0.8, 3)
    assert sorted(order[a] for a in held_out_moved) == held_out.tolist()


def test_random_splits_never_leak():
    rng = random.Random(5)
    for seed in range(20):
        data = random_dataset(rng, articles=25)
        try:
            train, held_out = split_articles(data, 0.8, seed)
        except ValueError:
            continue
        assert len(train) and len(held_out)
        assert_no_leak(data, train, held_out)


def test_two_articles_give_one_to_each_side():
    data = make_dataset(
        ["가", "나"],
        [(0, "", "글 1"), (1, "", "글 2")],
        [{"text": "하나?", "article": 0, "gold": [0]}, {"text": "둘?", "article": 1, "gold": [1]}],
    )
    for seed in range(5):
        for share in (0.01, 0.5, 0.99):
            assert [len(side) for side in split_articles(data, share, seed)] == [1, 1]


def test_data_that_cannot_be_split_is_refused():
    data = make_dataset(["가"], [(0, "", "글")], [{"text": "하나?", "article": 0, "gold": [0]}])
    with pytest.raises(ValueError, match="cannot hold out"):
        split_articles(data, 0.9, 1)
