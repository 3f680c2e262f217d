"""HTML becomes text without losing, gluing or moving anything, in linear time; checked against other parsers."""

import json
import re
import time
from unicodedata import is_normalized, normalize

import pytest
from bs4 import BeautifulSoup, Tag
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import html as lxml_html

from koret.data.answers import clean_and_map
from koret.data.markup import clean_html_text, clean_page

SAMPLE = "src/koret/data/sample/korquad2.1_sample.json"
BLOCKS = (
    """address article aside blockquote body br caption center dd details dir div dl dt fieldset figcaption figure
footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre section table tbody td tfoot th thead tr ul noscript"""
).split()
CELLS = ("td", "th", "li", "tr", "p", "h2", "h3", "dt", "dd", "caption")


def squeeze(text):
    text = re.sub(r"[\u200b\u00ad\ufeff\u200e\u200f\u2060]", "", normalize("NFC", text))
    return re.sub(r"\s+", " ", text).strip()


def letters(text):
    return re.sub(r"[\W_]+", "", normalize("NFC", text))


def is_furniture(node):
    """Whether a node of lxml's or BeautifulSoup's tree is a reference mark or an edit link."""
    name, text = (node.name, node.get_text()) if isinstance(node, Tag) else (node.tag, node.text_content())
    return (name == "sup" and re.fullmatch(r"(\s*\[[^\[\]]{1,30}\])+", text)) or (name == "span" and text == "[편집]")


def inline_runs(fragment):
    """Runs of text with no block boundary inside, in order, as lxml's tree has them (furniture left out)."""
    root = lxml_html.fragment_fromstring(fragment, create_parent="div")
    runs, current = [], []

    def flush():
        text = squeeze("".join(current))
        if text:
            runs.append(text)
        current.clear()

    def visit(node):
        if not isinstance(node.tag, str) or node.tag in ("style", "script", "math"):
            if node.tail:
                current.append(node.tail)
            return
        if is_furniture(node):
            current.append(node.tail or "")
            return
        block = node.tag in BLOCKS
        if block:
            flush()
        current.append(node.text or "")
        for child in node:
            visit(child)
        if block:
            flush()
        current.append(node.tail or "")

    visit(root)
    flush()
    return runs


@pytest.fixture(scope="module")
def real_answers(shared_data):
    return list(json.loads((shared_data / "korquad2_answers.json").read_text(encoding="utf-8")).values())


@pytest.fixture(scope="module")
def real_articles(shared_data):
    return json.loads((shared_data / "korquad2_real_articles.json").read_text(encoding="utf-8"))["data"]


