"""Parts of a Wikipedia page that are not its text: chrome, head, scripts, contents, navigation boxes, formulas."""

from __future__ import annotations

import html
import re

from koret.data.native import scan

Region = tuple[int, int, str]  # start, end, what stands there instead

# The body of a page runs from its skip link to the line that gives its address.
_BODY_STARTS = ("검색하러 가기</a>", "위키백과, 우리 모두의 백과사전.</div>")
_BODY_END = '>원본 주소 "'

_GAP = "\x01"  # markup.PARAGRAPH: what is left out separates
_ELEMENTS = ("script", "style", "math", "head", "title", "template", "svg")


def _any_case(letters: str) -> str:
    return "".join(f"[{letter}{letter.upper()}]" for letter in letters)


# The flag for upper and lower case would be slow; a look at three letters rules out nearly every tag at once.
_FIRST_LETTERS = "".join(
    f"[{letters}{letters.upper()}{other}]"
    for letters, other in zip(
        ("".join(sorted(set(column))) for column in zip(*_ELEMENTS, strict=False)), "!--", strict=False
    )
)
_OPENING = re.compile(rf"<(?={_FIRST_LETTERS})(?:(!--)|({'|'.join(map(_any_case, _ELEMENTS))})(?=[\s/>]))")
_CLOSING = {name: re.compile(rf"</{_any_case(name)}\s*>") for name in _ELEMENTS}
_RUNS_TO_END = ("script", "style")  # without a closing tag they swallow the rest, as in a browser
_BODY_TAG = re.compile(r"<body[\s/>]", re.I)
# Bounded: `html.unescape` refuses numbers of thousands of digits.
ENTITY = r"&(?:#[0-9]{1,20}(?![0-9]);?|#[xX][0-9a-fA-F]{1,16}(?![0-9a-fA-F]);?|[a-zA-Z][a-zA-Z0-9]{1,31};?)"
_ENTITY, _CONTROL = re.compile(ENTITY), re.compile(r"[\x00-\x1f\x7f]")
_FORMULA = re.compile(r"<annotation[^<>]*>([^<]*)</annotation>")
_ANY_TAG = re.compile(r"<[^<>]*>")
_CONTENTS = re.compile(r"<div[^<>]*>\s?(?:<input[^<>]*>\s?)?<div[^<>]*>\s?<h2[^<>]*>목차</h2>")
_LIST_TAG = re.compile(r"<(/?)ul[\s>]")
_TABLE_TAG = re.compile(r"<(/?)table[\s>]")
_MENU_TAG = re.compile(r"<(/?)nav[\s>]")
_NAVIGATION_MARK = ">v</abbr>"  # the view/discuss/edit links in the first row of every navigation box


def find_body(text: str) -> tuple[int, int]:
    """Where the article's own text starts and ends in a Wikipedia page; the whole string for anything else."""
    begin = 0
    for mark in _BODY_STARTS:
        found = text.find(mark)
        if found >= 0:
            begin = found + len(mark)
            break
    end = text.rfind(_BODY_END, begin)
    return begin, text.rfind("<", begin, end) if end >= 0 else len(text)


def find_regions(text: str, begin: int, end: int) -> list[Region]:
    """Regions of text[begin:end] to leave out, in order; one may lie inside another. Linear in the length."""
    found = _find_elements(text, begin, end) + _find_contents(text, begin, end) + _find_navigation(text, begin, end)
    return sorted(found + _find_menus(text, begin, end))


def _find_elements(text: str, begin: int, end: int) -> list[Region]:
    """Comments, scripts, styles, heads and the like; a formula is replaced by its LaTeX source."""
    found, unclosed = [], set()
    position = begin
    while opening := _find_opening(text, position, end):
        start, name = opening.start(), (opening[2] or "").lower()
        if opening[1]:
            stop = text.find("-->", start + 2, end)  # + 2: `<!-->` is a whole comment
            stop = stop + 3 if stop >= 0 else end
        else:
            stop = -1 if name in unclosed else _find_close(text, name, opening.end(), end)
        if stop < 0:
            unclosed.add(name)
            position = opening.end()
            continue
        found.append((start, stop, _read_formula(text[start:stop]) if name == "math" else _GAP if name else ""))
        position = stop
    return found


def _find_opening(text: str, position: int, end: int) -> re.Match | None:
    if scan is None:
        return _OPENING.search(text, position, end)
    while (position := scan.find_opening(text, position, end)) >= 0:
        if opening := _OPENING.match(text, position, end):
            return opening
        position += 1
    return None


def _find_close(text: str, name: str, position: int, end: int) -> int:
    closing = _CLOSING[name].search(text, position, end)
    if closing:
        return closing.end()
    if name == "head":  # its end tag may be left out
        body = _BODY_TAG.search(text, position, end)
        return body.start() if body else -1
    return end if name in _RUNS_TO_END else -1


def decode_entity(entity: str) -> str:
    """The characters an entity stands for, control characters as spaces."""
    return _CONTROL.sub(" ", html.unescape(entity))


def _read_formula(element: str) -> str:
    annotation = _FORMULA.search(element)
    formula = annotation[1].strip() if annotation else _ANY_TAG.sub("", element)
    if formula.startswith("{\\displaystyle") and formula.endswith("}"):
        formula = formula[len("{\\displaystyle") : -1].strip()
    return f" {_ENTITY.sub(lambda entity: decode_entity(entity[0]), formula)} "


def _find_contents(text: str, begin: int, end: int) -> list[Region]:
    if text.find("목차</h2>", begin, end) < 0:
        return []
    box = _CONTENTS.search(text, begin, end)
    stop = _find_balanced(text, _LIST_TAG, box.end(), end) if box else -1
    if stop < 0:
        return []
    tail = re.compile(r"\s?</div>").match(text, stop, end)
    return [(box.start(), tail.end() if tail else stop, _GAP)]


def _find_navigation(text: str, begin: int, end: int) -> list[Region]:
    """Tables whose first row has the view/discuss/edit links, with the tables inside them."""
    found, position = [], begin
    while (mark := text.find(_NAVIGATION_MARK, position, end)) >= 0:
        start = text.rfind("<table", position, mark)
        if start >= 0 and text.find("</tr>", start, mark) < 0:
            stop = _find_balanced(text, _TABLE_TAG, start, end)
            if stop < 0:
                break
            found.append((start, stop, _GAP))
            position = stop
        else:
            position = mark + len(_NAVIGATION_MARK)
    return found


def _find_menus(text: str, begin: int, end: int) -> list[Region]:
    """The ``nav`` elements of pages from elsewhere than the encyclopedia of 2019."""
    found, position = [], begin
    while (start := text.find("<nav", position, end)) >= 0:
        position = start + len("<nav")
        if _MENU_TAG.match(text, start, end):
            position = _find_balanced(text, _MENU_TAG, start, end)
            if position < 0:
                break
            found.append((start, position, _GAP))
    return found


def _find_balanced(text: str, tag: re.Pattern, position: int, end: int) -> int:
    """The end of the element that the first ``tag`` from ``position`` on opens, -1 where it is not closed."""
    depth = 0
    for found in tag.finditer(text, position, end):
        depth += -1 if found[1] else 1
        if depth <= 0:
            return text.find(">", found.start()) + 1 or -1
    return -1
