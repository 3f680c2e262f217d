"""Write files with the shape and the sizes of KorQuAD 2.1: pages of made-up text, exact offsets, official names.

The published means are matched: context 19,864 characters, raw_html 90,259, 2.17 questions an article, log-normal
page lengths, answers 67% text, 22% table, 11% list. Text is drawn from the words of the embedded sample.

    python benchmarks/data_generator.py OUT --files 3 --articles 1000 [--utf8] [--zip]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

SAMPLE = Path(__file__).resolve().parents[1] / "src/koret/data/sample/korquad2.1_sample.json"
MEAN_CONTEXT, SPREAD = 17_200, 0.9  # of the body; head and foot come on top
POOL = 1500  # different blocks of each kind in a file
_COMMENT_OR_SCRIPT = re.compile(r"<!--.*?-->|<script\b[^>]*>.*?</script>", re.S)
_TAG = re.compile(r"<(\w+)(\s[^>]*)>")
_SPAN = re.compile(r"\s(?:col|row)span=\"[^\"]*\"")


@dataclass(frozen=True)
class Block:
    """A piece of a page, raw and stripped, and the spans in both that can be asked for."""

    raw: str
    context: str
    spans: list[tuple[int, int, int, int]]  # raw start and end, context start and end


def strip_attributes(raw: str) -> str:
    """KorQuAD's rule: comments and scripts gone, every attribute gone but colspan and rowspan."""
    kept = _COMMENT_OR_SCRIPT.sub("", raw)
    return _TAG.sub(lambda tag: f"<{tag[1]}{''.join(_SPAN.findall(tag[2]))}>", kept)