class TestReadable:
    def test_inline_tags_leave_no_space_and_blocks_do(self):
        assert clean_html_text("<p><a>동해시</a>장 <b>심</b>규언</p><p>다음</p>") == "동해시장 심규언\n\n다음"

    def test_a_table_is_one_line_a_row(self):
        rows = "<tr><th>이름</th><th>값</th></tr>\n<tr>\n<td>가\n</td><td>1</td></tr>"
        assert clean_html_text(f"<table><caption>표</caption>{rows}</table>뒤") == "표\n\n이름 | 값\n가 | 1\n\n뒤"

    def test_empty_cells_keep_the_columns_apart(self):
        assert (
            clean_html_text("<tr><td>가</td><td></td><td>나</td></tr><tr><td></td><td>다</td></tr>")
            == "가 | | 나\n| 다"
        )

    def test_a_break_or_block_inside_a_cell_is_no_new_row(self):
        cell = "<table><tr><td>가<br/>나<p>다</p><ul><li>라</li><li>마</li></ul></td><td>바</td></tr></table>"
        assert clean_html_text(cell) == "가 / 나 / 다 / 라 / 마 | 바"

    def test_a_table_inside_a_cell_stays_in_its_row(self):
        inner = "<table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>"
        rows = f"<tr><td>가{inner}</td><td>나</td></tr><tr><td>다</td></tr>"
        assert clean_html_text(f"<table>{rows}</table>") == "가 / 1 | 2 / 3 | 나\n다"

    def test_unclosed_cells_and_rows_are_understood(self):
        assert clean_html_text("<table><tr><td>가<td>나<tr><td>다</table><p>라<br>마") == "가 | 나\n다\n\n라\n마"

    def test_lists_and_headings(self):
        heading = "<h2><span>역사</span><span><span>[</span><a>편집</a><span>]</span></span></h2>"
        assert clean_html_text(f"{heading}<ul><li>하나</li><li>둘</li></ul>") == "## 역사\n- 하나\n- 둘"
        assert clean_html_text("<h3></h3><p>빈 제목</p><h4>나<br>다</h4>라") == "빈 제목\n\n#### 나 다\n\n라"
        assert clean_html_text("<li>홀로</li>") == "홀로"

    def test_definition_lists_are_lines(self):
        assert clean_html_text("<dl><dt>가</dt><dd>나</dd></dl>") == "가\n나"

    @pytest.mark.parametrize(
        "mark",
        [
            "<sup><a>[12]</a></sup>",
            "<sup><a>[주 1]</a></sup>",
            '<sup id="r" class="reference"><a href="#n"><span>&#91;</span>3<span>&#93;</span></a></sup>',
            "<sup><a>[1]</a><a>[2]</a></sup>",
            "<sup>[<i><a>출처 필요</a></i>]</sup>",
        ],
    )
    def test_reference_marks_go(self, mark):
        assert clean_html_text(f"문장이다.{mark} 다음") == "문장이다. 다음"

    def test_other_superscripts_stay(self):
        assert clean_html_text("10<sup>2</sup> m H<sub>2</sub>O") == "102 m H2O"

    def test_edit_links_with_attributes_go(self):
        link = (
            '<span class="mw-editsection"><span class="b">[</span><a href="/x">편집</a><span class="d"> | </span>'
            '<a href="/y">원본 편집</a><span class="b">]</span></span>'
        )
        assert clean_html_text(f"<h2>가{link}</h2>나") == "## 가\n\n나"

    def test_ruby_keeps_its_reading_in_brackets(self):
        with_brackets = "<ruby><rb>漢</rb><rp>(</rp><rt>한</rt><rp>)</rp></ruby>자"
        assert clean_html_text(with_brackets) == "漢(한)자"
        assert clean_html_text("<ruby>漢<rt>한</rt></ruby>자") == "漢(한)자"

    def test_a_formula_is_its_source_once(self):
        formula = "<math><mi>x</mi><annotation>{\\displaystyle x^{2}&lt;1}</annotation></math>"
        assert clean_html_text(f"식 <span>{formula}</span>이다") == "식 x^{2}&lt;1 이다".replace("&lt;", "<")


class TestUnseen:
    def test_head_scripts_styles_and_comments_go(self):
        page = (
            "<!DOCTYPE html><HTML><HEAD><TITLE>제목</TITLE><META></HEAD><BODY>가<SCRIPT type='x'>1 < 2</SCRIPT>"
            "<style>p{}</style>나<!-- 주석 <p>x</p> -->다<!-->라</BODY></HTML>"
        )
        assert clean_html_text(page) == "가\n\n나다라"

    def test_contents_and_navigation_go(self):
        contents = "<div><input><div><h2>목차</h2></div>\n<ul><li>1<ul><li>1.1</li></ul></li></ul>\n</div>"
        navigation = (
            '<table><tbody><tr><th colspan="2"><div><ul><li><a><abbr>v</abbr></a></li></ul></div></th></tr>'
            "<tr><td><table><tr><td>안</td></tr></table></td></tr></tbody></table>"
        )
        assert clean_html_text(f"앞{contents}<h2>절</h2>가운데{navigation}뒤") == "앞\n\n## 절\n\n가운데\n\n뒤"

    def test_menus_go(self):
        menu = "<nav class='m'><ul><li>처음</li></ul><nav>안</nav></nav>"
        assert clean_html_text(f"앞{menu}본문<nav>끝</nav>") == "앞\n\n본문"
        assert clean_html_text("앞<nav>본문이 닫히지 않은 메뉴에 <navy>있다") == "앞\n\n본문이 닫히지 않은 메뉴에 있다"
        start = (page := f"앞{menu}").index("처음")
        assert clean_page(page, [(start, start + 2)])[0] == "앞\n- 처음\n\n안"

    def test_an_infobox_with_the_marks_at_its_foot_stays(self):
        box = "<table><tr><td>이름</td></tr><tr><td><abbr>v</abbr></td></tr></table>"
        assert clean_html_text(box) == "이름\nv"

    def test_what_an_answer_lies_in_is_never_left_out(self):
        page = "<div><div><h2>목차</h2></div><ul><li>역사</li></ul></div><p>본문</p>"
        start = page.index("역사")
        text, [(first, last)] = clean_page(page, [(start, start + 2)])
        assert text[first:last] == "역사"
        assert "역사" not in clean_html_text(page)


