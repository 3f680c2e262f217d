"""Dataset statistics: counted by hand, against NumPy, and on real KorQuAD 1.0."""

import io
import json
import random
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from koret.data import statistics, statistics_report
from koret.data.keys import normalize_answer, text_key
from koret.data.loader import Dataset, load_dataset
from koret.data.statistics import Distribution, classify_question, compute_statistics, find_overlap
from koret.data.tables import ARTICLES, PASSAGES, QUESTIONS


def make_dataset(articles, source="file.json", report=None):
    """``articles``: (title, [(passage, [(question, answer, kind)])])."""
    tables = {"articles": [], "passages": [], "questions": []}
    for number, (title, passages) in enumerate(articles):
        first = len(tables["passages"])
        for text, questions in passages:
            row = len(tables["passages"])
            tables["passages"].append(
                {"article": number, "heading": "", "text": text, "start": 0, "end": len(text), "tokens": -1}
                | {"text_key": text_key(text)}
            )
            for question, answer, kind in questions:
                tables["questions"].append(
                    {"id": str(len(tables["questions"])), "text": question, "article": number, "answers": [answer]}
                    | {"answer_kind": kind, "gold": [row], "best": row, "known": [row], "negatives": []}
                    | {"question_key": text_key(question), "answer_key": text_key(normalize_answer(answer))}
                    | {"answer_start": 0, "answer_end": 0}
                )
        tables["articles"].append(
            {"title": title, "url": "", "source": source, "first_passage": first, "passage_count": len(passages)}
            | {"characters": sum(len(text) for text, _ in passages), "html": False}
        )
    schemas = {"articles": ARTICLES, "passages": PASSAGES, "questions": QUESTIONS}
    return Dataset(
        **{name: pa.Table.from_pylist(rows, schemas[name]) for name, rows in tables.items()},
        fingerprint="",
        report=report or {},
    )


@pytest.fixture
def small():
    return make_dataset(
        [
            (
                "한라산",
                [
                    ("한라산은 높다.", [("가장 높은 산은 무엇인가?", "한라산", "short"), ("어딘가?", "섬", "short")]),
                    ("한라산은  높다.", []),
                ],
            ),
            ("백두산", [("백두산에는 호수가 있다.", [("가장 높은 산은 무엇인가?", "한라산은", "sentence")])]),
            ("빈 글", [("글", [])]),
        ],
        report={"reasons": {"offset": 3, "empty answer": 1}, "moved_answers": 2, "wide_answers": 5},
    )


def test_small_set_by_hand(small):
    found = compute_statistics(small)
    assert found["counts"] == {
        "articles": 3,
        "passages": 4,
        "questions": 3,
        "articles with questions": 2,
        "pages (HTML)": 0,
        "answers in more than one passage": 0,
    }
    assert {k: v for k, v in found["question_types"].items() if v} == {"무엇": 2, "어디": 1}
    assert found["answer_kinds"] == {"short": 2, "sentence": 1}
    assert found["duplicates"]["questions"] | {"most_frequent": 0} == {
        "repeats": 1,
        "repeated_texts": 1,
        "most_frequent": 0,
    }
    assert found["duplicates"]["passages"]["repeats"] == 1
    assert found["duplicates"]["answers"]["most_frequent"] == [["한라산", 2]]
    assert found["losses"] == {"offset": 3, "empty answer": 1}
    assert (found["moved_answers"], found["wide_answers"]) == (2, 5)
    assert found["lengths"]["characters"]["answer"]["mean"] == pytest.approx(8 / 3)
    assert (found["questions_per_article"]["max"], found["questions_per_article"]["p5"]) == (2, 0)
    assert found["tokens"] is None
    json.dumps(found)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("한글을 만든 사람은 누구인가?", "누구"),
        ("한글을 만든 사람은?", "누구"),
        ("언제 누가 무엇을 만들었는가?", "무엇"),
        ("전쟁이 일어난 해는?", "언제"),
        ("전쟁은 어느 해에 일어났는가?", "언제"),
        ("왜인이 살던 곳은 어디인가?", "어디"),
        ("왜 떠났는가?", "왜"),
        ("떠난 이유는 무엇인가?", "왜"),
        ("떠난 까닭은 무엇이라고 하는가?", "무엇"),
        ("높이는 얼마인가?", "몇/얼마"),
        ("며칠 걸렸나?", "몇/얼마"),
        ("물은 어떻게 끓는가?", "어떻게"),
        ("어느 나라의 수도인가?", "어느"),
        ("책의 제목은?", "무엇"),
        ("그가 내놓은 견해는?", "무엇"),
        ("이름을 적으시오", "기타"),
        ("", "기타"),
    ],
)
def test_question_types(question, kind):
    assert classify_question(question) == kind


