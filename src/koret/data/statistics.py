"""What a data set contains: counts, lengths, kinds, duplicates, losses, and overlap with other sets.

Everything is read in Arrow batches; what is kept are counters, histograms and one 64-bit key per row, so memory
does not grow with the length of the texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from koret.data.columns import read_column, read_lists, take_rows
from koret.data.keys import text_key
from koret.data.passages import join_heading
from koret.data.statistics_report import format_tables, save_report
from koret.data.totals import find_split

if TYPE_CHECKING:
    from koret.data.loader import Dataset

__all__ = ["classify_question", "compute_statistics", "find_overlap", "format_tables", "save_report"]

BATCH_ROWS = 4096
ENCODED_TEXTS = 256  # at a time: what a tokenizer returns is a hundred times the text
TOKENIZED_PASSAGES = 20000  # lengths in tokens are measured on this many passages, evenly spread
QUANTILES = (5, 25, 50, 75, 90, 95, 99)

# The last question word of a question decides. Half of KorQuAD's questions have none and end in a noun with 은 or 는
# (..."을 쓴 사람은?"); there the noun tells what is asked for: nouns of one syllable as whole words, longer ones also
# at the end of a compound.
QUESTION_TYPES = {
    "무엇": r"무엇|무슨|뭐|뭘|뭔",
    "누구": r"누구|누가|누굴",
    "언제": r"언제|어느 (?:해|날|때)",
    "어디": r"어디|어딜|어딘",
    "몇/얼마": r"몇|얼마|얼만|며칠",
    "왜": r"왜(?![가-힣]{2})",
    "어떻게": r"어떻게|어찌",
    "어느": r"어느(?! (?:해|날|때))|어떤|어떠한",
}
OTHER_TYPE = "기타"
_NOUNS = {
    "누구": "분 왕 이 사람 인물 선수 감독 가수 배우 대통령 총리 작가 화가 작곡가 정치인 의원 교수 후보 아들 아내 남편",
    "언제": "해 날 때 년도 연도 날짜 시기 일자 시점 연월일",
    "어디": "곳 섬 나라 지역 장소 도시 국가 지방 출신지 소재지",
    "몇/얼마": "수 나이 개수 갯수 횟수 금액 액수 가격 시간 기간 용량 비율 높이 길이 면적 무게 거리 점수 인구 숫자 수량",
    "왜": "이유 까닭 원인 계기",
    "어떻게": "방법 방식 과정",
}
_WORDS = re.compile("|".join(f"(?P<t{i}>{pattern})" for i, pattern in enumerate(QUESTION_TYPES.values())))
_REASON = re.compile(r"(?:이유|까닭)[은는이가]?\s*(?:무엇|뭐)\S*\s*$")
_LAST_NOUN = re.compile(r"(\S+)[은는]\s*[?？.]*\s*$")
_TYPE_NAMES = list(QUESTION_TYPES)
_TYPE_OF_NOUN = {noun: name for name, nouns in _NOUNS.items() for noun in nouns.split()}


def classify_question(question: str) -> str:
    """What a question asks for: a key of QUESTION_TYPES, or 기타 where neither question word nor noun tells."""
    if _REASON.search(question):
        return "왜"
    found = [word.lastgroup for word in _WORDS.finditer(question)]
    if found:
        return _TYPE_NAMES[int(found[-1][1:])]
    ending = _LAST_NOUN.search(question)
    if not ending:
        return OTHER_TYPE
    noun = ending[1]
    compounds = (noun[-n:] for n in (3, 2) if len(noun) >= n)
    return next((_TYPE_OF_NOUN[word] for word in (noun, *compounds) if word in _TYPE_OF_NOUN), "무엇")


class Distribution:
    """An exact histogram of whole numbers >= 0: memory grows with the largest value only."""

    def __init__(self) -> None:
        self.counts = np.zeros(1, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        if len(values):
            more = np.bincount(np.asarray(values, dtype=np.int64))
            if len(more) > len(self.counts):
                more, self.counts = self.counts, more
            self.counts[: len(more)] += more

    def summarize(self, bins: int = 40) -> dict[str, Any]:
        """Count, mean, quantiles (nearest rank) and a histogram; beyond the 99th percentile is one bin."""
        total = int(self.counts.sum())
        if not total:
            return {"count": 0}
        running = np.cumsum(self.counts)

        def find_quantile(percent: float) -> int:
            return int(np.searchsorted(running, max(np.ceil(total * percent / 100), 1)))

        present = np.flatnonzero(self.counts)
        values = np.arange(len(self.counts))
        return {
            "count": total,
            "mean": float((values * self.counts).sum() / total),
            "min": int(present[0]),
            **{f"p{q}": find_quantile(q) for q in QUANTILES},
            "max": int(present[-1]),
            "histogram": self._bin(int(present[0]), find_quantile(99), bins),
        }

    def _bin(self, low: int, high: int, bins: int) -> dict[str, list[int]]:
        step = max(-(-(high - low + 1) // bins), 1)
        edges = list(range(low, high + step + 1, step))
        counts = [int(self.counts[a:b].sum()) for a, b in zip(edges, edges[1:], strict=False)]
        return {"edges": edges, "counts": counts, "beyond": int(self.counts[edges[-1] :].sum())}


def compute_statistics(
    dataset: Dataset,
    tokenizer: str | Path | None = None,
    max_seq_length: int = 256,
    others: Mapping[str, Dataset] | None = None,
) -> dict[str, Any]:
    """Everything ``koret stats`` shows, as plain JSON values.

    ``tokenizer`` is a ``tokenizer.json``: lengths in tokens, the share of unknown tokens, and truncation at
    ``max_seq_length`` are measured with it. ``others`` are data sets to look for overlap with, by name.
    """
    articles, passages, questions = dataset.articles, dataset.passages, dataset.questions
    per_article = np.bincount(read_column(questions, "article"), minlength=articles.num_rows)
    gold = read_lists(questions, "gold")
    types: Counter[str] = Counter()
    for texts in _read_texts(questions, "text"):
        types.update(map(classify_question, texts))
    found = {
        "counts": {
            "articles": articles.num_rows,
            "passages": passages.num_rows,
            "questions": questions.num_rows,
            "articles with questions": int(np.count_nonzero(per_article)),
            "pages (HTML)": int(pc.sum(articles.column("html").cast(pa.int64())).as_py() or 0),
            "answers in more than one passage": int(np.count_nonzero(np.diff(gold.offsets) > 1)),
        },
        "question_types": {name: types[name] for name in [*QUESTION_TYPES, OTHER_TYPE]},
        "answer_kinds": _count_values(questions, "answer_kind"),
        "lengths": {"characters": _measure_characters(dataset)},
        "questions_per_article": _summarize(per_article),
        "passages_per_article": _summarize(read_column(articles, "passage_count")),
        "duplicates": _find_duplicates(dataset),
        "losses": dict(dataset.report.get("reasons", {})),
        "moved_answers": dataset.report.get("moved_answers", 0),
        "wide_answers": dataset.report.get("wide_answers", 0),
        "tokens": None,
        "overlap": {name: find_overlap(dataset, other) for name, other in (others or {}).items()},
    }
    if tokenizer is not None:
        found["lengths"]["tokens"], found["tokens"] = _measure_tokens(dataset, Path(tokenizer), max_seq_length)
    return found


def find_overlap(dataset: Dataset, other: Dataset) -> dict[str, Any]:
    """The leakage audit: how many of ``dataset``'s titles, passages and questions occur in ``other``.

    Equal means equal after NFC and white-space normalisation. ``files`` says in which of the set's files the shared
    questions are, ``splits`` how many of each of its splits are in each split of the other: (split, other's, number).
    A question asked in two splits of the other counts in both. A file of no official split stands for itself.
    """
    titles = [{text_key(t) for part in _read_texts(d.articles, "title") for t in part if t} for d in (dataset, other)]
    shared_passages = np.isin(read_column(dataset.passages, "text_key"), read_column(other.passages, "text_key"))
    keys, other_keys = (read_column(d.questions, "question_key") for d in (dataset, other))
    shared = np.isin(keys, other_keys)
    matching = np.isin(other_keys, keys)
    elsewhere: dict[int, set[str]] = {}
    for key, split in zip(other_keys[matching].tolist(), _list_splits(other, matching), strict=True):
        elsewhere.setdefault(key, set()).add(split)
    own = zip(keys[shared].tolist(), _list_splits(dataset, shared), strict=True)
    splits = Counter((split, there) for key, split in own for there in elsewhere[key])
    return {
        "titles": len(titles[0] & titles[1]),
        "passages": int(shared_passages.sum()),
        "questions": int(shared.sum()),
        "of": {"titles": len(titles[0]), "passages": len(shared_passages), "questions": len(shared)},
        "files": dict(Counter(_list_sources(dataset, shared)).most_common()),
        "splits": [[here, there, count] for (here, there), count in splits.most_common()],
    }


# ---- parts


def _list_sources(dataset: Dataset, questions: np.ndarray) -> list[str]:
    """The source of each of the questions a mask (Q,) chooses."""
    names = dataset.articles.column("source").to_pylist()
    return [names[article] or "" for article in read_column(dataset.questions, "article")[questions].tolist()]


def _list_splits(dataset: Dataset, questions: np.ndarray) -> list[str]:
    """The official split, or else the file, of each of the questions a mask (Q,) chooses."""
    versions = {source["name"]: source["version"] for source in dataset.report.get("sources", ())}
    sources = _list_sources(dataset, questions)
    names = {}
    for name in dict.fromkeys(sources):
        split = find_split(name, versions.get(name, ""))
        names[name] = f"KorQuAD {' '.join(split)}" if split else name.partition("!")[0]
    return [names[name] for name in sources]


def _read_texts(table: pa.Table, column: str) -> Iterator[list[str]]:
    for batch in table.select([column]).to_batches(max_chunksize=BATCH_ROWS):
        yield [text or "" for text in batch.column(0).to_pylist()]


def _summarize(values: np.ndarray) -> dict[str, Any]:
    distribution = Distribution()
    distribution.add(values)
    return distribution.summarize()


def _count_values(table: pa.Table, column: str) -> dict[str, int]:
    counts = Counter()
    for batch in table.select([column]).to_batches(max_chunksize=BATCH_ROWS):
        counts.update(batch.column(0).to_pylist())
    return dict(counts.most_common())


def _measure_characters(dataset: Dataset) -> dict[str, dict[str, Any]]:
    measured = {name: Distribution() for name in ("question", "answer", "context", "passage")}
    for batch in dataset.questions.select(["text", "answers"]).to_batches(max_chunksize=BATCH_ROWS):
        measured["question"].add(pc.utf8_length(batch.column("text")).to_numpy(zero_copy_only=False))
        first = [answers[0] for answers in batch.column("answers").to_pylist() if answers]
        measured["answer"].add(np.array([len(answer) for answer in first], dtype=np.int64))
    for batch in dataset.passages.select(["text"]).to_batches(max_chunksize=BATCH_ROWS):
        measured["passage"].add(pc.utf8_length(batch.column("text")).to_numpy(zero_copy_only=False))
    measured["context"].add(read_column(dataset.articles, "characters"))
    return {name: distribution.summarize() for name, distribution in measured.items()}


def _find_duplicates(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Per kind of text: rows that repeat an earlier one, texts that occur more than once, and the most frequent."""
    found = {}
    for name, table, key, column in (
        ("questions", dataset.questions, "question_key", "text"),
        ("passages", dataset.passages, "text_key", "text"),
        ("answers", dataset.questions, "answer_key", "answers"),
    ):
        keys, first, counts = np.unique(read_column(table, key), return_index=True, return_counts=True)
        top = [i for i in np.argsort(-counts, kind="stable")[:10] if counts[i] > 1]
        texts = take_rows(table.select([column]), first[top]).column(0).to_pylist() if top else []
        examples = [(t[0] if t else "") if column == "answers" else t for t in texts]
        found[name] = {
            "repeats": int(counts.sum() - len(keys)),
            "repeated_texts": int(np.count_nonzero(counts > 1)),
            "most_frequent": [[text[:80], int(counts[i])] for text, i in zip(examples, top, strict=True)],
        }
    return found


def _measure_tokens(
    dataset: Dataset, path: Path, max_seq_length: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Lengths in tokens (special tokens and prefix included), unknown tokens, truncation."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counter = _TokenCounter(tokenizer, max_seq_length)
    for texts in _read_texts(dataset.questions, "text"):
        counter.count("question", (f"query: {text}" for text in texts))
    for batch in dataset.questions.select(["answers"]).to_batches(max_chunksize=BATCH_ROWS):
        counter.count("answer", (f"passage: {a[0]}" for a in batch.column(0).to_pylist() if a))
    step = max(-(-dataset.passages.num_rows // TOKENIZED_PASSAGES), 1)
    rows = np.arange(0, dataset.passages.num_rows, step)
    for start in range(0, len(rows), BATCH_ROWS):
        part = take_rows(dataset.passages.select(["heading", "text"]), rows[start : start + BATCH_ROWS])
        texts = map(join_heading, part.column("heading").to_pylist(), part.column("text").to_pylist())
        counter.count("passage", (f"passage: {text}" for text in texts))
    lengths = counter.lengths.items()
    return {name: d.summarize() for name, d in lengths}, {
        "tokenizer": str(path),
        "max_seq_length": max_seq_length,
        "passages_measured": len(rows),
        "unknown_token_share": counter.share(counter.unknown, counter.tokens),
        "unknown_word_share": counter.share(counter.unknown_words, counter.words),
        "truncated": {name: counter.share(counter.truncated[name], int(d.counts.sum())) for name, d in lengths},
    }


class _TokenCounter:
    """Sums over encoded texts; a word is what the tokenizer's pre-tokenizer calls one."""

    def __init__(self, tokenizer: Any, max_seq_length: int) -> None:
        self.tokenizer, self.limit = tokenizer, max_seq_length
        self.unknown_id = next((i for name in ("[UNK]", "<unk>") if (i := tokenizer.token_to_id(name)) is not None), -1)
        self.lengths = {name: Distribution() for name in ("question", "answer", "passage")}
        self.truncated: Counter[str] = Counter()
        self.tokens = self.unknown = self.words = self.unknown_words = 0

    def count(self, name: str, texts: Iterable[str]) -> None:
        texts = iter(texts)
        while some := list(islice(texts, ENCODED_TEXTS)):
            self._add(name, self.tokenizer.encode_batch(some))

    def _add(self, name: str, encodings: list[Any]) -> None:
        lengths = np.array([len(e.ids) for e in encodings], dtype=np.int64)
        self.lengths[name].add(lengths)
        self.truncated[name] += int((lengths > self.limit).sum())
        self.tokens += int(lengths.sum())
        for e in encodings:
            words = e.word_ids
            self.words += (max((w for w in words if w is not None), default=-1)) + 1
            if self.unknown_id in e.ids:
                unknown = [w for i, w in zip(e.ids, words, strict=True) if i == self.unknown_id]
                self.unknown += len(unknown)
                self.unknown_words += len(set(unknown))

    @staticmethod
    def share(part: int, whole: int) -> float:
        return part / whole if whole else 0.0
