"""Render an article as the page a wiki would serve: chrome, infobox, contents, tables, lists, references.

Answers are enclosed in private-use characters (``OPEN`` and ``CLOSE``, each followed by ``chr(NUMBER + n)``),
which ``build`` turns into offsets.
"""

from __future__ import annotations

import html
import re
from urllib.parse import quote

from source import Article, Block

OPEN, CLOSE, NUMBER = "\ue000", "\ue001", 0xE100
SITE = "표본백과"
HOST = "https://example.org"

_TOKEN = re.compile(
    r"\{\{(\d+):([^{}\[\]']{1,14})\}\}|\{\{(\d+):|(\}\})|\[\[([^\]|]+)(?:\|([^\]]+))?\]\]|(''')|(\[\^\])"
)
_MARKUP = re.compile(r"\{\{\d+:|\}\}|\[\[(?:[^\]|]+\|)?|\]\]|'''|\[\^\]")
_YEAR = re.compile(r"\d{3,4}년")
_CONTENTS_FROM = 3  # sections


def find_links(article: Article) -> set[str]:
    """Everything the article links to."""
    lines = [value for _, value in article.infobox] + [line for block in article.blocks for line in block.lines]
    return {_plain(token[5]) for line in lines for token in _TOKEN.finditer(line) if token[5]} | {article.title}


def render_page(article: Article, number: int, links: set[str], siblings: list[str], category: str) -> str:
    """The whole page (raw_html). ``number`` varies what pages have; ``siblings`` fill the navigation box.

    Short answers that are in ``links``, and years, become links, as names and dates mostly are in a wiki.
    """
    body = _Body(article, number, links).render()
    name = html.escape(article.title)
    revision = 100000 + number * 37
    navigation = _render_navigation(article.title, siblings, category) if number % 2 else ""
    return "\n".join(
        [
            _render_head(article.title, name, revision, number),
            '<div class="mw-body" id="content" role="main">',
            '<a id="top"></a>',
            '<div id="siteNotice"><!-- 알림 없음 --></div>',
            f'<h1 class="firstHeading" id="firstHeading" lang="ko">{name}</h1>',
            '<div class="mw-body-content" id="bodyContent">',
            f'<div class="noprint" id="siteSub">{SITE}, 손으로 쓴 작은 백과사전.</div>',
            '<a class="mw-jump-link" href="#mw-head">둘러보기로 가기</a>',
            '<a class="mw-jump-link" href="#p-search">검색하러 가기</a>',
            '<div class="mw-content-ltr" dir="ltr" id="mw-content-text" lang="ko"><div class="mw-parser-output">'
            + body
            + navigation,
            f"<!-- \nParsed for revision {revision}\nCPU time usage: 0.{number % 90 + 10} seconds\n-->",
            '</div><noscript><img alt="" height="1" src="/wiki/Special:Start?type=1x1" width="1"/></noscript></div>',
            f'<div class="printfooter">원본 주소 "<a dir="ltr" href="{HOST}/w/index.php?title={quote(article.title)}'
            f'&amp;oldid={revision}">{HOST}/w/index.php?title={name}&amp;oldid={revision}</a>"</div>',
            f'<div class="catlinks" id="catlinks"><div><a href="/wiki/Special:Categories">분류</a>: '
            f"<ul><li>{_render_link(category)}</li></ul></div></div>",
            "</div>\n</div>",
            _render_foot(article.title, number),
        ]
    )


