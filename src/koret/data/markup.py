"""Wikipedia HTML -> readable text, with exact offsets back into the HTML.

Cleaning is two C-speed splits and a dictionary look-up each, so it is linear in the input whatever the input is:

1. The string is split at tags and entities. An inline tag becomes nothing (``동해시</a>장`` stays one word), a
   structural tag becomes a control character that says what it separates, an entity is decoded, once.
2. That is split at runs of separators (control characters, white space, invisible characters) and every run becomes
   the strongest separator in it: heading, list item, table row, paragraph, cell, line break, space.

Where the extension is built (``native``) each of the two is one pass in C that gives the same.

A position in the HTML is followed through both: the HTML is cut there before it is split, and the separator it falls
into says on which side of it the position comes out.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal
from unicodedata import is_normalized, normalize

from koret.data.native import scan
from koret.data.regions import ENTITY, Region, decode_entity, find_body, find_regions

Span = tuple[int, int]

# What a structural tag leaves behind until separators are merged. The input's own control characters go first.
PARAGRAPH, LINE, ITEM, ITEM_END, ROW, CELL, CELL_END, TABLE, TABLE_END = "\x01\x02\x03\x04\x05\x06\x07\x08\x0e"
SLASH, INNER_CELL, HEADING_END = "\x0f\x10\x11"  # a break inside a cell; a cell of a table inside a cell
HEADING, LEVELS = "\x12", "\x13\x14\x15\x16\x17\x18"  # a heading opens, followed by its level h1 .. h6
MARKERS = PARAGRAPH + LINE + ITEM + ITEM_END + ROW + CELL + CELL_END + TABLE + TABLE_END
MARKERS += SLASH + INNER_CELL + HEADING_END + HEADING + LEVELS
CONTROLS = "".join(map(chr, range(32))).translate({ord(c): None for c in "\t\n\x0b\x0c\r"}) + "\x7f"

INVISIBLE = "\u200b\u200e\u200f\u2060\u00ad\ufeff"  # joiners (U+200C, U+200D) carry meaning and stay
SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

_BLOCKS = """address article aside blockquote body caption center details dir div dl fieldset figcaption figure footer
form head header hr html legend main menu nav noscript ol option p pre section select summary title ul video audio"""
_TAG_MARKS = {name: (PARAGRAPH, PARAGRAPH) for name in _BLOCKS.split()}
_TAG_MARKS |= {f"h{number}": (HEADING + level, HEADING_END) for number, level in enumerate(LEVELS, 1)}
_TAG_MARKS |= {
    "table": (TABLE, TABLE_END),
    "tr": (ROW, CELL_END),
    "td": (CELL, CELL_END),
    "th": (CELL, CELL_END),
    "li": (ITEM, ITEM_END),
    "dt": (LINE, ""),
    "dd": (LINE, ""),
    "br": (LINE, LINE),
    "rt": ("(", ")"),  # a ruby reading without its own brackets
}

_ANY_TAG = "[a-zA-Z/!?][^<>]*>"
_EDIT_LINK = (
    r"pan[^<>]*><span[^<>]*>\[</span>(?:<a[^<>]*>[^<>]{1,20}</a>(?:<span[^<>]*>[^<>]{1,9}</span>)?){1,2}"
    r"<span[^<>]*>\]</span></span>"
)
_BACKLINK = r"pan[^<>]*><a[^<>]*>↑</a></span>\s?"
_MARK_TEXT = r"(?:[^<>\[\]&]|&(?!#93;)){0,30}"
_MARK = rf"{_MARK_TEXT}(?:</?(?:[abi]|span)(?:\s[^<>]*)?>{_MARK_TEXT}){{0,8}}"
_REFERENCE = (
    rf"up[^<>]*>(?:(?:<[a-z][^<>]*>){{0,3}}(?:\[|&#91;){_MARK}(?:\]|&#93;)(?:</[a-z]{{1,5}}>){{0,3}}\s?){{1,6}}</sup>"
)
_RUBY_BRACKET = r"p>\s?<rt[^<>]*>|t>\s?<rp[^<>]*>"
# Every alternative ends at the next angle bracket or at a fixed bound: no input makes this quadratic.
_TAG = f"<(?:s(?:{_EDIT_LINK}|{_BACKLINK}|{_REFERENCE})|/r(?:{_RUBY_BRACKET})|{_ANY_TAG})"
_TAGS, _TAGS_AND_ENTITIES = re.compile(f"({_TAG})"), re.compile(f"({_TAG}|{ENTITY})")
_TAG_OR_ENTITY = re.compile(f"{_TAG}|{ENTITY}")
_LONGEST_MARK = 400  # characters; a token of several tags is shorter
_TAG_NAME = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
_RUN = re.escape(SPACES + INVISIBLE + MARKERS)
_SEPARATORS = re.compile(f"([{_RUN}](?:[{_RUN}]+|(?<! )))")  # a lone space stays where it is
_BREAKS = LINE + PARAGRAPH + ITEM + HEADING + LEVELS + HEADING_END
_STATE = ROW + CELL + CELL_END + TABLE + TABLE_END
_CELL_STATE = re.compile(f"([{_STATE}])")
_BROKEN_CELL = re.compile(f"{CELL}[^{_STATE + _BREAKS}]*[{_BREAKS}][^{_STATE}]*")
_TABLE_IN_CELL = re.compile(f"{CELL}[^{_STATE}]*{TABLE}")
_WHOLE_HEADING = re.compile(f"{HEADING}[^{HEADING + HEADING_END}]*{HEADING_END}")

_CONTROL = re.compile(f"[{re.escape(CONTROLS)}]")
_NO_CONTROLS = str.maketrans(CONTROLS, " " * len(CONTROLS))
_IN_CELL = str.maketrans(_BREAKS, SLASH * len(_BREAKS))
_IN_HEADING = str.maketrans(_STATE + LINE + PARAGRAPH + ITEM, " " * (len(_STATE) + 3))
_MEMO_LIMIT, _MEMO_LENGTH = 4_000, 80


class _TagMarks(dict):
    """Tag or entity -> what replaces it, computed once for each distinct short one."""

    def __missing__(self, token: str) -> str:
        mark = decode_entity(token) if token[0] == "&" else _mark_tag(token)
        if len(token) <= _MEMO_LENGTH and len(self) < _MEMO_LIMIT:
            self[token] = mark
        return mark


def _mark_tag(token: str) -> str:
    name = _TAG_NAME.match(token)
    if not name or "<" in token[1:]:  # comment-like, or an edit link, reference mark or ruby bracket: several tags
        return ""
    opening, closing = _TAG_MARKS.get(name[2].lower(), ("", ""))
    return closing if name[1] else opening


class _Joins(dict):
    """Run of separators -> the one separator it becomes."""

    def __missing__(self, run: str) -> str:
        join = _join(run)
        if len(run) <= _MEMO_LENGTH and len(self) < _MEMO_LIMIT:
            self[run] = join
        return join


def _join(run: str) -> str:
    opened = _lead(run)
    if opened:
        return ("\n\n" if opened[0] == "#" else "\n") + opened
    if ROW in run:
        empty = run.count(CELL, run.rindex(ROW)) - 1  # cells without text before the first one with
        return ("\n\n" if _has_any(run, PARAGRAPH + TABLE + TABLE_END) else "\n") + "| " * empty
    if _has_any(run, PARAGRAPH + TABLE + TABLE_END + HEADING + HEADING_END):
        return "\n\n"
    if CELL in run:
        return " |" * run.count(CELL) + " "
    if SLASH in run:
        return " / "
    if INNER_CELL in run:
        return " |" * run.count(INNER_CELL) + " "
    if _has_any(run, LINE + ITEM + ITEM_END):
        return "\n"
    return " " if _has_any(run, SPACES + CELL_END) else ""


def _lead(run: str) -> str:
    """The heading or list mark that a run opens and does not close again: ``'## '``, ``'- '`` or nothing."""
    heading = run.rfind(HEADING)
    if heading > run.rfind(HEADING_END):
        return "#" * max(LEVELS.index(run[heading + 1]) + 1, 2) + " "
    return "- " if run.rfind(ITEM) > run.rfind(ITEM_END) else ""


def _has_any(run: str, marks: str) -> bool:
    return not set(marks).isdisjoint(run)


_tag_mark = _TagMarks().__getitem__
_joined = _Joins().__getitem__


def clean_html_text(text: str) -> str:
    """Readable text of any HTML string, whole page or fragment.

    Headings become lines starting with ``## `` (h1, h2) to ``###### ``, list items ``- `` lines, table rows one line
    with `` | `` between the cells and `` / `` for a break inside one. Head, scripts, styles, comments, table of
    contents, navigation boxes, edit links and reference marks are left out; entities are decoded once; the result is
    NFC. Text that is no markup (``a < b``, ``<3``) stays. Any input takes linear time.
    """
    if "<" not in text and "&" not in text and "  " not in text and text.isprintable() and is_normalized("NFC", text):
        return text.strip(" ")  # nothing to do: most answers
    return clean_page(text)[0]


def clean_page(text: str, points: Sequence[Span] = (), in_cell: bool = False) -> tuple[str, list[Span]]:
    """Clean a page and map spans of its HTML to spans of the clean text.

    ``points`` are (start, end) in code points of ``text``; nothing that overlaps one is left out as page furniture.
    For each, the returned (start, end) is what cleaning that piece by itself gives; ``in_cell`` says that ``text``
    is a piece from inside a table cell, where a break is `` / ``.
    """
    text = _blank_noise(text)
    begin, end = find_body(text)
    for start, stop in points:
        begin, end = min(begin, max(start, 0)), max(end, min(stop, len(text)))
    cuts = {point: (_settle(text, point[0], False), _settle(text, point[1], True)) for point in points}
    marked, where = _mark_tags(text, begin, end, find_regions(text, begin, end), cuts)
    starts = tuple(sorted({where[start] for start, _ in cuts.values()}))
    stops = tuple(sorted({where[stop] for _, stop in cuts.values()}))
    clean, start_item, is_composed, start_places, stop_places = _join_marks(marked, in_cell, starts, stops)
    first, last = _trim(clean, 0, len(clean), start_item)
    start_at, stop_at = dict(zip(starts, start_places, strict=True)), dict(zip(stops, stop_places, strict=True))
    spans = []
    for point in points:
        (start, is_item), (stop, _) = start_at[where[cuts[point][0]]], stop_at[where[cuts[point][1]]]
        x, y = _trim(clean, start, stop, is_item)
        spans.append((max(x, first) - first, max(min(y, last) - first, max(x, first) - first)))
    clean = clean[first:last]
    return (clean, spans) if is_composed or is_normalized("NFC", clean) else _compose(clean, spans)


def _blank_noise(text: str) -> str:
    """The text with spaces for control characters and for angle brackets inside quoted values."""
    has_controls, has_brackets = scan.inspect(text) if scan else (_CONTROL.search(text) is not None, True)
    if has_controls:
        text = text.translate(_NO_CONTROLS)
    return _hide_quoted_brackets(text) if has_controls or has_brackets else text


def _cuts(region: Region, point: Span) -> bool:
    """Whether leaving the region out would take away part of the point's text (not: something inside it)."""
    (start, stop), (first, last) = point, region[:2]
    return first < stop and start < last and not (start <= first and last <= stop)


