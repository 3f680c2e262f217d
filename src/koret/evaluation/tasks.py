"""What is asked of a model: retrieval tasks made from a prepared data set.

Letters: Q queries, N corpus texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from koret.data.columns import read_column, read_lists, take_rows
from koret.data.keys import normalize_answer
from koret.data.passages import join_heading

if TYPE_CHECKING:
    from koret.data.loader import Dataset

Kind = Literal["passage", "answer"]
TITLES = {"passage": "question → passage", "answer": "question → answer"}


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, the texts they search, and which of those are right.

    In tasks built here, equal texts stand in the corpus once and equal questions are one query. ``groups`` says which
    queries stand or fall together: the article for KorQuAD, the query itself where nothing is known. ``excluded``
    lists the queries that cannot be scored as (query id, reason).
    """

    name: str
    query_ids: list[str]  # Q
    queries: list[str]  # Q
    corpus_ids: list[str]  # N
    corpus: list[str]  # N, as encoded, without the passage prefix
    relevant: list[np.ndarray]  # Q arrays of corpus rows, ascending
    groups: np.ndarray  # (Q,)
    corpus_articles: np.ndarray  # (N,) article of each text, -1 unknown
    excluded: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    question_rows: np.ndarray | None = None  # (Q,) rows in dataset.questions
    passage_rows: np.ndarray | None = None  # (N,) rows in dataset.passages

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ValueError(f"task '{self.name}': the corpus is empty, there is nothing to search")
        if not self.queries:
            reasons = _list_reasons(self.excluded) or "none given"
            raise ValueError(f"task '{self.name}': no query can be scored ({reasons})")

    @property
    def has_articles(self) -> bool:
        """Whether some article has several texts, so that finding the article is a question of its own."""
        known = self.corpus_articles[self.corpus_articles >= 0]
        return len(np.unique(known)) < len(known)

    def fingerprint(self) -> str:
        """sha256 over queries, corpus and relevance: equal for tasks whose scores may be compared."""
        digest = sha256()
        for text in (*self.queries, "", *self.corpus):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        for rows in self.relevant:
            digest.update(rows.tobytes() + b"\n")
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Counts for a report."""
        return {
            "name": self.name,
            "queries": len(self.queries),
            "corpus": len(self.corpus),
            "groups": len(np.unique(self.groups)),
            "relevant_per_query": float(np.mean([len(rows) for rows in self.relevant])),
            "excluded": [{"query": query, "reason": reason} for query, reason in self.excluded],
            "notes": self.notes,
            "fingerprint": self.fingerprint(),
        }


def build_task(
    dataset: Dataset, question_rows: np.ndarray, passage_rows: np.ndarray, kind: Kind, name: str | None = None
) -> RetrievalTask:
    """The given questions against the given passages, or against their own answers.

    ``passage``: relevant is every passage that holds part of an answer, and every passage with the same text.
    ``answer``: the corpus is the different answers of the given questions (spelling variants are one, as in
    ``keys.normalize_answer``) and ``passage_rows`` is not used.
    Questions that cannot be scored are excluded with their reason. Raises ValueError when nothing is left.
    """
    builders = {"passage": _find_passages, "answer": _find_answers}
    if kind not in builders:
        raise ValueError(f"kind must be passage or answer, not {kind!r}")
    question_rows = np.asarray(question_rows, np.int64)
    table = take_rows(dataset.questions, question_rows)
    ids, texts = table.column("id").to_pylist(), table.column("text").to_pylist()
    articles, keys = read_column(table, "article"), read_column(table, "question_key")
    corpus, found, reason = builders[kind](dataset, table, np.asarray(passage_rows, np.int64))
    queries: dict[int, tuple[int, set[int]]] = {}
    excluded: list[tuple[str, str]] = []
    for i, rows in enumerate(found):
        if not texts[i] or not texts[i].strip():
            excluded.append((ids[i], "empty question"))
        elif not rows:
            excluded.append((ids[i], reason[i]))
        else:
            queries.setdefault(int(keys[i]), (i, set()))[1].update(rows)
    repeated = len(question_rows) - len(excluded) - len(queries)
    kept = [i for i, _ in queries.values()]
    return RetrievalTask(
        name=name or TITLES[kind],
        query_ids=make_distinct([ids[i] for i in kept], "#"),
        queries=[texts[i] for i in kept],
        relevant=[np.array(sorted(rows), np.int64) for _, rows in queries.values()],
        groups=articles[kept],
        excluded=excluded,
        notes=[f"{repeated} repeated questions count once"] if repeated else [],
        question_rows=question_rows[kept],
        **corpus,
    )


def build_held_out_tasks(
    dataset: Dataset,
    train: np.ndarray,
    held_out: np.ndarray,
    kinds: Sequence[Kind] = ("passage", "answer"),
    *,
    corpus_size: int = 20_000,
    samples: int | None = None,
    seed: int = 42,
) -> list[RetrievalTask]:
    """Tasks over the questions of the held-out articles (rows of ``dataset.articles``).

    The corpus is every held-out passage, filled up with random passages of training articles to ``corpus_size``.
    ``samples`` scores that many random questions only.
    """
    rng = np.random.default_rng(seed)
    questions = np.flatnonzero(np.isin(read_column(dataset.questions, "article"), held_out))
    if samples is not None and samples < len(questions):
        questions = np.sort(rng.choice(questions, samples, replace=False))
    articles = read_column(dataset.passages, "article")
    passages = np.flatnonzero(np.isin(articles, held_out))
    others = np.flatnonzero(np.isin(articles, train))
    room = min(max(corpus_size - len(passages), 0), len(others))
    passages = np.sort(np.concatenate([passages, rng.choice(others, room, replace=False)]))
    return [build_task(dataset, questions, passages, kind) for kind in kinds]


def _find_passages(dataset: Dataset, questions: pa.Table, rows: np.ndarray) -> tuple[dict, list[set[int]], list[str]]:
    """Corpus fields, corpus rows of each question's gold, and why a question has none."""
    taken = take_rows(dataset.passages, rows)
    headings, texts = taken.column("heading").to_pylist(), taken.column("text").to_pylist()
    keys = read_column(taken, "text_key").tolist()
    first: dict[tuple[str, int], int] = {}  # one corpus text per heading and text
    for i, unit in enumerate(zip(headings, keys, strict=True)):
        first.setdefault(unit, i)
    kept = list(first.values())
    by_key: dict[int, list[int]] = {}
    for row, i in enumerate(kept):
        by_key.setdefault(keys[i], []).append(row)
    gold, all_keys = read_lists(questions, "gold"), read_column(dataset.passages, "text_key")
    found = [{row for key in all_keys[gold[q]].tolist() for row in by_key.get(key, ())} for q in range(len(gold))]
    reasons = ["its passage is not in the corpus" if rows.size else "no passage holds its answer" for rows in gold]
    corpus = {
        "corpus_ids": [f"p{row}" for row in rows[kept].tolist()],
        "corpus": [join_heading(headings[i], texts[i]) for i in kept],
        "corpus_articles": read_column(taken, "article")[kept],
        "passage_rows": rows[kept],
    }
    return corpus, found, reasons


