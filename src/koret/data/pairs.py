"""Training pairs with everything known to be positive for them; the split by article.

A question has more positives than the one it is paired with: other passages with its answer, duplicates of
its passage, the targets of the same question asked twice or of questions with the same answer. None of them may
serve as a negative. They are kept as a relation between questions and texts, so that any batch, of any size
and from any process, can be masked by looking up ids.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

import numpy as np

from koret.data.columns import Csr, read_column, read_lists, take_rows
from koret.data.keys import normalize_answer, text_key
from koret.data.passages import join_heading

if TYPE_CHECKING:
    from koret.data.loader import Dataset

Positives = Literal["passage", "answer", "both"]


# ---- the split


def split_articles(dataset: Dataset, train_split: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the held-out articles (int64, ascending).

    Articles go to the same side when they have the same title, share a passage that answers a question, or
    share a question, in any chain. (Passages that answer nothing may be shared: a line such as "공식 웹사이트"
    would tie thousands of pages together.) About ``train_split`` of the articles that have questions are
    trained on. The same articles and seed give the same split, whatever the order of files and rows.
    Raises ValueError if nothing can be held out.
    """
    groups = _join_articles(dataset)
    asked = np.zeros(len(groups), dtype=np.int64)
    asked[read_column(dataset.questions, "article")] = 1
    weights = np.bincount(groups, weights=asked).astype(np.int64)
    if np.count_nonzero(weights) < 2:
        raise ValueError(
            "cannot hold out articles: all questions belong to one article, or to articles that share a title, "
            "passage or question; give data with at least two unrelated articles"
        )
    order = _order_groups(dataset, groups, seed)
    held_out = np.zeros(len(weights), dtype=bool)
    room_train, room_held = train_split * weights.sum(), (1 - train_split) * weights.sum()
    for group in order:
        held_out[group] = room_held > room_train
        if held_out[group]:
            room_held -= weights[group]
        else:
            room_train -= weights[group]
    asked_groups = [g for g in order if weights[g]]
    for side in (True, False):  # both sides need questions
        if all(held_out[g] != side for g in asked_groups):
            held_out[min(asked_groups[::-1], key=lambda g: weights[g])] = side
    chosen = held_out[groups]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def count_leaks(dataset: Dataset, train: np.ndarray, held_out: np.ndarray) -> dict[str, int]:
    """What both sides share: articles, titles, passages that answer a question, questions (number of keys)."""
    keys = _split_keys(dataset)
    leaks = {"articles": len(np.intersect1d(train, held_out))}
    for name, (articles, values) in keys.items():
        sides = [np.unique(values[np.isin(articles, side)]) for side in (train, held_out)]
        leaks[name] = len(np.intersect1d(*sides))
    return leaks


def assert_no_leak(dataset: Dataset, train: np.ndarray, held_out: np.ndarray) -> None:
    """Raise RuntimeError if training and held-out articles share anything ``count_leaks`` counts."""
    leaks = {name: count for name, count in count_leaks(dataset, train, held_out).items() if count}
    if leaks:
        found = ", ".join(f"{count} {name}" for name, count in leaks.items())
        raise RuntimeError(f"training and held-out articles share {found}: scores would be too good")


