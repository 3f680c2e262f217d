"""A prepared data set holds every record exactly once, in any number of processes, and is rebuilt when it must be."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from koret.data import assemble, loader
from koret.data.keys import normalize_answer, text_key
from koret.data.korquad import Article, read_articles
from koret.data.loader import format_report, load_dataset
from koret.data.markup import clean_html_text
from koret.data.pairs import build_pairs
from koret.data.prepare import Settings, prepare_source, shard_path
from koret.data.sources import DataError, find_sources
from koret.data.tables import TableWriter
from koret.evaluation.tasks import build_task


def make_page(number, sentences=60, answer=None, **question):
    answer = answer or f"답{number}"
    body = "".join(f"<p>{number}번 글의 {i}번째 <a>문장</a>이다.</p>\n" for i in range(sentences))
    context = (
        f"<html><body><h2>절</h2>{body}<table><tr><th>이름</th><td><b>{answer}</b></td></tr></table></body></html>"
    )
    place = {"text": f"<b>{answer}</b>", "answer_start": context.index(f"<b>{answer}</b>")}
    asked = {"question": f"{number}번은 무엇인가?", "id": str(number), "answer": place, **question}
    return {"title": f"글 {number}", "url": "", "context": context, "raw_html": "<p>x</p>", "qas": [asked]}


def write(path, data, version="KorQuAD_2.1_train"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": version, "data": data}), encoding="utf-8")
    return path


@pytest.fixture
def official(tmp_path):
    """Nine files in three folders, as the official archives unpack."""
    root = tmp_path / "KorQuAD_2.1"
    for number in range(9):
        folder = root / f"KorQuAD_2.1_train_{number // 3:02d}"
        write(folder / f"korquad2.1_train_{number:02d}.json", [make_page(10 * number + i) for i in range(4)])
    return root


def load(path, cache, **options):
    return load_dataset(path, cache_dir=cache, **{"num_workers": 0, "progress": False, **options})


def check_whole(dataset):
    """Everything that must hold for any prepared data set."""
    report = dataset.report
    for kind, rows in (("articles", dataset.articles), ("questions", dataset.questions)):
        assert report[kind]["seen"] == report[kind]["kept"] + report[kind]["rejected"]
        assert report[kind]["kept"] == rows.num_rows
        assert all(sum(s[kind][state] for s in report["sources"]) == report[kind][state] for state in report[kind])
    rejects = [json.loads(line) for line in open(dataset.directory / "rejects.jsonl", encoding="utf-8")]
    assert sum(line["questions"] for line in rejects) == report["questions"]["rejected"]
    assert all(line["reason"] and line["file"] for line in rejects)
    assert dataset.articles.schema == loader.ARTICLES and dataset.questions.schema == loader.QUESTIONS
    assert dataset.passages.schema == loader.PASSAGES
    articles, passages = dataset.articles.to_pylist(), dataset.passages.to_pylist()
    expected = 0
    for number, article in enumerate(articles):
        assert article["first_passage"] == expected
        rows = range(expected, expected + article["passage_count"])
        assert all(passages[row]["article"] == number for row in rows)
        expected += article["passage_count"]
    assert expected == len(passages)
    assert all(row["text_key"] == text_key(row["text"]) for row in passages)
    for row in dataset.questions.to_pylist():
        assert row["gold"] and row["best"] in row["gold"] and set(row["gold"]) <= set(row["known"])
        assert row["gold"] == sorted(row["gold"]) and row["known"] == sorted(row["known"])
        assert {passages[i]["article"] for i in (*row["known"], *row["negatives"])} == {row["article"]}
        assert row["answers"] and row["answer_key"] == text_key(normalize_answer(row["answers"][0]))
        assert row["question_key"] == text_key(row["text"])
        assert row["answer_kind"] in ("short", "sentence", "list", "table")
    return rejects


class TestPreparing:
    def test_official_folders(self, official, tmp_path):
        dataset = load(official, tmp_path / "cache")
        assert not check_whole(dataset)
        assert dataset.report["format"] == "KorQuAD 2.1" and len(dataset.report["sources"]) == 9
        assert dataset.articles.column("title").to_pylist() == [f"글 {10 * n + i}" for n in range(9) for i in range(4)]
        assert "KorQuAD 2.1 train has 38,496 articles" in dataset.report["notes"][0]
        for row in dataset.questions.to_pylist():
            text = dataset.passages.column("text")[row["best"]].as_py()
            assert row["answers"][0] in text and row["answers"] == [f"답{row['id']}"]

    def test_totals_are_known_by_name_folder_or_version(self, tmp_path):
        write(tmp_path / "d" / "part 1.json", [make_page(1)])
        write(tmp_path / "d" / "KorQuAD_2.0_dev_00" / "01.json", [make_page(2)], version="")
        write(tmp_path / "d" / "mine.json", [make_page(3)], version="own")
        assert load(tmp_path / "d", tmp_path / "c").report["notes"] == [
            "KorQuAD 2.1 train has 38,496 articles and 83,486 questions, these files 1 and 1",
            "KorQuAD 2.0 dev has 4,736 articles and 10,165 questions, these files 1 and 1",
        ]

    def test_an_answer_that_no_passage_holds_is_counted(self, tmp_path):
        page = make_page(1, sentences=80)
        answer = page["context"][page["context"].index("<p>") : page["context"].rindex("</p>")]
        page["qas"][0]["answer"] = {"text": answer, "answer_start": page["context"].index(answer)}
        dataset = load(write(tmp_path / "a.json", [page, make_page(2)]), tmp_path / "c", passage_tokens=64)
        first, _ = dataset.questions.to_pylist()
        assert dataset.report["wide_answers"] == 1 and len(first["gold"]) > 10
        assert "1 answer that no passage holds whole" in format_report(dataset.report)

    def test_rows_do_not_depend_on_workers(self, official, tmp_path):
        alone = load(official, tmp_path / "a")
        together = load(official, tmp_path / "b", num_workers=2)
        assert alone.fingerprint == together.fingerprint
        for name in ("articles", "passages", "questions"):
            assert getattr(alone, name).equals(getattr(together, name))

    def test_zips_read_as_their_folders(self, official, tmp_path):
        packed = tmp_path / "zips"
        packed.mkdir()
        for folder in sorted(official.iterdir()):
            with zipfile.ZipFile(packed / f"{folder.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted(folder.iterdir()):
                    archive.write(file, file.name)
        folders, zips = load(official, tmp_path / "cache"), load(packed, tmp_path / "cache", num_workers=2)
        assert zips.questions.equals(folders.questions) and zips.passages.equals(folders.passages)
        assert zips.articles.column("source")[0].as_py() == "KorQuAD_2.1_train_00.zip!korquad2.1_train_00.json"

    def test_answers_are_where_the_clean_text_has_them(self, official, tmp_path):
        dataset = load(official, tmp_path / "cache", passage_tokens=64)
        pages = {
            a.title: a for f in sorted(official.rglob("*.json")) for a in read_articles(f) if isinstance(a, Article)
        }
        for row in dataset.questions.to_pylist():
            article = dataset.articles.slice(row["article"], 1).to_pylist()[0]
            text = clean_html_text(pages[article["title"]].contexts[0])
            assert text[row["answer_start"] : row["answer_end"]] == row["answers"][0]
            best = dataset.passages.slice(row["best"], 1).to_pylist()[0]
            assert best["start"] <= row["answer_start"] and row["answer_end"] <= best["end"]
            assert best["heading"].startswith(article["title"])

    def test_passages_are_the_same_whatever_is_asked(self, official, tmp_path):
        asked = load(official, tmp_path / "c", passage_tokens=64).passages
        for file in official.rglob("*.json"):
            whole = json.loads(file.read_text(encoding="utf-8"))
            for page in whole["data"]:
                start = page["context"].index("글의 3번째")  # another answer, in another passage
                page["qas"][0]["answer"] = {"text": "글의 3번째", "answer_start": start}
            file.write_text(json.dumps(whole), encoding="utf-8")
        assert load(official, tmp_path / "c", passage_tokens=64).passages.equals(asked)

    def test_smaller_budgets_make_more_passages(self, official, tmp_path):
        counts = [load(official, tmp_path / "c", passage_tokens=n).passages.num_rows for n in (64, 128, 512)]
        assert counts[0] > counts[1] > counts[2]

    def test_other_passages_with_the_answer_are_known(self, tmp_path):
        page = make_page(1, sentences=80, answer="문장이다")
        dataset = load(write(tmp_path / "a.json", [page]), tmp_path / "c", passage_tokens=64)
        [row] = dataset.questions.to_pylist()
        assert len(row["gold"]) == 1 and len(row["known"]) == dataset.passages.num_rows > 5
        short = load(
            write(tmp_path / "b.json", [make_page(1, sentences=80, answer="문")]), tmp_path / "c", passage_tokens=64
        )
        assert len(short.questions.to_pylist()[0]["known"]) == 1

    def test_answer_kinds(self, tmp_path):
        parts = {
            "table": "<table><tr><td>가</td><td>나</td></tr></table>",
            "list": "<ul><li>가</li><li>나</li></ul>",
            "sentence": "<p>이것은 제법 긴 문장으로 된 답이다.</p>",
            "short": "<td>332cm</td>",
        }
        context = "<html>" + "<p>사이</p>".join(parts.values()) + "</html>"
        qas = [
            {"id": kind, "question": "?", "answer": {"text": part, "answer_start": context.index(part)}}
            for kind, part in parts.items()
        ]
        path = write(tmp_path / "a.json", [{"title": "글", "context": context, "qas": qas}])
        rows = load(path, tmp_path / "c").questions.to_pylist()
        assert {row["id"]: row["answer_kind"] for row in rows} == {kind: kind for kind in parts}

    def test_korquad_1_keeps_every_question(self, shared_data, tmp_path):
        dataset = load(shared_data / "KorQuAD_v1.0_dev.json", tmp_path / "c")
        assert not check_whole(dataset)
        sizes = (dataset.articles.num_rows, dataset.passages.num_rows, dataset.questions.num_rows)
        assert sizes == (140, 964, 5774) and dataset.report["notes"] == []
        texts, answers = dataset.passages.column("text").to_pylist(), dataset.questions.to_pylist()
        assert all(texts[r["best"]][r["answer_start"] : r["answer_end"]] == r["answers"][0] for r in answers)

    def test_the_sample_is_whole(self, tmp_path):
        dataset = load("sample", tmp_path / "c")
        assert not check_whole(dataset)
        kinds = Counter(dataset.questions.column("answer_kind").to_pylist())
        assert set(kinds) == {"short", "sentence", "list", "table"}
        assert dataset.report["root"] == "sample" and dataset.report["moved_answers"] == 0


class TestBadRecords:
    def test_each_is_listed_with_its_reason(self, tmp_path):
        pages = [make_page(n) for n in range(12)]
        pages[1]["qas"][0]["answer"]["answer_start"] += 1  # found at its only occurrence
        pages[2]["qas"][0]["answer"] = {"text": "문장", "answer_start": 3}
        pages[3]["qas"][0]["answer"]["text"] = "없는 답"
        pages[4]["qas"][0]["answer"] = {"text": "</p>\n<p>", "answer_start": pages[4]["context"].index("</p>\n<p>")}
        pages[5]["qas"].append({"id": "x"})
        pages[6]["context"] = None
        dataset = load(write(tmp_path / "a.json", pages), tmp_path / "c")
        rejects = check_whole(dataset)
        assert {line["id"]: line["reason"].partition(":")[0] for line in rejects} == {
            "2": "answer_start is wrong or missing and the answer occurs more than once",
            "3": "the answer is not in the context",
            "4": "the answer is empty once cleaned",
            "x": "not a valid question",
            "": "neither 'context' nor 'paragraphs'",
        }
        assert all(line["article"].startswith("글") and line["position"] for line in rejects)
        assert dataset.report["moved_answers"] == 1
        assert "left out 1: the answer is not in the context" in format_report(dataset.report)

    def test_too_many_stop_the_run(self, tmp_path):
        pages = [make_page(n) for n in range(40)]
        for page in pages[:15]:
            page["qas"][0]["answer"]["text"] = "없는 답"
        path = write(tmp_path / "a.json", pages)
        with pytest.raises(
            DataError, match=r"15 of 40 records .* are bad(.|\n)*15 x the answer is not(.|\n)*a\.json, 글 0, 0"
        ):
            load(path, tmp_path / "c")
        with pytest.raises(DataError, match="more than the share of 0.3"):
            load(path, tmp_path / "c", max_bad=0.3)
        assert load(path, tmp_path / "c", max_bad=0.4).questions.num_rows == 25

    def test_a_few_pass_by_default_and_none_when_asked(self, tmp_path):
        pages = [make_page(n) for n in range(4)]
        pages[0]["qas"][0]["answer"] = None
        path = write(tmp_path / "a.json", pages)
        assert load(path, tmp_path / "c").questions.num_rows == 3
        with pytest.raises(DataError, match="1 of 4 records"):
            load(path, tmp_path / "c", max_bad=0.0)

    def test_nothing_usable(self, tmp_path):
        path = write(tmp_path / "a.json", [make_page(1, answer="x", question=" ")])
        with pytest.raises(DataError, match=r"no usable question in .*a\.json(.|\n)*empty question"):
            load(path, tmp_path / "c", max_bad=1.0)

    def test_duplicate_ids(self, tmp_path):
        first, second = tmp_path / "d" / "a.json", tmp_path / "d" / "b.json"
        write(first, [make_page(1), make_page(2), make_page(3)])
        write(second, [make_page(1), make_page(4, id="2"), make_page(5)])
        for workers in (0, 2):
            dataset = load(tmp_path / "d", tmp_path / f"c{workers}", num_workers=workers)
            assert [row["id"] for row in dataset.questions.to_pylist()] == ["1", "3", "5"]
            fields = ("file", "article", "id", "reason")
            assert sorted(tuple(line[field] for field in fields) for line in check_whole(dataset)) == [
                ("a.json", "글 2", "2", "duplicate id, conflicting"),
                ("b.json", "글 1", "1", "duplicate id, identical"),
                ("b.json", "글 4", "2", "duplicate id, conflicting"),
            ]

    @pytest.mark.parametrize("given", [{"answer": "세종"}, {}], ids=["with answer", "without"])
    def test_one_question_with_several_passages_keeps_them_all(self, tmp_path, given):
        asked = {"id": "q1", "query": "한글을 만든 임금은?", **given}
        first, second = "세종이 한글을 만들었다.", "임금 세종은 학자였다."
        rows = [
            asked | {"positive": first, "article": "한글"},
            asked | {"positive": second, "article": "조선"},
            asked | {"positive": first, "article": "한글"},
            asked | {"positive": first, "article": "한글", "negatives": ["거북선이다."]},
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        dataset = load(path, tmp_path / "c")
        [reject] = check_whole(dataset)
        assert (reject["id"], reject["article"], reject["reason"]) == ("q1", "한글", "duplicate id, identical")
        passages = dataset.passages.column("text").to_pylist()
        found = dataset.questions.to_pylist()
        assert sorted(passages[row["best"]] for row in found) == sorted([first, first, second])
        assert [[passages[i] for i in row["negatives"]] for row in found if row["negatives"]] == [["거북선이다."]]
        pairs = build_pairs(dataset, range(2))
        assert sorted(pairs.queries) == [asked["query"]] * 2
        assert all({pairs.texts[i] for i in pairs.known_of(row)} == {first, second} for row in range(2))
        task = build_task(dataset, range(dataset.questions.num_rows), range(len(passages)), "passage")
        assert task.query_ids == ["q1"] and {task.corpus[i] for i in task.relevant[0]} == {first, second}

    def test_other_answers_under_one_id_conflict(self, tmp_path):
        asked = {"id": "q1", "query": "임금은?", "positive": "세종과 태종"}
        rows = [asked | {"answer": "세종"}, asked | {"answer": "태종"}, {"query": "둘?", "positive": "둘"}]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        reasons = [line["reason"] for line in check_whole(load(path, tmp_path / "c"))]
        assert reasons == ["duplicate id, conflicting"] * 2

    def test_the_search_for_them_takes_little_memory(self, tmp_path):
        def measure(shards):
            tracemalloc.start()
            assert assemble._find_duplicates(tmp_path, range(shards)) == {}
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return peak

        for number in range(40):
            table = TableWriter(shard_path(tmp_path, number, "questions"), loader.QUESTIONS)
            for n in range(1000):
                table.append((f"{1000 * number + n}", "?", 0, ["답"], "short", [0], 0, [0], [], n, 10**18 + n, 0, 1))
            table.close()
        assert measure(40) < measure(20) + 20_000 * 60  # bytes a question: 8, and what sorting them takes

    def test_a_broken_file_stops_workers_and_leaves_nothing(self, official, tmp_path):
        broken = official / "KorQuAD_2.1_train_01" / "korquad2.1_train_04.json"
        broken.write_bytes(broken.read_bytes()[:-300])
        for workers in (0, 2):
            with pytest.raises(DataError, match=r"korquad2\.1_train_04\.json is cut off after 3 whole articles"):
                load(official, tmp_path / "cache", num_workers=workers)
        assert not list((tmp_path / "cache").rglob("*.arrow"))


class TestMemory:
    def test_does_not_grow_with_the_articles(self, tmp_path):
        """One article at a time is held, and a few megabytes of rows that wait to be written."""

        def measure(articles):
            pages = [make_page(number, 600) for number in range(articles)]
            for page in pages:
                page["raw_html"] = page["context"] * 5
            source = find_sources(write(tmp_path / f"{articles}.json", pages))[0][0]
            pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
            tracemalloc.start()
            pa.set_memory_pool(pool)
            try:
                assert prepare_source(source, Settings(page_tokens=64), tmp_path, 0).articles_kept == articles
            finally:
                pa.set_memory_pool(before)
            peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
            tracemalloc.stop()
            return peak, source.size

        (few, _), (many, size) = measure(40), measure(160)
        assert size > 40_000_000 and many < few + 4_000_000


class TestSecondStart:
    def test_is_immediate_and_the_same(self, official, tmp_path, monkeypatch):
        first = load(official, tmp_path / "cache")
        monkeypatch.setattr(loader, "_prepare", lambda *_: pytest.fail("prepared again"))
        second = load(official, tmp_path / "cache")
        assert second.fingerprint == first.fingerprint and second.report == first.report
        assert second.questions.equals(first.questions)
        assert pa.total_allocated_bytes() < 50_000_000

    @pytest.mark.parametrize(
        "change",
        [
            lambda root: os.utime(next(root.rglob("*.json")), ns=(1, 1)),
            lambda root: write(root / "new.json", [make_page(99)]),
            lambda root: next(root.rglob("*.json")).rename(root / "moved.json"),
        ],
    )
    def test_a_changed_file_rebuilds(self, official, tmp_path, change):
        first = load(official, tmp_path / "cache").directory
        change(official)
        assert load(official, tmp_path / "cache").directory != first

    def test_a_renamed_folder_of_documents_rebuilds(self, tmp_path):
        root = tmp_path / "docs"
        (root / "guid").mkdir(parents=True)
        (root / "guid" / "setup.md").write_text("# 설치\n\n세종은 왕이다.\n", encoding="utf-8")
        (root / "z.md").write_text("# 다른\n\n이순신은 장군이다.\n", encoding="utf-8")
        asked = [{"question": "왕은?", "file": "guide/setup.md"}, {"question": "장군은?", "file": "z.md"}]
        (root / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
        assert load(root, tmp_path / "c").questions.num_rows == 1
        (root / "guid").rename(root / "guide")
        dataset = load(root, tmp_path / "c")
        assert dataset.questions.num_rows == 2
        assert dataset.articles.column("source").to_pylist() == ["guide/setup.md", "z.md"]

    def test_names_of_documents_are_found_composed_and_decomposed(self, tmp_path):
        root = tmp_path / "docs"
        root.mkdir()
        for name, text in (("세종.md", "세종은 왕이다."), ("이순신.md", "이순신은 장군이다.")):
            (root / unicodedata.normalize("NFD", name)).write_text(f"# 글\n\n{text}\n", encoding="utf-8")
        asked = [
            {"id": None, "question": "왕은?", "file": "세종.md"},
            {"id": None, "question": "장군은?", "file": unicodedata.normalize("NFD", "이순신.md")},
        ]
        (root / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
        dataset = load(root, tmp_path / "c")
        assert dataset.questions.column("id").to_pylist() == ["questions.jsonl:1", "questions.jsonl:2"]
        assert dataset.articles.column("source").to_pylist() == ["세종.md", "이순신.md"]

    def test_half_a_character_in_a_list_within_a_cell_is_text(self, tmp_path):
        file = tmp_path / "pairs.csv"
        file.write_text('query,positive,answers\n질문?,글이다.,"[""하\\ud800나""]"\n', encoding="utf-8")
        (answers,) = load(file, tmp_path / "c").questions.column("answers").to_pylist()
        assert answers == ['["하\\ud800나"]']

    def test_changed_settings_rebuild(self, official, tmp_path):
        folders = {
            load(official, tmp_path / "c", **options).directory
            for options in ({}, {"passage_tokens": 100}, {"max_seq_length": 64}, {"overlap": 0.1}, {"strict": True})
        }
        assert len(folders) == 5

    def test_changed_code_rebuilds(self, official, tmp_path, monkeypatch):
        code = tmp_path / "data"
        shutil.copytree(Path(loader.__file__).parent, code, ignore=shutil.ignore_patterns("sample", "*.so"))
        monkeypatch.setattr(loader, "__file__", str(code / "loader.py"))
        folders = [load(official, tmp_path / "c").directory]
        for name in ("regions.py", "csrc/tags.c"):
            assert load(official, tmp_path / "c").directory == folders[-1]
            (code / name).write_text((code / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
            folders.append(load(official, tmp_path / "c").directory)
        assert len(set(folders)) == 3

    def test_the_fingerprint_follows_content_not_place(self, official, tmp_path):
        first = load(official, tmp_path / "a")
        os.utime(next(official.rglob("*.json")), ns=(1, 1))
        official.rename(tmp_path / "elsewhere")
        assert load(tmp_path / "elsewhere", tmp_path / "b").fingerprint == first.fingerprint
        write(tmp_path / "elsewhere" / "z.json", [make_page(77)])
        assert load(tmp_path / "elsewhere", tmp_path / "b").fingerprint != first.fingerprint

    def test_what_a_killed_run_left_is_cleared(self, official, tmp_path):
        first = load(official, tmp_path / "c")
        left = first.directory.with_name(f".staging-{first.directory.name}")
        first.directory.rename(left)
        (left / "shards").mkdir()
        (left / "shards" / "00000.passages.arrow").write_bytes(b"half")
        again = load(official, tmp_path / "c")
        assert again.fingerprint == first.fingerprint and not left.exists()
        assert {p.name for p in again.directory.iterdir()} == {
            "articles.arrow", "passages.arrow", "questions.arrow", "rejects.jsonl", "manifest.json",
        }  # fmt: skip

    def test_damage_is_noticed(self, official, tmp_path):
        first = load(official, tmp_path / "c")
        table = first.directory / "questions.arrow"
        table.write_bytes(table.read_bytes()[:-50])
        check_whole(load(official, tmp_path / "c"))

    def test_an_unwritable_cache_is_named(self, official, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(DataError, match="KORET_CACHE"):
            load(official, tmp_path / "file" / "cache")


class TestOwnData:
    def test_jsonl_pairs(self, tmp_path):
        rows = [
            {"query": "가?", "positive": "가나다", "negatives": ["라마", "가나다"], "id": 1},
            {"query": "나?", "positive": ["가나다 라", "바사"], "article": "문서"},
            {"query": "다?", "positive": "지리산은 높다", "title": "문서", "answer": "높다"},
            {"query": "", "positive": "x"},
            {"query": "라?", "positive": [1]},
        ]
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join([*(json.dumps(row) for row in rows), "{bad", "[1]", ""]), encoding="utf-8")
        dataset = load(path, tmp_path / "c")
        rejects = check_whole(dataset)
        assert [line["position"] for line in rejects] == [4, 5, 6, 7]
        assert [line["id"] for line in rejects] == [f"pairs.jsonl:{number}" for number in (4, 5, 6, 7)]
        assert dataset.articles.column("title").to_pylist() == ["", "문서"]
        passages = dataset.passages.column("text").to_pylist()
        one, two, three = dataset.questions.to_pylist()
        assert [passages[i] for i in one["gold"]] == ["가나다"] and [passages[i] for i in one["negatives"]] == ["라마"]
        assert [passages[i] for i in two["gold"]] == ["가나다 라", "바사"] and two["id"] == "pairs.jsonl:2"
        assert three["answers"] == ["높다"] and (three["answer_start"], three["answer_end"]) == (5, 7)

    def test_hard_negatives_are_cleaned_and_cut_as_positives_are(self, tmp_path):
        question, page = "한글을 만든 임금은?", "<h2>창제</h2><p>세종이 <b>훈민정음</b>을 만들었다.</p>"
        plain = "한글은 스물네 자이다."
        rows = [
            {"query": question, "positive": page},
            {"query": question, "positive": "<p>한글은 세종이 지었다.</p>", "article": "나", "id": "나",
             "negatives": [page, "<p>거북선은 <b>배</b>다.</p>", "<div><p>거북선은 배다.</p></div>", "<p> </p>"]},
            {"query": question, "positive": plain, "article": "다", "negatives": [page]},
        ]  # fmt: skip
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        dataset = load(path, tmp_path / "c")
        [reject] = check_whole(dataset)
        assert (reject["id"], reject["questions"], reject["reason"]) == ("나", 0, "a negative is empty once cleaned")
        assert dataset.report["reasons"] == {"a negative is empty once cleaned": 1}
        passages = dataset.passages.to_pylist()
        assert [p["text"] for p in passages] == [
            "세종이 훈민정음을 만들었다.", "한글은 세종이 지었다.",
            "세종이 훈민정음을 만들었다.", "거북선은 배다.", plain, "세종이 훈민정음을 만들었다.",
        ]  # fmt: skip
        assert [p["heading"] for p in passages] == ["창제", "나", "창제", "", "", "창제"]
        assert dataset.questions.column("negatives").to_pylist() == [[], [2, 3], [5]]
        pairs = build_pairs(dataset, range(3))  # the page is right for the same question elsewhere
        assert [[pairs.texts[i] for i in pairs.negatives[row]] for row in range(3)] == [["거북선은 배다."]] * 3

    def test_plain_hard_negatives_are_normal_text_of_the_same_length(self, tmp_path):
        long = " ".join(f"{n}번째 문장은 조금 길게 쓴 글이다." for n in range(40))
        rows = [
            {"query": "가?", "positive": "다른 글", "negatives": [unicodedata.normalize("NFD", long), long]},
            {"query": "나?", "positive": long, "negatives": ["한  글", f" {long}"]},
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        whole = load(path, tmp_path / "c")
        assert whole.passages.column("text").to_pylist() == ["다른 글", long, long, "한  글", f" {long}"]
        assert whole.questions.column("negatives").to_pylist() == [[1], [3]]
        cut = load(path, tmp_path / "c", passage_tokens=64)
        check_whole(cut)
        own = {
            article: [p["text_key"] for p in cut.passages.to_pylist() if p["article"] == article] for article in (0, 1)
        }
        assert len(own[0]) > 3 and set(own[0][1:]) < set(own[1])
        assert [len(row) for row in cut.questions.column("negatives").to_pylist()] == [len(own[0]) - 1, 1]

    def test_rows_that_do_not_fit_the_columns_are_listed(self, tmp_path):
        for name, mark, held in (("a.csv", ",", "comma"), ("a.tsv", "\t", "tab")):
            lines = [["query", "positive", "answer"], ["가?", "글", ""], ["나?", "글", "둘", ""], ["다?", "글"]]
            (tmp_path / name).write_text("\n".join(map(mark.join, lines)), encoding="utf-8")
            dataset = load(tmp_path / name, tmp_path / "c")
            assert [(line["id"], line["position"], line["reason"]) for line in check_whole(dataset)] == [
                (f"{name}:3", 3, f"more cells than columns: put a cell that holds a {held} into quotes"),
                (f"{name}:4", 4, "fewer cells than columns: leave a cell empty where there is nothing to say"),
            ]
            assert dataset.questions.column("text").to_pylist() == ["가?"]

    def test_a_column_named_twice_is_refused(self, tmp_path):
        (tmp_path / "a.csv").write_text("query,positive,note,note,positive\n가?,하나,,,둘\n", encoding="utf-8")
        table = pa.Table.from_arrays(
            [pa.array([text]) for text in ("가?", "하나", "둘")], ["query", "passage", "passage"]
        )
        pq.write_table(table, tmp_path / "b.parquet")
        for name, column in (("a.csv", "positive"), ("b.parquet", "passage")):
            with pytest.raises(DataError, match=f"{name} has two columns named {column}: rename or remove"):
                load(tmp_path / name, tmp_path / "c")
        (tmp_path / "a.csv").write_text("query,positive,note,note\n가?,하나,,\n", encoding="utf-8")
        assert load(tmp_path / "a.csv", tmp_path / "c").questions.num_rows == 1

    def test_tables_with_named_columns(self, tmp_path):
        root = tmp_path / "d"
        root.mkdir()
        with open(root / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows(
                [["question", "passage", "negative"], ["하나?", "첫째, 글", "아닌 글"], ["둘?", "둘째 글", ""]]
            )
        answers = {"text": ["높다"], "answer_start": [5]}
        columns = {
            "question": ["셋?"],
            "context": ["지리산은 높다"],
            "answers": [answers],
            "title": ["지리산"],
            "id": ["z"],
        }
        pq.write_table(pa.table(columns), root / "b.parquet")
        dataset = load(root, tmp_path / "c")
        assert not check_whole(dataset)
        assert dataset.passages.column("text").to_pylist() == ["첫째, 글", "아닌 글", "둘째 글", "지리산은 높다"]
        assert dataset.questions.column("answer_start").to_pylist() == [-1, -1, 5]

    def test_a_table_without_the_columns_is_refused(self, tmp_path):
        (tmp_path / "a.csv").write_text("a,b\n1,2\n")
        with pytest.raises(DataError, match=r"a\.csv needs a column named query or question or anchor; it has a, b"):
            load(tmp_path / "a.csv", tmp_path / "c")

    def test_beir(self, tmp_path):
        root = tmp_path / "beir"
        (root / "qrels").mkdir(parents=True)
        corpus = [{"_id": f"d{i}", "title": "제목" if i == 1 else "", "text": f"글 {i}"} for i in range(4)]
        (root / "corpus.jsonl").write_text("\n".join(map(json.dumps, [*corpus, {"_id": "d9"}])))
        queries = [{"_id": f"q{i}", "text": f"질문 {i}"} for i in range(3)] + [{"_id": "q9"}]
        (root / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
        (root / "qrels" / "test.tsv").write_text(
            "query-id\tcorpus-id\tscore\nq0\td1\t1\nq0\td3\t2\nq1\td2\t1\nq2\td2\t0\n"
        )
        dataset = load(root, tmp_path / "c")
        assert [(line["file"], line["position"], line["id"], line["reason"]) for line in check_whole(dataset)] == [
            ("corpus.jsonl", 5, "", "a document without '_id' and 'text'"),
            ("queries.jsonl", 3, "q2", "no relevant document in the corpus"),
            ("queries.jsonl", 4, "q9", "a query without '_id' and 'text'"),
        ]
        assert dataset.report["articles"] == {"seen": 4, "kept": 3, "rejected": 1}  # two documents are one article
        assert dataset.report["questions"] == {"seen": 4, "kept": 2, "rejected": 2}
        passages = dataset.passages.column("text").to_pylist()
        gold = {row["id"]: [passages[i] for i in row["gold"]] for row in dataset.questions.to_pylist()}
        assert gold == {"q0": ["제목\n글 1", "글 3"], "q1": ["글 2"]}

    def test_beir_lists_what_it_leaves_out(self, tmp_path):
        root = tmp_path / "beir"
        (root / "qrels").mkdir(parents=True)
        corpus = [("d1", "첫째"), ("d1", "다른 글"), ("d2", "둘째"), ("d2", "둘째")]
        queries = [("q1", "하나?"), ("q1", "또 하나?"), ("q2", "둘?"), ("q2", "둘?")]
        for name, records in (("corpus", corpus), ("queries", queries)):
            lines = [json.dumps({"_id": identity, "text": text}) for identity, text in records]
            (root / f"{name}.jsonl").write_text("\n".join(lines))
        (root / "qrels" / "test.tsv").write_text(
            "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\nq2\tnone\t1\nq9\td2\t1\nq2\td1\t1e0\nq1 d2 1\n\n"
            "q9\tnone\t0\n"
        )
        dataset = load(root, tmp_path / "c")
        unread = "a judgement that is not query-id, corpus-id, score with tabs between"
        fields = ("file", "position", "id", "questions", "reason")
        assert [tuple(line[field] for field in fields) for line in check_whole(dataset)] == [
            ("corpus.jsonl", 2, "d1", 0, "another document has this '_id': the first is kept"),
            ("corpus.jsonl", 4, "d2", 0, "duplicate id, identical"),
            ("qrels/test.tsv", 4, "q2", 0, "a judgement of a document that is not in corpus.jsonl: none"),
            ("qrels/test.tsv", 6, "qrels/test.tsv:6", 1, unread),
            ("qrels/test.tsv", 7, "qrels/test.tsv:7", 1, unread),
            ("queries.jsonl", 2, "q1", 1, "another query has this '_id': the first is kept"),
            ("qrels/test.tsv", 5, "q9", 0, "a judgement of a query that is not in queries.jsonl: q9"),
            (".", -1, "q2", 1, "duplicate id, identical"),
        ]
        assert dataset.report["articles"] == {"seen": 4, "kept": 2, "rejected": 2}
        assert sum(dataset.report["reasons"].values()) == 8
        passages = dataset.passages.column("text").to_pylist()
        assert [(row["text"], passages[row["best"]]) for row in dataset.questions.to_pylist()] == [
            ("하나?", "첫째"), ("둘?", "둘째"),
        ]  # fmt: skip
        (root / "qrels" / "test.tsv").write_bytes("q1\t글\t1\n".encode("cp949"))
        with pytest.raises(DataError, match=r"qrels/test\.tsv is not UTF-8 \(byte 3\): convert it"):
            load(root, tmp_path / "c")

    def test_documents_with_questions_apart(self, tmp_path):
        root = tmp_path / "above" / "docs"
        (root / "sub").mkdir(parents=True)
        (root / "sub" / "a.html").write_text(
            "<html><head><title>글</title></head><body><h2>절</h2><p>답은 <b>42</b>다.</p></body></html>"
        )
        (root / "b.md").write_text("# 설명서\n\n## 설치\n\n- 받는다\n- 푼다\n\n## 실행\n\n" + "그냥 실행한다. " * 200)
        lines = [
            {"question": "답은?", "answer": "42", "file": "sub/a.html"},
            {"question": "설치?", "file": "b.md"},
            {"question": "?"},
        ]
        (root / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        dataset = load(root, tmp_path / "c")
        [reject] = check_whole(dataset)
        assert (reject["file"], reject["position"], reject["id"]) == ("questions.jsonl", 3, "questions.jsonl:3")
        assert dataset.articles.column("title").to_pylist() == ["설명서", "글"]
        assert dataset.articles.column("source").to_pylist() == ["b.md", "sub/a.html"]
        above = load(root.parent, tmp_path / "c")  # the same folder, as one of those in another
        assert above.articles.column("source").to_pylist() == ["docs/b.md", "docs/sub/a.html"]
        assert [line["file"] for line in check_whole(above)] == ["docs/questions.jsonl"]
        rows = {row["text"]: row for row in dataset.questions.to_pylist()}
        assert rows["답은?"]["answers"] == ["42"] and len(rows["설치?"]["gold"]) > 2
        assert dataset.passages.column("heading")[0].as_py().startswith("설명서")

    def test_answers_to_documents_are_quoted_as_they_read(self, tmp_path):
        root = tmp_path / "docs"
        root.mkdir()
        (root / "a.html").write_text(
            "<html><head><TITLE lang='ko'>설치 &amp; 실행</TITLE></head><body><nav>내려받기</nav><p>내려받기는 "
            "<b>42</b>초,<br>AT&amp;T 회선에서 <i>둘</i> 걸린다. 둘째 줄.</p></body></html>",
            encoding="utf-8",
        )
        asked = {"가": "42초", "나": "AT&T 회선", "다": "내려받기", "라": "둘", "마": "없는 말", "바": "설치"}
        lines = [{"question": q, "answer": a, "file": "a.html", "id": q} for q, a in asked.items()]
        (root / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        dataset = load(root, tmp_path / "c")
        assert {line["id"]: line["reason"] for line in check_whole(dataset)} == {
            "라": "answer_start is wrong or missing and the answer occurs more than once",
            "마": "the answer is not in the context",
            "바": "the answer is not in the context",  # only in the title, which is not text
        }
        text = clean_html_text((root / "a.html").read_text(encoding="utf-8"))
        for row in dataset.questions.to_pylist():
            assert row["answers"] == [asked[row["id"]]] == [text[row["answer_start"] : row["answer_end"]]]
        assert dataset.articles.column("title").to_pylist() == ["설치 & 실행"]


def test_a_script_without_a_main_guard_works(official, tmp_path):
    """Workers never import the caller's main module, so an unguarded script neither forks forever nor fails."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom koret.data.loader import load_dataset\n"
        f"d = load_dataset({str(official)!r}, cache_dir={str(tmp_path / 'c')!r}, num_workers=2)\n"
        "print(d.questions.num_rows, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "36 False", done.stderr
    assert "[9/9]" in done.stderr


def test_missing_paths_and_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "none.json", tmp_path / "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        load(tmp_path / "empty", tmp_path / "c")
    with pytest.raises(ValueError, match="num_workers"):
        load("sample", tmp_path / "c", num_workers=-1)
    with pytest.raises(ValueError, match="max_bad"):
        load("sample", tmp_path / "c", max_bad=2)
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        load("sample", tmp_path / "c", tokenizer=tmp_path / "none.json")


def test_a_killed_worker_is_named(official, tmp_path):
    """A process that dies (out of memory, say) ends the run with the name of its file."""
    script = tmp_path / "sitecustomize.py"
    script.write_text(
        "import sys\nif sys.argv[0] == '-c':\n    import os, koret.data.prepare as p\n"
        "    p.prepare_source = lambda *a: os.kill(os.getpid(), 9)\n"
    )
    code = f"from koret.data.loader import load_dataset; load_dataset({str(official)!r}, cache_dir={str(tmp_path)!r})"
    (tmp_path / "main.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=120, env=environment
    )
    assert "RuntimeError: the process preparing KorQuAD_2.1_train_0" in done.stderr
    assert "killed" in done.stderr