class Writer:
    """Makes articles from a seeded stream of words."""

    def __init__(self, seed: int, words: list[str]) -> None:
        self.rng = random.Random(seed)
        self.words = words
        makers = {
            "paragraph": self.make_paragraph,
            "table": self.make_table,
            "list": self.make_list,
            "formula": self.make_formula,
        }
        self.pool = {kind: [make() for _ in range(POOL)] for kind, make in makers.items()}

    def phrase(self, least: int, most: int) -> str:
        return " ".join(self.rng.choices(self.words, k=self.rng.randint(least, most)))

    def link(self, text: str) -> str:
        kind = ' class="mw-redirect"' if self.rng.random() < 0.2 else ""
        return f'<a{kind} href="/wiki/{quote(text)}" title="{text}">{text}</a>'

    def sentence(self) -> str:
        parts = []
        for _ in range(self.rng.randint(6, 16)):
            word, chance = self.rng.choice(self.words), self.rng.random()
            if chance < 0.15:
                word = self.link(word)
            elif chance < 0.16:
                word = f"<b>{word}</b>"
            elif chance < 0.165:
                word += "\u00a0"
            parts.append(word)
        number = self.rng.randint(1, 99)
        mark = (
            f'<sup class="reference" id="cite_ref-{number}"><a href="#cite_note-{number}">[{number}]</a></sup>'
            if self.rng.random() < 0.15
            else ""
        )
        return f"{' '.join(parts)}다.{mark}"

    def make_block(self, before: str, answer: str, after: str) -> Block:
        raw = before + answer + after
        spans = [(len(before), len(before) + len(answer))]
        if before:
            spans.append((0, len(raw.rstrip("\n"))))
        stripped = [
            (*span, len(strip_attributes(raw[: span[0]])), len(strip_attributes(raw[: span[1]]))) for span in spans
        ]
        return Block(raw, strip_attributes(raw), stripped)

    def make_paragraph(self) -> Block:
        before = "<p>" + " ".join(self.sentence() for _ in range(self.rng.randint(0, 4)))
        answer = self.phrase(1, 3) if self.rng.random() < 0.75 else self.link(self.phrase(1, 2))
        after = "이며 " + " ".join(self.sentence() for _ in range(self.rng.randint(1, 4))) + "\n</p>\n"
        return self.make_block(f"{before} ", answer, after)

    def make_table(self) -> Block:
        columns = self.rng.randint(2, 6)
        style = 'class="wikitable" style="width:80%; border-collapse:collapse; text-align:center; font-size:90%;"'
        head = "".join(
            f'<th scope="col" style="background:#D2D2FF;">{self.phrase(1, 2)}\n</th>\n' for _ in range(columns)
        )
        rows = [
            "<tr>\n" + "".join(self.cell() for _ in range(columns)) + "</tr>\n" for _ in range(self.rng.randint(2, 12))
        ]
        before = f"<table {style}>\n<tbody><tr>\n{head}</tr>\n{''.join(rows[:-1])}<tr>\n"
        return self.make_block(before, self.cell().rstrip("\n"), "\n<td></td></tr></tbody></table>\n")

    def cell(self) -> str:
        chance = self.rng.random()
        text = self.link(self.phrase(1, 2)) if chance < 0.4 else self.phrase(1, 3)
        style = ' style="text-align: center; vertical-align:middle;"' if chance < 0.5 else ""
        span = ' colspan="2"' if chance > 0.97 else ""
        extra = f"<br/>{self.phrase(1, 2)}" if 0.5 < chance < 0.55 else ""
        return f"<td{span}{style}>{text}{extra}\n</td>\n"

    def make_list(self) -> Block:
        items = [
            f"<li>{self.link(self.phrase(1, 2))} - {self.phrase(1, 5)}</li>\n" for _ in range(self.rng.randint(3, 15))
        ]
        return self.make_block(f'<ul class="list">{"".join(items[:-1])}<li>', self.phrase(1, 3), "</li></ul>\n")

    def make_formula(self) -> Block:
        source = "{\\displaystyle x=a^{2}&lt;b}"
        formula = (
            '<span class="mwe-math-element"><span class="mwe-math-mathml-inline" style="display: none;">'
            '<math xmlns="http://www.w3.org/1998/Math/MathML"><semantics><mrow><mi>x</mi><mo>=</mo><msup><mi>a</mi>'
            f'<mn>2</mn></msup></mrow><annotation encoding="application/x-tex">{source}</annotation></semantics></math>'
            '</span><img alt="x=a^2" class="mwe-math-fallback-image-inline" src="https://wikimedia.org/api/x.svg"/></span>'
        )
        return self.make_block(f"<p>{self.phrase(2, 6)} ", self.phrase(1, 2), f" {formula} {self.sentence()}\n</p>\n")

    def heading(self, level: int, name: str) -> str:
        encoded = quote(name).replace("%", ".")
        return (
            f'<h{level}><span id="{encoded}"></span><span class="mw-headline" id="{name}">{name}</span>'
            '<span class="mw-editsection"><span class="mw-editsection-bracket">[</span>'
            f'<a href="/w/index.php?title={quote(name)}&amp;action=edit" title="부분 편집: {name}">편집</a>'
            f'<span class="mw-editsection-bracket">]</span></span></h{level}>\n'
        )

    def contents(self, names: list[str]) -> str:
        items = "".join(
            f'<li class="toclevel-1 tocsection-{i}"><a href="#{quote(n)}"><span class="tocnumber">{i}</span> '
            f'<span class="toctext">{n}</span></a></li>\n'
            for i, n in enumerate(names, 1)
        )
        return (
            '<div class="toc" id="toc"><input class="toctogglecheckbox" id="toctogglecheckbox" role="button" '
            'style="display:none" type="checkbox"/><div class="toctitle" dir="ltr" lang="ko"><h2>목차</h2>'
            '<span class="toctogglespan"><label for="toctogglecheckbox"></label></span></div>\n'
            f"<ul>\n{items}</ul>\n</div>\n"
        )

    def references(self) -> str:
        items = "".join(
            f'<li id="cite_note-{i}"><span class="mw-cite-backlink"><a href="#cite_ref-{i}">↑</a></span> '
            f'<span class="reference-text"><cite class="citation news"><a class="external text" rel="nofollow" '
            f'href="http://www.example.org/articleView.html?idxno={self.rng.randint(10_000, 999_999)}">'
            f"“{self.phrase(2, 6)}”</a>. "
            f"《{self.phrase(1, 2)}》. {1990 + i % 30}년 {1 + i % 12}월 {1 + i % 28}일.</cite></span>\n</li>\n"
            for i in range(1, self.rng.randint(2, 25))
        )
        return f'<div class="reflist" style="list-style-type: decimal;">\n<ol class="references">\n{items}</ol></div>\n'

    def navigation(self) -> str:
        links = "\n".join(f"<li>{self.link(self.phrase(1, 2))}</li>" for _ in range(self.rng.randint(5, 50)))
        marks = "".join(
            f'<li class="nv-x"><a href="/wiki/T"><abbr title="이 틀">{mark}</abbr></a></li>' for mark in "vdeh"
        )
        return (
            '<div class="navbox" role="navigation"><table class="nowraplinks"><tbody><tr><th colspan="2" scope="col">'
            f'<div class="plainlinks"><ul>{marks}</ul></div><div>{self.phrase(1, 3)}</div></th></tr><tr><td>'
            f"<div>\n<ul>{links}</ul>\n</div></td></tr></tbody></table></div>\n"
        )

    def make_article(self, first_id: int) -> dict:
        """One article; its questions are numbered from ``first_id``."""
        rng = self.rng
        title = f"{self.phrase(1, 3)} {rng.randint(1, 99_999)}"
        target = max(1_500, min(900_000, rng.lognormvariate(math.log(MEAN_CONTEXT) - SPREAD**2 / 2, SPREAD)))
        count = rng.choices([1, 2, 3, 4, 5, 6], [42, 27, 15, 9, 4, 3])[0]
        wanted = rng.choices(["paragraph", "table", "list"], [67, 22, 11], k=count)
        names = [self.phrase(1, 3) for _ in range(max(2, int(target / 2_500)))]
        raw, context, questions = [HEAD.format(title=title, quoted=quote(title))], [], []
        context.append(strip_attributes(raw[0]))
        sizes = [len(raw[0]), len(context[0])]

        def add(block_raw: str, block_context: str) -> None:
            raw.append(block_raw)
            context.append(block_context)
            sizes[0] += len(block_raw)
            sizes[1] += len(block_context)

        def add_raw(piece: str) -> None:
            add(piece, strip_attributes(piece))

        start, left = sizes[1], list(wanted)
        if len(names) > 2:
            add_raw(self.contents(names))
        sections = iter(names)
        while sizes[1] - start < target or left:
            if rng.random() < 0.4 and (name := next(sections, None)):
                add_raw(self.heading(rng.choice([2, 2, 3]), name))
            asked = bool(left) and rng.random() < 0.5
            kind = left.pop() if asked else rng.choices(list(self.pool), [62, 18, 18, 2])[0]
            block = rng.choice(self.pool[kind])
            if asked:
                span = block.spans[-1 if rng.random() < 0.2 else 0]
                questions.append(self.make_question(block, span, sizes, first_id + len(questions)))
            add(block.raw, block.context)
        add_raw(self.heading(2, "각주") + self.references())
        if rng.random() < 0.5:
            add_raw(self.navigation())
        add_raw(FOOT.format(title=title, quoted=quote(title)))
        return {
            "title": title,
            "url": f"https://ko.wikipedia.org/wiki/{title}",
            "context": "".join(context),
            "raw_html": "".join(raw),
            "qas": questions,
        }

    def make_question(self, block: Block, span: tuple[int, int, int, int], sizes: list[int], number: int) -> dict:
        return {
            "answer": {
                "text": block.context[span[2] : span[3]],
                "html_answer_start": sizes[0] + span[0],
                "html_answer_text": block.raw[span[0] : span[1]],
                "answer_start": sizes[1] + span[2],
            },
            "question": f"{self.phrase(4, 9)}은 무엇인가?",
            "id": str(number),
        }


