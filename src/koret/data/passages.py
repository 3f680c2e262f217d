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

from koret.data.native import scan

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
    level: int = 0  # 2-6: a heading, which is not packed
    tokens: int = 0
    header: _Unit | None = None  # the header row above it in its table
    path: tuple[str, ...] = ()  # headings above it, the title first
    room: int = 0  # tokens a passage has below that path
    opens: tuple[str, ...] = ()  # headings between the unit before and this one


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
    first, last = min([start for start, _ in spans]), max([end for _, end in spans])
    near = [i for i, p in enumerate(passages) if p.start < last and first < p.end]
    overlaps = {
        i: max([min(passages[i].end, end) - max(passages[i].start, start) for start, end in spans]) for i in near
    }
    gold = [i for i in near if overlaps[i] > 0]
    if not gold:
        following = bisect.bisect_left([p.start for p in passages], spans[0][1])
        gold = [min(following, len(passages) - 1)]
        return gold, gold[0]
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
        lines, texts = self._read_lines()
        names = {i: texts[i][line.level :].lstrip() for i, line in enumerate(lines) if line.level}
        counts = self.count_tokens([*texts, *names.values()])
        for line, tokens in zip(lines, counts, strict=False):
            line.tokens = tokens
        self.counts.update(zip(names.values(), counts[len(lines) :], strict=True))
        self._choose_headings(lines, names)
        units: list[_Unit] = []
        levels: list[tuple[int, str]] = []
        path, room, opens = self.root, self._count_room(self.root), ()
        for i, line in enumerate(lines):
            if line.level:
                levels = [h for h in levels if h[0] < line.level] + [(line.level, names[i])]
                path = self.root + tuple([h[1] for h in levels])
                room = self._count_room(path)
                opens += (names[i],)
            else:
                line.path, line.room = path, room
                if opens:
                    line.opens, opens = opens, ()
                units.append(line)
        return units

    def _read_lines(self) -> tuple[list[_Unit], list[str]]:
        """The lines that are not blank, and their texts."""
        lines: list[_Unit] = []
        if scan:
            read, texts = scan.read_lines(self.text, self.html)
            for start, end, level, header in read:
                lines.append(_Unit(start, end, level, 0, lines[-header] if header else None))
            return lines, texts
        first = position = 0  # the open block starts at lines[first]
        has_row = False
        html = self.html
        for text in self.text.split("\n"):
            body = text.strip()
            if body:
                start = position if len(body) == len(text) else position + text.index(body[0])
                mark = _HEADING.match(body) if html and body[0] == "#" else None
                lines.append(_Unit(start, start + len(body), len(mark[1]) if mark else 0))
                has_row = has_row or " | " in body
            else:
                if has_row and html:
                    self._mark_table(lines[first:])
                first, has_row = len(lines), False
            position += len(text) + 1
        if has_row and html:
            self._mark_table(lines[first:])
        return lines, [self.text[line.start : line.end] for line in lines]

    def _mark_table(self, block: list[_Unit]) -> None:
        """Note the header for the rows below it: the first row with the most cells, if those are three or more.

        Rows of two cells are mostly label and value, and have no header.
        """
        cells = [
            0 if self.text.startswith("- ", row.start) else self.text.count(" | ", row.start, row.end) + 1
            for row in block
        ]
        most = max(cells)
        if most >= 3:
            at = cells.index(most)
            for row in block[at + 1 :]:
                row.header = block[at]

    def _choose_headings(self, lines: list[_Unit], names: dict[int, str]) -> None:
        """A heading that would fill half the budget, or has nothing below it, becomes a plain line."""
        path: list[tuple[int, str]] = []
        for i, name in names.items():
            level = lines[i].level
            longer = [h for h in path if h[0] < level] + [(level, name)]
            if self._count_path(self.root + tuple(h[1] for h in longer)) > self.available // 2:
                lines[i].level = 0
            else:
                path = longer
        for i in reversed(names):
            following = lines[i + 1].level if i + 1 < len(lines) else 1
            if following and following <= lines[i].level:
                lines[i].level = 0

    # ---- units -> units that fit

    def _cut_long(self, units: list[_Unit]) -> list[_Unit]:
        units = self._refine(units, self._cut_sentences, always=self.overlap > 0)
        units = self._refine(units, self._cut_words)
        while any(u.tokens > u.room and u.end - u.start > 1 for u in units):
            units = self._refine(units, self._cut_half)
        return units

    def _refine(
        self, units: list[_Unit], cut: Callable[[int, int], list[tuple[int, int]]], always: bool = False
    ) -> list[_Unit]:
        """The units with those that do not fit (or all of them) replaced by their pieces."""
        long = [i for i, u in enumerate(units) if always or u.tokens > u.room]
        if not long:
            return units
        pieces = {i: cut(units[i].start, units[i].end) for i in long}
        counts = iter(self.count_tokens([self.text[a:b] for spans in pieces.values() for a, b in spans]))
        refined: list[_Unit] = []
        for i, unit in enumerate(units):
            if i not in pieces:
                refined.append(unit)
                continue
            opens = unit.opens
            for a, b in pieces[i]:
                refined.append(_Unit(a, b, 0, next(counts), unit.header, unit.path, unit.room, opens))
                opens = ()
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
            added = unit.tokens + (sum([self.counts[name] for name in unit.opens]) if unit.opens else 0)
            new_section = bool(unit.opens) and used * 3 >= room
            if group and not new_section and used + added <= room:
                group.append(unit)
                used += added
                continue
            if group:
                yield group
            room = unit.room
            group = self._repeat_last(group, unit) if self.overlap and not new_section else []
            group.append(unit)
            used = sum([u.tokens for u in group]) + self._count_header(group)
        if group:
            yield group

    def _repeat_last(self, group: list[_Unit], unit: _Unit) -> list[_Unit]:
        """The last units of ``group`` that the next passage begins with: about ``overlap * room`` tokens."""
        repeated: list[_Unit] = []
        room, tokens = unit.room, 0
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
        tokens = first.header.tokens
        fits = tokens <= first.room // 4 and tokens + sum([u.tokens for u in group]) <= first.room
        return tokens if fits else 0

    def _render(self, group: list[_Unit]) -> Passage:
        first, end = group[0], group[-1].end
        while self.text[end - 1].isspace():
            end -= 1
        text = self.text[first.start : end]
        if self.html and "##" in text:
            text = _HEADING_MARK.sub("", text)
        tokens = self._count_path(first.path) + sum([u.tokens for u in group])
        tokens += sum([self.counts[name] for u in group[1:] for name in u.opens])
        header_tokens = self._count_header(group)
        if first.header and header_tokens:
            text = f"{self.text[first.header.start : first.header.end]}\n{text}"
        heading = PATH_SEPARATOR.join(first.path)
        return Passage(heading, text, first.start, end, tokens + header_tokens)

    # ---- counting

    def _count(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.counts]
        if new:
            self.counts.update(zip(new, self.count_tokens(new), strict=True))

    def _count_path(self, path: tuple[str, ...]) -> int:
        return sum([self.counts[name] for name in path]) + self.counts[PATH_SEPARATOR] * max(len(path) - 1, 0)

    def _count_room(self, path: tuple[str, ...]) -> int:
        return max(self.available - self._count_path(path), 1)
