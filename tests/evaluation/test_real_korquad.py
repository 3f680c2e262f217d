"""On real KorQuAD 1.0: known counts, the published level of BM25, and a set that leaks into itself."""

import numpy as np
import pytest

from koret.data.loader import load_dataset
from koret.evaluation.audit import audit_overlap, take_evaluated, take_training
from koret.evaluation.evaluator import Evaluator
from koret.evaluation.tasks import build_task


@pytest.fixture(scope="module")
def korquad(shared_data):
    return load_dataset(shared_data / "KorQuAD_v1.0_dev.json", num_workers=0, progress=False)


def test_bm25_bigrams_reach_their_known_level(korquad):
    task = build_task(korquad, np.arange(korquad.questions.num_rows), np.arange(korquad.passages.num_rows), "passage")
    assert len(task.corpus) == 961 and len(task.queries) == 5764 and not task.excluded
    scores = Evaluator(task).score_lexical("bigram")
    assert scores.metrics["ndcg@10"] == pytest.approx(0.949, abs=0.003)
    assert scores.metrics["recall@10"] == pytest.approx(0.992, abs=0.003)
    interval = scores.measure_intervals(task.groups)["ndcg@10"]
    assert 0.93 < interval.low < interval.mean < interval.high < 0.965


def test_training_on_what_is_asked_is_found_out(korquad):
    articles = np.arange(korquad.articles.num_rows)
    audit = audit_overlap(take_training(korquad, articles[:100]), [take_evaluated(korquad, articles[95:])])
    found = {finding.what: finding for finding in audit.findings}
    assert not audit.clean and found["titles"].same == 5
    assert 20 < found["passages"].same < 60 and found["passages"].checked > 250