def _split_keys(dataset: Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each thing that must not be shared: (article rows, keys), one entry per occurrence."""
    titles = dataset.articles.column("title").to_pylist()
    named = np.array([i for i, title in enumerate(titles) if title and title.strip()], dtype=np.int64)
    title_keys = np.array([text_key(titles[i]) for i in named], dtype=np.int64)
    passage_keys = read_column(dataset.passages, "text_key")
    gold = np.unique(read_lists(dataset.questions, "gold").values)
    answering = np.flatnonzero(np.isin(passage_keys, passage_keys[gold]))
    return {
        "titles": (named, title_keys),
        "passages": (read_column(dataset.passages, "article")[answering], passage_keys[answering]),
        "questions": (read_column(dataset.questions, "article"), read_column(dataset.questions, "question_key")),
    }


def _join_articles(dataset: Dataset) -> np.ndarray:
    """Group number of every article: connected components over shared keys (union-find)."""
    parent = list(range(dataset.articles.num_rows))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for articles, keys in _split_keys(dataset).values():
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        for a, b in zip(articles[order[same]].tolist(), articles[order[same + 1]].tolist(), strict=True):
            parent[find(a)] = find(b)
    roots = [find(i) for i in range(len(parent))]
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def _order_groups(dataset: Dataset, groups: np.ndarray, seed: int) -> list[int]:
    """Group numbers in an order that depends on seed and content alone."""
    content = np.zeros(len(groups), dtype=np.uint64)
    titles = [text_key(title or "") for title in dataset.articles.column("title").to_pylist()]
    content += np.array(titles, dtype=np.int64).astype(np.uint64)
    for table, column in ((dataset.passages, "text_key"), (dataset.questions, "question_key")):
        np.add.at(content, read_column(table, "article"), read_column(table, column).astype(np.uint64))  # modulo 2**64
    least = np.full(groups.max() + 1, np.iinfo(np.uint64).max)
    np.minimum.at(least, groups, content)
    ranks = [blake2b(f"{seed} {key}".encode(), digest_size=8).digest() for key in least.tolist()]
    return sorted(range(len(least)), key=ranks.__getitem__)


# ---- pairs


@dataclass(frozen=True)
class PairTable:
    """P training pairs (question, target) over T different texts.

    Positives and hard negatives are ids of ``texts``; equal texts have one id. ``known`` lists per question group
    (equal questions) the texts that hold or are its answer, ``same_answer`` per answer group the targets of all
    questions with that answer.
    """

    queries: list[str]  # P
    targets: np.ndarray  # (P,) id of the pair's own positive
    texts: list[str]  # T, as encoded, without the passage prefix
    question: np.ndarray  # (P,) row in dataset.questions
    article: np.ndarray  # (P,) row in dataset.articles
    question_key: np.ndarray  # (P,)
    answer_key: np.ndarray  # (P,)
    question_group: np.ndarray  # (P,) list in known
    answer_group: np.ndarray  # (P,) list in same_answer
    known: Csr
    same_answer: Csr
    negatives: Csr  # per pair: curated hard negatives, those of equal questions among them
    skipped: dict[str, int]  # questions left out, by reason
    dropped_negatives: int  # curated negatives that are known positives
    positive_scores: np.ndarray | None = None  # (P,) float32, a teacher's score of (question, target); NaN: unknown
    negative_scores: np.ndarray | None = None  # float32, the same of every entry of negatives.values

    def __len__(self) -> int:
        return len(self.queries)

    def known_of(self, row: int) -> np.ndarray:
        """Ids of all texts that are never negatives of pair ``row``, ascending; its own target among them."""
        both = np.union1d(self.known[self.question_group[row]], self.same_answer[self.answer_group[row]])
        return np.setdiff1d(both, self.negatives[row])


def build_pairs(
    dataset: Dataset,
    articles: np.ndarray,
    positives: Positives = "passage",
    max_samples: int | None = None,
    seed: int = 42,
    mined: Csr | None = None,
) -> PairTable:
    """The pairs of the given articles, in the order of the data.

    ``positives``: a question's target is its best gold passage (heading and text), its reference answer, or both
    (two pairs). ``max_samples`` takes that many of the usable questions at random by ``seed``. Skipped, and counted:
    empty questions, questions without gold passage or without answer text where one is needed, and repeats of a pair
    (whose known positives and negatives are kept). ``mined`` lists, per row of ``dataset.questions``, passages that
    serve as hard negatives besides those the source names.
    """
    return _PairBuilder(dataset, np.asarray(articles), positives, mined).build(max_samples, seed)


def known_mask(
    table: PairTable, batch_rows: np.ndarray, batch_target_ids: np.ndarray, *, same_answer: bool = True
) -> np.ndarray:
    """(B, M) bool: True where text j is a known positive of pair i, so that it must not be a negative.

    Targets of other questions with the same answer are spared too; without ``same_answer`` they are not, and what is
    True is right for the question.
    ``batch_rows`` (B,) are pairs, ``batch_target_ids`` (M,) ids of ``table.texts`` (positives and hard negatives of
    the batch). A pair's own target is True as well: the loss keeps that column as the positive. Curated hard
    negatives of pair i are never True in row i.
    """
    batch_rows = np.asarray(batch_rows)
    ids, columns = np.unique(np.asarray(batch_target_ids), return_inverse=True)
    mask = np.zeros((len(batch_rows), len(ids)), dtype=bool)
    if ids.size == 0:
        return mask
    for lists, groups, positive in (
        (table.known, table.question_group[batch_rows], True),
        (table.same_answer if same_answer else None, table.answer_group[batch_rows], True),
        (table.negatives, batch_rows, False),
    ):
        if lists is None:
            continue
        rows, values = lists.take(groups)
        at = np.minimum(np.searchsorted(ids, values), len(ids) - 1)
        found = ids[at] == values
        mask[rows[found], at[found]] = positive
    return mask[:, columns.reshape(-1)]


class _PairBuilder:
    def __init__(self, dataset: Dataset, articles: np.ndarray, positives: Positives, mined: Csr | None) -> None:
        if positives not in ("passage", "answer", "both"):
            raise ValueError(f"positives must be passage, answer or both, not {positives!r}")
        self.dataset, self.positives = dataset, positives
        questions = dataset.questions
        self.rows = np.flatnonzero(np.isin(read_column(questions, "article"), articles))
        self.questions = take_rows(questions, self.rows)
        self.query = self.questions.column("text").to_pylist()
        answers = self.questions.column("answers").to_pylist()
        self.answers = [[a for a in row or () if a and a.strip()] for row in answers]
        self.question_key = read_column(self.questions, "question_key")
        self.answer_key = read_column(self.questions, "answer_key")
        self.best = read_column(self.questions, "best")
        self.known = read_lists(self.questions, "known")
        self.negatives = read_lists(self.questions, "negatives")
        if mined is not None:
            own = zip(self.rows.tolist(), range(len(self.rows)), strict=True)
            self.negatives = Csr.from_lists([np.concatenate([self.negatives[q], mined[row]]) for row, q in own])
        self.texts: dict[int, int] = {}  # text_key of what is encoded -> id
        self.strings: list[str] = []
        self.passage_ids: dict[int, int] = {}  # passage row -> text id
        self.answer_ids: dict[str, set[int]] = {}  # normalised answer -> text ids

    def build(self, max_samples: int | None, seed: int) -> PairTable:
        usable, skipped = self._select()
        if max_samples is not None and max_samples < len(usable):
            usable = np.sort(np.random.default_rng(seed).choice(usable, max_samples, replace=False))
        self.passage_ids = self._add_passages(usable)
        owner, targets = self._choose_targets(usable)
        question_group = np.unique(self.question_key[owner], return_inverse=True)[1]
        answer_group = self._group_answers(owner)
        known = self._find_known(owner, question_group, targets)
        negatives, dropped = self._collect_negatives(owner, question_group, known)
        pairs = np.unique(np.stack([question_group, targets]), axis=1, return_index=True)[1]
        pairs.sort()
        skipped["repeated pair"] = len(usable) - len(np.unique(owner[pairs]))
        at = owner[pairs]
        return PairTable(
            queries=[self.query[q] for q in at.tolist()],
            targets=targets[pairs],
            texts=self.strings,
            question=self.rows[at],
            article=read_column(self.questions, "article")[at],
            question_key=self.question_key[at],
            answer_key=self.answer_key[at],
            question_group=question_group[pairs],
            answer_group=answer_group[pairs],
            known=known,
            same_answer=Csr.from_groups(answer_group, targets),
            negatives=Csr.from_lists([negatives[g] for g in question_group[pairs].tolist()]),
            skipped={reason: count for reason, count in skipped.items() if count},
            dropped_negatives=dropped,
        )

    def _select(self) -> tuple[np.ndarray, Counter[str]]:
        skipped: Counter[str] = Counter()
        usable = []
        for q, text in enumerate(self.query):
            if not text or not text.strip():
                skipped["empty question"] += 1
            elif self.positives != "answer" and self.best[q] < 0:
                skipped["no passage holds the answer"] += 1
            elif self.positives != "passage" and not self.answers[q]:
                skipped["empty answer"] += 1
            else:
                usable.append(q)
        return np.array(usable, dtype=np.int64), skipped

    def _add(self, text: str) -> int:
        key = text_key(text)
        if key not in self.texts:
            self.texts[key] = len(self.strings)
            self.strings.append(text)
        return self.texts[key]

    def _add_passages(self, usable: np.ndarray) -> dict[int, int]:
        """Give ids to the passages that pairs use, in the order of the data: passage row -> text id."""
        rows = [self.negatives.take(usable)[1]]
        if self.positives != "answer":
            rows.append(self.best[usable])
        needed = np.unique(np.concatenate(rows))
        taken = take_rows(self.dataset.passages.select(["heading", "text"]), needed)
        texts = map(join_heading, taken.column("heading").to_pylist(), taken.column("text").to_pylist())
        return {row: self._add(text) for row, text in zip(needed.tolist(), texts, strict=True)}

    def _choose_targets(self, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(owner, target): the question and the text id of every pair, in the order of the data."""
        pairs: list[tuple[int, int]] = []
        for q in usable.tolist():
            if self.positives != "answer":
                pairs.append((q, self.passage_ids[int(self.best[q])]))
            if self.positives != "passage":
                answer = self.answers[q][0]
                pairs.append((q, self._add(answer)))
                self.answer_ids.setdefault(normalize_answer(answer), set()).add(pairs[-1][1])
        table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def _group_answers(self, owner: np.ndarray) -> np.ndarray:
        """Equal answers, equal group; a question without an answer text shares its group with no other."""
        nameless = np.array([not self.answers[q] for q in owner.tolist()], dtype=bool)
        labels = np.where(nameless, owner, self.answer_key[owner])
        return np.unique(np.stack([nameless, labels]), axis=1, return_inverse=True)[1].reshape(-1)

    def _find_known(self, owner: np.ndarray, question_group: np.ndarray, targets: np.ndarray) -> Csr:
        """Per question group, the ids of its own targets, its known passages and their duplicates, its answers."""
        passage_keys = read_column(self.dataset.passages, "text_key")
        ids_of_key = {key: {text_id} for key, text_id in self.texts.items()}
        for row, text_id in self.passage_ids.items():
            ids_of_key.setdefault(int(passage_keys[row]), set()).add(text_id)
        known: dict[int, set[int]] = {}
        for q, group, target in zip(owner.tolist(), question_group.tolist(), targets.tolist(), strict=True):
            found = known.setdefault(group, set())
            found.add(target)
            for key in passage_keys[self.known[q]].tolist():
                found |= ids_of_key.get(key, set())
            for answer in self.answers[q] if self.answer_ids else ():
                found |= self.answer_ids.get(normalize_answer(answer), set())
        return Csr.from_lists([sorted(known[group]) for group in range(len(known))])

    def _collect_negatives(
        self, owner: np.ndarray, question_group: np.ndarray, known: Csr
    ) -> tuple[dict[int, list[int]], int]:
        """Per question group, the curated negatives that are not known positives; how many were."""
        named: dict[int, dict[int, None]] = {}
        for q, group in zip(owner.tolist(), question_group.tolist(), strict=True):
            named.setdefault(group, {}).update((self.passage_ids[row], None) for row in self.negatives[q].tolist())
        kept = {}
        for group, ids in named.items():
            positive = set(known[group].tolist())
            kept[group] = [i for i in ids if i not in positive]
        return kept, sum(map(len, named.values())) - sum(map(len, kept.values()))