_MENU = "".join(
    f'<li id="n-{i}"><a href="/wiki/%ED%8A%B9%EC%88%98:{i}" title="메뉴 {i} [alt-shift-{i}]">메뉴 {i}</a></li>'
    for i in range(60)
)
_SCRIPT = (
    "<script>(window.RLQ=window.RLQ||[]).push(function(){{mw.config.set({{"
    + '"wgX":["a","b"],' * 700
    + "}});}});</script>\n"
)
_LINKS = (
    '<link rel="stylesheet" href="/w/load.php?lang=ko&amp;modules=ext.cite.styles&amp;only=styles&amp;skin=vector"/>\n'
    * 60
)
HEAD = (
    '<!DOCTYPE html>\n<html class="client-nojs" dir="ltr" lang="ko">\n<head>\n<meta charset="utf-8"/>\n'
    "<title>{title} - 위키백과, 우리 모두의 백과사전</title>\n" + _SCRIPT + _LINKS + "</head>\n"
    '<body class="mediawiki ltr sitedir-ltr skin-vector action-view">\n<div id="mw-page-base"></div>\n'
    '<div id="content" class="mw-body" role="main">\n<h1 id="firstHeading" lang="ko">{title}</h1>\n'
    '<div id="bodyContent"><div id="siteSub">위키백과, 우리 모두의 백과사전.</div>\n'
    '<a class="mw-jump-link" href="#mw-head">둘러보기로 가기</a>\n'
    '<a class="mw-jump-link" href="#p-search">검색하러 가기</a>\n'
    '<div id="mw-content-text"><div class="mw-parser-output">'
)
FOOT = (
    "<!-- \nNewPP limit report\nParsed by mw1234\nCPU time usage: 0.1 seconds\n"
    + "Transclusion 1 Template\n" * 40
    + "-->\n"
    '</div><noscript><img src="//ko.wikipedia.org/wiki/Special:CentralAutoLogin/start"/></noscript></div>\n'
    '<div class="printfooter">원본 주소 "<a href="https://ko.wikipedia.org/w/index.php?title={quoted}">{title}</a>"</div>\n'
    '<div id="mw-navigation"><h2>둘러보기 메뉴</h2><ul class="menu">'
    + _MENU
    + "</ul></div>\n"
    + _SCRIPT
    + "</body>\n</html>\n"
)


