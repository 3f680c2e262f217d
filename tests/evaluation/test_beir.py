"""BEIR folders: what is read, what is left out and said, what is refused."""

import json

import numpy as np
import pytest

from koret.evaluation.beir import read_beir


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "panel"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": "제목" if i else "", "text": f"글 {i}"} for i in range(4)]
    queries = [{"_id": f"q{i}", "text": f"질문 {i}"} for i in range(5)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td1\t1\nq0\td3\t2\nq1\td0\t1\nq2\td2\t0\nq3\td9\t1\nq9\td1\t1\n"
    )
    return folder


def test_reads_judgements_and_lists_what_it_leaves_out(folder):
    task = read_beir(folder)
    assert task.name == "panel" and task.corpus == ["글 0", "제목 글 1", "제목 글 2", "제목 글 3"]
    assert task.query_ids == ["q0", "q1"] and [rows.tolist() for rows in task.relevant] == [[1, 3], [0]]
    assert task.excluded == [("q2", "no relevant text"), ("q3", "no relevant text")]  # q4 belongs to no judgement
    assert task.notes == [
        "1 judgements of test.tsv name query ids that do not exist (q9); left out",
        "1 judgements of test.tsv name corpus ids that do not exist (d9); left out",
        "1 judgements have grades above 1; relevance counts as yes or no",
    ]
    assert np.array_equal(task.groups, [0, 1]) and not task.has_articles


def test_split_is_named_or_found(folder):
    (folder / "qrels" / "dev.tsv").write_text("q1\td1\t1\n")
    assert len(read_beir(folder).queries) == 2
    assert len(read_beir(folder, "dev").queries) == 1
    with pytest.raises(FileNotFoundError, match="has no train.tsv; it has: dev, test"):
        read_beir(folder, "train")
    (folder / "qrels" / "test.tsv").unlink()
    assert len(read_beir(folder).queries) == 1
    (folder / "qrels" / "dev.tsv").rename(folder / "qrels" / "mine.tsv")
    assert len(read_beir(folder).queries) == 1


@pytest.mark.parametrize(
    "file,content,message",
    [
        ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{broken\n', "corpus.jsonl, line 2 is not JSON"),
        ("corpus.jsonl", "", "the corpus is empty"),
        ("corpus.jsonl", "[1]\n", "line 1 must be an object with _id and text, not list"),
        (
            "corpus.jsonl",
            '{"_id": 1, "text": "x"}\n\n{"_id": "1", "text": "x"}\n',
            "corpus.jsonl, line 3 has the _id '1' of a line before it",
        ),
        ("queries.jsonl", '{"_id": "q", "text": "x"}\n' * 2, "queries.jsonl, line 2 has the _id 'q' of a line before"),
        ("queries.jsonl", '{"text": "x"}\n', "queries.jsonl, line 1 has no _id"),
        ("queries.jsonl", '{"_id": "q0"}\n', "queries.jsonl, line 1 has no text"),
        ("qrels/test.tsv", "q0\td1\n", "test.tsv, line 1 must be query-id, corpus-id, score"),
        ("qrels/test.tsv", "q0\td1\t1\nq1 d0 1\n", "test.tsv, line 2 must be query-id, corpus-id, score"),
        ("qrels/test.tsv", "q0\td1\tyes\n", "test.tsv, line 1 must be"),
        ("qrels/test.tsv", "q0\td7\t1\n", r"no query can be scored \(1 with no relevant text\)"),
    ],
)
def test_faults_name_file_and_line(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_beir(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: a BEIR folder has"):
        read_beir(tmp_path / "nowhere")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="queries.jsonl does not exist"):
        read_beir(folder)
