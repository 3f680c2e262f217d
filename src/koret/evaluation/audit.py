"""Leakage audit: what of an evaluation set a model has already seen in training, exactly or nearly.

A passage counts as seen when at least 80% of its 8-character pieces occur in one training passage (containment, so
that other passage borders do not hide it); a question when it shares 85% of its 4-character pieces with a training
question (Jaccard). Both searches are exact: a text with n pieces whose overlap reaches the threshold t must share one
of any n - ceil(t * n) + 1 of them (prefix filter; Chaudhuri, Ganti and Kaushik 2006), so only those are looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from koret.data.columns import make_places, read_column, read_lists, take_rows
from koret.data.keys import text_key
from koret.data.markup import normalize_text
from koret.evaluation.tasks import RetrievalTask

if TYPE_CHECKING:
    from koret.data.loader import Dataset

PASSAGE_PIECE, PASSAGE_SHARE = 8, 0.8
QUESTION_PIECE, QUESTION_SHARE = 4, 0.85
BATCH = 4096
LISTED = 20
_NOT_WORD = re.compile(r"\W+")


@dataclass(frozen=True)
class Texts:
    """One side of an audit; ``passages`` may be read more than once, in batches."""

    name: str
    titles: Sequence[str] = ()
    questions: Sequence[str] = ()
    passages: Sequence[str] = ()
    batches: Iterable[list[str]] | None = None  # instead of ``passages`` for a large side

    def read_passages(self) -> Iterator[list[str]]:
        if self.batches is not None:
            yield from self.batches
        for start in range(0, len(self.passages), BATCH):
            yield list(self.passages[start : start + BATCH])


@dataclass(frozen=True)
class Finding:
    """What one evaluated set shares with training: ``examples`` are (evaluated text, training text, share)."""

    where: str  # the evaluated set
    what: str  # titles | passages | questions
    same: int
    near: int  # not the same, but above the threshold
    checked: int
    examples: list[tuple[str, str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        listed = [{"evaluated": a, "training": b, "share": round(share, 3)} for a, b, share in self.examples]
        return {"where": self.where, "what": self.what, "same": self.same, "near": self.near, "checked": self.checked,
                "examples": listed}  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """All findings over all evaluated sets; clean when everything was compared and nothing is shared.

    ``unknown`` are the models whose training could not be compared: name -> reason, '' where they are no runs.
    """

    training: str
    findings: list[Finding]
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool | None:
        """None: nothing shared was found, but not everything was compared."""
        if any(finding.same or finding.near for finding in self.findings):
            return False
        return True if self.findings and not self.unknown else None

    @property
    def sentence(self) -> str:
        if self.clean is None:
            models = (self.unknown or {"this model": ""}).items()
            listed = [f"{name} was trained on is not known here" + (why and f" ({why})") for name, why in models]
            missing = "no whole leakage audit" if self.findings else "no leakage audit"
            return f"What {'; what '.join(listed)}, so these numbers cannot be called clean ({missing})."
        if self.clean:
            return f"Clean: training has seen none of {self._list(lambda f: f'{f.checked:,} {f.what}', self.findings)}."
        shared = [finding for finding in self.findings if finding.same or finding.near]
        seen = self._list(
            lambda f: f"{f.same + f.near:,} of {f.checked:,} {f.what} ({f.same:,} the same, {f.near:,} nearly)", shared
        )
        return f"NOT CLEAN: training has seen {seen}. Scores on seen texts say little about new ones."

    def _list(self, describe: Callable[[Finding], str], findings: Sequence[Finding]) -> str:
        """The findings in words, those of one evaluated set together."""
        sets = dict.fromkeys(finding.where for finding in findings)
        return "; ".join(f"{', '.join(describe(f) for f in findings if f.where == where)} of {where}" for where in sets)

    def to_dict(self) -> dict[str, Any]:
        return {"training": self.training, "clean": self.clean, "sentence": self.sentence, "unknown": {**self.unknown},
                "findings": [finding.to_dict() for finding in self.findings]}  # fmt: skip


def audit_overlap(training: Texts, evaluated: Sequence[Texts]) -> Audit:
    """Compare every evaluated set with what was trained on: titles, questions, passages."""
    findings = []
    for texts in evaluated:
        if texts.titles:
            findings.append(_compare_titles(training, texts))
        if texts.passages:
            matches = find_near(texts.passages, training.read_passages(), PASSAGE_PIECE, PASSAGE_SHARE)
            findings.append(_summarize(texts.name, "passages", texts.passages, matches))
        if texts.questions:
            seen = [list(training.questions)]
            matches = find_near(texts.questions, seen, QUESTION_PIECE, QUESTION_SHARE, symmetric=True)
            findings.append(_summarize(texts.name, "questions", texts.questions, matches))
    return Audit(training.name, findings)


def take_training(dataset: Dataset, articles: np.ndarray, name: str = "training") -> Texts:
    """Everything in the given articles: titles, questions, all passages (read in batches)."""
    rows = np.flatnonzero(np.isin(read_column(dataset.passages, "article"), articles))
    passages = dataset.passages.select(["text"])

    class Batches:
        def __iter__(self) -> Iterator[list[str]]:
            for start in range(0, len(rows), BATCH):
                yield take_rows(passages, rows[start : start + BATCH]).column(0).to_pylist()

    asked = np.isin(read_column(dataset.questions, "article"), articles)
    return Texts(
        name,
        titles=[title for title in dataset.articles.column("title").take(make_places(articles)).to_pylist() if title],
        questions=dataset.questions.column("text").take(make_places(np.flatnonzero(asked))).to_pylist(),
        batches=Batches(),
    )


def merge_texts(sides: Sequence[Texts]) -> Texts:
    """Several sides as one."""

    class Batches:
        def __iter__(self) -> Iterator[list[str]]:
            for side in sides:
                yield from side.read_passages()

    return Texts(
        " and ".join(dict.fromkeys(side.name for side in sides)),
        titles=[title for side in sides for title in side.titles],
        questions=[question for side in sides for question in side.questions],
        batches=Batches(),
    )


def take_evaluated(dataset: Dataset, articles: np.ndarray, name: str = "the held-out articles") -> Texts:
    """Titles and questions of the given articles, and the passages that answer those questions.

    Passages that answer nothing ("공식 웹사이트") may be shared: they cannot lift a score.
    """
    asked = np.flatnonzero(np.isin(read_column(dataset.questions, "article"), articles))
    questions = take_rows(dataset.questions, asked)
    gold = np.unique(read_lists(questions, "gold").values)
    return Texts(
        name,
        titles=[title for title in dataset.articles.column("title").take(make_places(articles)).to_pylist() if title],
        questions=questions.column("text").to_pylist(),
        passages=take_rows(dataset.passages.select(["text"]), gold).column(0).to_pylist(),
    )


def take_task(task: RetrievalTask) -> Texts:
    """A task's queries and the texts that are right for any of them."""
    gold = np.unique(np.concatenate(task.relevant))
    return Texts(task.name, questions=task.queries, passages=[task.corpus[row] for row in gold])


