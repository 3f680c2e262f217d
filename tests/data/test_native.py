"""The compiled passes give what the Python beside them gives: on made-up pages, real ones, mutations and soup."""

import json
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import native_soup
import pytest

from koret.data import markup, native, regions

USERS = (markup, regions)
needs_extension = pytest.mark.skipif(native.scan is None, reason="koret.data._scan is not built, or switched off")
SAMPLE = Path("src/koret/data/sample/korquad2.1_sample.json")


@contextmanager
def plain_python():
    with pytest.MonkeyPatch.context() as patch:
        for module in USERS:
            patch.setattr(module, "scan", None)
        yield


def both(function, *arguments):
    compiled = function(*arguments)
    with plain_python():
        return compiled, function(*arguments)


def read_pages(path):
    return [article["context"] for article in json.loads(path.read_text(encoding="utf-8"))["data"]]


@needs_extension
class TestSameResults:
    @pytest.mark.parametrize("seed", range(4))
    def test_of_soup(self, seed):
        rng = random.Random(seed)
        for _ in range(1_500):
            text = native_soup.make_soup(rng)
            compiled, plain = both(markup.clean_page, text, native_soup.cut_points(rng, text), rng.random() < 0.2)
            assert compiled == plain, repr(text)

    def test_of_mutated_pages(self):
        rng, pages = random.Random(9), read_pages(SAMPLE)
        for _ in range(1_500):
            text = native_soup.mutate(rng, rng.choice(pages))
            compiled, plain = both(markup.clean_page, text, native_soup.cut_points(rng, text))
            assert compiled == plain, repr(text)

    def test_of_every_character(self):
        for first in range(0, 0x110000, 0x1000):
            text = "".join(f"가{chr(code)}<b>{chr(code)} </b>{chr(code)}나" for code in range(first, first + 0x1000))
            compiled, plain = both(markup.clean_page, text)
            assert compiled == plain, hex(first)

    def test_of_every_tag(self):
        names = [*markup._TAG_MARKS, "a", "b", "span", "x1", "blockquotes", "divs", "t", "h7", "tab1e"]
        tags = [f"<{slash}{name}{rest}>" for name in names for slash in ("", "/") for rest in ("", " x", "/", "-y")]
        for tag in [*tags, *map(str.upper, tags)]:
            compiled, plain = both(markup.clean_page, f"<h2>가</h2>나{tag}다{tag}{tag}라")
            assert compiled == plain, tag


def test_the_variable_chooses_python():
    code = "from koret.data.native import scan; print(scan)"
    command = [sys.executable, "-c", code]
    chosen = subprocess.run(command, env={"KORET_PURE_PYTHON": "1", "PYTHONPATH": ":".join(sys.path)}, text=True,
                            capture_output=True, check=True)  # fmt: skip
    assert chosen.stdout.strip() == "None"


def test_contents_whose_list_is_cut_off_are_no_region():
    page = "가나<div><div><h2>목차</h2></ul "
    assert markup.clean_html_text(page).count("가나") == 1
