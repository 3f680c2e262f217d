"""The questions of an evaluation set: examples, completions, and which passages answer each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from koret.data.columns import take_rows
from koret.data.markup import normalize_text
from koret.evaluation.tasks import RetrievalTask

if TYPE_CHECKING:
    from koret.data.loader import Dataset

EXAMPLES = 6
Unit = tuple[str, str]  # heading and text of a passage, spaces folded


class Question(msgspec.Struct, frozen=True):
    id: str
    text: str
    answers: tuple[str, ...]
    gold: frozenset[Unit]  # the passages that hold its answer


class Questions:
    """Questions by their text, compared without regard to case, spaces and how jamo are composed."""

    def __init__(self, questions: Sequence[Question] = ()) -> None:
        self._all = list(questions)
        self._folded = [fold(question.text) for question in self._all]
        self._places = {text: place for place, text in reversed(list(enumerate(self._folded)))}

    def __len__(self) -> int:
        return len(self._all)

    def find(self, text: str) -> Question | None:
        """The question asked in these words."""
        place = self._places.get(fold(text))
        return None if place is None else self._all[place]

    def complete(self, text: str, most: int = 8) -> list[str]:
        """Questions that contain ``text``, those that begin with it first."""
        wanted = fold(text)
        if not wanted:
            return []
        begin, contain = [], []
        for folded, question in zip(self._folded, self._all, strict=True):
            if folded.startswith(wanted):
                begin.append(question.text)
            elif len(contain) < most and wanted in folded:
                contain.append(question.text)
            if len(begin) == most:
                break
        return list(dict.fromkeys([*begin, *contain]))[:most]

    def pick_examples(self) -> list[str]:
        """A few short questions from all over the set, the same ones every time."""
        short = [question.text for question in self._all if len(question.text) <= 40] or [q.text for q in self._all]
        step = max(1, len(short) // EXAMPLES)
        return list(dict.fromkeys(short[step // 2 :: step]))[:EXAMPLES]


def take_questions(dataset: Dataset, task: RetrievalTask) -> Questions:
    """The questions a task asks, with their answers and every passage that counts as right."""
    rows = take_rows(dataset.questions, task.question_rows)
    passages = take_rows(dataset.passages, task.passage_rows)
    headings, texts = passages.column("heading").to_pylist(), passages.column("text").to_pylist()
    units = [make_unit(*unit) for unit in zip(headings, texts, strict=True)]
    answers = rows.column("answers").to_pylist()
    return Questions(
        [
            Question(id_, text, tuple(own or ()), frozenset(units[row] for row in relevant))
            for id_, text, own, relevant in zip(task.query_ids, task.queries, answers, task.relevant, strict=True)
        ]
    )


@functools.lru_cache(20_000)  # the same passages come up again and again
def make_unit(heading: str, text: str) -> Unit:
    """What makes two passages one: heading and text without regard to spaces."""
    return " ".join(heading.split()), " ".join(text.split())


def fold(text: str) -> str:
    return " ".join(normalize_text(text).casefold().split())
