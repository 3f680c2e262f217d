"""Corpora of every kind become documents with ids of their own, cut as in training; what is lost is told."""

from __future__ import annotations

import json
import unicodedata
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from koret.data.korquad import Reject
from koret.data.loader import load_dataset
from koret.data.passages import estimate_tokens, join_heading
from koret.data.sources import DataError
from koret.retrieval.corpus import Document, cut_document, read_corpus

TEXT = "서울은 대한민국의 수도이다."


def write_lines(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def split(path) -> tuple[list[Document], list[Reject]]:
    found = list(read_corpus(path))
    return [f for f in found if isinstance(f, Document)], [f for f in found if isinstance(f, Reject)]


def test_the_sample_is_cut_as_in_training():
    dataset = load_dataset("sample", max_seq_length=128, num_workers=0)
    columns = dataset.passages.column("heading").to_pylist(), dataset.passages.column("text").to_pylist()
    documents, rejects = split("sample")
    entries = [e for d in documents for e in cut_document(d, 128, estimate_tokens)[0]]
    trained = [join_heading(*pair) for pair in zip(*columns, strict=True)]
    assert [join_heading(e.heading, e.text) for e in entries] == trained
    assert len({d.id for d in documents}) == len(documents) == dataset.articles.num_rows and not rejects
    assert len({e.id for e in entries}) == len(entries)


def test_korquad_1_paragraphs_stay_whole_unless_too_long(tmp_path):
    long = "아주 긴 문단이다. " * 100
    data = {"data": [{"title": "서울", "paragraphs": [{"context": TEXT, "qas": []}, {"context": long, "qas": []}]}]}
    (tmp_path / "k.json").write_text(json.dumps(data, ensure_ascii=False))
    (document,), _ = split(tmp_path / "k.json")
    assert document.id == "서울"
    entries, cut = cut_document(document, 64, estimate_tokens)
    assert cut == 1 and entries[0].text == TEXT and entries[0].heading == "" and len(entries) > 3
    assert [e.id for e in entries] == [f"서울#{i}" for i in range(1, len(entries) + 1)]
    assert "".join("".join(e.text for e in entries[1:]).split()) == "".join(long.split())


def test_records_bring_their_metadata(tmp_path):
    record = {"id": 7, "title": "서울", "text": TEXT, "year": 1994, "kind": "도시", "open": True}
    (document,), _ = split(write_lines(tmp_path / "a.jsonl", {**record, "list": [1], "none": None}))
    assert (document.id, document.title, document.texts) == ("7", "서울", (TEXT,))
    assert document.metadata == {"title": "서울", "year": 1994, "kind": "도시", "open": True}
    (tmp_path / "a.csv").write_text(f"id,title,text,year,kind,open\n7,서울,{TEXT},1994,도시,true\n")
    (tabled,), _ = split(tmp_path / "a.csv")
    assert tabled == document and tabled.version == document.version
    columns = {"id": [7], "title": ["서울"], "text": [TEXT], "year": [1994], "kind": ["도시"], "open": [True]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert split(tmp_path / "a.parquet")[0] == [document]


def test_another_name_of_a_field_that_is_taken_is_metadata(tmp_path):
    record = {
        "id": "a",
        "doc_id": "b",
        "title": "서울",
        "article": "수도",
        "text": TEXT,
        "context": "짧은 글",
        "body": "",
    }
    (document,), _ = split(write_lines(tmp_path / "a.jsonl", record))
    assert (document.id, document.title, document.texts) == ("a", "서울", (TEXT,))
    assert document.metadata == {"title": "서울", "doc_id": "b", "article": "수도", "context": "짧은 글"}


def test_table_cells_that_look_like_numbers_lose_nothing(tmp_path):
    (tmp_path / "a.csv").write_text(f"id,text,code,odd,발행 연도\n001,{TEXT},007,1_990,1990\n")
    (document,), _ = split(tmp_path / "a.csv")
    assert document.id == "001" and document.metadata == {"code": "007", "odd": "1_990", "발행 연도": 1990}


def test_numbers_that_are_not_finite_are_missing(tmp_path):
    columns = {"id": ["a", "b"], "text": [TEXT, "글"], "score": [float("nan"), 1.5], "far": [float("inf"), 2.0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert [d.metadata for d in split(tmp_path / "a.parquet")[0]] == [{}, {"score": 1.5, "far": 2.0}]


def test_the_title_of_a_page_is_decoded_once_and_normal(tmp_path):
    title = unicodedata.normalize("NFD", "센터")
    (tmp_path / "a.html").write_text(f"<title>R&amp;D&nbsp;{title} &lt;b&gt; &amp;lt;</title><p>{TEXT}</p>")
    (document,), _ = split(tmp_path / "a.html")
    assert document.title == document.metadata["title"] == "R&D 센터 <b> &lt;"
    (entry,), _ = cut_document(document, 64, estimate_tokens)
    assert entry.heading == document.title and entry.text == TEXT


def test_a_changed_field_changes_the_version(tmp_path):
    base = {"id": "a", "title": "t", "text": TEXT, "year": 1}
    versions = set()
    for change in ({}, {"title": "u"}, {"text": TEXT + "."}, {"year": 2}):
        versions.add(split(write_lines(tmp_path / "a.jsonl", {**base, **change}))[0][0].version)
    assert len(versions) == 4


def test_duplicates_and_broken_records_are_told_with_their_place(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"id": "a", "text": TEXT}, {"id": "a", "text": "다른 글"}, {"id": "b"}, {"id": "c", "text": " "},
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + b"{broken\n[1]\n")
    documents, rejects = split(path)
    assert [d.id for d in documents] == ["a"] and documents[0].texts == (TEXT,)
    assert [(r.source, r.position, r.id) for r in rejects] == [
        ("a.jsonl", 2, "a"), ("a.jsonl", 3, "b"), ("a.jsonl", 4, "c"), ("a.jsonl", 5, ""), ("a.jsonl", 6, ""),
    ]  # fmt: skip
    assert "came before" in rejects[0].reason and "text" in rejects[1].reason and "JSON" in rejects[3].reason


def test_an_id_is_known_across_the_files_of_a_folder(tmp_path):
    write_lines(tmp_path / "1.jsonl", {"id": "a", "text": TEXT})
    write_lines(tmp_path / "2.jsonl", {"id": "a", "text": TEXT}, {"id": "b", "text": TEXT})
    documents, (reject,) = split(tmp_path)
    assert [d.id for d in documents] == ["a", "b"] and (reject.source, reject.position) == ("2.jsonl", 1)


def test_records_without_ids_go_by_title_then_by_place(tmp_path):
    records = [{"title": "서울", "text": TEXT}, {"title": "서울", "text": "동명의 글"}, {"text": "제목 없는 글"}]
    documents, (reject,) = split(write_lines(tmp_path / "a.jsonl", *records, records[0]))
    assert [d.id for d in documents] == ["서울", "서울 (2)", "a.jsonl:3"]
    assert reject.position == 4 and "same document" in reject.reason


def test_training_pairs_give_their_passages(tmp_path):
    pairs = [{"query": f"{text}?", "positive": text, "article": "서울"} for text in (TEXT, "한강")]
    (document,), _ = split(write_lines(tmp_path / "a.jsonl", *pairs))
    assert document.id == "서울" and document.texts == (TEXT, "한강")


def test_beir_gives_its_corpus(tmp_path):
    write_lines(tmp_path / "corpus.jsonl", {"_id": "d1", "title": "서울", "text": TEXT}, {"_id": "d2", "text": "부산"})
    write_lines(tmp_path / "queries.jsonl", {"_id": "q", "text": "수도?"})
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n")
    documents, rejects = split(tmp_path)
    assert [d.id for d in documents] == ["d1", "d2"] and not rejects
    ((entry,), _) = cut_document(documents[0], 64, estimate_tokens)
    assert join_heading(entry.heading, entry.text) == f"서울\n{TEXT}"


def test_a_folder_of_documents(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("숨은 것")
    (tmp_path / "a.md").write_text(f"# 서울\n\n{TEXT}\n\n## 한강\n\n{'한강은 흐른다. ' * 30}")
    page = f"<html><title>부산 </title><body><h2>바다</h2><p>{TEXT}</p></body></html>"
    (tmp_path / "sub" / "b.html").write_text(page)
    (tmp_path / "c.txt").write_text("﻿그냥 글")
    (tmp_path / "d.txt").write_bytes("한글".encode("cp949"))
    documents, (reject,) = split(tmp_path)
    assert [(d.id, d.title) for d in documents] == [("a.md", "서울"), ("c.txt", "c"), ("sub/b.html", "부산")]
    assert reject.source == "d.txt" and "UTF-8" in reject.reason
    headings = [e.heading for e in cut_document(documents[0], 64, estimate_tokens)[0]]
    assert headings[0] == "서울" and set(headings[1:]) == {"서울 > 한강"}
    ((page,), _) = cut_document(documents[2], 64, estimate_tokens)
    assert page.heading == "부산 > 바다" and page.text == TEXT


def test_zip_and_single_documents(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("d.jsonl", json.dumps({"id": "x", "text": TEXT}))
    assert [d.id for d in split(tmp_path / "a.zip")[0]] == ["x"]
    (tmp_path / "one.txt").write_text(TEXT)
    assert [d.id for d in split(tmp_path / "one.txt")[0]] == ["one.txt"]


def test_notes_beside_data_are_no_documents(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"id": "a", "text": TEXT})
    (tmp_path / "README.md").write_text("설명")
    (tmp_path / "b.txt").write_text("글")
    assert [d.id for d in split(tmp_path)[0]] == ["a", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name,year\nx,1\n", "column named text"),
        ("a.json", '{"data": [', "a.json"),
        ("a.jsonl", "글".encode("cp949") + b"\n", "UTF-8"),
        ("a.parquet", "no table", "Parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        split(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="nothing to index"):
        split(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such"):
        split(tmp_path / "gone")


def test_real_korquad(shared_data):
    documents, rejects = split(shared_data / "KorQuAD_v1.0_dev.json")
    assert len(documents) == 140 and sum(len(d.texts) for d in documents) == 964 and not rejects