def _settle(text: str, position: int, is_end: bool) -> int:
    """The position, or the edge of the tag, entity or mark it falls into: the front for a start, the end for an end."""
    position = min(max(position, 0), len(text))
    candidates = [text.rfind("<", 0, position), text.rfind("&", max(position - 40, 0), position)]
    for opening in ("<sp", "<su", "</r"):  # of tokens of several tags
        start = position
        while (start := text.rfind(opening, max(position - _LONGEST_MARK, 0), start)) >= 0:
            candidates.append(start)
    for start in sorted(candidates):
        token = _TAG_OR_ENTITY.match(text, start) if start >= 0 else None
        if token and token.end() > position:
            return token.end() if is_end else start
    return position


def _mark_tags(
    text: str, begin: int, end: int, regions: list[Region], cuts: dict[Span, Span]
) -> tuple[str, dict[int, int]]:
    """text[begin:end] with marks for tags, and where in it each of the cuts is. Regions cuts go through stay."""
    stops = [region for region in regions if not any(_cuts(region, point) for point in cuts)]
    stops += [(cut, cut, "") for cut in {cut for pair in cuts.values() for cut in pair}]
    stops = (*sorted(stops), (end, end, ""))
    if scan:
        marked, places = scan.mark_tags(text, begin, stops, _tag_mark)
        return marked, dict(zip([stop[0] for stop in stops], places, strict=True))
    split = (_TAGS_AND_ENTITIES if "&" in text else _TAGS).split
    marked, where, length, position = [], {}, 0, begin
    for start, stop, replacement in stops:
        if start >= position:
            parts = split(text[position:start])
            parts[1::2] = map(_tag_mark, parts[1::2])
            parts.append(replacement)
            marked.append("".join(parts))
            length += len(marked[-1])
            position = stop
        where[start] = length - len(replacement) if start == stop else length
    return "".join(marked), where


