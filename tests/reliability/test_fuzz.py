"""Spoilt pages and files: no crash, no hang, and nothing lost that is not counted."""

from __future__ import annotations

import html
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unicodedata import is_normalized, normalize

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutations import files, pages

from koret.data.answers import clean_and_map
from koret.data.korquad import Article, read_articles
from koret.data.markup import clean_html_text
from koret.data.prepare import Settings, prepare_source
from koret.data.sources import DataError, Source

LONGEST = 1.0  # seconds of CPU for one input, none of which is larger than some 20 KB
COUNTS = {"pages": (400, 12_000), "files": (400, 8_000)}  # by default, and in the slow run: 20,000 together


def fuzz(inputs: st.SearchStrategy, count: int, check: Callable[[object], bool]) -> None:
    """``check`` every input; the oracle it holds it against must apply to a fifth of them at least."""
    seen, applied = 0, 0

    @seed(20261123)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(inputs)
    def run(value: object) -> None:
        nonlocal seen, applied
        began = time.process_time()
        seen += 1
        applied += check(value)
        assert time.process_time() - began < LONGEST

    run()
    assert seen >= count
    assert applied >= count // 5


# ---------------------------------------------------------------- pages

REMOVED = ("script", "style", "head", "title", "template", "svg")
BRACKET_IN_QUOTES = re.compile(r"""=\s?(?:"[^"<>]*|'[^'<>]*)[<>]""")


LONG_NUMBER = re.compile(r"&#(?:[0-9]{21}|[xX][0-9a-fA-F]{17})")  # no character: left as it stands


def read_visible(page: str) -> str | None:
    """The letters and digits a reader of the page sees, by a walk along its characters.

    None where quotes decide or numbers run long.

    A tag is ``<`` and a letter, ``/``, ``!`` or ``?`` up to ``>`` with no other bracket between. Comments and the
    elements of REMOVED are not seen; an element that is not closed is only its tag, but scripts, styles and comments
    run to the end, and a head to the body.
    """
    if BRACKET_IN_QUOTES.search(page) or LONG_NUMBER.search(page):
        return None
    lower, seen, at, text_from = page.lower(), [], 0, 0

    def flush(stop: int) -> None:
        seen.append(html.unescape(page[text_from:stop]))

    while at < len(page):
        stop = -1
        if page[at] == "<":
            name = next((n for n in REMOVED if re.match(rf"<{n}[\s/>]", lower[at : at + 12])), "")
            if page.startswith("<!--", at):
                stop = page.find("-->", at + 2) + 3 or -1
                stop = stop if stop > 2 else len(page)
            elif name:
                closing = re.compile(rf"</{name}\s*>").search(lower, at + 1 + len(name))
                stop = closing.end() if closing else -1
                if name == "head" and not closing:
                    body = re.compile(r"<body[\s/>]").search(lower, at + 5)
                    stop = body.start() if body else -1
                elif name in ("script", "style") and not closing:
                    stop = len(page)
            if stop < 0 and re.match(r"<[a-zA-Z/!?]", page[at : at + 2]):
                ends = [n for n in (page.find(">", at + 1), page.find("<", at + 2)) if n >= 0]
                stop = min(ends) + 1 if ends and page[min(ends)] == ">" else -1
        if stop < 0:
            at += 1
            continue
        flush(at)
        at = text_from = stop
    flush(len(page))
    return keep_letters("".join(seen))


def keep_letters(text: str) -> str:
    return "".join(c for c in normalize("NFD", text) if c.isalnum())  # decomposed: a tag may part two jamo


