"""Data no one should have to read: each case is made in code, and says what reading it must come to."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Make = Callable[[Path], Path]  # writes into the folder it is given and returns what to read


@dataclass(frozen=True)
class Reads:
    """The data set is made: how much was kept, why the rest was not, and texts that must be in its passages."""

    articles: int
    questions: int
    reasons: dict[str, int] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    moved: int | None = None
    ignored: int = 0


@dataclass(frozen=True)
class Refused:
    """A DataError (or FileNotFoundError) whose message holds every one of these."""

    says: tuple[str, ...]

    def __init__(self, *says: str) -> None:
        object.__setattr__(self, "says", says)


@dataclass(frozen=True)
class Case:
    make: Make
    outcome: Reads | Refused
    options: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def add(name: str, make: Make, outcome: Reads | Refused, **options: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(make, outcome, options)


# ---------------------------------------------------------------- what the cases are made of


def page(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A good KorQuAD 2.1 article with one question."""
    context = f"<html><body><h2>절</h2><p>글 {number}의 답은 정답{number} 이다.</p></body></html>"
    asked = {"question": f"{number}번의 답은?", "id": f"q{number}", "answer": locate(context, f"정답{number}")}
    return {"title": f"글 {number}", "url": "", "context": context, "raw_html": "<p>x</p>", "qas": [asked]} | changes


def locate(context: str, text: str) -> dict[str, Any]:
    return {"text": text, "answer_start": context.index(text)}


def page_of(context: str, answer: str = "정답") -> dict[str, Any]:
    """An article of the given context; its question's answer must occur in it."""
    return page(1, context=context, qas=[{"question": "답은?", "id": "q", "answer": locate(context, answer)}])


def asking(**changes: Any) -> dict[str, Any]:
    """A good article whose question has some members changed."""
    good = page()
    return good | {"qas": [good["qas"][0] | changes]}


def dump(*articles: Any, **members: Any) -> bytes:
    return json.dumps({"version": "KorQuAD_2.1", "data": list(articles), **members}, ensure_ascii=False).encode()


def file(content: bytes | str, name: str = "bad.json") -> Make:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def articles(*records: Any) -> Make:
    return file(dump(*records))


def html(body: str) -> Make:
    """A page with hostile markup between two texts that must both survive; the answer comes last."""
    return articles(page_of(f"<html><body><p>처음글</p>{body}<p>끝글 정답</p></body></html>"))


def pair(number: int = 1, **changes: Any) -> dict[str, Any]:
    return {"query": f"질문 {number}", "positive": f"문단 {number}의 글이다.", "answer": f"문단 {number}"} | changes


def lines(*records: Any) -> Make:
    text = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in records]
    return file(b"\n".join(text) + b"\n", "bad.jsonl")