Place = tuple[int, bool]  # a position in the clean text, and whether it opens a list item


def _join_marks(
    marked: str, in_cell: bool, starts: tuple[int, ...], stops: tuple[int, ...]
) -> tuple[str, bool, bool, list[Place], list[Place]]:
    """The marked text with every run of separators joined to one, and where positions in it (sorted) come out.

    Also whether the text opens with a list item, and whether it is certainly composed (NFC).
    """
    if scan:
        return scan.join_marks(marked, in_cell, starts, stops)
    if in_cell or CELL in marked:
        marked = _flatten_cells(marked, in_cell)
    if HEADING_END in marked:
        marked = _WHOLE_HEADING.sub(lambda m: m[0][:2] + m[0][2:].translate(_IN_HEADING), marked)
    runs = _SEPARATORS.split(marked)
    pieces = runs[:]
    pieces[1::2] = map(_joined, runs[1::2])
    if len(runs) > 1:  # a text does not start or end with a separator
        if not runs[-1]:
            pieces[-2] = ""
        if not runs[0]:
            pieces[1] = _lead(runs[1]) if len(runs) > 3 or runs[-1] else ""
    start_item = not runs[0] and len(runs) > 1 and _lead(runs[1]) == "- "
    find = _make_point_map(runs, pieces) if starts or stops else None
    found = [find(start, False) for start in starts], [find(stop, True) for stop in stops]
    return "".join(pieces), start_item, False, *found


