"""The order of training: which pairs stand in which batch, fixed by seed, epoch and data alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from koret.data.pairs import PairTable

Batching = Literal["shuffle", "article"]
# Of a full batch under ``article`` batching, at most this share comes from one article, and from one passage.
ARTICLE_SHARE, PASSAGE_SHARE = 1 / 4, 1 / 8


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on."""

    number: int  # from 1
    epoch: int  # from 0
    batches: list[np.ndarray]  # rows of the pair table, one array a batch
    ends_epoch: bool


class Schedule:
    """Every pair once an epoch, in batches of ``batch_size`` and a last smaller one.

    ``batching`` is ``shuffle``, or ``article`` (see ``deal_articles``). A batch in which all pairs share one target
    and none has a curated negative teaches nothing: it is left out and its pairs are counted in ``dropped``; usually
    that is a last batch of one.
    """

    def __init__(
        self,
        table: PairTable,
        *,
        batch_size: int,
        epochs: int,
        seed: int,
        accumulate: int = 1,
        max_steps: int | None = None,
        batching: Batching = "shuffle",
    ) -> None:
        self.table, self.batch_size, self.seed, self.accumulate = table, batch_size, seed, accumulate
        self.batching = batching
        self.dropped = 0  # pairs, over all epochs
        self.steps_of_epoch: list[int] = []
        for epoch in range(epochs):
            batches, dropped = self.cut_epoch(epoch)
            self.steps_of_epoch.append(-(-len(batches) // accumulate))
            self.dropped += dropped
            if max_steps is not None and sum(self.steps_of_epoch) >= max_steps:
                break
        self.total = min(sum(self.steps_of_epoch), max_steps or sum(self.steps_of_epoch))

    def steps_after(self, done: int) -> Iterator[Step]:
        """Steps ``done + 1`` to ``total``."""
        number = 0
        for epoch, count in enumerate(self.steps_of_epoch):
            if number + count <= done:
                number += count
                continue
            batches, _ = self.cut_epoch(epoch)
            for first in range(0, len(batches), self.accumulate):
                number += 1
                if number > self.total:
                    return
                if number > done:
                    chosen = batches[first : first + self.accumulate]
                    yield Step(number, epoch, chosen, ends_epoch=first + self.accumulate >= len(batches))

    def epochs_done(self, step: int) -> float:
        """How many epochs lie behind after ``step`` steps, as a fraction."""
        for epoch, count in enumerate(self.steps_of_epoch):
            if step <= count:
                return epoch + step / count
            step -= count
        return float(len(self.steps_of_epoch))

    def find_mining(self, step: int, every: int | None) -> int:
        """How many epochs lie behind the last one that ended in mining, every so many; 0 before the first."""
        return int(self.epochs_done(step)) // every * every if every else 0

    def cut_epoch(self, epoch: int) -> tuple[list[np.ndarray], int]:
        """The usable batches of an epoch, and how many pairs are in none."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.batching == "article":
            order = deal_articles(self.table, self.batch_size, rng)
        else:
            order = rng.permutation(len(self.table))
        cuts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        batches = [rows for rows in cuts if self._has_negatives(rows)]
        return batches, len(order) - sum(map(len, batches))

    def _has_negatives(self, rows: np.ndarray) -> bool:
        targets = self.table.targets[rows]
        return bool((targets != targets[0]).any()) or bool(self.table.negatives.take(rows)[1].size)


def deal_articles(table: PairTable, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """All rows in an order in which questions of one article, and of one passage, stand together: (P,) int64.

    The passages of an article, in random order, are packed into hands of at most a quarter of a batch, a passage
    giving at most an eighth of a batch to a hand (the rest of its questions goes to another). The hands of an article
    are spread evenly over the epoch from a random start. So a batch holds about four articles or more, and eight
    passages or more, as far as the data has them, and most passages are encoded once for several questions.
    """
    hands, places = [], []
    for rows in _group(table.article, np.arange(len(table))):
        dealt = _pack(_cut_passages(table, rows, batch_size, rng), max(1, int(batch_size * ARTICLE_SHARE)))
        hands += dealt
        places += ((rng.random() + np.arange(len(dealt)) / len(dealt)) % 1).tolist()
    return np.concatenate([hands[i] for i in np.argsort(places, kind="stable")])


def _cut_passages(
    table: PairTable, rows: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[tuple[int, np.ndarray]]:
    """The rows of an article as (passage, at most an eighth of a batch of its rows), in random order."""
    most = max(1, int(batch_size * PASSAGE_SHARE))
    _, first, question = np.unique(table.question[rows], return_index=True, return_inverse=True)
    question = question.reshape(-1)
    target = table.targets[rows][first][question]  # an answer stands with the passage of its question
    _, at, same = np.unique(target, return_index=True, return_inverse=True)
    passage = at[same.reshape(-1)]  # numbered as they come: ids of texts change with the hard negatives
    order = np.argsort(rng.permutation(len(first))[question], kind="stable")
    pieces = []
    for number, own in enumerate(_group(passage[order], rows[order])):
        pieces += [(number, piece) for piece in np.array_split(own, -(-len(own) // most))]
    return [pieces[i] for i in rng.permutation(len(pieces))]


def _pack(pieces: list[tuple[int, np.ndarray]], most: int) -> list[np.ndarray]:
    """Consecutive pieces joined to about equal hands of at most ``most`` rows, two of one passage never."""
    total = sum(len(piece) for _, piece in pieces)
    enough = -(-total // -(-total // most))
    hands: list[list[np.ndarray]] = []
    passages: set[int] = set()
    for passage, piece in pieces:
        held = sum(map(len, hands[-1])) if hands else most
        if held >= enough or held + len(piece) > most or passage in passages:
            hands.append([])
            passages = set()
        hands[-1].append(piece)
        passages.add(passage)
    return [np.concatenate(hand) for hand in hands]


def _group(labels: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """``rows`` by their labels, ascending; the order within a group is kept."""
    order = np.argsort(labels, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(labels[order])) + 1)
