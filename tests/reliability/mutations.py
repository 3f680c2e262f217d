"""Valid pages and files, and ways to spoil them: what the fuzz tests feed to the readers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

# Without the furniture of Wikipedia pages (contents, edit links, reference marks): leaving that out is no loss.
PAGES = (
    "<html><head><title>제목</title></head><body><h1>한라산</h1><p>한라산은 <b>제주</b>도에 <a href='x'>있다</a>.</p>"
    "<h2>높이</h2><p>높이는 1,950&nbsp;m &amp; 남한에서 <i>가장</i> 높다.</p><ul><li>하나<li>둘 <b>셋</b></ul>"
    "</body></html>",
    '<table class="wikitable"><tr><th>이름</th><th>값</th><th>해</th></tr><tr><td rowspan="2">가</td><td>나<br/>다</td>'
    "<td>1950</td></tr><tr><td></td><td>라 | 마</td></tr></table><p>표 뒤의 글</p>",
    "<div><div><ol><li>첫째<ul><li>안쪽</li></ul></li><li>둘째</li></ol></div><dl><dt>말</dt><dd>뜻 &lt;3</dd></dl>"
    "<pre>줄\n줄</pre><!-- 숨은 말 --><style>p { 색: 빨강 }</style><script>let 값 = 1 < 2;</script>"
    "a &#44032; &#xAC01; b</div>",
    "글만 있다. 1 < 2 이고 3 > 2 이다. AT&T &copy; 2026 <3 한\u1112\u1161\u11ab글",
)
TAGS = (
    "<p>", "</p>", "<div>", "</div>", "<b>", "</b>", "<i", "<td>", "</td>", "<tr>", "</tr>", "<table>", "</table>",
    "<li>", "</ul>", "<h2>", "</h2>", "<br>", "<br/>", "<!--", "-->", "<!", "<?x?>", "<script>", "</script>", "<style>",
    "</style>", "<head>", "</head>",
    "<title>", "</title>", "<h7>", "<template>", "<svg ", "</svg>", "<SCRIPT >", "</Script >", "<", ">",
    "</", "<>", "< p>", "<p/", "<body>", "<!DOCTYPE html>", "<rt>", "<ruby>", "<a:b>", "<1>", "]]>", "<![CDATA[",
)  # fmt: skip
ENTITIES = (
    "&", "&amp;", "&amp", "&lt;", "&#44032;", "&#xAC00", "&#", "&#x", "&#99999999999999999999;", "&nosuch;",
    "&#0;", "&;", "&#xD800;", "&nbsp;", "&lt;p&gt;", "&ampamp;", "&#1;", "&#128;",
    "&CounterClockwiseContourIntegral;", "&zwj;",
)  # fmt: skip
ATTRIBUTES = (
    " a", " a=", ' a="b"', " a='b'", ' a="', " =", ' "', " '", ' a = "b c"', " a=b/", "/", ' a="b"c="d"', " 가=나",
)  # fmt: skip

Step = tuple[str, int, int, int]  # what to do, where (in millionths of the length), how much, with which piece
KINDS = ("cut", "double", "splice", "tag", "entity", "attribute", "repeat", "truncate", "swap")
PLACES = st.integers(0, 999_999)


def steps(kinds: tuple[str, ...], most: int = 10) -> st.SearchStrategy[list[Step]]:
    return st.lists(st.tuples(st.sampled_from(kinds), PLACES, st.integers(0, 60), PLACES), min_size=1, max_size=most)


def spoil(text: Any, plan: list[Step], others: tuple, make: Callable[[str, int], Any]) -> Any:
    """``text`` (a string or a list of tokens) after every step; ``make(kind, number)`` is what a step inserts."""
    for kind, place, amount, number in plan:
        at = place * len(text) // 1_000_000
        if kind == "cut":
            text = text[:at] + text[at + amount :]
        elif kind == "double":
            text = text[: at + amount] + text[at : at + amount] + text[at + amount :]
        elif kind == "splice":
            other = others[number % len(others)]
            start = number * len(other) // 1_000_000
            text = text[:at] + other[start : start + amount] + text[at:]
        elif kind == "repeat":
            text = text[:at] + make("tag", number) * amount * 5 + text[at:]
        elif kind == "truncate":
            text = text[: len(text) - len(text) * place // 3_000_000]
        elif kind == "swap":
            text = text[at:] + text[:at]
        else:
            text = text[:at] + make(kind, number) + text[at:]
    return text


def make_markup(kind: str, number: int) -> str:
    pieces = {"tag": TAGS, "entity": ENTITIES, "attribute": ATTRIBUTES}[kind]
    if kind == "attribute":
        return "<a" + "".join(pieces[(number + i * 7) % len(pieces)] for i in range(1 + number % 5)) + ">"
    return pieces[number % len(pieces)]


@st.composite
def pages(draw: st.DrawFn) -> str:
    return spoil(draw(st.sampled_from(PAGES)), draw(steps(KINDS)), PAGES, make_markup)


# ---------------------------------------------------------------- JSON, token by token

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s"\[\]{}:,]+')
TOKENS = (
    '""', '"id"', '"qas"', '"data"', '"context"', '"question"', '"answer"', '"가"', "0", "-1", "1e999", "NaN",
    "Infinity", "null", "true", "[", "]", "{", "}", ",", ":", '"\\ud800"', '"\\u0000"', "9" * 30, "{}", "[]", '"', "\\",
)  # fmt: skip


def make_article(number: int) -> dict[str, Any]:
    page = f"<p>글 {number} 의 정답{number} 이다.</p>"
    answer = {
        "text": f"정답{number}",
        "answer_start": page.index("정답"),
        "html_answer_start": 0,
        "html_answer_text": "",
    }
    asked = [{"question": f"{number}의 {n}번?", "id": f"{number}-{n}", "answer": answer} for n in range(2)]
    return {"title": f"글 {number}", "url": "", "context": page, "raw_html": f"<p>{number}</p>", "qas": asked}


def make_squad(number: int) -> dict[str, Any]:
    paragraphs = [
        {"context": f"문단 {n} 의 답{n} 이다.", "qas": [{"id": f"s{number}-{n}", "question": f"답{n}?",
         "answers": [{"text": f"답{n}", "answer_start": 7}]}]}
        for n in range(2)
    ]  # fmt: skip
    return {"title": f"제목_{number}", "paragraphs": paragraphs}


DATA = ([make_article(n) for n in range(4)], [make_squad(n) for n in range(3)], [make_article(0), make_squad(1)])
DOCUMENTS = tuple(TOKEN.findall(json.dumps({"version": "v", "data": data}, ensure_ascii=False)) for data in DATA)
ODD = (
    None,
    0,
    -1,
    10**30,
    1e300,
    "",
    " ",
    "가",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    True,
    ["가"],
    {"text": "답0"},
    {"가": 1},
)
JSON_KINDS = ("cut", "double", "splice", "tag", "truncate", "swap", "tag", "cut")


def make_token(kind: str, number: int) -> list[str]:
    return [TOKENS[number % len(TOKENS)]]


def bend(data: list, plan: list[Step]) -> list:
    """The articles with values taken out, doubled or replaced by odd ones, at any depth."""
    data = json.loads(json.dumps(data))
    for kind, place, _, number in plan:
        places = list(walk(data))
        if places:
            holder, key = places[place * len(places) // 1_000_000]
            if kind == "cut":
                del holder[key]
            elif kind == "double" and isinstance(holder, list):
                holder.insert(key, json.loads(json.dumps(holder[key])))
            else:
                holder[key] = json.loads(json.dumps(ODD[number % len(ODD)]))
    return data


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place a value stands in: its holder and its key there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from walk(value[key])


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A data file with values, tokens or bytes that are not what or where they should be."""
    if draw(st.booleans()):
        data = bend(draw(st.sampled_from(DATA)), draw(steps(("cut", "double", "odd"), 4)))
        plain = draw(st.booleans()) and "\\ud800" not in json.dumps(data)
        return json.dumps({"version": "v", "data": data}, ensure_ascii=not plain).encode()
    plan = [(kind, place, 1 + amount % 4, number) for kind, place, amount, number in draw(steps(JSON_KINDS, 3))]
    tokens = spoil(draw(st.sampled_from(DOCUMENTS)), plan, DOCUMENTS, make_token)
    data = draw(st.sampled_from((" ", "", "\n"))).join(tokens).encode("utf-8", "surrogatepass")
    for place, byte in draw(st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=1)):
        at = place * len(data) // 1_000_000
        data = data[:at] + bytes([byte]) + data[at + 1 :]
    return data
