"""Articles -> passages under a token budget, and which passages hold each answer (gold).

A page is read as lines (``markup`` writes them): ``## 절`` headings, ``- `` list items, table rows with `` | ``
between cells, a blank line between blocks. Lines are packed in order until the budget is full; a longer line
is cut at sentence ends, then at spaces, then hard. What is encoded is ``join_heading(heading, text)`` with the
heading path 제목 > 절 > 소절 of the passage's first line.

A new section starts a new passage once the current one is a third full. Smaller ones are packed together, because
a page of one-line sections would else become a page of one-line passages; the headings in between then stay in
``text`` as lines of their own, without their marks. Boundaries depend on the text and the budget only, never on
where answers are: an index cut around answers would give them away.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

TokenCounter = Callable[[Sequence[str]], list[int]]

RESERVED_TOKENS = 8  # special tokens (2) and the "passage: " prefix (2-4), with a little slack
LEAST_BUDGET = 16
PATH_SEPARATOR = " > "

_HEADING = re.compile(r"(#{2,6}) +(?=\S)")
_HEADING_MARK = re.compile(r"^#{2,6} +(?=\S)", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?。…])[\"'”’)\]]*\s+(?=\S)")
_WORD = re.compile(r"\S+")
_NO_LIMIT = 1 << 60


class Passage(msgspec.Struct, gc=False):
    """A stretch of an article: ``start`` and ``end`` are code points of the article's clean text.

    ``text`` is ``clean[start:end]`` without heading marks, after a repeated table header where a table was cut.
    ``tokens`` counts heading and text, without special tokens and prefix.
    """

    heading: str
    text: str
    start: int
    end: int
    tokens: int


class _Unit(msgspec.Struct, gc=False):
    """The smallest piece that is packed: a line, or a part of a line that is too long."""

    start: int
    end: int
    tokens: int
    path: tuple[str, ...]  # headings above it, the title first
    opens: tuple[str, ...] = ()  # headings between the unit before and this one
    header: tuple[int, int] | None = None  # span of its table's header row


def join_heading(heading: str, text: str) -> str:
    """What is encoded for a passage: the heading path on a line of its own, then the text."""
    return f"{heading}\n{text}" if heading else text


def estimate_tokens(texts: Sequence[str]) -> list[int]:
    """Tokens per text without a tokenizer: one per two characters, a little more than Korean subwords need."""
    return [(len(text) + 1) // 2 for text in texts]


def make_token_counter(tokenizer_json: Path | str) -> TokenCounter:
    """Count tokens with a ``tokenizer.json`` (no special tokens, no truncation).

    Raises ValueError naming the file if it is no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_json))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"cannot read tokenizer {tokenizer_json}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count_tokens(texts: Sequence[str]) -> list[int]:
        return [len(e.ids) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    return count_tokens


def split_article(
    title: str, text: str, *, html: bool, budget: int | None, count_tokens: TokenCounter, overlap: float = 0.0
) -> list[Passage]:
    """Cut one article's clean text (or one plain paragraph) into passages, in text order.

    ``budget`` is the model's length in tokens: special tokens, prefix, heading and text together stay within it;
    None keeps the text whole. Every non-blank character lies in a passage's span or, for heading lines, in the
    heading path of the passage that follows. ``overlap`` (share of the room, below 0.5) repeats the last
    sentences of a passage at the start of the next one of the same section; lines are then cut at sentence ends.
    Raises ValueError for a budget below 16 tokens or an overlap outside [0, 0.5).
    """
    if budget is not None and budget < LEAST_BUDGET:
        raise ValueError(f"a passage budget of {budget} tokens is too small: give at least {LEAST_BUDGET}")
    if not 0.0 <= overlap < 0.5:
        raise ValueError(f"passage overlap must be at least 0 and below 0.5, not {overlap}")
    if not text.strip():
        return []
    if budget is None and not html:
        return [Passage("", text, 0, len(text), count_tokens([text])[0])]
    return _Splitter(title if html else "", text, html, budget, count_tokens, overlap).split()


def find_gold(passages: Sequence[Passage], spans: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Passages that overlap any of the answer spans (ascending), and the one with the largest overlap.

    The first wins a tie. An answer no passage covers (a heading line) belongs to the passage that follows it,
    or else to the last one. No passages: ``([], -1)``.
    """
    if not passages or not spans:
        return [], -1
    overlaps = [max(min(p.end, end) - max(p.start, start) for start, end in spans) for p in passages]
    gold = [i for i, shared in enumerate(overlaps) if shared > 0]
    if not gold:
        following = bisect.bisect_left([p.start for p in passages], spans[0][1])
        gold = [min(following, len(passages) - 1)]
    return gold, max(gold, key=overlaps.__getitem__)


class _Splitter:
    """The work on one article. Token counts are asked for in batches and remembered; sums bound joined texts."""

    def __init__(
        self, title: str, text: str, html: bool, budget: int | None, count_tokens: TokenCounter, overlap: float
    ) -> None:
        self.text, self.html, self.overlap, self.count_tokens = text, html, overlap, count_tokens
        self.available = _NO_LIMIT if budget is None else budget - RESERVED_TOKENS
        self.counts: dict[str, int] = {}
        title = " ".join(title.split())
        self._count([title, PATH_SEPARATOR])
        while self.counts[title] > self.available // 4:
            title = title[: len(title) // 2].rstrip()
            self._count([title])
        self.root = (title,) if title else ()

    def split(self) -> list[Passage]:
        return [self._render(group) for group in self._pack(self._cut_long(self._read_units()))]

    # ---- lines -> units

    def _read_units(self) -> list[_Unit]:
        lines = list(self._read_lines())
        self._count([self.text[start:end] for start, end, _, _ in lines])
        levels = self._choose_headings(lines)
        units: list[_Unit] = []
        path: list[tuple[int, str]] = []
        opens: list[str] = []
        for (start, end, _, header), level in zip(lines, levels, strict=True):
            name = self._strip_mark(start, end)
            if level:
                path = [h for h in path if h[0] < level] + [(level, name)]
                opens.append(name)
            else:
                above = self.root + tuple(h[1] for h in path)
                tokens = self.counts[self.text[start:end]]
                units.append(_Unit(start, end, tokens, above, tuple(opens), header))
                opens = []
        return units

    def _read_lines(self) -> Iterator[tuple[int, int, int, tuple[int, int] | None]]:
        """(start, end, heading level or 0, span of the table header above it) of every line that is not blank."""
        block: list[tuple[int, int]] = []
        position = 0
        for line in self.text.split("\n"):
            body = line.strip()
            if body:
                start = position + line.index(body[0])
                block.append((start, start + len(body)))
            elif block:
                yield from self._read_block(block)
                block = []
            position += len(line) + 1
        yield from self._read_block(block)

    def _read_block(self, block: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, tuple[int, int] | None]]:
        header = self._find_table_header(block) if self.html else None
        for start, end in block:
            mark = _HEADING.match(self.text, start, end) if self.html else None
            below = header is not None and start > header[0]
            yield start, end, len(mark[1]) if mark else 0, header if below else None

    def _find_table_header(self, block: list[tuple[int, int]]) -> tuple[int, int] | None:
        """The first row with the most cells, if those are three or more: rows of two are label and value."""
        cells = [0 if self.text.startswith("- ", a) else self.text.count(" | ", a, b) + 1 for a, b in block]
        most = max(cells, default=0)
        return block[cells.index(most)] if most >= 3 else None

    def _choose_headings(self, lines: Sequence[tuple[int, int, int, tuple[int, int] | None]]) -> list[int]:
        """Heading level per line. A heading that would fill half the budget, or has nothing below, is a plain line."""
        self._count([self._strip_mark(start, end) for start, end, level, _ in lines if level])
        levels = []
        path: list[tuple[int, str]] = []
        for start, end, level, _ in lines:
            if level:
                longer = [h for h in path if h[0] < level] + [(level, self._strip_mark(start, end))]
                if self._count_path(self.root + tuple(h[1] for h in longer)) > self.available // 2:
                    level = 0
                else:
                    path = longer
            levels.append(level)
        following = 1  # as if a section of the highest level came after the end
        for i in range(len(levels) - 1, -1, -1):
            if levels[i] and following and following <= levels[i]:
                levels[i] = 0
            following = levels[i]
        return levels

    # ---- units -> units that fit

    def _cut_long(self, units: list[_Unit]) -> list[_Unit]:
        units = self._refine(units, self._cut_sentences, always=self.overlap > 0)
        units = self._refine(units, self._cut_words)
        while any(u.tokens > self._room(u.path) and u.end - u.start > 1 for u in units):
            units = self._refine(units, self._cut_half)
        return units

    def _refine(
        self, units: list[_Unit], cut: Callable[[int, int], list[tuple[int, int]]], always: bool = False
    ) -> list[_Unit]:
        spans = [
            cut(u.start, u.end) if always or u.tokens > self._room(u.path) else [(u.start, u.end)] for u in units
        ]
        self._count([self.text[a:b] for pieces in spans if len(pieces) > 1 for a, b in pieces])
        refined = []
        for unit, pieces in zip(units, spans, strict=True):
            if len(pieces) == 1:
                refined.append(unit)
                continue
            for k, (a, b) in enumerate(pieces):
                opens = unit.opens if k == 0 else ()
                refined.append(_Unit(a, b, self.counts[self.text[a:b]], unit.path, opens, unit.header))
        return refined

    def _cut_sentences(self, start: int, end: int) -> list[tuple[int, int]]:
        ends = [m.end() for m in _SENTENCE_END.finditer(self.text, start, end)]
        return list(zip([start, *ends], [*ends, end], strict=True))

    def _cut_words(self, start: int, end: int) -> list[tuple[int, int]]:
        return [m.span() for m in _WORD.finditer(self.text, start, end)]

    def _cut_half(self, start: int, end: int) -> list[tuple[int, int]]:
        middle = (start + end) // 2
        return [(start, middle), (middle, end)] if end - start > 1 else [(start, end)]

    # ---- units -> passages

    def _pack(self, units: list[_Unit]) -> Iterator[list[_Unit]]:
        group: list[_Unit] = []
        used = room = 0
        for unit in units:
            added = unit.tokens + sum(self.counts[name] for name in unit.opens)
            new_section = bool(unit.opens) and used * 3 >= room
            if group and not new_section and used + added <= room:
                group.append(unit)
                used += added
                continue
            if group:
                yield group
            room = self._room(unit.path)
            group = [] if new_section else self._repeat_last(group, unit, room)
            group.append(unit)
            used = sum(u.tokens for u in group) + self._count_header(group)
        if group:
            yield group

    def _repeat_last(self, group: list[_Unit], unit: _Unit, room: int) -> list[_Unit]:
        """The last units of ``group`` that the next passage begins with: about ``overlap * room`` tokens."""
        repeated: list[_Unit] = []
        tokens = 0
        for last in reversed(group[1:]):
            over = tokens + last.tokens + unit.tokens > room or tokens + last.tokens > room // 2
            if tokens >= self.overlap * room or over or last.path != unit.path:
                break
            repeated.insert(0, last)
            tokens += last.tokens
        return repeated

    def _count_header(self, group: list[_Unit]) -> int:
        """Tokens of the table header that is put before the group; 0 where there is none or no room for it."""
        first = group[0]
        if first.header is None:
            return 0
        tokens = self.counts[self.text[slice(*first.header)]]
        room = self._room(first.path)
        return tokens if tokens <= room // 4 and tokens + sum(u.tokens for u in group) <= room else 0

    def _render(self, group: list[_Unit]) -> Passage:
        first, last = group[0], group[-1]
        end = last.end
        while self.text[end - 1].isspace():
            end -= 1
        text = _HEADING_MARK.sub("", self.text[first.start : end]) if self.html else self.text[first.start : end]
        tokens = sum(u.tokens for u in group) + sum(self.counts[name] for u in group[1:] for name in u.opens)
        header_tokens = self._count_header(group)
        if first.header is not None and header_tokens:
            text = f"{self.text[slice(*first.header)]}\n{text}"
        tokens += header_tokens
        return Passage(PATH_SEPARATOR.join(first.path), text, first.start, end, tokens + self._count_path(first.path))

    # ---- counting

    def _strip_mark(self, start: int, end: int) -> str:
        return _HEADING_MARK.sub("", self.text[start:end])

    def _count(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.counts]
        if new:
            self.counts.update(zip(new, self.count_tokens(new), strict=True))

    def _count_path(self, path: tuple[str, ...]) -> int:
        return sum(self.counts[name] for name in path) + self.counts[PATH_SEPARATOR] * max(len(path) - 1, 0)

    def _room(self, path: tuple[str, ...]) -> int:
        return max(self.available - self._count_path(path), 1)
