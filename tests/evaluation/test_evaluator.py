"""Scores of encoders and BM25 on small tasks, against brute force, and the verdict on two of them."""

import dataclasses
import json

import numpy as np
import pytest
from evaluation_examples import HashEncoder

from koret.evaluation.evaluator import WEIGHTS, Evaluator, rank_articles
from koret.evaluation.metrics import compute_metrics
from koret.evaluation.scores import Scores, format_p, judge, label
from koret.evaluation.tasks import build_task


@pytest.fixture
def task(dataset):
    return build_task(dataset, np.arange(dataset.questions.num_rows), np.arange(dataset.passages.num_rows), "passage")


def test_scores_equal_a_full_sort(task, encoder):
    scores = Evaluator(task).score(encoder)
    similarity = encoder.encode(task.queries, "query").astype(float) @ encoder.encode(task.corpus, "passage").T
    order = np.argsort(-similarity, axis=1, kind="stable")
    assert scores.rankings.shape == (30, 30)  # the corpus is smaller than the depth of 100
    assert scores.metrics["ndcg@10"] == pytest.approx(compute_metrics(order, task.relevant)["ndcg@10"].mean(), abs=0.02)
    assert scores.metrics["recall@100"] == 1 and 0.5 < scores.metrics["ndcg@10"] < 1
    assert scores.system == "hash" and set(scores.seconds) == {"encode", "search"}
    assert json.loads(json.dumps(scores.to_dict()))["metrics"]["map"] == scores.metrics["map"]


def test_article_metrics_equal_brute_force(task, weak_encoder):
    scores = Evaluator(task, depth=12).score(weak_encoder)  # 12 texts rarely hold 10 articles: it must search deeper
    full = Evaluator(task, depth=30).score(weak_encoder)
    ranks = []
    for query in range(len(task.queries)):
        wanted = {task.corpus_articles[row] for row in task.relevant[query]}
        order = list(dict.fromkeys(task.corpus_articles[full.rankings[query]].tolist()))
        ranks.append(min(order.index(article) + 1 for article in wanted))
    assert np.allclose(scores.per_query["article/mrr@10"], [1 / rank if rank <= 10 else 0 for rank in ranks])
    assert scores.per_query["article/accuracy@1"].tolist() == [float(rank == 1) for rank in ranks]
    assert (scores.per_query["article/recall@10"] >= scores.per_query["recall@10"] - 1e-9).all()


def test_rank_articles_by_hand():
    owners = np.array([7, 7, 3, 5, 3])
    assert rank_articles(np.array([[2, 0, 4, 1, 3], [4, 2, -1, -1, -1]]), owners).tolist() == [
        [3, 7, 5, -1, -1],
        [3, -1, -1, -1, -1],
    ]


def test_bm25_and_fusion_on_the_same_queries(task, encoder):
    evaluator = Evaluator(task)
    dense, lexical = evaluator.score(encoder, "tuned"), evaluator.score_lexical("bigram")
    assert lexical.system == "BM25 bigrams" and lexical.metrics["ndcg@10"] > 0.5
    fused = evaluator.score_fusion(dense, lexical)
    assert fused.system == "tuned + BM25 (RRF)" and len(fused.rankings) == 30
    only_dense = evaluator.score_fusion(dense, lexical, weight=1.0)
    assert only_dense.metrics["mrr@10"] == pytest.approx(dense.metrics["mrr@10"])
    assert evaluator.score_fusion(dense, lexical, weight=0.4).system == "tuned + BM25 (w=0.4)"


def make_scores(task, right, name):
    """Rankings with the right text first where ``right`` (Q,), last elsewhere; the others in order."""
    rows = np.array([
        [gold, *others] if good else [*others, gold]
        for gold, good in zip((r[0] for r in task.relevant), right, strict=True)
        for others in [[row for row in range(len(task.corpus)) if row != gold]]
    ])  # fmt: skip
    similarities = np.tile(np.linspace(1, 0, rows.shape[1], dtype=np.float32), (len(rows), 1))
    return Scores(name, task.name, compute_metrics(rows, task.relevant), rows, similarities)


