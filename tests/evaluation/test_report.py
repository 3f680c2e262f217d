"""A whole evaluation on the small data set: the report, its tables, files and pages."""

import json
import re
import shutil

import numpy as np
import pytest
from evaluation_examples import HashEncoder
from rich.console import Console

from koret.evaluation.evaluator import Remembering, evaluate
from koret.evaluation.metrics import PRIMARY, compute_metrics
from koret.evaluation.model_card import format_model_card
from koret.evaluation.outputs import save_report, save_trec
from koret.evaluation.report import EvaluationReport, build_section
from koret.evaluation.tables import format_report, print_report


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    """A BEIR set whose texts share all their words; its questions are pieces of them."""
    folder = tmp_path_factory.mktemp("beir") / "panel"
    (folder / "qrels").mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = [f"낱말{i}" for i in range(60)]
    texts = [" ".join(rng.choice(words, 8)) for _ in range(40)]
    lines = [json.dumps({"_id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": f"q{i}", "text": " ".join(text.split()[2:7])}) for i, text in enumerate(texts)]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    (folder / "qrels" / "test.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(40)))
    return folder


FUSIONS = ["tuned + BM25 (RRF)", "tuned + BM25 (learned)"]


class Forgetful(HashEncoder):
    """Good at home, blind to texts made of 낱말."""

    def encode(self, texts, kind, *, progress=False):
        return super().encode([text.replace("낱말", "").translate({ord(c): "1" for c in "0123456789"})
                               if "낱말" in text else text for text in texts], kind)  # fmt: skip


@pytest.fixture
def report(dataset, weak_encoder, panel):
    model = Forgetful("tuned model")
    return evaluate(model, dataset, baseline=weak_encoder, extra=[panel], probes=True, bm25=["bigram"])


def _print(renderable, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(renderable)
    return console.export_text()


def test_better_here_and_worse_elsewhere_is_said_aloud(report):
    assert report.sections[0].verdict.verdict == "better"
    assert report.extra[0].verdict.verdict == "worse"
    assert report.verdict == "mixed"
    assert "But it got WORSE on panel (-0." in report.conclusion


def test_every_system_and_task_is_there(report):
    passage, answer = report.sections
    assert [row.role for row in passage.rows] == ["base", "model", "lexical", "fusion", "fusion"]
    assert [row.system for row in passage.rows] == ["base", "tuned", "BM25 bigrams", *FUSIONS]
    assert (passage.task.name, answer.task.name) == ("question → passage", "question → answer")
    assert passage.strongest == "BM25 bigrams" and passage.lexical.task == passage.task.name
    assert any("BM25 bigrams" in line for line in passage.lines)
    assert passage.slices and passage.probes and not answer.slices
    row = passage.rows[1]
    assert row.metrics["ndcg@10"].low <= row.metrics["ndcg@10"].mean <= row.metrics["ndcg@10"].high
    assert row.curve[10].mean == pytest.approx(row.metrics["recall@10"].mean)
    assert report.audit.clean is None and report.cleanness == (
        "What tuned model was trained on is not known here, so these numbers cannot be called clean (no leakage audit)."
    )
    assert set(report.seconds) == {"loading", "encoding", "rest"}


def test_terminal_fits_a_hundred_columns(report):
    text = _print(format_report(report))
    assert all(len(line) <= 100 for line in text.splitlines())
    for part in ("nDCG@10", "tuned - base", "MIXED", "whole articles", "by slice", "decomposed jamo (NFD)", "panel"):
        assert part in text, part
    assert "…" not in re.sub(r"[+-]?\.\d+…|\+?-?1\.000…", "", text)  # no cell was cut
    assert "설악산-3" in text  # the question that cannot be scored is named
    short = _print(format_report(report, slices=False))
    assert "by slice" not in short and "MIXED" in short
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    print_report(report, console)
    assert console.export_text() == text


def test_json_is_whole_and_valid(report):
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False, ensure_ascii=False))
    assert record["verdict"] == "mixed" and record["clean"] is None
    first = record["tasks"][0]
    assert first["verdict"]["difference"] == pytest.approx(report.sections[0].gaps["ndcg@10"].mean)
    assert {e["query"] for e in first["task"]["excluded"]} == {"설악산-3", "북한산-3"}
    assert set(first["differences"]) == set(PRIMARY)
    assert len(first["systems"]) == 5 and first["systems"][0]["recall_curve"]["1"]["mean"] >= 0