def find_near(
    texts: Sequence[str], seen: Iterable[list[str]], size: int, threshold: float, symmetric: bool = False
) -> dict[int, tuple[str, float]]:
    """For each of ``texts`` the most similar text of ``seen``, where it reaches ``threshold``: index -> (text, share).

    The share is |pieces of both| / |pieces of the text|, with ``symmetric`` / |pieces of either|; pieces are the
    different ``size``-character strings after NFKC, lower case, and without anything but letters and digits.
    ``seen`` comes in batches and is read once.
    """
    owner, pieces = _cut_pieces(texts, size)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(len(texts) + 1))
    own = [pieces[order[bounds[i] : bounds[i + 1]]] for i in range(len(texts))]
    lookup_owner, lookup = _choose_lookups(own, threshold)
    order = np.argsort(lookup, kind="stable")
    lookup_owner, lookup = lookup_owner[order], lookup[order]
    present = np.zeros(1 << 22, bool)  # a cheap first filter on 22 bits of the hash
    present[(lookup >> np.uint64(42)).astype(np.int64)] = True
    best: dict[int, tuple[str, float]] = {}
    for batch in seen:
        seen_owner, seen_pieces = _cut_pieces(batch, size)
        maybe = np.flatnonzero(present[(seen_pieces >> np.uint64(42)).astype(np.int64)])
        left = np.searchsorted(lookup, seen_pieces[maybe], "left")
        counts = np.searchsorted(lookup, seen_pieces[maybe], "right") - left
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pairs = np.stack([lookup_owner[np.repeat(left, counts) + inside], np.repeat(seen_owner[maybe], counts)], axis=1)
        starts = np.searchsorted(seen_owner, np.arange(len(batch) + 1))
        for i, j in np.unique(pairs, axis=0).tolist():
            theirs = seen_pieces[starts[j] : starts[j + 1]]
            both = len(np.intersect1d(own[i], theirs, assume_unique=True))
            share = both / (len(own[i]) + len(theirs) - both if symmetric else len(own[i]))
            if share >= threshold and share > best.get(i, ("", 0.0))[1]:
                best[i] = batch[j], share
    return best