def test_distribution_equals_numpy():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.poisson(30, 3000), [0, 900, 5000]])
    distribution = Distribution()
    for part in np.array_split(rng.permutation(values), 7):
        distribution.add(part)
    distribution.add(np.array([], dtype=np.int64))
    summary = distribution.summarize()
    assert summary["mean"] == pytest.approx(values.mean())
    assert (summary["count"], summary["min"], summary["max"]) == (len(values), 0, 5000)
    for q in statistics.QUANTILES:
        assert summary[f"p{q}"] == np.percentile(values, q, method="inverted_cdf")
    histogram = summary["histogram"]
    assert sum(histogram["counts"]) + histogram["beyond"] == len(values)
    inside = values[values < histogram["edges"][-1]]
    np.testing.assert_array_equal(np.histogram(inside, [*histogram["edges"][:-1], 1e9])[0], histogram["counts"])
    assert Distribution().summarize() == {"count": 0}


def test_tokens_by_hand(tmp_path):
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "passage": 3, "query": 4, ":": 5, "산": 6, "##은": 7, "높다": 8}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = make_dataset([("산", [("산은 높다 정말 정말", [("산은 뭐", "높다", "short")])])])
    found = compute_statistics(data, tmp_path / "tokenizer.json", max_seq_length=8)
    # [CLS] query : 산 ##은 [UNK] [SEP]; [CLS] passage : 높다 [SEP]; [CLS] passage : 산 ##은 높다 [UNK] [UNK] [SEP]
    assert [found["lengths"]["tokens"][k]["max"] for k in ("question", "answer", "passage")] == [7, 5, 9]
    assert found["tokens"]["unknown_token_share"] == pytest.approx(3 / 21)
    assert found["tokens"]["unknown_word_share"] == pytest.approx(3 / (4 + 3 + 6))
    assert found["tokens"]["truncated"] == {"question": 0.0, "answer": 0.0, "passage": 1.0}


def test_overlap_is_counted_on_both_sides(small):
    other = make_dataset([("한라산", [("백두산에는 호수가  있다.", [("가장 높은  산은 무엇인가?", "답", "short")])])])
    shared = find_overlap(small, other)
    assert (shared["titles"], shared["passages"], shared["questions"]) == (1, 1, 2)
    assert shared["files"] == {"file.json": 2} and shared["splits"] == [["file.json", "file.json", 2]]
    assert find_overlap(other, small)["questions"] == 1
    assert find_overlap(small, make_dataset([("다른 글", [("글월", [])])]))["questions"] == 0


def test_overlap_says_in_which_split_of_either_set(tmp_path):
    def write(name, numbers, version=""):
        data = [
            {"title": f"{name} {n}", "paragraphs": [{"context": f"{n}번 답", "qas": [
                {"id": f"{name}-{n}", "question": f"{n}번은  무엇인가?", "answers": [{"text": "답", "answer_start": 3}]}
            ]}]}
            for n in numbers
        ]  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": version, "data": data}), encoding="utf-8")

    write("new/train/00.json", range(4), "KorQuAD_2.1_train")  # by its version
    write("new/dev/00.json", (4, 9), "KorQuAD_2.1_dev")  # the same file name in another folder
    write("new/KorQuAD_2.1_train_01/00.json", (5, 6))  # by its folder
    write("new/own.json", (1,))
    write("old/KorQuAD_v1.0_train.json", (0, 1, 5))
    write("old/KorQuAD_v1.0_dev.json", (1, 4))
    new, old = (load_dataset(tmp_path / name, num_workers=0, progress=False) for name in ("new", "old"))
    shared = find_overlap(new, old)
    assert shared["files"] == {
        "train/00.json": 2, "KorQuAD_2.1_train_01/00.json": 1, "dev/00.json": 1, "own.json": 1,
    }  # fmt: skip
    assert {(here, there): count for here, there, count in shared["splits"]} == {
        ("KorQuAD 2.1 train", "KorQuAD 1.0 train"): 3,
        ("KorQuAD 2.1 train", "KorQuAD 1.0 dev"): 1,
        ("KorQuAD 2.1 dev", "KorQuAD 1.0 dev"): 1,
        ("own.json", "KorQuAD 1.0 train"): 1,
        ("own.json", "KorQuAD 1.0 dev"): 1,
    }
    table = statistics_report.build_sheets(compute_statistics(new, others={"old": old}))[-1]
    assert ("  questions of KorQuAD 2.1 train in KorQuAD 1.0 train", "3", "60.0%") in table.rows


