"""The Korean pages say the same as the English ones: figures, commands and pictures cannot drift apart unnoticed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from koret.evaluation.significance import RESAMPLES

ROOT = Path(__file__).resolve().parents[1]
README, KOREAN = ROOT / "README.md", ROOT / "README.ko.md"
PAGES = [KOREAN, *sorted((ROOT / "docs" / "ko").glob("*.md"))]
SOURCES = [README, *(ROOT / "docs").glob("[A-Z]*[A-Z].md"), *(ROOT / "docs" / "guides").glob("*.md")]
# said in Korean pages only: examples (versions, ranks, weights) and no measurements
OWN = {"0.5", "1.0", "2.0", "2.1", "3.10", f"{RESAMPLES:,}"}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def find_figures(text: str) -> set[str]:
    """Decimal numbers, with or without the zero in front, and counts of a thousand and more."""
    text = re.sub(r"\]\([^)]*\)", "]", text)  # not those in addresses
    decimals = {number.removeprefix("0") for number in re.findall(r"(?<![\d.])\d*\.\d+(?![\d.])", text)}
    return decimals | set(re.findall(r"(?<!\d)\d{1,3}(?:,\d{3})+", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_figure_of_a_korean_page_stands_in_an_english_one(page):
    known = set().union(*(find_figures(read(path)) for path in SOURCES)) | {own.removeprefix("0") for own in OWN}
    assert not find_figures(read(page)) - known


def test_the_korean_readme_has_every_measured_figure_of_the_english_one():
    results = read(README).split("## Two commands")[1].split("## Coming from")[0]
    assert not find_figures(results) - find_figures(read(KOREAN))


def test_both_readmes_show_the_same_screen_pictures_and_source_files():
    def collect(path: Path) -> list[set[str]]:
        text = read(path)
        screens = set(re.findall(r"```text\n(.*?)```", text, re.DOTALL))
        links = re.findall(r"\]\(([^)#\s]+)", text)
        return [screens, {x for x in links if x.startswith(("docs/pictures", "src/"))}]

    assert collect(README) == collect(KOREAN)


def test_every_command_of_the_english_readme_is_in_the_korean_one():
    def list_commands(path: Path) -> set[str]:
        blocks = re.findall(r"```bash\n(.*?)```", read(path), re.DOTALL)
        return set(re.findall(r"^koret (\w+)", "".join(blocks), re.MULTILINE))

    assert list_commands(README) <= list_commands(KOREAN)
