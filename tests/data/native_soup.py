"""Hostile strings for the compiled passes: seeded random soup of the pieces they look for, and mutations of pages."""

import random

PIECES = (
    """
< > <a </a </a> <a> <a href="x"> <b> </b> <i> <span> <span> </span> <sup> </sup> <sup class="r"> [ ]
[1] &#91; &#93; <!-- --> <!--> <!x <?xml?> </ /> <br/> <BR> <p> </p> <td> <td colspan="2"> </td>
<th> <tr> </tr> <table> </table> <TABLE> <li> </li> <ul> </ul> <ol> <h1> <h2> </h2> <h3> <h6> </h6>
<h7> <dt> <dd> <dl> <rt> </rt> <rp> </rp> <ruby> ↑ <math> </math> <annotation> </annotation>
{\\displaystyle <script> </script> <style> <STYLE> </style > <head> </head> <body> <title>
<template> <svg/> <nav> </nav> <![CDATA[ ]]> <figcaption> <blockquote> <blockquotes> <h> <1> & &amp &amp;
&amp;lt; &lt; &nbsp; &#x &#x; &#x1F600; &#xD800; &#0; &#1; &#65 &#12345678901234567890123
&#x12345678901234567 &copy &notin; &zzzz; &a; ="a>b" =' =" = "x" title="a <b>" 편집 [</span>
]</span></span> </a></span> <a>↑</a></span> 목차</h2> >v</abbr> 출처 필요 검색하러 가기</a> >원본 주소 " # ## - | /
. 다. \u1100 \u1161 \u11a8 각 한글 동해시 漢字 e \u0301 \u0323 \u212b é ﬁ ½ … 😀 \U0001f1f0 \ud800 \udfff \0
\x01 \x02 \x06 \x08 \x0e \x12 \x13 \x18 \x1b \x7f \x85 \xa0 \xad \u200b \u200c \u200e \u2003 \u2028
\u3000 \ufeff \u1680 \u2060 ∤ ㎢ Σ İ ǅ 12 ABC abc \t \r \x0b \x0c
""".replace("\n", " ").split(" ")
    + [" ", "  ", "\n", " \n", "\n\n", "\t", "\r\n", "가나다"]
)

EDIT_LINK = "<span class='e'><span>[</span><a>편집</a><span> | </span><a>원본 편집</a><span>]</span></span>"
TOKENS = [
    EDIT_LINK,
    "<span><a>↑</a></span> ",
    "<sup><a>[1]</a></sup>",
    "<sup><a>[주 1]</a></sup> <sup><a>[2]</a></sup>",
    "<sup>[<i><a>출처 필요</a></i>]</sup>",
    '<sup id="r"><a href="#n"><span>&#91;</span>3<span>&#93;</span></a></sup>',
    "</rp> <rt>",
    "<table><tr><td>가<br>나<table><tr><td>1<td>2</table></td><td>다</table>",
    "<div><input><div><h2>목차</h2></div><ul><li>x</li></ul></div>",
    "<table><tr><td><abbr>v</abbr></td></tr></table>",
    "<math><mi>x</mi><annotation>{\\displaystyle x&lt;1}</annotation></math>",
    "<ul><li>하나</li><li>둘<p>셋</li></ul>",
    "<h2>역사<br>와</h2>",
]


def make_soup(rng: random.Random) -> str:
    """Pieces in any order; some strings keep to Latin or Hangul, so that every width of string occurs."""
    pieces = rng.sample(PIECES, rng.randint(2, 25)) if rng.random() < 0.5 else PIECES
    if rng.random() < 0.3:
        pieces = [piece for piece in pieces if piece.isascii()] or ["a"]
    tokens = rng.random() < 0.5
    return "".join(rng.choice(TOKENS if tokens and rng.random() < 0.2 else pieces) for _ in range(rng.randint(0, 40)))


LINES = [
    "",
    "",
    " ",
    "## 절",
    "###### 소절",
    "####### x",
    "##  \tx",
    "# x",
    "##",
    "가 | 나 | 다",
    "- 하나 | 둘 | 셋",
    "| | ",
    "-",
]
LINES += [
    "1 | 2",
    " 3 | 4 | 5 | 6 ",
    "문장이다. 또 문장이다.",
    "\u3000들여 쓴 줄\x1f",
    "\x85",
    "e\u0301 | \U0001f600 | \ud800",
    "a\rb",
]


def make_page(rng: random.Random) -> str:
    """Lines as clean text has them, and some that it never has."""
    return "\n".join(rng.choice(LINES) * rng.choice([1, 1, 1, 9]) for _ in range(rng.randint(0, 40)))


def mutate(rng: random.Random, page: str) -> str:
    """A stretch of a page with some characters lost, doubled or replaced by a piece."""
    start = rng.randrange(len(page))
    characters = list(page[start : start + rng.randint(1, 1500)])
    for _ in range(rng.randint(0, 12)):
        at = rng.randrange(len(characters))
        characters[at] = rng.choice(["", characters[at] * 2, rng.choice(PIECES), "<", ">", '"', "&"])
    return "".join(characters)


def cut_points(rng: random.Random, text: str) -> list[tuple[int, int]]:
    """A few (start, end) in a text, some of them outside it."""
    points = []
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        start = rng.randint(-2, len(text) + 2)
        points.append((start, start + rng.randint(0, rng.choice([3, 30, 300]))))
    return points