class ImageCounter(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not any(str(value).startswith(("http", "//")) for value in attrs.values())
        if tag == "img":
            self.images.append(attrs["src"])

    def handle_data(self, data):
        self.texts.append(data)


def test_report_is_one_file_with_tables_and_plots(small, tmp_path):
    found = compute_statistics(small, others={"다른 <집합>": small})
    files = statistics.save_report(found, tmp_path / "new" / "report")
    assert {file.name for file in files} == {
        "statistics.json",
        "report.html",
        "question_types.png",
        "answer_kinds.png",
        "lengths.png",
        "per_article.png",
    }
    assert json.loads((tmp_path / "new/report/statistics.json").read_text(encoding="utf-8")) == found
    page = ImageCounter()
    page.feed((tmp_path / "new/report/report.html").read_text(encoding="utf-8"))
    assert len(page.images) == 4 and all(src.startswith("data:image/png;base64,") for src in page.images)
    assert "questions also in 다른 <집합>" in page.texts and "무엇 (what)" in page.texts


def test_tables_show_every_figure(small):
    console = Console(width=100, file=io.StringIO())
    for table in statistics.format_tables(compute_statistics(small, others={"[bold]": small})):
        console.print(table)
    text = console.file.getvalue()
    expected = "무엇 (what)|66.7%|한라산|offset|only occurrence|the whole answer|questions also in [bold]"
    for part in expected.split("|"):
        assert part in text


def test_empty_set_is_no_error(tmp_path):
    found = compute_statistics(make_dataset([]))
    assert found["counts"]["questions"] == 0
    assert statistics.format_tables(found)
    statistics.save_report(found, tmp_path)


def test_memory_does_not_grow_with_the_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "BATCH_ROWS", 64)
    tokenizer = str(tmp_path / "tokenizer.json")
    Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(tokenizer)

    def measure(articles):
        rng = random.Random(0)
        letters = [chr(0xAC00 + rng.randrange(11172)) for _ in range(5000)]
        with pa.OSFile(str(tmp_path / "p.arrow"), "wb") as sink, pa.ipc.new_file(sink, PASSAGES) as writer:
            for number in range(articles):
                text = "".join(rng.choices(letters, k=4000))
                row = {"article": number, "heading": "", "text": text, "start": 0, "end": 4000, "tokens": -1}
                writer.write_table(pa.Table.from_pylist([row | {"text_key": number // 2}], PASSAGES))
        asked = [("질문은?", "같은 답", "short")] * 2  # repeated texts are looked up for the report
        base = make_dataset([(str(i), [("", asked)] if i < 2 else []) for i in range(articles)])
        mapped = pa.ipc.open_file(pa.memory_map(str(tmp_path / "p.arrow"))).read_all()
        data = Dataset(base.articles, mapped, base.questions, "", {})
        pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
        tracemalloc.start()
        pa.set_memory_pool(pool)
        try:
            compute_statistics(data, tokenizer)
        finally:
            pa.set_memory_pool(before)
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
        tracemalloc.stop()
        return peak

    assert measure(800) < measure(200) + 300_000  # 800 texts are 9.6 MB


def test_known_totals_of_korquad_1(shared_data):
    path = shared_data / "KorQuAD_v1.0_dev.json"
    questions = [
        qa
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    dataset = load_dataset(path, num_workers=0, progress=False)
    found = compute_statistics(dataset)
    assert [found["counts"][k] for k in ("articles", "passages", "questions")] == [140, 964, 5774]
    assert found["duplicates"]["questions"]["repeats"] == 10
    assert found["duplicates"]["passages"]["repeats"] == 3
    lengths = [len(qa["question"].strip()) for qa in questions]
    assert found["lengths"]["characters"]["question"]["mean"] == pytest.approx(np.mean(lengths))
    answers = {normalize_answer(qa["answers"][0]["text"]) for qa in questions}
    assert found["duplicates"]["answers"]["repeats"] == 5774 - len(answers)
    assert found["question_types"]["기타"] < 0.01 * 5774


def test_sample_shares_nothing_with_korquad_1(shared_data):
    sample = load_dataset("sample", num_workers=0, progress=False)
    shared = find_overlap(sample, load_dataset(shared_data / "KorQuAD_v1.0_dev.json", num_workers=0, progress=False))
    assert (shared["passages"], shared["questions"]) == (0, 0)