def _flatten_cells(marked: str, in_cell: bool) -> str:
    """Mark breaks inside table cells (and whole tables inside them) as such; the length stays the same."""
    if not in_cell and not _TABLE_IN_CELL.search(marked):
        return _BROKEN_CELL.sub(lambda cell: CELL + cell[0][1:].translate(_IN_CELL), marked)
    pieces = _CELL_STATE.split(marked)
    outer: list[bool] = []  # for each open table around the current one: was it opened inside a cell?
    inside, nested = in_cell, False
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            if inside or nested:
                pieces[i] = piece.translate(_IN_CELL)
            continue
        if piece == TABLE:
            outer.append(nested)
            pieces[i] = SLASH if inside or nested else TABLE
            nested, inside = inside or nested, False
        elif piece == TABLE_END:
            inside, nested = nested, outer.pop() if outer else False
            pieces[i] = SLASH if inside or nested else TABLE_END
        elif piece == CELL_END:
            inside = False
        else:
            inside = piece == CELL
            if nested:
                pieces[i] = INNER_CELL if inside else SLASH
    return "".join(pieces)


def _trim(clean: str, start: int, stop: int, is_item: bool) -> Span:
    """Shrink a span by the spaces at its ends, and by its dash where it is a lone list item."""
    while start < stop and clean[start] == " ":
        start += 1
    while start < stop and clean[stop - 1] == " ":
        stop -= 1
    if is_item and clean.find("\n", start, stop) < 0:
        start += 2
    return start, max(start, stop)