def archive(*members: tuple[str, bytes], change: Callable[[bytearray], bytes | None] = lambda data: None) -> Make:
    """A zip of the members; ``change`` may damage its bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members:
            out.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    data = bytearray(packed.getvalue())
    return file(bytes(change(data) or data), "bad.zip")


def parquet(columns: dict[str, list], change: Callable[[bytes], bytes] = lambda data: data) -> Make:
    def make(folder: Path) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / "bad.parquet"
        pq.write_table(pa.table(columns), path)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def folder_of(*makes: Callable[[Path], Any]) -> Make:
    def make(folder: Path) -> Path:
        root = folder / "data"
        root.mkdir()
        for part in makes:
            part(root)
        return root

    return make


ONE = Reads(1, 1)
START, NUMBER = {"text": "정답1", "answer_start": -77}, b"-77"  # a number to put something else in the place of
NESTED = b"[" * 100_000 + b"]" * 100_000
BOTH = ("처음글", "끝글 정답")

# ---------------------------------------------------------------- the file is not JSON, or not all of it

two = dump(page(1), page(2))
add("empty file", file(b""), Refused("bad.json", "is empty"))
add("white space only", file(b" \n\t \n"), Refused("bad.json", "is empty"))
add("white space for a megabyte", file(b" " * (1 << 20) + two), Reads(2, 2))
add("cut inside the second article", file(two[:-150]), Refused("bad.json", "cut off after 1 whole article", "byte"))
add("cut before the first article", file(two[:30]), Refused("bad.json", "cut off after 0 whole articles"))
add(
    "cut in the middle of a syllable",
    file(two[: two.index("정답2".encode()) + 1]),
    Refused("bad.json", "cut off after 1"),
)
add("byte order mark", file(b"\xef\xbb\xbf" + two), Reads(2, 2))
add("UTF-16 with its mark", file(two.decode().encode("utf-16")), Refused("bad.json", "UTF-16", "save it as UTF-8"))
add("UTF-16 without", file(two.decode().encode("utf-16-be")), Refused("bad.json", "UTF-16", "save it as UTF-8"))
add("UTF-32", file(two.decode().encode("utf-32")), Refused("bad.json", "UTF-32", "save it as UTF-8"))
add("CP949", file(two.decode().encode("cp949")), Refused("bad.json", "CP949", "iconv"))
add(
    "one byte of another encoding",
    file(two.replace("글 2의".encode(), b"\xb1\xdb 2")),
    Refused("bad.json", "UTF-8", "byte"),
)
add(
    "zeros in the middle of a page",
    file(two.replace("글 2의".encode(), bytes(4096))),
    Reads(1, 1, {"not a valid article": 1}),
)
add(
    "zeros between two articles",
    file(two.replace(b'}, {"title"', b"}" + bytes(4096) + b', {"title"')),
    Refused("bad.json", "not valid JSON"),
)
add("zeros at the end", file(two + bytes(4096)), Refused("bad.json", "goes on after its JSON ended"))
add("zeros only", file(bytes(4096)), Refused("bad.json", "UTF-16"))
add("two documents", file(two + two), Refused("bad.json", "goes on after its JSON ended"))
add("gzip", file(gzip.compress(two)), Refused("bad.json", "gzip", "gunzip"))
add("a picture", file(b"\x89PNG\r\n\x1a\n" + bytes(100)), Refused("bad.json", "not JSON"))
add("an error page", file("<html><h1>404</h1></html>"), Refused("bad.json", "HTML page", "download"))
add("a Git LFS pointer", file("version https://git-lfs.github.com/spec/v1\n"), Refused("bad.json", "git lfs pull"))
add("a comma too many", file(two.replace(b"]}]}", b"]},]}")), Reads(2, 2))
add("a comma too few", file(two.replace(b'}, {"title"', b'} {"title"')), Refused("bad.json", "not valid JSON", "byte"))
add("single quotes", file(two.replace(b'"', b"'")), Refused("bad.json", "JSON"))
add("a comment first", file(b"// data\n" + two), Refused("bad.json", "not JSON"))
add("a hundred thousand brackets", file(b"[" * 100_000), Refused("bad.json"))
add("a million braces", file(b'{"a":' * 200_000), Refused("bad.json"))
add("data is an object", file(b'{"data": {"a": 1}}'), Refused("bad.json", "'data'", "expected a list of articles"))
add("data is null", file(b'{"data": null}'), Refused("bad.json", "expected a list of articles"))
add("data is empty", file(b'{"data": []}'), Refused("no usable question", "bad.json"))
add("no data at all", file(b'{"rows": [1, 2]}'), Refused("bad.json", "found the keys rows"))
add("a version of NaN", file(b'{"version": NaN, "data": []}'), Refused("bad.json", "not valid JSON"))
add("settings, not data", file(b'{"hidden_size": 384}', "config.json"), Refused("config.json", "hidden_size"))

# ---------------------------------------------------------------- records of other types and sizes

NOT_ARTICLE = "not a valid article"
add("articles that are none", articles(page(1), 7, "글", None, [1], True), Reads(1, 1, {NOT_ARTICLE: 5}))
add("a context that is a number", articles(page(1), page(2, context=7)), Reads(1, 1, {NOT_ARTICLE: 1}))
add("questions that are an object", articles(page(1), page(2, qas={})), Reads(1, 1, {NOT_ARTICLE: 1}))
add("a title that is a list", articles(page(1), page(2, title=["글"])), Reads(1, 1, {NOT_ARTICLE: 1}))
add("a title of null", articles(page(1), page(2, title=None)), Reads(2, 2))
add("an article without questions", articles(page(1), page(2, qas=[])), Reads(2, 1))
add("an article of {}", articles(page(1), {}), Reads(1, 1, {"neither 'context' nor 'paragraphs'": 1}))
add("a question that is text", articles(page(1), page(2, qas=["왜?"])), Reads(2, 1, {"not a valid question": 1}))
add("a question of null", articles(page(1), asking(question=None, id="n")), Reads(2, 1, {"not a valid question": 1}))
add("an empty question", articles(page(1), asking(question=" \n", id="n")), Reads(2, 1, {"empty question": 1}))
add("no answer", articles(page(1), asking(answer=None, id="n")), Reads(2, 1, {"no answer": 1}))
add("answers of []", articles(page(1), asking(answer=[], id="n")), Reads(2, 1, {"no answer": 1}))
add("a blank answer", articles(page(1), asking(answer={"text": " "}, id="n")), Reads(2, 1, {"no answer": 1}))
add("an answer that is a number", articles(page(1), asking(answer=7, id="n")), Reads(2, 1, {"not a valid question": 1}))

twice = "<p>정답 그리고 정답</p>"
moved = page_of("<p>글의 정답</p>") | {
    "qas": [{"question": "답?", "id": "q", "answer": {"text": "정답", "answer_start": 0}}]
}
lost = asking(id="n", answer={"text": "없는 말", "answer_start": 3})
unsure = page_of(twice) | {"qas": [{"question": "답?", "id": "u", "answer": {"text": "정답", "answer_start": 1}}]}
PLACES = {
    "the answer is not in the context": 1,
    "answer_start is wrong or missing and the answer occurs more than once": 1,
}
add("offsets that do not match", articles(page(1), moved, lost, unsure), Reads(4, 2, PLACES, moved=1))
for name, start in {
    "negative": -5,
    "beyond the page": 10**9,
    "beyond 64 bits": 10**30,
    "of 5,000 digits": int("9" * 4000) * 10**1000,
}.items():
    offset = {"text": "정답1", "answer_start": start}
    outcome = Reads(1, 1, moved=1) if start < 10**99 else Refused("no usable question", "bad.json", "q1")
    number = b'"answer_start": ' + (b"9" * 5000 if start > 10**99 else str(start).encode())
    text = dump(asking(answer=START)).replace(b'"answer_start": -77', number)
    add(f"an offset {name}", file(text), outcome)
add(
    "an offset of 1e400",
    file(dump(asking(answer=START)).replace(NUMBER, b"1e400")),
    Refused("no usable question", "bad.json", "q1", "not a valid question"),
)
add(
    "an offset of NaN",
    file(dump(page(1), asking(id="n", answer=START)).replace(NUMBER, b"NaN")),
    Reads(1, 1, {NOT_ARTICLE: 1}),
)
add(
    "an offset that is text",
    articles(page(1), asking(id="n", answer={"text": "정답1", "answer_start": "x"})),
    Reads(2, 1, {"not a valid question": 1}),
)
add(
    "NaN beside a good article",
    file(dump(page(1), page(2, score=-77)).replace(NUMBER, b"NaN")),
    Reads(1, 1, {NOT_ARTICLE: 1}),
)
add(
    "Infinity beside a good article",
    file(dump(page(1), page(2, score=-77)).replace(NUMBER, b"-Infinity")),
    Reads(1, 1, {NOT_ARTICLE: 1}),
)
add(
    "a lone surrogate in a page",
    file(dump(page(1), page(2)).replace("글 2의".encode(), b"\\ud800")),
    Reads(1, 1, {NOT_ARTICLE: 1}),
)
add(
    "a lone surrogate in a question",
    file(dump(page(1), page(2)).replace("2번의".encode(), b"\\udfff")),
    Reads(1, 1, {NOT_ARTICLE: 1}),
)
add(
    "raw bytes of a surrogate",
    file(dump(page(1)).replace("글 1의".encode(), b"\xed\xa0\x80")),
    Refused("bad.json", "UTF-8"),
)
add("an escaped null", file(dump(page(1)).replace("글 1의".encode(), b"\\u0000\\u0000")), ONE)
add(
    "a raw control character",
    file(dump(page(1), page(2)).replace("글 2의".encode(), b"\x07")),
    Reads(1, 1, {NOT_ARTICLE: 1}),
)
add(
    "deep nesting inside an article",
    file(dump(page(1), page(2, x=-77)).replace(NUMBER, NESTED)),
    Reads(1, 1, {"nested too deeply": 1}),
)
add(
    "deep nesting inside a question",
    file(dump(page(1), asking(id="n", x=-77)).replace(NUMBER, NESTED)),
    Reads(1, 1, {"nested too deeply": 1}),
)
add(
    "one id for two questions",
    articles(page(1), page(2), asking(id="q2")),
    Reads(3, 1, {"duplicate id, conflicting": 2}),
)
add("the same article twice", articles(page(1), page(1)), Reads(2, 1, {"duplicate id, identical": 1}))
doubled = dump(page(1), page(2)).replace(b'"title": "\xea\xb8\x80 2"', b'"title": "x", "title": "y"')
add("duplicate keys", file(doubled), Reads(2, 2))
add("duplicate keys, read strictly", file(doubled), Reads(1, 1, {"not valid": 1}), strict=True)
listed = asking(id="l", answer=[{"text": "정답1"}]) | {"raw_html": "<p>x</p>"}
add(
    "answers in a list, read strictly",
    articles(listed, page(2) | {"qas": 7}, page(3)),
    Reads(2, 2, {NOT_ARTICLE: 1}),
    strict=True,
)
nulls = (
    {"context": "\0 \0", "qas": []},
    {"context": "앞 정답 뒤", "qas": [{"id": "z", "question": "답?", "answers": "정답"}]},
)
add("paragraphs of null characters", articles({"title": "글", "paragraphs": list(nulls)}), ONE)
add("an empty page", articles(page(1), page(2, context="")), Reads(2, 1, {"the answer is not in the context": 1}))
add(
    "a page of tags only",
    articles(page(1), page_of("<p></p><b title='정답'></b>")),
    Reads(2, 1, {"the answer is empty once cleaned": 1}),
)
add(
    "squad paragraphs of null",
    articles(page(1), {"title": "글", "paragraphs": None}),
    Reads(1, 1, {"neither 'context' nor 'paragraphs'": 1}),
)
add(
    "squad paragraphs without context",
    articles(page(1), {"title": "글", "paragraphs": [{"qas": []}]}),
    Reads(1, 1, {NOT_ARTICLE: 1}),
)

# ---------------------------------------------------------------- hostile markup

add("a page of 10 MB in one text", html("<p>" + "가나다 라마바 " * 500_000 + "</p>"), Reads(1, 1, texts=BOTH))
add("a page of 10 MB of paragraphs", html("<p>가나다 라마바</p>" * 330_000), Reads(1, 1, texts=BOTH))
add("a word of a million letters", html("<p>" + "가" * 1_000_000 + "</p>"), Reads(1, 1, texts=BOTH))
add(
    "100,000 nested div",
    html("<div>" * 100_000 + "<p>깊은글</p>" + "</div>" * 100_000),
    Reads(1, 1, texts=(*BOTH, "깊은글")),
)
add("100,000 nested, never closed", html("<div><b>" * 50_000 + "<p>깊은글</p>"), Reads(1, 1, texts=(*BOTH, "깊은글")))
add(
    "20,000 nested tables",
    html("<table><tr><td>" * 20_000 + "깊은글" + "</td></tr></table>" * 20_000),
    Reads(1, 1, texts=(*BOTH, "깊은글")),
)
add(
    "20,000 nested lists",
    html("<ul><li>" * 20_000 + "깊은글" + "</li></ul>" * 20_000),
    Reads(1, 1, texts=(*BOTH, "깊은글")),
)
add(
    "200,000 attributes",
    html("<p " + " ".join(f'a{i}="{i}"' for i in range(200_000)) + ">속글</p>"),
    Reads(1, 1, texts=(*BOTH, "속글")),
)
add("200,000 tags that are not closed", html("<tr><td>칸" * 200_000), Reads(1, 1, texts=BOTH))
add("a million <", html("<" * 1_000_000), Reads(1, 1, texts=BOTH))
add("a million >", html(">" * 1_000_000), Reads(1, 1, texts=BOTH))
add("a million &", html("&" * 1_000_000), Reads(1, 1, texts=BOTH))
add("a million entities", html("&amp;" * 1_000_000), Reads(1, 1, texts=BOTH))
add("a million numbers of characters", html("&#44032;" * 500_000), Reads(1, 1, texts=BOTH))
add(
    "entities out of range",
    html("<p>&#x110000; &#xD800; &#99999999999999; &#0; &nosuch; 속글</p>"),
    Reads(1, 1, texts=(*BOTH, "속글")),
)
add("250,000 comments opened", html("<!--" * 250_000 + "-->"), Reads(1, 1, texts=BOTH))
add("100,000 quotes opened", html('<a title="' * 100_000 + '">'), Reads(1, 1, texts=BOTH))
add("100,000 scripts opened", html("<script>" * 100_000 + "</script>"), Reads(1, 1, texts=BOTH))
add("100,000 reference marks", html("<sup>[<a>1</a>" * 100_000), Reads(1, 1, texts=BOTH))
add("100,000 headings opened", html("<h2>제목" * 100_000), Reads(1, 1, texts=BOTH))
add(
    "formatting that overlaps",
    html("<b><i><u>" * 30_000 + "속글" + "</b></i></u>" * 30_000),
    Reads(1, 1, texts=(*BOTH, "속글")),
)
add("a million combining marks", html("가" + "\u0301" * 1_000_000), Reads(1, 1, texts=BOTH))
marks = "가" + "\u0301\u0323" * 300_000
add("combining marks in a question", articles(page(1), asking(id="m", question=marks + " 정답은?")), Reads(2, 2))
add("combining marks in an answer", articles(page_of(f"<p>{marks} 정답</p>", marks)), ONE)
asked = {"question": "답은?", "id": "s", "answers": [{"text": "정답", "answer_start": len(marks) + 1}]}
paragraph = {"context": f"{marks} 정답", "qas": [asked]}
add("combining marks in a plain paragraph", articles({"title": "글", "paragraphs": [paragraph]}), ONE)
add("a million spaces", html("<p>" + " " * 1_000_000 + "</p>"), Reads(1, 1, texts=BOTH))
bomb = '<!DOCTYPE a [<!ENTITY a0 "하">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)) + "]>"
add("an entity bomb", articles(page_of(bomb + "<p>처음글</p><p>&a11;</p><p>끝글 정답</p>")), Reads(1, 1, texts=BOTH))
xxe = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
add(
    "an entity that names a file",
    articles(page_of(xxe + "<p>처음글</p><p>&x;</p><p>끝글 정답</p>")),
    Reads(1, 1, texts=BOTH),
)

# ---------------------------------------------------------------- archives


def lie_about_size(data: bytearray) -> None:
    """Both headers claim that the member unpacks to 100 bytes."""
    central = data.index(b"PK\x01\x02")
    data[22:26] = data[central + 24 : central + 28] = struct.pack("<I", 100)


def encrypt(data: bytearray) -> None:
    central = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[central + 8] |= 1


def claim_terabytes(data: bytearray) -> None:
    central = data.index(b"PK\x01\x02")
    data[22:26] = data[central + 24 : central + 28] = struct.pack("<I", 0xFFFFFFF0)


def change_a_byte(data: bytearray) -> None:
    data[60] ^= 0x55


def make_symlink_zip(folder: Path) -> Path:
    path = folder / "bad.zip"
    with zipfile.ZipFile(path, "w") as out:
        link = zipfile.ZipInfo("link.json")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        out.writestr(link, "/etc/passwd")
        out.writestr("good.json", two)
    return path


add("zip names that climb", archive(("../../climbed.json", two)), Reads(2, 2))
add("zip names from the root", archive(("/tmp/koret-absolute.json", two)), Reads(2, 2))
add("a zip member that is a link", make_symlink_zip, Refused("bad.zip!link.json", "not JSON"))
add(
    "a zip bomb",
    archive(("a.json", b'{"data": [' + b" " * (300 << 20))),
    Refused("bad.zip!a.json", "-fold", "no data file"),
)
add("a zip that claims terabytes", archive(("a.json", two), change=claim_terabytes), Refused("bad.zip!a.json", "-fold"))
add(
    "a zip bomb that lies",
    archive(("a.json", b'{"data": [' + b" " * (200 << 20)), change=lie_about_size),
    Refused("bad.zip!a.json"),
)
add("an encrypted zip", archive(("a.json", two), change=encrypt), Refused("bad.zip!a.json", "encrypted", "password"))
add(
    "a zip cut in half",
    archive(("a.json", two), change=lambda data: data[: len(data) // 2]),
    Refused("bad.zip", "no readable zip"),
)
add("a zip with a changed byte", archive(("a.json", two), change=change_a_byte), Refused("bad.zip!a.json", "damaged"))
add("an empty zip", archive(), Refused("bad.zip", "holds no data file"))
add(
    "a zip in a zip", archive(("inner.zip", b"PK\x05\x06" + bytes(18))), Refused("bad.zip!inner.zip", "not a JSON file")
)
add(
    "20,000 members", archive(*((f"{i}.txt", b"") for i in range(20_000)), ("a.json", two)), Reads(2, 2, ignored=20_000)
)
add("no zip at all", file(two, "bad.zip"), Refused("bad.zip", "no readable zip"))

# ---------------------------------------------------------------- pairs, tables, folders

add(
    "JSONL with broken lines",
    lines(pair(1), b'{"query": ', b"]]", b"7", b'"text"', pair(2)),
    Reads(2, 2, {"not valid JSON": 2, "not a JSON object": 2}),
)
add("JSONL with a cut last line", lines(pair(1), b'{"query": "\xec\xa7'), Refused("bad.jsonl", "UTF-8", "line 2"))
add("JSONL with NaN", lines(pair(1), b'{"query": NaN, "positive": "x"}'), Reads(1, 1, {"not valid JSON": 1}))
add(
    "JSONL with nothing in its fields",
    lines(pair(1), pair(2, query=" "), pair(3, positive=[]), {}),
    Reads(1, 1, {"no text under 'query'": 2, "no text under 'positive'": 1}),
)
TWICE = {
    "'query' and 'question' are one field and hold different things": 1,
    "'positive' and 'context' are one field and hold different things": 1,
}
add(
    "JSONL with a field under two of its names",
    lines(
        pair(1),
        pair(2, question=" 질문 2", positives=["문단 2의 글이다."], pos=""),
        pair(3, question="다른 질문"),
        pair(4, context="다른 글"),
    ),
    Reads(2, 2, TWICE),
)
numbers = [pair(2, query=7), pair(3, positive=7), pair(4, negatives=[7]), pair(5, answer=7)]
NUMBERS = {
    "no text under 'query'": 1,
    "'positive' must be text or a list of texts": 1,
    "'negatives' must be text or a list of texts": 1,
    "'answer' must be text or {'text', 'answer_start'}": 1,
}
add("JSONL with numbers for texts", lines(pair(1), *numbers), Reads(1, 1, NUMBERS))
add("JSONL in UTF-16", file(json.dumps(pair(1)).encode("utf-16"), "bad.jsonl"), Refused("bad.jsonl", "UTF-16"))
add("JSONL with a deep line", lines(pair(1), NESTED), Reads(1, 1, {"nested too deeply": 1}))
add("JSONL with a line of 10 MB", lines(pair(1), pair(2, positive="가나다 " * 1_000_000)), Reads(2, 2))
starts = pair(2, answer={"text": ["문단 2"], "answer_start": 7})
add("JSONL with one start for a list of answers", lines(pair(1), starts), Reads(2, 2))
add("JSONL with null bytes", lines(pair(1), bytes(1000)), Reads(1, 1, {"not valid JSON": 1}))
add("JSONL of blank lines", lines(b"", b"  ", b""), Refused("no usable question", "bad.jsonl"))
HEADER = "query,positive\n"
add(
    "CSV with other columns",
    file("a,b\n1,2\n", "bad.csv"),
    Refused("bad.csv", "needs a column named query", "it has a, b"),
)
add(
    "CSV without a header",
    file("왜?,문단이다\n무엇?,글이다\n", "bad.csv"),
    Refused("bad.csv", "needs a column named query"),
)
add("CSV of no byte", file(b"", "bad.csv"), Refused("bad.csv", "it has none"))
add(
    "CSV with ragged rows",
    file(HEADER + "질문,문단\n혼자\n셋,문단이다,남는다\n", "bad.csv"),
    Reads(
        1,
        1,
        {
            "fewer cells than columns": 1,
            "more cells than columns": 1,
        },
    ),
)
add(
    "CSV with an open quote",
    file(HEADER + '질문,"문단\n' + "다음,줄\n" * 1000, "bad.csv"),
    Refused("bad.csv", "unexpected end of data", "row at line 2"),
)
add("CSV with null bytes", file(HEADER + "질문,문단\n\0\0,\0\n", "bad.csv"), Refused("bad.csv", "null bytes (line 3)"))
add(
    "CSV with a list of brackets in a cell",
    file("query,positive,answer\n질문,문단," + "[" * 100_000 + "\n", "bad.csv"),
    ONE,
)
add("CSV in CP949", file((HEADER + "질문,문단\n").encode("cp949"), "bad.csv"), Refused("bad.csv", "not UTF-8"))
GOOD = {"query": ["질문 1", "질문 2"], "positive": ["문단 1", "문단 2"]}
add(
    "Parquet cut in half",
    parquet(GOOD, lambda data: data[: len(data) // 2]),
    Refused("bad.parquet", "no readable Parquet"),
)
add(
    "Parquet with a changed footer",
    parquet(GOOD, lambda data: data[:100] + bytes(len(data) - 108) + data[-8:]),
    Refused("bad.parquet", "no readable Parquet"),
)
add("Parquet with other columns", parquet({"a": [1]}), Refused("bad.parquet", "needs a column named query"))
add(
    "Parquet with numbers and nulls",
    parquet({"query": ["질문", None], "positive": ["문단", "글"], "answer": [1, 2]}),
    Refused("bad.parquet", "'answer' must be text"),
)
add("text named Parquet", file(two, "bad.parquet"), Refused("bad.parquet", "no readable Parquet"))


def make_loop(root: Path) -> None:
    (root / "again").symlink_to(root, target_is_directory=True)
    (root / "self.json").symlink_to(root / "self.json")


def make_dangling(root: Path) -> None:
    (root / "gone.json").symlink_to(root / "nowhere.json")


def make_pipe(root: Path) -> None:
    os.mkfifo(root / "pipe.json")


def make_beir(root: Path, corpus: str, queries: str, qrels: str) -> None:
    (root / "qrels").mkdir()
    (root / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    (root / "queries.jsonl").write_text(queries, encoding="utf-8")
    (root / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")


def make_documents(root: Path, *questions: dict[str, Any]) -> None:
    (root.parent / "secret.md").write_text("비밀 문서", encoding="utf-8")
    (root / "a.md").write_text("# 제목\n\n글의 정답 이다.\n", encoding="utf-8")
    (root / "questions.jsonl").write_text("\n".join(json.dumps(q) for q in questions), encoding="utf-8")


good = file(two, "good.json")
add("nothing there", lambda folder: folder / "absent", Refused("absent", "no such file"))
add("an empty folder", folder_of(), Refused("holds no data file"))
add(
    "a folder without data",
    folder_of(file("글", "notes.txt"), file(b"\xff\xd8", "a.jpg")),
    Refused("holds no data file", "notes.txt"),
)
add("a folder that holds itself", folder_of(good, make_loop), Reads(2, 2, ignored=2))
add("a link to nowhere", folder_of(good, make_dangling), Reads(2, 2, ignored=1))
add("a pipe", folder_of(good, make_pipe), Reads(2, 2, ignored=1))
add("a folder named as a file", folder_of(good, lambda root: (root / "a.json").mkdir()), Reads(2, 2))
add(
    "a file name that is no text",
    folder_of(lambda root: (root / os.fsdecode(b"\xff\n.json")).write_bytes(two)),
    Refused("no file name in UTF-8", "rename it"),
)
add(
    "one broken file among good ones", folder_of(good, file(two[:-9], "broken.json")), Refused("broken.json", "cut off")
)
CORPUS = '{"_id": "d1", "text": "문단"}\n{"_id": "d2"}\nnonsense\n'
QUERIES = '{"_id": "q1", "text": "질문"}\n{"_id": "q2", "text": "왜?"}\n{"text": 7}\n'
add(
    "BEIR with broken lines",
    folder_of(lambda root: make_beir(root, CORPUS, QUERIES, "q1\td1\t1\nq2\tnone\t1\nx\n")),
    Reads(
        1,
        1,
        {
            "a document without '_id' and 'text'": 2,
            "no relevant document in the corpus": 1,
            "a judgement of a document that is not in corpus.jsonl": 1,
            "a judgement that is not query-id, corpus-id, score with tabs between": 1,
            "a query without '_id' and 'text'": 1,
        },
    ),
)
add(
    "BEIR without judgements",
    folder_of(lambda root: make_beir(root, CORPUS, QUERIES, "")),
    Refused("qrels", "query-id"),
)
ASKED = {"question": "답은?", "file": "a.md", "answer": "정답"}
add(
    "documents that climb",
    folder_of(
        lambda root: make_documents(root, ASKED, {**ASKED, "file": "../secret.md"}, {**ASKED, "file": "/etc/passwd"})
    ),
    Reads(1, 1, {"no document named '../secret.md'": 1, "no document named '/etc/passwd'": 1}),
)
