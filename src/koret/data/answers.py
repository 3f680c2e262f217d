"""Where an answer stands in clean text, and what kind of answer it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from koret.data.korquad import Answer
from koret.data.markup import Span, clean_html_text, clean_page, normalize_text

AnswerKind = str  # short | sentence | list | table
_CELL = re.compile(r"<t[dh][\s>]")
_LIST = re.compile(r"<(?:[uod]l|li)[\s>]")
_SENTENCE_END = re.compile(r"[.!?。…](?=\s|$)")
_LONGEST_PHRASE = 60  # characters; a longer run of words is a sentence even without a full stop


class Unlocated(ValueError):
    """An answer whose place in the text is not certain; the message is the reason."""


def classify_answer(fragment: str, clean: str) -> AnswerKind:
    """The kind of an answer by its markup (``fragment``) and, where that is plain text, by its shape."""
    if "<table" in fragment or "<tr" in fragment or len(_CELL.findall(fragment)) > 1:
        return "table"
    if _LIST.search(fragment) and "\n" in clean:
        return "list"
    words = len(clean.split())
    return "sentence" if len(clean) > _LONGEST_PHRASE or (words > 3 and _SENTENCE_END.search(clean)) else "short"


def find_answer(context: str, answer: Answer) -> Span:
    """The answer's place in its context: where the source says, or else at its only occurrence.

    Raises Unlocated when the text stands elsewhere, several times or not at all.
    """
    if answer.start >= 0 and context.startswith(answer.text, answer.start):
        return answer.start, answer.start + len(answer.text)
    return _find_only(context, answer.text, normalize_text(answer.text), normalize_text(answer.text, "NFD"))


def find_quoted(clean: str, answer: str) -> Span:
    """The only place of an answer without offset in a page's clean text: people quote what they read.

    The page itself may have tags and entities in it (``<b>42</b> km``), or have it once more where nobody reads it.
    Raises Unlocated when it reads so nowhere, or in several places.
    """
    return _find_only(clean, clean_html_text(answer), clean_page(answer, in_cell=True)[0])


def _find_only(text: str, *spellings: str) -> Span:
    """The only place of the first of an answer's spellings that occurs at all."""
    for spelling in dict.fromkeys(spellings):
        first = text.find(spelling) if spelling else -1
        if first >= 0:
            if text.find(spelling, first + 1) >= 0:
                raise Unlocated("answer_start is wrong or missing and the answer occurs more than once")
            return first, first + len(spelling)
    raise Unlocated("the answer is not in the context")


def clean_and_map(page: str, points: Sequence[Span]) -> tuple[str, list[Span | Unlocated]]:
    """Clean a page and map answers into it; each is where cleaning the answer alone gives the same text."""
    text, spans = clean_page(page, points)
    found: list[Span | Unlocated] = []
    for (start, stop), (first, last) in zip(points, spans, strict=True):
        fragment, answer = page[start:stop], text[first:last]
        if not answer:
            found.append(Unlocated("the answer is empty once cleaned"))
        elif clean_html_text(fragment) == answer or clean_page(fragment, in_cell=True)[0] == answer:
            found.append((first, last))
        else:
            found.append(Unlocated("the answer reads differently in the page than by itself"))
    return text, found
