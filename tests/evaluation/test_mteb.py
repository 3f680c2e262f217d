"""mteb runs a model that koret saved, unchanged and with its prompts, and gets koret's nDCG@10."""

import numpy as np
import pytest
from evaluation_examples import build_tiny_encoder

from koret.evaluation.evaluator import Evaluator
from koret.evaluation.tasks import build_task

mteb = pytest.importorskip("mteb")


def _make_mteb_task(task):
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="KoretLocal", description="a task of the test", reference=None, type="Retrieval", category="t2t",
            dataset={"path": "none", "revision": "1"}, eval_splits=["test"], eval_langs=["kor-Hang"],
            main_score="ndcg_at_10", date=None, domains=None, task_subtypes=None, license=None,
            annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, *args, **options):
            relevant = {
                query: {task.corpus_ids[row]: 1 for row in rows}
                for query, rows in zip(task.query_ids, task.relevant, strict=True)
            }
            corpus = Dataset.from_dict({"id": task.corpus_ids, "text": task.corpus, "title": [""] * len(task.corpus)})
            queries = Dataset.from_dict({"id": task.query_ids, "text": task.queries})
            split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return LocalRetrieval()


@pytest.mark.filterwarnings("ignore")  # mteb's own, about names it does not know
def test_mteb_gets_the_same_ndcg(dataset, tmp_path):
    from sentence_transformers import SentenceTransformer

    task = build_task(dataset, np.arange(dataset.questions.num_rows), np.arange(dataset.passages.num_rows), "passage")
    encoder = build_tiny_encoder(tmp_path / "tiny")
    encoder.save(tmp_path / "saved")
    ours = Evaluator(task).score(encoder)
    assert len(np.unique(ours.similarities[0])) == len(task.corpus)  # no ties, which mteb breaks the other way round
    result = mteb.evaluate(
        SentenceTransformer(str(tmp_path / "saved"), device="cpu"), _make_mteb_task(task), cache=None,
        overwrite_strategy="always", co2_tracker=False, show_progress_bar=False,
    )  # fmt: skip
    scores = result.task_results[0].scores["test"][0]
    assert 0.1 < ours.metrics["ndcg@10"] < 0.9
    assert scores["ndcg_at_10"] == pytest.approx(ours.metrics["ndcg@10"], abs=1e-5)
    assert scores["recall_at_10"] == pytest.approx(ours.metrics["recall@10"], abs=1e-5)
    # the prompts count: without them mteb would have found other vectors
    encoder.prefixes = {"query": "", "passage": ""}
    assert Evaluator(task).score(encoder).metrics["ndcg@10"] != pytest.approx(ours.metrics["ndcg@10"], abs=1e-4)
