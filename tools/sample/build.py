"""Build the embedded sample, KorQuAD 2.1 JSON, from the articles beside this file.

    python tools/sample/build.py [--out FILE]

The same sources give the same bytes. Offsets are made by rendering the answers' places along with the page, and
are checked before anything is written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from urllib.parse import quote

from page import CLOSE, HOST, NUMBER, OPEN, find_links, render_page
from source import Article, read_articles

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "src" / "koret" / "data" / "sample" / "korquad2.1_sample.json"
CATEGORIES = {"culture": "문화와 예술", "history": "역사와 인물", "nature": "자연과 지리", "science": "과학과 기술"}
FAMILY = 8  # writers keep related articles together: navigation boxes name this many neighbours

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
_ATTRIBUTES = re.compile(r"<([a-z][a-z0-9]*)\s([^<>]*)>")
_SPAN = re.compile(r'\b(?:colspan|rowspan)="[^"]*"')
_MARKER = re.compile(f"([{OPEN}{CLOSE}])(.)", re.DOTALL)


def strip_page(raw: str) -> str:
    """raw_html -> context, as KorQuAD 2.x does: without comments, scripts and attributes but colspan and rowspan."""
    raw = _SCRIPT.sub("", _COMMENT.sub("", raw))
    return _ATTRIBUTES.sub(lambda m: f"<{' '.join([m[1], *_SPAN.findall(m[2])])}>", raw)


def read_spans(marked: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """The text without markers, and the (start, end) each pair of them enclosed."""
    parts: list[str] = []
    starts: dict[int, int] = {}
    spans: dict[int, tuple[int, int]] = {}
    length = position = 0
    for marker in _MARKER.finditer(marked):
        parts.append(marked[position : marker.start()])
        length += len(parts[-1])
        position = marker.end()
        number = ord(marker[2]) - NUMBER
        if marker[1] == OPEN:
            starts[number] = length
        else:
            spans[number] = (starts[number], length)
    parts.append(marked[position:])
    return "".join(parts), spans


def build_record(article: Article, marked: str, first_id: str) -> dict:
    """One entry of KorQuAD's "data" list, from the page with its markers."""
    raw_html, raw_spans = read_spans(marked)
    context, spans = read_spans(strip_page(marked))
    if context != strip_page(raw_html):
        raise ValueError(f"{article.place} {article.title}: markers changed the page")
    qas = []
    for k, (mark, question) in enumerate(article.questions, 1):
        (start, end), (raw_start, raw_end) = spans[mark], raw_spans[mark]
        answer = {
            "text": context[start:end],
            "answer_start": start,
            "html_answer_start": raw_start,
            "html_answer_text": raw_html[raw_start:raw_end],
        }
        if not answer["text"].strip():
            raise ValueError(f"{article.place} {article.title}: answer {mark} is empty")
        qas.append({"question": question, "id": f"{first_id}-{k}", "answer": answer})
    url = f"{HOST}/wiki/{quote(article.title.replace(' ', '_'))}"
    return {"title": article.title, "url": url, "context": context, "raw_html": raw_html, "qas": qas}


def build_sample(folder: Path = HERE / "articles") -> dict:
    """The whole data set. Raises ValueError with every problem of the sources."""
    topics = {path.stem: read_articles(path) for path in sorted(folder.glob("*.txt"))}
    titles = [a.title for articles in topics.values() for a in articles]
    repeated = sorted({t for t in titles if titles.count(t) > 1})
    if repeated:
        raise ValueError(f"titles used twice: {', '.join(repeated)}")
    links = set().union(*(find_links(a) for articles in topics.values() for a in articles))
    data: list[dict] = []
    for topic, articles in topics.items():
        for i, article in enumerate(articles):
            family = [a.title for a in articles[i - i % FAMILY : i - i % FAMILY + FAMILY]]
            page = render_page(article, len(data), links, family, CATEGORIES.get(topic, topic))
            data.append(build_record(article, page, f"{topic}-{i + 1:02}"))
    return {"version": "KorQuAD_2.1_sample", "data": data}


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the embedded sample from tools/sample/articles.")
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write")
    out = parser.parse_args().out
    try:
        sample = build_sample()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8")
    questions = sum(len(article["qas"]) for article in sample["data"])
    print(f"{out}: {len(sample['data'])} articles, {questions} questions, {out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
