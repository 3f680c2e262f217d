"""Draw the pictures of the guides: how a question finds its passage, and what a real report looks like.

    python tools/pictures.py                 draws docs/pictures/search.svg
    python tools/pictures.py --report DIR    also takes report_scores.svg and report_page.png (with Chromium) from
                                             a folder that `koret evaluate MODEL --out DIR` wrote

benchmarks/figures.py draws the pictures of measurements.
"""

from __future__ import annotations

import argparse
import shutil
from html import escape
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
CHROMIUM = "/usr/bin/chromium"
# A background of its own in both schemes: readable whatever the page around it looks like.
STYLE = """
  .page { fill: #ffffff } .box { fill: #f3f5f8; stroke: #c5ccd6 } .core { fill: #e3edf9; stroke: #2f6db3 }
  .words { fill: #fbefe6; stroke: #d0703a } .line { stroke: #6b7280; fill: none } .tip { fill: #6b7280 }
  text { fill: #22262b; font-family: sans-serif; font-size: 14px } .soft { fill: #5b6270; font-size: 12px }
  .head { font-weight: bold }
  @media (prefers-color-scheme: dark) {
    .page { fill: #15181d } .box { fill: #222730; stroke: #4a5260 } .core { fill: #1d3350; stroke: #6ba4e6 }
    .words { fill: #3b2a1f; stroke: #e59a66 } .line { stroke: #9aa3b0 } .tip { fill: #9aa3b0 }
    text { fill: #e8eaed } .soft { fill: #a9b1bd }
  }
"""
WIDTH, HEIGHT, BOX = 940, 400, 76
# column, row, width, kind, headline, what stands below it
BOXES = {
    "pages": (20, 40, 150, "box", "pages", ("HTML, text, JSON", "cleaned, cut in passages")),
    "passages": (200, 40, 200, "box", "passages, with prefix", ("passage: 한글 > 창제", "세종은 1443년에 …")),
    "encoder_p": (430, 40, 130, "core", "encoder", ("the tuned weights",)),
    "index": (590, 40, 150, "box", "one vector each", ("length 1, D numbers", "koret index")),
    "question": (20, 164, 150, "box", "question", ("한글을 만든 임금은?",)),
    "query": (200, 164, 200, "box", "question, with prefix", ("query: 한글을 만든 임금은?",)),
    "encoder_q": (430, 164, 130, "core", "encoder", ("the same weights",)),
    "vector": (590, 164, 150, "box", "one vector", ("length 1, D numbers",)),
    "cosine": (770, 102, 150, "core", "dot product", ("cosine of every pair", "highest first")),
    "bigrams": (200, 288, 360, "words", "BM25", ("bigrams or morphemes both texts share", "rare ones count more")),
    "fusion": (590, 288, 150, "words", "fusion", ("ranks, or a weight of", "held-out questions")),
    "answer": (770, 288, 150, "box", "ranked passages", ("title, section, text", "koret search")),
}
ARROWS = (
    ("pages", "passages"), ("passages", "encoder_p"), ("encoder_p", "index"), ("question", "query"),
    ("query", "encoder_q"), ("encoder_q", "vector"), ("index", "cosine"), ("vector", "cosine"), ("question", "bigrams"),
    ("bigrams", "fusion"), ("cosine", "fusion"), ("fusion", "answer"), ("cosine", "answer"),
)  # fmt: skip


def draw_search() -> Path:
    """docs/pictures/search.svg: the way of a passage into the index and of a question to it."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' role="img" aria-label="Passages and the question go through the same encoder; dot products rank the passages;'
        ' BM25 can be fused in">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        '<text class="soft" x="20" y="26">once, before anybody asks</text>',
        '<text class="soft" x="20" y="152">for every question</text>',
    ]
    parts += [draw_arrow(BOXES[a], BOXES[b]) for a, b in ARROWS]
    parts += [draw_box(*box) for box in BOXES.values()]
    path = PICTURES / "search.svg"
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")
    return path


def draw_box(x: int, y: int, width: int, kind: str, head: str, lines: tuple[str, ...]) -> str:
    rows = [f'<text class="head" x="{x + 12}" y="{y + 24}">{escape(head)}</text>']
    rows += [
        f'<text class="soft" x="{x + 12}" y="{y + 44 + 17 * i}">{escape(line)}</text>' for i, line in enumerate(lines)
    ]
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{BOX}" rx="6"/>' + "".join(rows)


def draw_arrow(start: tuple, end: tuple) -> str:
    """A line from the right side of a box to the left of the next, or from the bottom of one to a box below it."""
    x, y = start[0] + start[2], start[1] + BOX // 2
    to_x, to_y = end[0], end[1] + BOX // 2
    if to_x < x and start[0] == end[0]:  # straight down
        middle = start[0] + start[2] // 2
        path = f"M{middle} {start[1] + BOX} V{end[1]}"
    elif y == to_y:
        path = f"M{x} {y} H{to_x}"
    elif (
        start[0] + start[2] == end[0] + end[2] or end[0] < start[0]
    ):  # back to a column before: down, then in from above
        path = f"M{start[0] + 30} {start[1] + BOX} V{end[1] - 24} H{end[0] + end[2] // 2} V{end[1]}"
    elif end[0] - x > 20 and start[0] == 20:  # the question goes to BM25 as it is
        path = f"M{start[0] + start[2] // 2} {start[1] + BOX} V{to_y} H{to_x}"
    else:
        path = f"M{x} {y} H{(x + to_x) // 2} V{to_y} H{to_x}"
    return f'<path class="line" stroke-width="1.6" marker-end="url(#tip)" d="{path}"/>'


def take_report(folder: Path) -> list[Path]:
    """report_scores.svg as the report drew it, report_page.png as a browser shows the page's beginning."""
    from playwright.sync_api import sync_playwright

    scores, page_picture = PICTURES / "report_scores.svg", PICTURES / "report_page.png"
    shutil.copyfile(folder / "scores-question-passage.svg", scores)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1180, "height": 1120})
        page.goto((folder / "report.html").resolve().as_uri())
        page.screenshot(path=page_picture)
        browser.close()
    return [scores, page_picture]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder written by koret evaluate --out")
    options = parser.parse_args()
    print(draw_search())
    for path in take_report(options.report) if options.report else ():
        print(path)


if __name__ == "__main__":
    main()