def read_words() -> list[str]:
    """Korean words of the embedded sample, most frequent ones as often as they occur."""
    articles = json.loads(SAMPLE.read_text(encoding="utf-8"))["data"]
    return [word for article in articles for word in re.findall(r"[가-힣]{2,7}", article["context"])]


def write_files(
    folder: Path, files: int, articles: int, *, utf8: bool = False, packed: bool = False, first: int = 0
) -> list[Path]:
    """Write ``files`` JSON files, three to an official folder (or zip), and return the files (or zips).

    File number ``first`` + i depends on that number alone: a larger set starts with the smaller one's files.
    """
    words, made = read_words(), []
    for number in range(first, first + files):
        writer = Writer(1000 + number, words)
        data, next_id = [], number * 10 * articles
        for _ in range(articles):
            data.append(writer.make_article(next_id))
            next_id += len(data[-1]["qas"])
        part = folder / f"KorQuAD_2.1_train_{number // 3:02d}"
        part.mkdir(parents=True, exist_ok=True)
        path = part / f"korquad2.1_train_{number:02d}.json"
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"version": "KorQuAD_2.1_train", "data": data}, file, ensure_ascii=not utf8)
        made.append(path)
    return _pack(folder, made) if packed else made


def _pack(folder: Path, files: list[Path]) -> list[Path]:
    archives = []
    for part in dict.fromkeys(path.parent for path in files):
        archives.append(folder / f"{part.name}.zip")
        with zipfile.ZipFile(archives[-1], "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(part.glob("*.json")):
                archive.write(path, path.name)
                path.unlink()
        part.rmdir()
    return archives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--articles", type=int, default=1000)
    parser.add_argument("--utf8", action="store_true", help="write Hangul as it is; default: \\uXXXX, as published")
    parser.add_argument("--zip", action="store_true", help="three files to a zip, as published")
    options = parser.parse_args()
    for path in write_files(options.out, options.files, options.articles, utf8=options.utf8, packed=options.zip):
        print(path, f"{path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
