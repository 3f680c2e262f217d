"""Metrics against pytrec_eval, ranx, sentence-transformers' evaluator, and by hand."""

import math
import random

import numpy as np
import pytest

from koret.evaluation.metrics import compute_metrics, mark_hits, measure_recall_curve
from koret.retrieval.exact import find_top_k

KS = (1, 3, 5, 10, 50)


@pytest.fixture(scope="module")
def run():
    """Random rankings of 80 texts over 300, several relevant texts per query, some not retrieved, some repeated."""
    rng = random.Random(3)
    rankings = np.array([rng.sample(range(300), 80) for _ in range(120)])
    rankings[:10, 40:] = -1  # short result lists
    rankings[10, :] = -1  # none at all
    relevant = []
    for ranking in rankings:
        pool = [int(r) for r in ranking[:25] if r >= 0] + list(range(300))[:: rng.randint(5, 90)]
        relevant.append([rng.choice(pool) for _ in range(rng.randint(1, 6))])
    return rankings, relevant


def test_by_hand():
    values = compute_metrics(np.array([[5, 2, 9, 7], [1, 3, -1, -1]]), [{2, 7, 8}, {4}], ks=(1, 2, 4, 10))
    assert values["map"].tolist() == [pytest.approx((1 / 2 + 2 / 4) / 3), 0]
    assert values["mrr@10"].tolist() == [0.5, 0] and values["mrr@1"].tolist() == [0, 0]
    assert values["recall@4"][0] == pytest.approx(2 / 3) and values["precision@4"][0] == 0.5
    assert values["precision@10"][0] == 0.2 and values["accuracy@2"].tolist() == [1, 0]
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert values["ndcg@4"][0] == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert values["ndcg@2"][0] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))


def test_equal_to_pytrec_eval(run):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rankings, relevant = run
    cuts = ",".join(map(str, KS))
    evaluator = pytrec_eval.RelevanceEvaluator(
        {f"q{i}": {f"d{row}": 1 for row in rows} for i, rows in enumerate(relevant)},
        {"map", f"ndcg_cut.{cuts}", f"recall.{cuts}", f"P.{cuts}", f"success.{cuts}", "recip_rank"},
    )
    results = evaluator.evaluate(
        {f"q{i}": {f"d{row}": 1000.0 - rank for rank, row in enumerate(r) if row >= 0} for i, r in enumerate(rankings)}
    )
    values = compute_metrics(rankings, relevant, KS)
    names = {"map": "map", f"mrr@{rankings.shape[1]}": "recip_rank"}
    values |= compute_metrics(rankings, relevant, (rankings.shape[1],))
    for k in KS:
        names |= {f"ndcg@{k}": f"ndcg_cut_{k}", f"recall@{k}": f"recall_{k}"}
        names |= {f"precision@{k}": f"P_{k}", f"accuracy@{k}": f"success_{k}"}
    for ours, theirs in names.items():
        wanted = [results.get(f"q{i}", {}).get(theirs, 0.0) for i in range(len(rankings))]
        assert np.allclose(values[ours], wanted, atol=1e-9), ours


@pytest.mark.slow  # ranx compiles its metrics for half a minute
def test_equal_to_ranx(run):
    ranx = pytest.importorskip("ranx")
    rankings, relevant = run
    rankings, relevant = rankings[11:], relevant[11:]
    values = compute_metrics(rankings, relevant, KS)
    qrels = ranx.Qrels({f"q{i}": {f"d{row}": 1 for row in rows} for i, rows in enumerate(relevant)})
    found = ranx.Run(
        {f"q{i}": {f"d{row}": 1000.0 - rank for rank, row in enumerate(r) if row >= 0} for i, r in enumerate(rankings)}
    )
    names = {"map": "map"} | {
        f"{a}@{k}": f"{b}@{k}"
        for k in KS
        for a, b in (
            ("ndcg", "ndcg"),
            ("mrr", "mrr"),
            ("recall", "recall"),
            ("precision", "precision"),
            ("accuracy", "hit_rate"),
        )
    }
    theirs = ranx.evaluate(qrels, found, list(names.values()))
    for ours, name in names.items():
        assert values[ours].mean() == pytest.approx(theirs[name], abs=1e-9), ours