class TestEntities:
    def test_decoded_once(self):
        assert clean_html_text("&amp;lt;b&amp;gt; &lt;i&gt; &copy 2&nbsp;&nbsp;3") == "&lt;b&gt; <i> © 2 3"

    def test_numbers(self):
        assert clean_html_text("&#44032;&#xAC01; &#0;&#xD800; &#1;x") == "가각 �� x"
        assert clean_html_text("&#" + "9" * 5000 + ";").startswith("&#999")

    def test_what_is_no_markup_stays(self):
        assert clean_html_text("a < b, 3<5 <가나> <3 & b") == "a < b, 3<5 <가나> <3 & b"

    def test_brackets_in_attributes_do_not_end_a_tag(self):
        assert clean_html_text('<a title="x > y" href=\'<b>\'>글</a> 1="2<3"') == '글 1="2<3"'

    def test_composed_and_without_invisible_characters(self):
        assert clean_html_text("e&#x301; \u1112\u1161\u11ab 가\u200b나\u00ad다 \x01라") == "é 한 가나다 라"


class TestOffsets:
    def test_every_span_reads_as_its_fragment(self):
        page = (
            "<p>앞 <b>하</b>나</p><table><tr><td>가<br/>나</td><td>다</td></tr></table>"
            "<ul><li>라</li><li>마</li></ul><h2>끝</h2>"
        )
        for wanted in (
            "<b>하</b>나",
            "나",
            "가<br/>나</td><td>다",
            "<td>다</td>",
            "<li>마</li>",
            "라</li><li>마",
            "<h2>끝</h2>",
        ):
            start = page.index(wanted)
            text, [place] = clean_and_map(page, [(start, start + len(wanted))])
            assert isinstance(place, tuple), wanted
            assert text == clean_html_text(page)
            assert text[slice(*place)] in (clean_html_text(wanted), clean_page(wanted, in_cell=True)[0])

    def test_an_answer_of_markup_only_is_named(self):
        _, [place] = clean_and_map("<p>가<a></a></p>", [(4, 11)])
        assert "empty" in str(place)

    def test_composition_moves_spans(self):
        page = "<p>\u1112\u1161\u11ab\u1100\u1173\u11af <b>답</b></p>"
        start = page.index("답")
        text, [(first, last)] = clean_page(page, [(start, start + 1)])
        assert (text, text[first:last]) == ("한글 답", "답")

    def test_the_sample_is_located_completely(self, request):
        sample = json.loads((request.config.rootpath / SAMPLE).read_text(encoding="utf-8"))["data"]
        for article in sample:
            answers = [question["answer"] for question in article["qas"]]
            points = [(a["answer_start"], a["answer_start"] + len(a["text"])) for a in answers]
            text, places = clean_and_map(article["context"], points)
            assert text == clean_html_text(article["context"])
            assert all(isinstance(place, tuple) and place[0] < place[1] for place in places)

    def test_real_articles(self, real_articles):
        for article in real_articles:
            answer = article["qas"][0]["answer"]
            start = answer["answer_start"]
            text, [place] = clean_and_map(article["context"], [(start, start + len(answer["text"]))])
            assert text[slice(*place)] == clean_html_text(answer["text"]) == answer["text"]
            assert clean_html_text(article["raw_html"]) == text

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_any_cut_of_soup_maps_or_is_named(self, data):
        pieces = st.sampled_from(
            [
                *"가나 \n<>&|-",
                "다라 ",
                "<b>",
                "</b>",
                "<td>",
                "</td>",
                "<tr>",
                "<li>",
                "</li>",
                "<br/>",
                "<p>",
                "</p>",
                "<h2>",
            ]
            + [
                "</h2>",
                "<table>",
                "</table>",
                "&amp;",
                "&nbsp;",
                "<sup><a>[1]</a></sup>",
                "<!--",
                "-->",
                "<style>",
                "</style>",
            ]
        )
        page = "".join(data.draw(st.lists(pieces, max_size=30)))
        first = data.draw(st.integers(0, len(page)))
        last = data.draw(st.integers(first, len(page)))
        text, [place] = clean_and_map(page, [(first, last)])
        if isinstance(place, tuple):
            fragment = page[first:last]
            assert text[slice(*place)] in (clean_html_text(fragment), clean_page(fragment, in_cell=True)[0])
        assert is_normalized("NFC", text) and text == text.strip(" \n")


