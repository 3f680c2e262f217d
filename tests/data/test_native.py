"""The compiled passes give what the Python beside them gives: on made-up pages, real ones, mutations and soup."""

import json
import random
from contextlib import contextmanager, nullcontext
from pathlib import Path

import native_soup
import pytest

from koret.data import keys, markup, native, passages, prepare, regions
from koret.data.sources import find_sources

USERS = (keys, markup, passages, prepare, regions)
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

    def test_of_real_answers(self, shared_data):
        for fragment in json.loads((shared_data / "korquad2_answers.json").read_text(encoding="utf-8")).values():
            for in_cell in (False, True):
                compiled, plain = both(markup.clean_page, fragment, [(0, len(fragment))], in_cell)
                assert compiled == plain, repr(fragment)

    def test_of_generated_pages(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        import data_generator

        for article in json.loads(data_generator.write_files(tmp_path, 1, 40)[0].read_text(encoding="utf-8"))["data"]:
            for page in (article["context"], article["raw_html"]):
                answers = [answer["answer"] for answer in article["qas"]]
                points = [(answer["answer_start"], answer["answer_start"] + len(answer["text"])) for answer in answers]
                compiled, plain = both(markup.clean_page, page, points)
                assert compiled == plain, article["title"]

    def test_of_keys_and_passages(self):
        rng = random.Random(11)
        for _ in range(3_000):
            text = native_soup.make_page(rng) if rng.random() < 0.5 else native_soup.make_soup(rng)
            for is_html in (True, False):
                cut = {"html": is_html, "budget": rng.choice([16, 40, 256]), "count_tokens": passages.estimate_tokens}
                compiled, plain = both(lambda text=text, cut=cut: passages.split_article("제목", text, **cut))
                assert compiled == plain, repr(text)
            for reduce in (keys.text_key, keys.fold_text, keys.normalize_answer):
                compiled, plain = both(reduce, text)
                assert compiled == plain, repr(text)

    def test_of_every_character(self):
        before = [chr(code) for code in (0x61, 0x3042, 0x1100, 0xAC00, 0xAC01, 0x4E00, 0x5D0, 0x915, 0x3A3, 0x130)]
        for code in range(0x110000):
            if native.scan.squeeze(chr(code)) or native.scan.fold(chr(code)):  # the rest is Python's anyway
                text = "".join(f"{chr(code)}{other}{chr(code)} {chr(code)}" for other in before)
                for reduce in (keys.text_key, keys.fold_text):
                    compiled, plain = both(reduce, text)
                    assert compiled == plain, hex(code)
        everywhere = "\n".join(f"{chr(code)}x {chr(code)}" for code in range(0x110000))
        compiled, plain = both(
            lambda: passages._Splitter("", everywhere, True, 64, passages.estimate_tokens, 0.0)._read_lines()[1]
        )
        assert compiled == plain
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


@needs_extension
@pytest.mark.parametrize("name", [None, "KorQuAD_v1.0_dev.json", "korquad2_real_articles.json"])
def test_prepared_data_is_the_same(name, request, tmp_path):
    path = request.getfixturevalue("shared_data") / name if name else SAMPLE
    prepared = []
    for number in range(2):
        with plain_python() if number else nullcontext():
            settings = prepare.Settings(page_tokens=64, overlap=0.1)
            report = prepare.prepare_source(find_sources(path)[0][0], settings, tmp_path, number)
        report.seconds = 0.0
        shards = [prepare.shard_path(tmp_path, number, table).read_bytes() for table in (*prepare.SHARDS, "rejects")]
        prepared.append((report, shards))
    assert prepared[0] == prepared[1]


def test_contents_whose_list_is_cut_off_are_no_region():
    page = "가나<div><div><h2>목차</h2></ul "
    assert markup.clean_html_text(page).count("가나") == 1
