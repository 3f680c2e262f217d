"""Many files in parallel, in bounded memory -> a prepared data set on disk, memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

ARTICLES = pa.schema(
    [
        ("title", pa.string()),
        ("url", pa.string()),
        ("source", pa.string()),  # file, or zip!member
        ("first_passage", pa.int64()),  # its passages are rows first_passage .. first_passage + passage_count - 1
        ("passage_count", pa.int32()),
        ("characters", pa.int64()),  # of clean text
        ("html", pa.bool_()),
    ]
)
PASSAGES = pa.schema(
    [
        ("article", pa.int64()),  # row in ARTICLES
        ("heading", pa.string()),  # 제목 > 절, empty for ready-made paragraphs
        ("text", pa.string()),  # what is encoded is heading + newline + text (passages.join_heading)
        ("start", pa.int64()),  # code points in the article's clean text (in the paragraph for plain ones)
        ("end", pa.int64()),
        ("tokens", pa.int32()),  # by the tokenizer the set was prepared with, heading included; -1 unknown
        ("text_key", pa.int64()),  # hash of the normalised text: equal texts have equal keys
    ]
)
QUESTIONS = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("article", pa.int64()),
        ("answers", pa.list_(pa.string())),  # clean texts, the first is the reference answer
        ("answer_kind", pa.string()),  # short | sentence | list | table
        ("gold", pa.list_(pa.int64())),  # every passage that overlaps an answer, ascending
        ("best", pa.int64()),  # the one with the largest overlap
        ("known", pa.list_(pa.int64())),  # gold plus same-article passages containing an answer text: never negatives
        ("negatives", pa.list_(pa.int64())),  # passages the source names as hard negatives
        ("question_key", pa.int64()),  # hash of the normalised question
        ("answer_key", pa.int64()),  # hash of the normalised reference answer
        ("answer_start", pa.int64()),  # in the article's clean text (paragraph's for plain ones); -1 unknown
        ("answer_end", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: three tables joined by row number, and the account of how they came to be.

    The tables follow the schemas ARTICLES, PASSAGES and QUESTIONS of this module and may be memory-mapped.
    """

    articles: pa.Table
    passages: pa.Table
    questions: pa.Table
    fingerprint: str  # sha256 over sources and settings
    report: dict = field(default_factory=dict)  # counts per file, kept, rejected by reason
    directory: Path | None = None
