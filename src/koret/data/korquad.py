"""Read KorQuAD 1.0, 2.0, 2.1 and SQuAD JSON, and JSONL pairs, as article records."""

from __future__ import annotations

import msgspec


class Answer(msgspec.Struct, frozen=True, gc=False):
    """One gold answer: its text and where it starts in the article's context (code points, -1 unknown)."""

    text: str
    start: int = -1


class Question(msgspec.Struct, frozen=True, gc=False):
    """One question with every gold answer the source gives it.

    ``paragraph`` is the index of the context it was asked about (0 for KorQuAD 2.x, whose articles have one).
    ``negatives`` are texts a JSONL source names as hard negatives.
    """

    id: str
    text: str
    answers: tuple[Answer, ...]
    paragraph: int = 0
    negatives: tuple[str, ...] = ()


class Article(msgspec.Struct, frozen=True, gc=False):
    """One article: HTML pages have one context, SQuAD-style articles one per paragraph.

    ``html`` says whether the contexts are markup (KorQuAD 2.x) or plain text.
    ``source`` names the file (and zip member) and ``position`` the record inside it, for messages and rejects.
    """

    title: str
    contexts: tuple[str, ...]
    questions: tuple[Question, ...]
    html: bool
    url: str = ""
    source: str = ""
    position: int = 0