def _choose_lookups(own: Sequence[np.ndarray], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(owner, piece): the rarest n - ceil(t * n) + 1 pieces of each text."""
    different, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *own]), return_counts=True)
    owners, chosen = [], []
    for i, pieces in enumerate(own):
        rare = np.argsort(counts[np.searchsorted(different, pieces)], kind="stable")
        needed = len(pieces) - math.ceil(threshold * len(pieces) - 1e-9) + 1
        chosen.append(pieces[rare[:needed]])
        owners.append(np.full(len(chosen[-1]), i))
    if not own:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    return np.concatenate(owners), np.concatenate(chosen)


def _cut_pieces(texts: Sequence[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(owner ascending, 64-bit hash) of each text's different pieces; a short text is one piece, an empty one none."""
    plain = [_NOT_WORD.sub("", normalize_text(text or "", "NFKC").lower()) for text in texts]
    padded = [text.ljust(size, "\0") if text else "" for text in plain]
    letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded], np.int64)
    owner = np.repeat(np.arange(len(padded)), lengths)
    place = np.arange(len(letters)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    begins = np.flatnonzero(place <= lengths[owner] - size)
    hashes = np.zeros(len(begins), np.uint64)
    for step in range(size):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + letters[begins + step] + np.uint64(1)
    hashes ^= hashes >> np.uint64(29)  # the high bits are the ones looked at first
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    owner = owner[begins]
    order = np.lexsort((hashes, owner))
    owner, hashes = owner[order], hashes[order]
    new = np.ones(len(owner), bool)
    new[1:] = (owner[1:] != owner[:-1]) | (hashes[1:] != hashes[:-1])
    return owner[new], hashes[new]


def _compare_titles(training: Texts, texts: Texts) -> Finding:
    seen = {text_key(title) for title in training.titles}
    shared = [title for title in texts.titles if text_key(title) in seen]
    examples = [(title, title, 1.0) for title in shared[:LISTED]]
    return Finding(texts.name, "titles", len(shared), 0, len(texts.titles), examples)


def _summarize(where: str, what: str, texts: Sequence[str], matches: dict[int, tuple[str, float]]) -> Finding:
    same = sum(text_key(texts[i]) == text_key(other) for i, (other, _) in matches.items())
    ranked = sorted(matches.items(), key=lambda match: (-match[1][1], match[0]))[:LISTED]
    examples = [(texts[i], other, share) for i, (other, share) in ranked]
    return Finding(where, what, same, len(matches) - same, len(texts), examples)