class TestRealMarkup:
    def test_every_inline_run_is_intact(self, real_answers):
        broken = runs = 0
        for fragment in real_answers:
            if "<" not in fragment:
                continue
            text, position = squeeze(clean_html_text(fragment)), 0
            for run in inline_runs(fragment):
                runs += 1
                found = text.find(run, position)
                broken += found < 0
                position = max(position, found + len(run))
        assert runs > 15_000
        assert broken == 0

    def test_nothing_is_glued(self, real_answers):
        glued = pairs = 0
        for fragment in real_answers:
            if "<" not in fragment:
                continue
            text, position, previous = squeeze(clean_html_text(fragment)), 0, 0
            for number, run in enumerate(inline_runs(fragment)):
                position = text.find(run, position)
                if number:
                    pairs += 1
                    glued += position == previous
                position = previous = position + len(run)
        assert pairs > 10_000
        assert glued == 0

    def test_same_letters_as_other_parsers(self, real_answers, real_articles):
        for fragment in real_answers:
            if "<style" in fragment or "<math" in fragment:
                continue
            soup = BeautifulSoup(fragment, "lxml")
            for node in [node for node in soup.find_all(["sup", "span"]) if is_furniture(node)]:
                node.extract()
            expected = "".join(soup.find_all(string=True)) if soup.ruby else soup.get_text()
            assert letters(clean_html_text(fragment)) == letters(expected), fragment
        for article in real_articles:
            body = article["context"].partition("검색하러 가기</a>")[2].partition("<div>원본 주소")[0]
            tree = lxml_html.fragment_fromstring(body, create_parent="div")
            for contents in tree.xpath("//div[div/h2[text()='목차']] | //table[tbody/tr[1]//abbr[text()='v']]"):
                contents.drop_tree()
            for node in [node for node in tree.iter("sup", "span") if is_furniture(node)]:
                node.drop_tree()
            assert letters(clean_html_text(article["context"])) == letters(tree.text_content())


def test_same_letters_as_another_parser_on_every_page_of_the_sample(request):
    pages = json.loads((request.config.rootpath / SAMPLE).read_text(encoding="utf-8"))["data"]
    for page in (article["context"] for article in pages):
        body = page.partition("검색하러 가기</a>")[2].rpartition('<div>원본 주소 "')[0]
        tree = lxml_html.fragment_fromstring(body, create_parent="div")
        left_out = "//div[div/h2[text()='목차']] | //table[tbody/tr[1]//abbr[text()='v']] | //style | //script"
        for node in [*tree.xpath(left_out), *(n for n in tree.iter("sup", "span") if is_furniture(n))]:
            node.drop_tree()
        assert letters(clean_html_text(page)) == letters(tree.text_content())


HOSTILE = {
    "angle brackets": "<" * 1_000_000,
    "comment openings": "<!--" * 250_000,
    "nested divs": "<div>" * 100_000 + "가" + "</div>" * 100_000,
    "attributes": "<a" + ' b="c"' * 200_000 + ">가",
    "attributes with brackets": "<a" + ' b="c>"' * 200_000,
    "long text": "가나다라 마바사\n" * 1_100_000,
    "entities": "&amp;" * 1_000_000,
    "unclosed rows": "<table><tr><td>" * 70_000,
    "nested marks": "<sup><b>[" * 100_000,
    "closed marks": ("<sup>&#91;" + "&#93;&#91;<a>" * 60) * 300,
    "nested spans": "<span><span>[" * 80_000,
    "unclosed styles": "<style>" * 150_000,
    "unclosed formulas": "<math>" * 150_000,
    "open quotes": '<a ="<' * 200_000,
    "two quotes": "<a =\" ='" * 200_000,
    "navigation marks": "<table>>v</abbr>" * 70_000,
    "contents": "<div><div><h2>목차</h2><ul>" * 40_000,
    "menus": "<nav><navy>" * 90_000,
    "menus closed": "<nav>" * 90_000 + "</nav>" * 90_000,
    "white space": " \n" * 1_000_000,
    "headings": "<h2>" * 200_000,
    "annotations": "<math>" + "<annotation>" * 100_000 + "</math>",
    "control characters": "\x01\x05\x12" * 300_000,
    "decomposed": "\u1112\u1161\u11ab" * 300_000,
    "combining marks": "a" + "\u0301" * 100_000 + "\u0323" * 100_000,
    "nul": "\0" * 1_000_000,
    "equals": '="' * 500_000,
    "ruby": "</rp><rt " * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_takes_linear_time(name):
    started = time.process_time()
    text = clean_html_text(HOSTILE[name])
    clean_page(HOSTILE[name], [(10, 500_000)])
    assert time.process_time() - started < 4  # both together; each takes well under a second on an idle machine
    assert isinstance(text, str)


def test_deep_nesting_keeps_the_text():
    assert clean_html_text("<div>" * 10_000 + "글" + "</div>" * 10_000) == "글"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="<>&;/!-=\"' \nab가\u0301\u200b#x1|tdrliph2", max_size=120))
def test_soup_never_fails(text):
    clean = clean_html_text(text)
    assert is_normalized("NFC", clean) and not re.search(r"[\x00-\x08\x0e-\x1f]", clean)
