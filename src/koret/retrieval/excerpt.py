"""Which words of a passage a query found, and the part of a long passage around them, for people to read."""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[int, int]  # code points
_WORD = re.compile(r"\w+")
_ENDING = 2  # characters that a particle or ending may differ in
_LONGEST_QUERY = 200  # words; more mark everything


def mark_words(query: str, text: str) -> list[Span]:
    """The stretches of ``text`` that match words of ``query``, ascending, not overlapping.

    A word matches where at least two characters and all but the last two of it begin a word of the text, so that
    particles and endings may differ (수도는, 수도가); from three characters on also inside one (대학교에, 서울대학교).
    Words of one character match themselves only.
    """
    words = list(dict.fromkeys(_WORD.findall(query.lower())))[:_LONGEST_QUERY]
    lowered = text.lower()
    if len(lowered) != len(text):  # a few letters change length with their case
        lowered = text
    spans = []
    for found in _WORD.finditer(lowered):
        best = max((_match(word, found[0]) for word in words), key=lambda span: span[1] - span[0], default=(0, 0))
        if best[1] > best[0]:
            spans.append((found.start() + best[0], found.start() + best[1]))
    return spans


def _match(word: str, other: str) -> Span:
    """The part of ``other`` that ``word`` matches; empty where it does not."""
    if len(word) == 1:
        return (0, 1) if word == other else (0, 0)
    shared = 0
    while shared < min(len(word), len(other)) and word[shared] == other[shared]:
        shared += 1
    if shared >= max(2, len(word) - _ENDING):
        return 0, shared
    stem = word[: max(3, len(word) - 1)]
    place = other.find(stem) if len(word) >= 3 else -1
    return (place, place + len(stem)) if place >= 0 else (0, 0)


def cut_excerpt(text: str, spans: Sequence[Span], length: int = 300) -> tuple[int, int]:
    """Start and end of the ``length`` characters of ``text`` that hold the most of ``spans``, cut at spaces."""
    if len(text) <= length:
        return 0, len(text)
    starts = [max(0, min(start - length // 5, len(text) - length)) for start, _ in spans] or [0]
    start = max(starts, key=lambda s: sum(b - a for a, b in spans if s <= a and b <= s + length))
    end = min(start + length, len(text))
    if start:
        gap = re.compile(r"\s").search(text, start, min(start + length // 5, end))
        start = gap.end() if gap else start
    if end < len(text):
        cut = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
        end = cut if cut > start + length // 2 else end
    return start, end
