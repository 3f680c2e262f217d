"""The sample's source text: articles in a small line-based notation, read and checked.

# 제목                      title
| 이름표 | 값               infobox row, directly below the title
문단                        one paragraph a line: '''bold''', [[link]], [[target|label]], [^] reference
## 절   ### 소절            headings
!list 4                     a list; the number makes the whole block answer 4
* 항목   ** 아래 항목
!table 5                    a table, first row the header, cells separated by " | "
? 1 질문                    a question; the number names {{1:answer}} in the text, or a block
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_MARK = re.compile(r"\{\{(\d+):")
_FORBIDDEN = re.compile(r"[<>&\t\ue000-\uf8ff]")


@dataclass
class Block:
    """A paragraph, heading (with its level), list or table; ``mark`` makes the whole block an answer."""

    kind: str
    lines: list[str]
    level: int = 0
    mark: int | None = None


@dataclass
class Article:
    title: str
    place: str  # file:line, for messages
    infobox: list[tuple[str, str]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    questions: list[tuple[int, str]] = field(default_factory=list)

    def find_problems(self) -> list[str]:
        marks: list[int] = [b.mark for b in self.blocks if b.mark is not None]
        texts = [value for _, value in self.infobox] + [line for b in self.blocks for line in b.lines]
        problems = []
        for text in texts:
            marks += map(int, _MARK.findall(text))
            if text.count("{{") != text.count("}}") or len(_MARK.findall(text)) != text.count("{{"):
                problems.append(f"unbalanced marks in: {text[:60]}")
            if text.count("'''") % 2 or text.count("[[") != text.count("]]"):
                problems.append(f"unbalanced markup in: {text[:60]}")
        asked = {number for number, _ in self.questions}
        problems += [f"mark {m} is used {marks.count(m)} times" for m in sorted(set(marks)) if marks.count(m) > 1]
        problems += [f"question names no mark: {n}" for n in sorted(asked - set(marks))]
        problems += [f"mark is asked by no question: {n}" for n in sorted(set(marks) - asked)]
        return [f"{self.place} {self.title}: {problem}" for problem in problems]


def read_articles(path: Path) -> list[Article]:
    """The articles of one file. Raises ValueError listing every problem with its place."""
    articles: list[Article] = []
    problems: list[str] = []
    block: Block | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        line = line.strip()
        place = f"{path.name}:{number}"
        if _FORBIDDEN.search(line):
            problems.append(f"{place}: forbidden character in: {line[:60]}")
        if line.startswith("# "):
            articles.append(Article(line[2:].strip(), place))
            block = None
        elif not line:
            block = None
        elif not articles:
            problems.append(f"{place}: text before the first title")
        else:
            try:
                block = _read_line(articles[-1], block, line)
            except ValueError as error:
                problems.append(f"{place}: {error}: {line[:60]}")
    for article in articles:
        problems += article.find_problems()
    if problems:
        raise ValueError("\n".join(problems))
    return articles


def _read_line(article: Article, block: Block | None, line: str) -> Block | None:
    """Add one line to the article; the open list or table, if any, is returned."""
    if line.startswith("? "):
        question = re.fullmatch(r"\? (\d+) (\S.*)", line)
        if not question:
            raise ValueError("not a question")
        article.questions.append((int(question[1]), question[2]))
        return None
    if heading := re.fullmatch(r"(#{2,4}) (\S.*)", line):
        article.blocks.append(Block("heading", [heading[2]], level=len(heading[1])))
        return None
    if opening := re.fullmatch(r"!(list|table)(?: (\d+))?", line):
        article.blocks.append(Block(opening[1], [], mark=int(opening[2]) if opening[2] else None))
        return article.blocks[-1]
    if block is not None:
        if (block.kind == "list") != bool(re.match(r"\*+ ", line)):
            raise ValueError(f"not a line of a {block.kind}")
        if block.kind == "table" and block.lines and line.count(" | ") != block.lines[0].count(" | "):
            raise ValueError("row has another number of cells than its table")
        block.lines.append(line)
        return block
    if line.startswith("| "):
        label, separator, value = line[2:].partition(" | ")
        if not separator or article.blocks:
            raise ValueError("not an infobox row")
        article.infobox.append((label.strip(), value.strip()))
        return None
    if line[0] in "*!|?#":
        raise ValueError("stray line")
    article.blocks.append(Block("paragraph", [line]))
    return None
