"""The page in a real Chromium: searching, the report, own passages, keys, languages, hostile texts, a phone."""

from __future__ import annotations

import re
import shutil
from urllib.parse import quote

import pytest

from conftest import HOSTILE, HOSTILE_QUESTION, HOSTILE_TITLE

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            found = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to drive: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def open_page(browser, address):
    """Open a page; at the end nothing may have gone wrong in it and nothing may have come from elsewhere."""
    contexts, problems = [], []

    def open_one(path: str = "/", **options):
        context = browser.new_context(**{"locale": "ko-KR", "viewport": {"width": 1400, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if "Content Security Policy" in said.text else None)
        page.on("request", lambda sent: problems.append(sent.url) if not sent.url.startswith(address) else None)
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(address + path)
        page.wait_for_function("document.querySelector('#search-columns input')")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def question(opened) -> str:
    """An evaluation question whose right passage the tuned model finds."""
    texts = [q.text for q in opened.desk.questions._all if HOSTILE_QUESTION not in q.text]
    return texts[0]


def search(page, text: str) -> None:
    page.locator("#query").fill(text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results .board")


def test_a_search_shows_columns_side_by_side_with_gold_lines_and_bars(open_page, question):
    page = open_page()
    search(page, question)
    columns = page.locator(".column")
    expect(columns).to_have_count(4)
    assert columns.locator("h2").all_inner_texts() == ["학습 전", "학습 후", "BM25", "하이브리드"]
    tops = {round(columns.nth(i).bounding_box()["y"]) for i in range(4)}
    assert len(tops) == 1  # side by side
    assert page.locator(".card.gold").count() >= 1
    expect(page.locator(".goldline li")).to_have_count(4)
    assert page.locator(".lines path").count() >= 3 and page.locator(".lines path.gold").count() >= 1
    assert page.locator(".card mark").count() >= 1
    assert all(re.fullmatch(r"\d+ms", text) for text in page.locator(".ms").all_inner_texts())
    widths = page.locator(".column").nth(2).locator(".bar i").evaluate_all("l => l.map(e => e.offsetWidth)")
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_hybrid_is_called_tuned_only_where_a_model_was(browser, open_page, question, log_dir, tmp_path):
    from koret.retrieval.index import build_index
    from koret.web.app import make_app
    from koret.web.opening import open_page as open_models
    from koret.web.server import Server, bind

    page = open_page()
    search(page, question)
    expect(page.locator(".column.kind-hybrid .about")).to_have_text("학습 후 + BM25")
    build_index(str(log_dir.parent / "tiny"), log_dir.parent / "data.json", tmp_path / "index").close()
    opened = open_models(indexes=[str(tmp_path / "index")])
    with bind("127.0.0.1", 0) as own, Server(make_app(opened)).serve_in_background(own) as where:
        plain = browser.new_page()
        plain.goto(where)
        search(plain, question)
        expect(plain.locator(".column.kind-hybrid .about")).to_have_text("tiny + BM25")
        plain.close()
    opened.close()


def test_lines_join_the_places_of_the_same_passage(open_page, question):
    page = open_page()
    search(page, question)
    joined = page.evaluate(
        """() => [...document.querySelectorAll('.lines path')].map(path => {
            const board = document.querySelector('.board').getBoundingClientRect();
            const [x1, y1] = path.getAttribute('d').match(/M([\\d.]+) ([\\d.]+)/).slice(1).map(Number);
            const card = document.elementFromPoint(board.left + x1 - 6, board.top + y1)?.closest('.card');
            return card ? card.dataset.passage === path.dataset.passage : null;
        }).filter(same => same !== null)"""
    )
    assert joined and all(joined)


def test_columns_are_chosen_and_two_stay(open_page, question):
    page = open_page()
    search(page, question)
    for name in ("학습 전", "하이브리드"):
        page.locator("#search-columns label", has_text=name).click()
    expect(page.locator(".column")).to_have_count(2)
    assert page.locator("#search-columns input:checked:disabled").count() == 2
    page.locator("#search-columns label", has_text="학습 전").click()
    expect(page.locator(".column")).to_have_count(3)


def test_the_keyboard_is_enough(open_page, question):
    page = open_page()
    page.locator("body").click(position={"x": 5, "y": 500})
    page.keyboard.press("/")
    expect(page.locator("#query")).to_be_focused()
    page.keyboard.type(question[:5])
    page.wait_for_selector("#suggestions li")
    assert page.locator("#query").get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowDown")
    chosen = page.locator("#suggestions [aria-selected=true]")
    assert page.locator("#query").get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card")
    page.keyboard.press("ArrowDown")
    first = page.locator(".column").first.locator(".card").first
    expect(first).to_be_focused()
    assert first.evaluate("e => getComputedStyle(e).outlineStyle") != "none"
    page.keyboard.press("ArrowRight")
    expect(page.locator(".column").nth(1).locator(".card").first).to_be_focused()
    page.keyboard.press("ArrowDown")
    second = page.locator(".column").nth(1).locator(".card").nth(1)
    expect(second).to_be_focused()
    page.keyboard.press("Enter")
    expect(second).to_have_class(re.compile("open"))
    page.locator("#tab-search").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-report")).to_be_focused()
    expect(page.locator("#report")).to_be_visible()


def test_the_report_leads_to_both_rankings(open_page, opened):
    page = open_page("/#/report")
    page.wait_for_selector(".question")
    report = opened.report.describe()
    for part in (".verdict h1", "table.scores", "svg.chart .whisker", "table.slices tbody td", ".curve"):
        assert page.locator(part).count() >= 1, part
    mean = f"{report['verdict']['tuned']:.3f}".lstrip("0")
    assert mean in page.locator(".verdict .figures").inner_text()
    for kind in ("wins", "losses", "ties", "all"):
        page.locator(f"[data-kind={kind}]").click()
        shown = min(report["counts"][kind], 20)
        if shown:
            expect(page.locator(".question")).to_have_count(shown)
    asked = page.locator(".question .asked").first.inner_text()
    page.locator(".question").first.click()
    page.wait_for_selector("#search-results .board")
    assert page.locator("#query").input_value() == asked
    expect(page.locator(".goldline")).to_be_visible()
    page.go_back()
    expect(page.locator("#report .verdict")).to_be_visible()


def test_own_passages_are_ranked(open_page):
    page = open_page("/#/own")
    page.locator("#own-form .go").click()
    expect(page.locator("#own-results [role=alert]")).to_have_text("문단을 하나 이상 넣어 주세요.")
    page.locator("#own-passages").fill("가마 나바\n라자 마차\n다사 가마")
    expect(page.locator("#own-count")).to_contain_text("문단 3개")
    page.locator("#own-query").fill("가마 나바")
    page.keyboard.press("Enter")
    page.wait_for_selector("#own-results .card")
    expect(page.locator("#own-results .column")).to_have_count(4)
    expect(page.locator("#own-results .column").first.locator(".card")).to_have_count(3)
    page.locator("#own-passages").fill("가\n\n" * 101)
    page.locator("#own-form .go").click()
    expect(page.locator("#own-results [role=alert]")).to_contain_text("최대 100개")


def test_both_languages(open_page, question):
    page = open_page(locale="en-US")
    expect(page.locator("#tab-own")).to_have_text("My passages")
    search(page, question)
    page.locator("#language").click()
    expect(page.locator("#tab-own")).to_have_text("내 문단")
    assert page.evaluate("document.documentElement.lang") == "ko"
    expect(page.locator(".column h2").first).to_have_text("학습 전")
    page.reload()
    expect(page.locator("#tab-own")).to_have_text("내 문단")  # remembered


def test_every_text_has_both_languages(open_page):
    page = open_page()
    missing = page.evaluate(
        """async () => {
            const words = await import('/words.js');
            const files = ['app', 'results', 'report'].map(name => fetch(`/${name}.js`).then(found => found.text()));
            const used = (await Promise.all(files)).join('').matchAll(/say\\("([a-z_]+)"/g);
            const marked = [...document.querySelectorAll('[data-word], [data-label], [data-placeholder]')]
                .flatMap(e => [e.dataset.word, e.dataset.label, e.dataset.placeholder]).filter(Boolean);
            return [...[...used].map(m => m[1]), ...marked].filter(name => words.say(name) === name);
        }"""
    )
    assert missing == []


def test_hostile_texts_are_text(open_page):
    page = open_page("/#/search?q=" + quote(HOSTILE[0] + " " + HOSTILE_QUESTION))
    page.wait_for_selector(".card")
    shown = page.locator(".card .text").all_inner_texts()
    assert any(HOSTILE[0] in text for text in shown)
    page.locator("#query").fill(HOSTILE_QUESTION[:3])
    page.wait_for_timeout(400)
    page.goto(page.url.split("#")[0] + "#/report")
    page.wait_for_selector(".question")
    page.locator("[data-kind=all]").click()
    page.wait_for_timeout(300)
    page.goto(page.url.split("#")[0] + "#/own")
    page.locator("#own-passages").fill("\n\n".join(HOSTILE))
    page.locator("#own-query").fill(HOSTILE_TITLE)
    page.keyboard.press("Enter")
    page.wait_for_selector("#own-results .card")
    assert page.evaluate("window.hacked") is None
    for tag in ("main img", "main script", "main iframe", "main b[onclick]", "main a", "main style", "main math"):
        assert page.locator(tag).count() == 0, tag


def test_errors_are_words_with_a_way_on(open_page):
    page = open_page()
    search(page, "가" * 2000)
    page.evaluate("document.getElementById('query').value = '가'.repeat(2001)")
    page.locator("#search-form .go").click()
    expect(page.locator("#search-results [role=alert]")).to_contain_text("최대 2,000자")
    page.context.set_offline(True)
    page.locator("#query").fill("가마")
    page.keyboard.press("Enter")
    expect(page.locator("#search-results [role=alert]")).to_contain_text("서버에 닿지 않습니다")
    page.context.set_offline(False)
    page.locator("#search-results [role=alert] button").click()
    page.wait_for_selector("#search-results .board")


def test_an_address_leads_back_to_its_question(open_page, question):
    page = open_page("/#/search?q=" + quote(question))
    page.wait_for_selector(".board")
    assert page.locator("#query").input_value() == question
    search(page, "가마 나바")
    page.go_back()
    expect(page.locator("#query")).to_have_value(question)


def test_the_page_fits_a_phone(open_page, question):
    page = open_page("/#/search?q=" + quote(question), viewport={"width": 390, "height": 844}, has_touch=True)
    page.wait_for_selector(".board")
    for address in ("search", "own", "report"):
        page.locator(f"#tab-{address}").click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
    page.locator("#tab-search").click()
    board = page.locator(".board")
    assert board.evaluate("e => e.scrollWidth > e.clientWidth && getComputedStyle(e).scrollSnapType.startsWith('x')")
    width = page.locator(".column").first.bounding_box()["width"]
    assert 280 < width < 390


def test_dark_and_light_differ_and_are_readable(open_page, question):
    """WCAG contrast of text on its card and of soft text on the page: at least 4.5."""
    for scheme in ("light", "dark"):
        page = open_page("/#/search?q=" + quote(question), color_scheme=scheme)
        page.wait_for_selector(".card")
        for what, behind in ((".card .text", ".card"), (".about", "body"), (".card .score", ".card")):
            color, paper = page.evaluate(
                "([a, b]) => [getComputedStyle(document.querySelector(a)).color,"
                " getComputedStyle(document.querySelector(b)).backgroundColor]",
                [what, behind],
            )
            assert measure_contrast(color, paper) >= 4.5, (scheme, what, color, paper)


def measure_contrast(one: str, other: str) -> float:
    """WCAG 2.2: (L1 + 0.05) / (L2 + 0.05) of relative luminances."""

    def weigh(color: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((weigh(one), weigh(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
