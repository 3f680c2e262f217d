"""Hard negatives: what a model or BM25 ranks high for a question although it does not answer it.

Letters: Q questions, N passages of the training articles, K candidates a question.

DPR (Karpukhin et al. 2020, arXiv:2004.04906) takes them from BM25, ANCE (Xiong et al. 2020, arXiv:2007.00808) from the
model that is being trained. Many of the best-ranked passages do answer the question (RocketQA, Qu et al. 2020,
arXiv:2010.08191), so a candidate is dropped by what is known about it and by its score: NV-Retriever (Moreira et al.
2024, arXiv:2407.15831) keeps those below a share of the positive's score (``margin_relative``) or below it by an
amount (``margin_absolute``).
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from koret.data.columns import Csr, make_places, read_column, read_lists, take_rows
from koret.data.keys import fold_text, normalize_answer
from koret.data.loader import Dataset
from koret.data.passages import join_heading
from koret.data.prepare import LEAST_KNOWN
from koret.retrieval.encoder import TextEncoder
from koret.retrieval.exact import TopK
from koret.retrieval.lexical import LexicalIndex

Source = Literal["model", "bm25", "both"]
SOURCES = ("model", "bm25", "both")
PASSAGES_AT_ONCE, QUESTIONS_AT_ONCE = 8192, 512
SHINGLE, NEAR = 5, 0.6  # characters; share of the shorter text's shingles that makes two texts near duplicates

# Why a candidate is no negative, in the order of the tests.
KNOWN = "a known positive"
SKIPPED = "among the first that were to be skipped"
COPY = "a copy of a candidate before it"
MARGIN = "scores too close to the positive, or above it"
ANSWER = "holds the answer"
DUPLICATE = "nearly the positive's text"
BEYOND = "beyond the number asked for"
REASONS = (KNOWN, SKIPPED, COPY, MARGIN, ANSWER, DUPLICATE, BEYOND)


@dataclass(frozen=True)
class MiningSettings:
    """Where candidates come from and which are kept. Raises ValueError for numbers that cannot be meant."""

    source: Source = "model"
    depth: int = 50  # candidates a question, from each source
    per_question: int = 4  # negatives kept, best-ranked first
    skip_top: int = 0  # candidates passed over, known positives not counted
    margin_absolute: float | None = None
    margin_relative: float | None = 0.95

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("per_question", 1), ("skip_top", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"mining needs {name} of at least {least}, not {getattr(self, name)}")
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, not {self.source!r}")

    def find_limit(self, positive: float) -> float:
        """The highest score a negative may have beside a positive of this score; NaN stays NaN."""
        limits = [np.inf]
        if self.margin_absolute is not None:
            limits.append(positive - self.margin_absolute)
        if self.margin_relative is not None:
            limits.append(positive - (1 - self.margin_relative) * abs(positive))
        return float(np.min(limits))


@dataclass(frozen=True)
class Mined:
    """The negatives of Q questions, as rows of the data set, with the scores they were chosen by.

    Scores are cosines of the model, or BM25's where only BM25 was asked; NaN where none is known.
    """

    questions: np.ndarray  # (Q,) rows in dataset.questions, ascending
    positives: np.ndarray  # (Q,) rows in dataset.passages
    positive_scores: np.ndarray  # (Q,) float32
    negatives: Csr  # Q lists of rows in dataset.passages, best-ranked first
    scores: np.ndarray  # float32, of every entry of negatives.values
    sources: np.ndarray  # int8, of the same: place in SOURCES
    measure: Literal["cosine", "bm25"]
    report: dict[str, Any]  # counts: candidates = kept + what was dropped, by reason


def mine_negatives(
    dataset: Dataset,
    articles: np.ndarray,
    encoder: TextEncoder,
    settings: MiningSettings,
    *,
    questions: np.ndarray | None = None,
    progress: bool = False,
) -> Mined:
    """Negatives for the questions of ``articles`` (or those rows of them) among the passages of ``articles``.

    Passages are encoded and searched ``PASSAGES_AT_ONCE`` at a time, so memory holds the questions' vectors, one block
    and K candidates a question (with BM25 its index besides). The result depends on data, model and settings alone.
    """
    rows = _list_questions(dataset, articles) if questions is None else np.unique(questions)
    if not len(rows):
        raise ValueError("no question of the training articles has a passage that answers it: nothing can be mined for")
    passages = np.flatnonzero(np.isin(read_column(dataset.passages, "article"), articles))
    asked = dataset.questions.column("text").take(make_places(rows)).to_pylist()
    positives = read_column(dataset.questions, "best")[rows]
    lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if settings.source != "model":
        lists["bm25"] = _search_words(dataset, passages, asked, settings.depth)
    if settings.source == "bm25":
        found, scores = lists["bm25"]
        positive_scores = np.where(found == positives[:, None], scores, np.nan)
        positive_scores = np.nanmax(np.column_stack([positive_scores, np.full(len(rows), -np.inf)]), axis=1)
        positive_scores[np.isneginf(positive_scores)] = np.nan
    else:
        also = np.column_stack([positives, *([lists["bm25"][0]] if lists else [])])
        lists["model"], known = _search_vectors(dataset, passages, asked, also, encoder, settings.depth, progress)
        positive_scores = known[:, 0]
        if "bm25" in lists:
            lists["bm25"] = lists["bm25"][0], known[:, 1:]
    return _choose(dataset, rows, positives, positive_scores, lists, settings)


# ---------------------------------------------------------------- candidates


def _list_questions(dataset: Dataset, articles: np.ndarray) -> np.ndarray:
    """Rows of the questions of ``articles`` that say something and have a passage."""
    said = np.array([bool(text and text.strip()) for text in dataset.questions.column("text").to_pylist()], dtype=bool)
    own = np.isin(read_column(dataset.questions, "article"), articles)
    return np.flatnonzero(own & said & (read_column(dataset.questions, "best") >= 0))


def read_passages(dataset: Dataset, rows: np.ndarray) -> list[str]:
    """The texts of passages as they are encoded."""
    taken = take_rows(dataset.passages.select(["heading", "text"]), rows)
    return list(map(join_heading, taken.column("heading").to_pylist(), taken.column("text").to_pylist()))


def _search_words(
    dataset: Dataset, passages: np.ndarray, asked: list[str], depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """BM25's passages (Q, K), -1 where there is none, and their scores."""
    found, scores = LexicalIndex(read_passages(dataset, passages)).search(asked, depth)
    return np.where(found >= 0, passages[found], -1), scores


