"""The embedded sample is exact KorQuAD 2.1 JSON, built from its sources, and varied enough to learn from."""

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SAMPLE = PROJECT / "src" / "koret" / "data" / "sample" / "korquad2.1_sample.json"
BUILDER = PROJECT / "tools" / "sample" / "build.py"


@pytest.fixture(scope="module")
def sample():
    return json.loads(SAMPLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def questions(sample):
    return [qa for article in sample["data"] for qa in article["qas"]]


class AttributeStripper(HTMLParser):
    """KorQuAD's rule by the standard library's parser: no comments, scripts and attributes but colspan, rowspan."""

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.parts, self.in_script = [], False

    def handle_decl(self, decl):
        self.parts.append(f"<!{decl}>")

    def handle_starttag(self, tag, attrs):
        self.in_script = tag == "script"
        if not self.in_script:
            kept = "".join(f' {name}="{value}"' for name, value in attrs if name in ("colspan", "rowspan"))
            self.parts.append(f"<{tag}{kept}>" if attrs else self.get_starttag_text())

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        if not self.in_script:
            self.parts.append(f"</{tag}>")
        self.in_script = False

    def handle_data(self, data):
        if not self.in_script:
            self.parts.append(data)

    def handle_entityref(self, name):
        self.parts.append(f"&{name};")

    def handle_charref(self, name):
        self.parts.append(f"&#{name};")


def test_size_and_form(sample, questions):
    assert SAMPLE.stat().st_size < 3_000_000
    assert (SAMPLE.parent / "LICENSE").read_text(encoding="utf-8").startswith("Apache-2.0")
    assert len(sample["data"]) >= 120 and len(questions) >= 600
    assert list(sample) == ["version", "data"]
    for article in sample["data"]:
        assert list(article) == ["title", "url", "context", "raw_html", "qas"]
        assert len(article["qas"]) >= 5
        for qa in article["qas"]:
            assert list(qa) == ["question", "id", "answer"] and isinstance(qa["id"], str)
            assert list(qa["answer"]) == ["text", "answer_start", "html_answer_start", "html_answer_text"]
    assert len({qa["id"] for qa in questions}) == len({qa["question"] for qa in questions}) == len(questions)
    assert len({article["title"] for article in sample["data"]}) == len(sample["data"])


def test_offsets_are_exact(sample):
    for article in sample["data"]:
        for qa in article["qas"]:
            answer = qa["answer"]
            start, raw_start = answer["answer_start"], answer["html_answer_start"]
            assert article["context"][start : start + len(answer["text"])] == answer["text"], qa["id"]
            raw_text = answer["html_answer_text"]
            assert article["raw_html"][raw_start : raw_start + len(raw_text)] == raw_text, qa["id"]
            assert answer["text"].strip()


def test_context_is_the_page_without_attributes(sample):
    for article in sample["data"]:
        stripper = AttributeStripper()
        stripper.feed(article["raw_html"])
        stripper.close()
        assert "".join(stripper.parts) == article["context"], article["title"]


def test_tags_are_balanced(sample):
    for article in sample["data"]:
        stack = []
        for closing, tag in re.findall(r"<(/?)([a-z][a-z0-9]*)", article["context"]):
            if tag in ("meta", "link", "input", "img", "br"):
                continue
            if closing:
                assert stack.pop() == tag, article["title"]
            else:
                stack.append(tag)
        assert not stack, article["title"]


def test_pages_have_what_real_pages_have(sample):
    pages = [article["raw_html"] for article in sample["data"]]
    for part, share in {
        "<script": 1.0,
        'class="mw-editsection"': 0.9,
        "<!--": 1.0,
        'id="footer"': 1.0,
        'class="infobox"': 0.4,
        'class="toc"': 0.2,
        'class="wikitable"': 0.2,
        'class="reference"': 0.5,
        'class="navbox"': 0.3,
        "<ul><li>": 0.3,
        "<style": 0.2,
        '<th colspan="': 0.3,
    }.items():
        assert sum(part in page for page in pages) >= share * len(pages), part


def test_answers_are_of_all_kinds(questions):
    def tell_kind(answer):
        form = {"<table": "table", "<ul>": "list"}.get(re.match(r"(?:<table|<ul>)?", answer)[0])
        return form or ("sentence" if answer.endswith(".") else "short")

    answers = [qa["answer"]["text"] for qa in questions]
    kinds = Counter(map(tell_kind, answers))
    assert kinds["short"] > len(answers) / 2
    assert min(kinds[kind] for kind in ("table", "list", "sentence")) >= 30
    assert sum(a.startswith("<a>") for a in answers) >= 50  # links stay markup, as in the original
    shared = Counter(re.sub("<[^>]*>", "", a) for a in answers)
    assert sum(count for count in shared.values() if count > 1) >= 60


def test_rebuild_gives_the_same_bytes(tmp_path):
    out = tmp_path / "sample.json"
    done = subprocess.run([sys.executable, str(BUILDER), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == SAMPLE.read_bytes(), "run tools/sample/build.py"


def test_problems_of_the_sources_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BUILDER.parent))
    from source import read_articles

    bad = "# 산\n\n높은 {{1:산}}이다.\n\n!table\n가 | 나\n다\n\n? 2 무엇인가?\n? 무엇인가?\n"
    (tmp_path / "bad.txt").write_text(bad, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_articles(tmp_path / "bad.txt")
    message = str(caught.value)
    for part in ("bad.txt:7", "bad.txt:10", "question names no mark: 2", "mark is asked by no question: 1"):
        assert part in message