def test_files_and_one_page_with_everything_in_it_escaped(report, tmp_path):
    report.sections[0].task.queries[0] = '<script>alert("x")</script>'
    for probe in report.sections[0].probes:
        probe.examples[:] = [("<b>", "&")]
    files = save_report(report, tmp_path / "out")
    assert all(file.is_file() and file.stat().st_size for file in files)
    names = {file.name for file in files}
    assert {"report.json", "report.html", "queries-question-passage.jsonl", "recall-question-passage.svg",
            "slices-question-passage.png", "moves-question-passage.png", "scores-panel.png"} <= names  # fmt: skip
    lines = (tmp_path / "out" / "queries-question-passage.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 30 and set(records[0]["systems"]) == {row.system for row in report.sections[0].rows}
    tuned = report.sections[0].find_scores("model")
    assert [r["systems"]["tuned"]["ndcg@10"] for r in records] == pytest.approx(tuned.per_query["ndcg@10"], abs=1e-6)

    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;b&gt;" in page
    assert "http" not in page and "//" not in re.sub(r"data:image/png;base64,[^\"]*", "", page).replace("<!--", "")
    assert page.count("<svg") == page.count("</svg>") == sum(name.endswith(".svg") for name in names) == 10
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(ids)


def _copy_panel(panel, *places):
    for place in places:
        shutil.copytree(panel, place)
    return places


def test_extra_sets_of_one_name_keep_names_files_and_pictures_apart(dataset, encoder, panel, tmp_path):
    same = _copy_panel(panel, tmp_path / "ko" / "set", tmp_path / "en" / "set")
    alike = _copy_panel(panel, tmp_path / "Москва", tmp_path / "Ωμέγα", tmp_path / "task-2")
    report = evaluate(encoder, dataset, baseline=encoder, bm25=["bigram"], kinds=["passage"], extra=[*same, *alike])
    assert [s.task.name for s in report.extra] == ["set", "set #2", "Москва", "Ωμέγα", "task-2"]
    assert [s.verdict.task for s in report.extra] == [s.task.name for s in report.extra]
    files = save_report(report, tmp_path / "out")
    assert len({*files}) == len(files) == len(list((tmp_path / "out").iterdir()))
    names = {file.name for file in files if file.name.startswith("queries-")}
    assert names == {
        f"queries-{name}.jsonl" for name in ("question-passage", "set", "set-2", "task", "task-3", "task-2")
    }
    assert len({*save_trec(report, tmp_path / "trec")}) == len(list((tmp_path / "trec").iterdir())) == 6 * 6
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(page.count(f'aria-label="scores: {s.task.name}"') == 1 for s in (*report.sections, *report.extra))


def test_trec_files_give_trec_eval_the_same_numbers(report, tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    files = {file.name: file for file in save_trec(report, tmp_path)}
    assert "question-passage-tuned-bm25-rrf.run" in files
    with open(files["question-passage.qrels"]) as lines:
        qrels = pytrec_eval.parse_qrel(lines)
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map", "recall.10"})
    for scores in report.sections[0].scores:
        name = re.sub("[^a-z0-9]+", "-", scores.system.lower()).strip("-")
        with open(files[f"question-passage-{name}.run"]) as lines:
            found = evaluator.evaluate(pytrec_eval.parse_run(lines))
        for ours, theirs in (("ndcg@10", "ndcg_cut_10"), ("map", "map"), ("recall@10", "recall_10")):
            mean = np.mean([found[query][theirs] if query in found else 0.0 for query in qrels])
            assert mean == pytest.approx(scores.metrics[ours], abs=1e-9), (scores.system, ours)


def test_trec_ties_keep_their_order(dataset, tmp_path):
    """Every vector is the same: all scores tie, and trec_eval would sort them by document id."""

    class Blind(HashEncoder):
        def encode(self, texts, kind, *, progress=False):
            return np.ones((len(texts), 4), np.float32) / 2

    report = evaluate(Blind(), dataset, bm25=False, kinds=["passage"])
    run = {file.suffix: file for file in save_trec(report, tmp_path)}[".run"]
    scores = [float(line.split()[4]) for line in run.read_text().splitlines()[:30]]
    assert scores == sorted(set(scores), reverse=True)
    ranking = compute_metrics(np.tile(np.arange(30), (30, 1)), report.sections[0].task.relevant)
    assert report.sections[0].scores[0].metrics["ndcg@10"] == pytest.approx(ranking["ndcg@10"].mean())


def test_model_card(report):
    config = {
        "model_name": "intfloat/multilingual-e5-small", "dataset_root": "/home/someone/KorQuAD_2.1", "batch_size": 16,
        "use_lora": True, "lora_target_modules": ["query"], "max_seq_length": 256, "learning_rate": 2e-5,
    }  # fmt: skip
    card = format_model_card(config, {"fingerprint": "abc", "training_articles": 40_000}, report, dimensions=384)
    assert card.startswith("---\nlanguage: ko\n") and "base_model: intfloat/multilingual-e5-small\n" in card
    for part in (
        "**Mixed.**", "CC BY-ND 2.0 KR", "| training articles | 40,000 |", "| source | KorQuAD_2.1 |",
        "SentenceTransformer(", "lora_weights", "| learning_rate | 2e-05 |", "## Limits", "| tuned - base |",
    ):  # fmt: skip
        assert part in card, part
    assert "/home/someone" not in card
    mean = report.sections[0].rows[1].metrics["ndcg@10"].mean
    assert f"| tuned | {mean:.3f} (" in card


def test_without_baseline_there_is_no_verdict(dataset, encoder):
    report = evaluate(encoder, dataset, kinds=["passage"], bm25=False)
    assert report.verdict == report.conclusion == "" and report.baseline is None
    assert report.to_dict()["verdict"] is None
    assert [row.system for row in report.sections[0].rows] == ["model"]
    assert "model" in _print(format_report(report))


def test_a_worse_model_is_called_worse(dataset, encoder, weak_encoder):
    report = evaluate(weak_encoder, dataset, baseline=encoder, bm25=["bigram"], kinds=["passage"])
    assert report.verdict == "worse" and report.conclusion.startswith("tuned is worse than base")
    assert "WORSE" in _print(format_report(report))


def test_scores_read_back_without_rankings_still_make_a_section(dataset, encoder, weak_encoder):
    """A training keeps the deciding metrics of the base only."""
    from koret.evaluation.scores import Scores

    whole = evaluate(encoder, dataset, baseline=weak_encoder, bm25=["bigram"], kinds=["passage"]).sections[0]
    base = whole.find_scores("base")
    kept = Scores("base", base.task, {n: base.per_query[n] for n in PRIMARY}, np.zeros((30, 0), int), np.zeros((30, 0)))
    section = build_section(whole.task, whole.find_scores("model"), kept, [whole.scores[2]])
    assert section.verdict == whole.verdict
    report = EvaluationReport("tuned", "base", {}, [section])
    assert "tuned - base" in _print(format_report(report))


def test_no_text_is_encoded_twice(encoder):
    remembering = Remembering(encoder)
    first = remembering.encode(["가나", "다라", "가나"], "passage")
    again = remembering.encode(["다라", "마바"], "passage")
    assert encoder.encoded == [("passage", 2), ("passage", 1)]
    assert (first[0] == first[2]).all() and (first[1] == again[0]).all()
    remembering.encode(["가나"], "query")
    assert encoder.encoded[-1] == ("query", 1) and remembering.encode([], "query").shape == (0, 256)