class _Body:
    """The article's own part of the page."""

    def __init__(self, article: Article, number: int, links: set[str]) -> None:
        self.article, self.number, self.links = article, number, links
        self.references = 0
        self.section = self.tables = 0
        self.heading = ""

    def render(self) -> str:
        headings = [(b.level, _plain(b.lines[0])) for b in self.article.blocks if b.kind == "heading"]
        contents = _render_contents(headings) if len(headings) >= _CONTENTS_FROM else ""
        parts = []
        if self.number % 4 == 0:
            parts.append('<style data-mw-deduplicate="r1">.mw-parser-output .infobox{float:right}</style>')
        if self.article.infobox:
            parts.append(self._render_infobox())
        for block in self.article.blocks:
            if block.kind == "heading" and contents:
                parts.append(contents)
                contents = ""
            parts.append(getattr(self, f"_render_{block.kind}")(block))
        if self.number % 5 == 0:
            parts.insert(len(parts) // 2, "<!-- 이 줄은 읽는 사람에게 보이지 않는다 -->")
        if self.references:
            parts.append(self._render_references())
        return "\n".join(parts)

    def _render_infobox(self) -> str:
        rows = "\n".join(
            f'<tr>\n<th scope="row" style="text-align: left;"><span class="nowrap">{self._inline(label)} </span>\n</th>'
            f"\n<td>{self._inline(value)}\n</td></tr>"
            for label, value in self.article.infobox
        )
        name = html.escape(self.article.title)
        return (
            f'<table class="infobox" style="width:22em;">\n<tbody><tr>\n<th colspan="2" style="text-align:center;">'
            f"<b>{name}</b>\n</th></tr>\n{rows}</tbody></table>"
        )

    def _render_paragraph(self, block: Block) -> str:
        return f"<p>{self._inline(block.lines[0])}\n</p>"

    def _render_heading(self, block: Block, editable: bool = True) -> str:
        self.section += 1
        self.heading = _plain(block.lines[0])
        anchor = html.escape(self.heading.replace(" ", "_"))
        left, right = (f'<span class="mw-editsection-bracket">{bracket}</span>' for bracket in "[]")
        edit = (
            f'<span class="mw-editsection">{left}'
            f'<a href="/w/index.php?title={quote(self.article.title)}&amp;action=edit&amp;section={self.section}" '
            f'title="부분 편집: {html.escape(self.heading)}">편집</a>{right}</span>'
        )
        tag = f"h{block.level}"
        text = self._inline(block.lines[0])
        legacy = quote(anchor).replace("%", ".")
        return f'<{tag}><span id="{legacy}"></span><span class="mw-headline" id="{anchor}">{text}</span>{edit}</{tag}>'

    def _render_list(self, block: Block) -> str:
        out, depth = "", 0
        for line in block.lines:
            stars, _, text = line.partition(" ")
            while depth < len(stars):
                out += ("\n" if depth else "") + "<ul>"
                depth += 1
                fresh = True
            while depth > len(stars):
                out += "</li></ul>"
                depth -= 1
                fresh = False
            out += ("" if fresh else "</li>\n") + f"<li>{self._inline(text)}"
            fresh = False
        return _enclose(out + "</li></ul>" * depth, block.mark)

    def _render_table(self, block: Block) -> str:
        self.tables += 1
        rows = [line.split(" | ") for line in block.lines]
        out = '<table class="wikitable" style="text-align:center;">\n<tbody>'
        if (self.number + self.tables) % 3 == 0:
            caption = html.escape(f"{self.article.title}: {self.heading}" if self.heading else self.article.title)
            out += f'<tr>\n<th colspan="{len(rows[0])}" style="background:#eef;">{caption}\n</th></tr>\n'
        lines = []
        for i, row in enumerate(rows):
            tag = "td" if i else "th"
            lines.append("<tr>\n" + "\n".join(f"<{tag}>{self._inline(cell)}\n</{tag}>" for cell in row) + "</tr>")
        return _enclose(out + "\n".join(lines) + "</tbody></table>", block.mark)

    def _render_references(self) -> str:
        items = "\n".join(
            f'<li id="cite_note-{n}"><span class="mw-cite-backlink"><a href="#cite_ref-{n}">↑</a></span> '
            f'<span class="reference-text">{SITE} 편집 노트 {self.number}-{n}.</span>\n</li>'
            for n in range(1, self.references + 1)
        )
        heading = self._render_heading(Block("heading", ["각주"], level=2))
        return f'{heading}\n<div class="reflist"><ol class="references">\n{items}\n</ol></div>'

    def _inline(self, text: str) -> str:
        out, position, bold = "", 0, False
        open_marks: list[str] = []
        for token in _TOKEN.finditer(text):
            out += html.escape(text[position : token.start()], quote=False)
            position = token.end()
            short, answer, opened, closed, target, label, quotes, _ = token.groups()
            if short:
                out += self._render_short(int(short), answer)
            elif opened:
                open_marks.append(chr(NUMBER + int(opened)))
                out += OPEN + open_marks[-1]
            elif closed:
                out += CLOSE + open_marks.pop()
            elif target:
                out += _render_link(_plain(target), self._inline(label or target))
            elif quotes:
                out += "</b>" if bold else "<b>"
                bold = not bold
            else:
                self.references += 1
                n = self.references
                out += f'<sup class="reference" id="cite_ref-{n}"><a href="#cite_note-{n}">[{n}]</a></sup>'
        return out + html.escape(text[position:], quote=False)

    def _render_short(self, mark: int, answer: str) -> str:
        text = html.escape(answer, quote=False)
        if answer not in self.links and not _YEAR.fullmatch(answer):
            return _enclose(text, mark)
        if (self.number + mark) % 2:  # the offsets of real answers lie outside their link as often as inside
            return _enclose(_render_link(answer), mark)
        return _render_link(answer, _enclose(text, mark))


def _plain(text: str) -> str:
    return _MARKUP.sub("", text)


def _enclose(block: str, mark: int | None) -> str:
    return block if mark is None else f"{OPEN}{chr(NUMBER + mark)}{block}{CLOSE}{chr(NUMBER + mark)}"


def _render_link(target: str, label: str | None = None) -> str:
    kind = ' class="mw-redirect"' if len(target.encode()) % 7 == 0 else ""
    name = html.escape(target)
    return f'<a{kind} href="/wiki/{quote(target.replace(" ", "_"))}" title="{name}">{label or name}</a>'


def _render_contents(headings: list[tuple[int, str]]) -> str:
    items, numbers = [], [0, 0, 0]
    for level, name in headings:
        depth = level - 2
        numbers[depth] += 1
        numbers[depth + 1 :] = [0] * (2 - depth)
        label = ".".join(map(str, numbers[: depth + 1]))
        anchor = html.escape(name.replace(" ", "_"))
        items.append(
            (
                depth,
                f'<li class="toclevel-{depth + 1}"><a href="#{anchor}"><span class="tocnumber">{label}</span> '
                f'<span class="toctext">{html.escape(name)}</span></a>',
            )
        )
    out, depth = "<ul>\n", 0
    for i, (level, item) in enumerate(items):
        if level > depth:
            out += "\n" + "<ul>\n" * (level - depth)
        elif i:
            out += "</li>\n" + "</ul>\n</li>\n" * (depth - level)
        out += item
        depth = level
    out += "</li>\n" + "</ul>\n</li>\n" * depth + "</ul>"
    return (
        '<div class="toc" id="toc"><input class="toctogglecheckbox" id="toctogglecheckbox" role="button" '
        'style="display:none" type="checkbox"/><div class="toctitle" dir="ltr" lang="ko"><h2>목차</h2>'
        '<span class="toctogglespan"><label class="toctogglelabel" for="toctogglecheckbox"></label></span></div>\n'
        f"{out}\n</div>"
    )


def _render_navigation(title: str, siblings: list[str], category: str) -> str:
    links = "\n".join(f"<li>{_render_link(s) if s != title else f'<b>{html.escape(s)}</b>'}</li>" for s in siblings)
    page = f"/wiki/Template:{quote(category)}"
    marks = "".join(
        f'<li class="nv-{name}"><a href="{page}"><abbr title="{name}">{letter}</abbr></a></li>'
        for name, letter in (("view", "v"), ("talk", "d"), ("edit", "e"))
    )
    return (
        '\n<div class="navbox" role="navigation"><table class="navbox-inner"><tbody><tr>'
        f'<th class="navbox-title" colspan="2" scope="col"><div class="navbar"><ul>{marks}</ul></div>'
        f'<div>{html.escape(category)}</div></th></tr><tr><th scope="row">문서</th>'
        f'<td class="hlist"><div>\n<ul>{links}</ul>\n</div></td></tr></tbody></table></div>'
    )


def _render_head(title: str, name: str, revision: int, number: int) -> str:
    return (
        '<!DOCTYPE html>\n<html class="client-nojs" dir="ltr" lang="ko">\n<head>\n<meta charset="utf-8"/>\n'
        f"<title>{name} - {SITE}</title>\n"
        f'<script>PAGE={{"wgPageName":"{name}","wgRevisionId":{revision},"wgArticleId":{number + 1},'
        '"wgAction":"view"};if(1<2){document.documentElement.className="client-js";}</script>\n'
        '<link href="/w/load.php?lang=ko&amp;modules=skin&amp;only=styles" rel="stylesheet"/>\n'
        '<meta content="origin" name="referrer"/>\n'
        f'<link href="{HOST}/wiki/{quote(title)}" rel="canonical"/>\n'
        '<!--[if lt IE 9]><script src="/w/load.php?modules=shiv"></script><![endif]-->\n'
        f'</head>\n<body class="mediawiki ltr ns-0 page-{number} skin-sample">'
    )


def _render_foot(title: str, number: int) -> str:
    menu = "".join(
        f'<li id="n-{key}"><a href="/wiki/Special:{key}">{label}</a></li>'
        for key, label in (("main", "첫 화면"), ("recent", "바뀐 글"), ("random", "아무 글"), ("help", "도움말"))
    )
    day = f"{2020 + number % 5}년 {number % 12 + 1}월 {number % 28 + 1}일"
    return (
        '<div id="mw-navigation">\n<h2>둘러보기 메뉴</h2>\n<div id="mw-head">\n<h3>보기</h3>\n<ul>\n'
        f'<li id="ca-view"><span><a href="/wiki/{quote(title)}">읽기</a></span></li>'
        f'<li id="ca-edit"><span><a href="/w/index.php?title={quote(title)}&amp;action=edit">편집</a></span></li> '
        '</ul>\n<form action="/w/index.php" id="searchform">\n<input name="search" type="search"/></form>\n</div>\n'
        '<div class="portal" id="p-navigation" role="navigation">\n<h3>둘러보기</h3>\n'
        f"<ul>\n{menu} </ul>\n</div>\n</div>\n"
        '<div id="footer" role="contentinfo">\n<ul id="footer-info">\n'
        f"<li> 이 글은 {day}에 마지막으로 고쳤습니다.</li>\n"
        '<li>글은 <a href="/wiki/License">Apache 2.0 조건</a>에 따라 쓸 수 있습니다.<br/>'
        "누구나 고칠 수 있습니다.</li>\n</ul>\n"
        '<div style="clear: both;"></div>\n</div>\n'
        f'<script>PAGE.set({{"backend":{number % 300},"host":"sample"}});</script>\n</body>\n</html>\n'
    )