class _Lookup:
    """Stands where a SentenceTransformer would: it looks vectors up."""

    similarity_fn_name = "cosine"

    def __init__(self, table):
        self.table = table

    def encode_query(self, texts, **_):
        import torch

        return torch.tensor(np.array([self.table[text] for text in texts]))

    encode_document = encode = encode_query


@pytest.mark.parametrize("chunk", [7, 50_000])
def test_equal_to_sentence_transformers_with_duplicates_and_ties(chunk):
    """One-hot-like vectors: exact arithmetic, many equal scores, ids in corpus order, any chunk size."""
    from sentence_transformers.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    rng = np.random.default_rng(5)
    corpus = np.zeros((150, 32), np.float32)
    corpus[np.arange(150)[:, None], rng.integers(0, 8, (150, 4)) * 4 + np.arange(4)] = 0.5  # norm 1, scores in 1/4s
    queries = corpus[rng.choice(150, 60)]
    relevant = [sorted(set(rng.integers(0, 150, rng.integers(1, 5)).tolist())) for _ in range(60)]
    rows, scores = find_top_k(queries, corpus, 100, chunk=chunk)
    assert (np.diff(scores, axis=1) == 0).mean() > 0.8  # the data is mostly ties
    ks = [1, 3, 10]
    evaluator = InformationRetrievalEvaluator(
        {f"q{i:03}": f"q{i}" for i in range(60)},
        {f"d{i:03}": f"d{i}" for i in range(150)},
        {f"q{i:03}": {f"d{row:03}" for row in rows} for i, rows in enumerate(relevant)},
        corpus_chunk_size=chunk,
        mrr_at_k=ks,
        ndcg_at_k=ks,
        accuracy_at_k=ks,
        precision_recall_at_k=ks,
        map_at_k=[100],
        score_functions={"cosine": cos_sim},
        write_csv=False,
    )
    table = {f"q{i}": v for i, v in enumerate(queries)} | {f"d{i}": v for i, v in enumerate(corpus)}
    theirs = evaluator.compute_metrices(_Lookup(table))["cosine"]
    ours = {name: column.mean() for name, column in compute_metrics(rows, relevant, ks).items()}
    assert ours["map"] == pytest.approx(theirs["map@k"][100], abs=1e-9)
    for k in ks:
        for name in ("ndcg", "mrr", "accuracy", "precision", "recall"):
            assert ours[f"{name}@{k}"] == pytest.approx(theirs[f"{name}@k"][k], abs=1e-9), (name, k)


def test_recall_curve_holds_every_recall(run):
    rankings, relevant = run
    curve, values = measure_recall_curve(rankings, relevant), compute_metrics(rankings, relevant, KS)
    for k in KS:
        assert (curve[:, k - 1] == values[f"recall@{k}"]).all()


def test_a_cut_off_beyond_the_ranking_counts_missing_ranks_as_nothing():
    values = compute_metrics(np.array([[0, 1]]), [[1]], ks=(2, 50))
    assert values["recall@50"] == values["recall@2"] == 1 and values["precision@50"] == 1 / 50


def test_clear_errors():
    with pytest.raises(ValueError, match="query 1 has no relevant text"):
        compute_metrics(np.array([[0], [1]]), [[0], []])
    with pytest.raises(ValueError, match="ranking of query 1 lists corpus row 4 more than once"):
        mark_hits(np.array([[0, -1, -1], [4, 2, 4]]), [[0], [1]])
    with pytest.raises(ValueError, match="do not fit 1 lists"):
        compute_metrics(np.array([[0], [1]]), [[0]])
    with pytest.raises(ValueError, match="at least 1, not 0"):
        compute_metrics(np.array([[0]]), [[0]], ks=(0, 10))