def _make_point_map(runs: list[str], pieces: list[str]):
    """A function from a position in the marked text to one in the clean text, and whether a list item opens there.

    ``runs`` are text, separators, text, ... and ``pieces`` what became of them.
    """
    run_at = list(accumulate(map(len, runs), initial=0))
    clean_at = list(accumulate(map(len, pieces), initial=0))

    def find(position: int, is_end: bool) -> tuple[int, bool]:
        side = bisect_left if is_end else bisect_right
        i = min(max(side(run_at, position) - 1, 0), len(runs) - 1)
        if i % 2 == 0:  # in text: the same distance from its start
            return clean_at[i] + min(position - run_at[i], len(runs[i])), False
        if is_end:
            return clean_at[i], False
        lead = _lead(runs[i][position - run_at[i] :])
        if not pieces[i].endswith(lead):
            return clean_at[i + 1], False
        return clean_at[i + 1] - len(lead), lead == "- "

    return find


def _compose(clean: str, spans: list[Span]) -> tuple[str, list[Span]]:
    """NFC of the text, and the spans in it: a position becomes the composed length of what stands before it."""
    composed, position, length = {}, 0, 0
    for point in sorted({point for span in spans for point in span}):
        length += len(normalize_text(clean[position:point]))
        composed[point], position = length, point
    return normalize_text(clean), [(composed[start], composed[stop]) for start, stop in spans]


# Characters that never compose with what precedes them, in either form: a text may be cut before one.
_SAFE_CUT = re.compile("[\x00-\u02ff\u1100-\u115f\u3000-\u3098\u309b-\u312f\u3190-\u9fff\uac00-\ud7a3]")
_CHUNK = 128


def normalize_text(text: str, form: Literal["NFC", "NFD", "NFKC"] = "NFC") -> str:
    """The normal form in linear time: ``unicodedata.normalize`` sorts a run of combining marks in quadratic time."""
    if is_normalized(form, text):
        return text
    pieces, position = [], 0
    while position < len(text):
        safe = _SAFE_CUT.search(text, position + _CHUNK, position + 2 * _CHUNK)
        stop = safe.start() if safe else position + 2 * _CHUNK
        pieces.append(normalize(form, text[position:stop]))
        position = stop
    return "".join(pieces)


_QUOTED_BRACKET = re.compile(r"""=[ \t\r\n]?(?:(")[^"<>]*|(')[^'<>]*)[<>]""")
_LONGEST_VALUE = 10_000
_NO_BRACKETS = str.maketrans("<>", "  ")


def _hide_quoted_brackets(text: str) -> str:
    """Blank angle brackets inside quoted attribute values (``title="a > b"``), so that tags end where they end."""
    pieces, done, in_tag = [], 0, False
    while match := _QUOTED_BRACKET.search(text, done):
        start = match.start()
        opened, closed = text.rfind("<", done, start), text.rfind(">", done, start)
        if opened != closed:
            in_tag = opened > closed and text[opened + 1 : opened + 2].isalpha()
        before = max(opened, done)  # an odd number of quotes: this one closes a value (`colspan="1 style=">`)
        is_value = in_tag and not text.count('"', before, start) % 2 and not text.count("'", before, start) % 2
        stop = text.find(match[1] or match[2], match.end(), match.end() + _LONGEST_VALUE) if is_value else -1
        if stop < 0:
            stop = match.end() - 2
            pieces.append(text[done : stop + 1])
        else:
            pieces += text[done:start], text[start : stop + 1].translate(_NO_BRACKETS)
        done = stop + 1
    return "".join(pieces) + text[done:] if pieces else text