def _search_vectors(
    dataset: Dataset,
    passages: np.ndarray,
    asked: list[str],
    also: np.ndarray,
    encoder: TextEncoder,
    depth: int,
    progress: bool,
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """The model's passages and scores (Q, K), and its scores (Q, A) of the passages ``also`` (Q, A), NaN for -1."""
    vectors = encoder.encode(asked, "query", progress=progress)
    depth = min(depth, len(passages))
    heaps = [TopK(vectors[i : i + QUESTIONS_AT_ONCE], depth) for i in range(0, len(vectors), QUESTIONS_AT_ONCE)]
    order = np.argsort(also, axis=None, kind="stable")
    wanted, scores = also.ravel()[order], np.full(also.size, np.nan, np.float32)
    for start in range(0, len(passages), PASSAGES_AT_ONCE):
        rows = passages[start : start + PASSAGES_AT_ONCE]
        block = encoder.encode(read_passages(dataset, rows), "passage", progress=progress)
        longest = float(np.sqrt(np.einsum("nd,nd->n", block, block).max()))
        for best in heaps:
            best.add(block, rows, longest)
        here = slice(np.searchsorted(wanted, rows[0]), np.searchsorted(wanted, rows[-1], side="right"))
        at = np.minimum(np.searchsorted(rows, wanted[here]), len(rows) - 1)
        places = order[here][rows[at] == wanted[here]]
        at = at[rows[at] == wanted[here]]
        for i in range(0, len(places), PASSAGES_AT_ONCE):
            piece = slice(i, i + PASSAGES_AT_ONCE)
            left, right = vectors[places[piece] // also.shape[1]], block[at[piece]]
            scores[places[piece]] = np.einsum("nd,nd->n", left.astype(np.float64), right.astype(np.float64))
    found = np.concatenate([best.rows for best in heaps]), np.concatenate([best.scores for best in heaps])
    return (found[0], found[1].astype(np.float32)), scores.reshape(also.shape)


def _merge_lists(lists: dict[str, tuple[np.ndarray, np.ndarray]], i: int) -> Iterable[tuple[int, float, int]]:
    """(passage, score, place in SOURCES) of question ``i``: rank by rank, the model's first, each passage once."""
    ranked = {name: lists[name][0][i].tolist() for name in SOURCES if name in lists}
    scores = {name: lists[name][1][i].tolist() for name in ranked}
    held = [set(passages) for passages in ranked.values()]
    seen = {-1}
    for rank in range(max(map(len, ranked.values()))):
        for name, passages in ranked.items():
            if rank < len(passages) and passages[rank] not in seen:
                seen.add(passages[rank])
                common = len(held) == 2 and all(passages[rank] in other for other in held)
                yield passages[rank], scores[name][rank], SOURCES.index("both" if common else name)


# ---------------------------------------------------------------- which of them are negatives


def _choose(
    dataset: Dataset,
    rows: np.ndarray,
    positives: np.ndarray,
    positive_scores: np.ndarray,
    lists: dict[str, tuple[np.ndarray, np.ndarray]],
    settings: MiningSettings,
) -> Mined:
    judge = _Judge(dataset, settings)
    kept: list[list[tuple[int, float, int]]] = []
    counts: Counter[str] = Counter()
    for i, (row, positive, score) in enumerate(zip(rows.tolist(), positives.tolist(), positive_scores, strict=True)):
        chosen = []
        for candidate, reason in judge.examine(row, positive, float(score), _merge_lists(lists, i)):
            counts[reason or "kept"] += 1
            if reason is None:
                chosen.append(candidate)
        kept.append(chosen)
    values = [candidate for chosen in kept for candidate in chosen]
    report = {
        "questions": len(rows),
        "questions_without_negatives": sum(not chosen for chosen in kept),
        "candidates": sum(counts.values()),
        "kept": counts["kept"],
        "dropped": {reason: counts[reason] for reason in REASONS if counts[reason]},
    }
    return Mined(
        questions=rows,
        positives=positives,
        positive_scores=positive_scores.astype(np.float32),
        negatives=Csr.from_lists([[passage for passage, _, _ in chosen] for chosen in kept]),
        scores=np.array([score for _, score, _ in values], np.float32),
        sources=np.array([source for _, _, source in values], np.int8),
        measure="bm25" if settings.source == "bm25" else "cosine",
        report=report,
    )


class _Judge:
    """Says why a candidate is no negative of a question."""

    def __init__(self, dataset: Dataset, settings: MiningSettings) -> None:
        self.settings = settings
        self.texts, self.answers = dataset.passages.column("text"), dataset.questions.column("answers")
        self.passage_key = read_column(dataset.passages, "text_key")
        self.question_key = read_column(dataset.questions, "question_key")
        self.known: dict[int, set[int]] = defaultdict(set)  # question_key -> keys of the passages that answer it
        lists = read_lists(dataset.questions, "known")
        for row, key in enumerate(self.question_key.tolist()):
            self.known[key].update(self.passage_key[lists[row]].tolist())
        self.fold = functools.lru_cache(1 << 14)(lambda row: fold_text(self.texts[row].as_py()))
        self.shingle = functools.lru_cache(1 << 12)(lambda row: cut_shingles(self.fold(row)))

    def examine(
        self, question: int, positive: int, positive_score: float, candidates: Iterable[tuple[int, float, int]]
    ) -> Iterable[tuple[tuple[int, float, int], str | None]]:
        """Every candidate (passage, score, source) with the reason to drop it, or None."""
        known, seen = self.known[int(self.question_key[question])], set()
        folded = map(normalize_answer, self.answers[question].as_py() or ())
        answers = [answer for answer in folded if len(answer) >= LEAST_KNOWN]
        limit, passed, kept = self.settings.find_limit(positive_score), 0, 0
        for candidate in candidates:
            passage, score, _ = candidate
            key = int(self.passage_key[passage])
            reason = None
            if key in known:
                reason = KNOWN
            elif passed < self.settings.skip_top:
                passed, reason = passed + 1, SKIPPED
            elif key in seen:
                reason = COPY
            elif kept == self.settings.per_question:
                reason = BEYOND
            elif not score <= limit:
                reason = MARGIN
            elif any(answer in self.fold(passage) for answer in answers):
                reason = ANSWER
            elif measure_overlap(self.shingle(passage), self.shingle(positive)) >= NEAR:
                reason = DUPLICATE
            else:
                kept += 1
            seen.add(key)
            yield candidate, reason


def cut_shingles(text: str) -> frozenset[str]:
    """Every run of SHINGLE characters of a folded text; the whole of a shorter one."""
    return frozenset(text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1)))


def measure_overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared shingles as a share of the smaller set (containment, Broder 1997): a part of a text counts as the text."""
    return len(a & b) / min(len(a), len(b))