def test_a_weight_is_learned_on_other_articles_only(task):
    """Dense is right on one half of the articles, BM25 on the other: what helps an article is learned elsewhere."""
    evaluator = Evaluator(task)
    half = np.isin(task.groups, np.unique(task.groups)[::2])
    dense, lexical = make_scores(task, half, "tuned"), make_scores(task, ~half, "BM25")
    learned = evaluator.score_learned_fusion(dense, lexical)
    by_weight = {w: evaluator.score_fusion(dense, lexical, w).per_query["ndcg@10"] for w in WEIGHTS}
    groups = np.unique(task.groups)
    folds = np.random.default_rng(0).permutation(len(groups)) % 5
    wanted = np.empty(len(task.groups))
    for query, group in enumerate(task.groups):
        others = folds[np.searchsorted(groups, task.groups)] != folds[np.searchsorted(groups, group)]
        best = max(WEIGHTS, key=lambda w: by_weight[w][others].mean())
        wanted[query] = by_weight[best][query]
    assert learned.per_query["ndcg@10"] == pytest.approx(wanted)
    again = compute_metrics(learned.rankings, task.relevant)
    assert all(np.allclose(again[name], values) for name, values in learned.per_query.items())


@pytest.mark.parametrize("strong", [True, False])
def test_a_learned_weight_follows_the_stronger_side(task, strong):
    evaluator = Evaluator(task)
    dense, lexical = (make_scores(task, np.full(len(task.groups), right), "x") for right in (strong, not strong))
    learned = evaluator.score_learned_fusion(dense, lexical)
    assert learned.metrics["ndcg@10"] > 0.98 > evaluator.score_fusion(dense, lexical).metrics["ndcg@10"]
    assert (evaluator.choose_weight(dense, lexical) > 0.5) == strong


def test_questions_of_one_article_teach_no_weight(task, encoder):
    one = dataclasses.replace(task, groups=np.zeros_like(task.groups))
    evaluator = Evaluator(one)
    assert evaluator.score_learned_fusion(evaluator.score(encoder), evaluator.score_lexical()) is None


def test_replaced_queries_are_scored_instead(task, encoder):
    evaluator = Evaluator(task)
    same = evaluator.score(encoder, queries=task.queries)
    blank = evaluator.score(encoder, queries=["?"] * len(task.queries))
    assert same.metrics == evaluator.score(encoder).metrics
    assert blank.metrics["ndcg@10"] < 0.3 < same.metrics["ndcg@10"]


def test_verdict_on_a_clearly_better_model(task, encoder, weak_encoder):
    evaluator = Evaluator(task)
    base, tuned = evaluator.score(weak_encoder, "base"), evaluator.score(encoder, "tuned")
    verdict = judge(base, tuned, task.groups)
    assert verdict.verdict == "better" and verdict.low > 0 and verdict.p_value < 0.05
    assert verdict.difference == pytest.approx(tuned.metrics["ndcg@10"] - base.metrics["ndcg@10"])
    assert verdict.sentence.startswith("tuned is better than base: nDCG@10 ")
    assert "30 questions of 10 articles" in verdict.sentence
    assert judge(tuned, base, task.groups).verdict == "worse"
    assert tuned.sort_key > base.sort_key


def test_verdict_on_the_same_model_says_what_could_have_been_seen(task, encoder):
    evaluator = Evaluator(task)
    base = evaluator.score(encoder, "base")
    verdict = judge(base, evaluator.score(encoder, "tuned"), task.groups)
    assert verdict.verdict == "not distinguishable" and verdict.p_value == 1
    nearly = judge(base, evaluator.score(HashEncoder(dimensions=2000), "tuned"), task.groups)
    assert nearly.verdict == "not distinguishable" and nearly.detectable > 0
    assert f"A true difference of {nearly.detectable:.3f} or more would have shown" in nearly.sentence
    assert json.loads(json.dumps(nearly.to_dict())) == nearly.to_dict()


def test_bad_vectors_and_mixed_tasks_are_clear_errors(dataset, task, encoder):
    class Broken(HashEncoder):
        def encode(self, texts, kind, *, progress=False):
            vectors = super().encode(texts, kind)
            vectors[7 if kind == "passage" else 0, 0] = np.nan if kind == "passage" else 0
            return vectors

    with pytest.raises(ValueError, match="corpus vectors hold NaN or infinite values, the first in row 7"):
        Evaluator(task).score(Broken())
    encoder.encode, whole = lambda texts, kind, progress=False: whole(texts[1:], kind), encoder.encode
    with pytest.raises(ValueError, match=r"the encoder gave \(29, 256\) for 30 corpus texts"):
        Evaluator(task).score(encoder)
    other = build_task(dataset, np.arange(5), np.arange(31), "answer")
    with pytest.raises(ValueError, match="was scored on"):
        judge(Evaluator(task).score(HashEncoder()), Evaluator(other).score(HashEncoder()), task.groups)


def test_written_forms():
    names = ("ndcg@10", "map", "mrr@10", "recall@10", "article/ndcg@10")
    assert [label(name) for name in names] == ["nDCG@10", "MAP", "MRR@10", "recall@10", "nDCG@10"]
    assert (format_p(0.0001), format_p(0.0321), format_p(1.0)) == ("< .001", "= .032", "= 1.000")
