"""Where the time of an article goes while full pages are prepared: CPU microseconds of every stage on generated pages.

Each stage runs over all pages by itself, with the compiled extension and in Python alone, in turn with the others; the
least of all rounds counts. "everything" is prepare_source, shards written: what the stages leave over is rows, tuples
and garbage collection.

    python benchmarks/data_stages.py [--articles 300] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import data_generator
from koret.data import answers, keys, markup, native, passages, prepare, regions
from koret.data.korquad import Article, read_articles
from koret.data.sources import find_sources

USERS = (keys, markup, passages, prepare, regions)  # of the extension
RESULTS = Path(__file__).resolve().parent / "results" / "data_stages.json"
SETTINGS = prepare.Settings(page_tokens=256)


def list_stages(path: Path, scratch: Path) -> dict[str, Callable[[], object]]:
    """The stages by name, each a function over every page of the file."""
    articles = [article for article in read_articles(path) if isinstance(article, Article)]
    pages = [article.contexts[0] for article in articles]
    points = [[answers.find_answer(a.contexts[0], q.answers[0]) for q in a.questions] for a in articles]
    bounds = [regions.find_body(page) for page in pages]
    found = [regions.find_regions(page, *bound) for page, bound in zip(pages, bounds, strict=True)]
    marked = [markup._mark_tags(page, *b, r, {})[0] for page, b, r in zip(pages, bounds, found, strict=True)]
    clean = [markup.clean_page(page)[0] for page in pages]
    rows = [prepare._ArticleRows(article, SETTINGS, passages.estimate_tokens) for article in articles]

    def split() -> None:
        for article, text in zip(articles, clean, strict=True):
            passages.split_article(
                article.title, text, html=True, budget=256, count_tokens=passages.estimate_tokens, overlap=0.0
            )

    def place() -> None:
        for row in rows:
            row._folded = None
            list(row.place_questions())

    return {
        "reading: jump, decode context and questions": lambda: list(read_articles(path)),
        "cleaning, all of it": lambda: [answers.clean_and_map(p, q) for p, q in zip(pages, points, strict=True)],
        "- control characters, quoted brackets": lambda: [markup._blank_noise(page) for page in pages],
        "- body and regions left out": lambda: [regions.find_regions(p, *regions.find_body(p)) for p in pages],
        "- tags to marks": lambda: [
            markup._mark_tags(page, *b, r, {}) for page, b, r in zip(pages, bounds, found, strict=True)
        ],
        "- separators joined": lambda: [markup._join_marks(page, False, (), ()) for page in marked],
        "passages": split,
        "keys of passages": lambda: [keys.text_key(passage.text) for row in rows for passage in row.passages],
        "placing questions": place,
        "everything": lambda: prepare.prepare_source(find_sources(path)[0][0], SETTINGS, scratch, 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--articles", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if native.scan is None:
        raise SystemExit("the extension is not built: python setup.py build_ext --inplace")
    with tempfile.TemporaryDirectory(prefix="koret-bench-") as folder:
        path = data_generator.write_files(Path(folder), 1, options.articles)[0]
        stages = list_stages(path, Path(folder))
        ways = {"with the extension": native.scan, "Python alone": None}
        least = {way: dict.fromkeys(stages, float("inf")) for way in ways}
        for _ in range(options.rounds):
            for way, scan in ways.items():
                for module in USERS:
                    module.scan = scan
                for name, stage in stages.items():
                    started = time.process_time()
                    stage()
                    least[way][name] = min(least[way][name], time.process_time() - started)
    each = {
        way: {name: round(1e6 * seconds / options.articles, 1) for name, seconds in spent.items()}
        for way, spent in least.items()
    }
    found = {"articles": options.articles, "rounds": options.rounds, "cpu_us_per_article": each}
    options.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