def check_page(page: str) -> bool:
    clean = clean_html_text(page)
    assert is_normalized("NFC", clean) and not re.search(r"[\x00-\x08\x0e-\x1f]", clean)
    places = [(len(page) // 3, len(page) // 2)]
    text, _ = clean_and_map(page, places)
    visible = read_visible(page)
    if visible is None:
        return False
    assert keep_letters(clean) == visible
    return True


@pytest.mark.parametrize("count", [COUNTS["pages"][0], pytest.param(COUNTS["pages"][1], marks=pytest.mark.slow)])
def test_spoilt_pages_keep_every_letter_one_can_see(count):
    fuzz(pages(), count, check_page)


# ---------------------------------------------------------------- files


class Twins(ValueError):
    """A key comes twice in an object."""


def refuse_twins(members: list[tuple[str, object]]) -> dict:
    if len(dict(members)) < len(members):
        raise Twins
    return dict(members)


def parse(data: bytes) -> list | None:
    """The articles by the standard library, None where this is no JSON of unique keys with a list of articles."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        document = json.loads(data.decode(), object_pairs_hook=refuse_twins, parse_constant=refuse)
    except ValueError:
        return None
    found = document.get("data") if isinstance(document, dict) else document
    return found if isinstance(found, list) else None


def check_file(data: bytes) -> bool:
    """Every article is kept or a reject, every question of a kept article too, whichever way the file is read."""
    known, outcomes = parse(data), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoilt.json"
        path.write_bytes(data)
        for options in ({}, {"strict": True}, {"block": 64}):
            try:
                outcomes.append(list(read_articles(Source(path, path.name, "json", size=len(data)), **options)))
            except DataError as error:
                assert "spoilt.json" in str(error)
                outcomes.append(None)
        if outcomes[0] is not None:
            report = prepare_source(Source(path, path.name, "json"), Settings(page_tokens=64), Path(folder), 0)
            assert report.articles_seen == report.articles_kept + report.articles_rejected
            assert report.questions_seen == report.questions_kept + report.questions_rejected
            rejects = (Path(folder) / "00000.rejects.jsonl").read_bytes().splitlines()
            assert sum(json.loads(line)["questions"] for line in rejects) == report.questions_rejected
    assert outcomes[0] == outcomes[2]  # however the bytes come
    if known is None:
        return False
    assert outcomes[0] is not None and outcomes[1] is not None, "valid JSON was refused"
    for records in outcomes[:2]:
        check_records(records, known)
    return True


def check_records(records: list, known: list) -> None:
    by_position = {n: [r for r in records if r.position == n] for n in range(len(known))}
    assert sum(map(len, by_position.values())) == len(records)
    for number, article in enumerate(known):
        whole = [r for r in by_position[number] if isinstance(r, Article) or r.is_article]
        assert len(whole) == 1, article
        if not isinstance(whole[0], Article):
            continue
        parts = article["paragraphs"] if article.get("paragraphs") is not None else [article]
        asked = [question for part in parts for question in part.get("qas", ())]
        lost = [r for r in by_position[number] if r is not whole[0]]
        assert len(whole[0].questions) + len(lost) == len(asked)
        texts = [q["question"].strip() for q in asked if isinstance(q, dict) and isinstance(q.get("question"), str)]
        assert all(q.text in texts for q in whole[0].questions)
        assert list(whole[0].contexts) == [part["context"] for part in parts]


@pytest.mark.parametrize("count", [COUNTS["files"][0], pytest.param(COUNTS["files"][1], marks=pytest.mark.slow)])
def test_spoilt_files_lose_nothing_uncounted(count):
    fuzz(files(), count, check_file)


def test_together_the_slow_runs_are_twenty_thousand():
    assert sum(slow for _, slow in COUNTS.values()) >= 20_000


# ---------------------------------------------------------------- the checks can fail


@pytest.mark.parametrize(
    ("page", "visible"),
    [
        ("<p>가 <b>나</b> &amp; 다</p>", "가나다"),
        ("가<!-- 나 -->다<!-- 라", "가다"),
        ("1 < 2 <3 가<b", "123가b"),
        ("<script>가</script>나<style>다", "나"),
        ("<title>가 <p>나", "가나"),
        ("<head>가<body>나", "나"),
        ('<a title="가>">나', None),
    ],
)
def test_the_oracle_by_hand(page, visible):
    assert read_visible(page) == (None if visible is None else keep_letters(visible))


def test_a_reader_that_loses_an_article_is_caught():
    known = parse(json.dumps({"data": [{"context": "가", "qas": []}, {"context": "나", "qas": []}]}).encode())
    with pytest.raises(AssertionError):
        check_records([Article("", ("가",), (), False)], known)