def _find_answers(dataset: Dataset, questions: pa.Table, rows: np.ndarray) -> tuple[dict, list[set[int]], list[str]]:
    """As ``_find_passages``, with the questions' own answers as corpus."""
    places: dict[str, int] = {}
    texts: list[str] = []
    found: list[set[int]] = []
    for answers in questions.column("answers").to_pylist():
        own = set()
        for answer in answers or ():
            if answer and answer.strip():
                place = places.setdefault(normalize_answer(answer), len(texts))
                if place == len(texts):
                    texts.append(answer)
                own.add(place)
        found.append(own)
    corpus = {
        "corpus_ids": [f"a{i}" for i in range(len(texts))],
        "corpus": texts,
        "corpus_articles": np.full(len(texts), -1, np.int64),
    }
    return corpus, found, ["no answer text"] * len(found)


def name_apart(tasks: Sequence[RetrievalTask]) -> list[RetrievalTask]:
    """The tasks, none called as another: a repeated name gets its count, as in 'scifact #2'."""
    names = make_distinct([task.name for task in tasks], " #")
    return [task if task.name == name else replace(task, name=name) for task, name in zip(tasks, names, strict=True)]


def make_distinct(names: Sequence[str], mark: str) -> list[str]:
    """Names as they are, a repeated one with ``mark`` and its count behind it."""
    counts: dict[str, int] = {}
    taken, distinct = set(names), []
    for name in names:
        unlike, counts[name] = name, counts.get(name, 0) + 1
        while counts[name] > 1 and (unlike := f"{name}{mark}{counts[name]}") in taken:
            counts[name] += 1
        taken.add(unlike)
        distinct.append(unlike)
    return distinct


def _list_reasons(excluded: Sequence[tuple[str, str]]) -> str:
    reasons = [reason for _, reason in excluded]
    return ", ".join(f"{reasons.count(reason)} with {reason}" for reason in dict.fromkeys(reasons))
