"""Every message a person can meet is explained in docs/TROUBLESHOOTING.md, and nothing there is gone from the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from koret import cli

ROOT = Path(__file__).resolve().parents[1]
PAGE, KOREAN = ROOT / "docs" / "TROUBLESHOOTING.md", ROOT / "docs" / "TROUBLESHOOTING.ko.md"


def load_tool():
    spec = importlib.util.spec_from_file_location("koret_messages", ROOT / "tools" / "messages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """Message -> the module that says it."""
    return {m.text: m.module for m in tool.find_messages()} | dict.fromkeys(tool.FOREIGN, "argparse")


@pytest.fixture(scope="module")
def entries():
    return tool.read_page(PAGE)


# ---- the page and the code


def test_every_message_has_an_entry(found, entries):
    explained = {message for entry in entries for message in entry.messages}
    missing = "\n".join(f"- {tool.quote(text)}    ({place})" for text, place in found.items() if text not in explained)
    assert not missing, (
        "these messages have no entry in docs/TROUBLESHOOTING.md: add each as such a line to the entry of the same "
        f"cause, or under a new '### heading' with what happened and what to do\n{missing}"
    )


def test_no_entry_is_left_of_a_message_that_is_gone(found, entries):
    gone = "\n".join(f"{e.title}: {m}" for e in entries for m in e.messages if m not in found)
    assert not gone, f"no code says these messages (any more): change or remove them in docs/TROUBLESHOOTING.md\n{gone}"


def test_every_message_stands_once_under_an_entry_that_says_something(entries):
    twice = [text for text, count in Counter(m for e in entries for m in e.messages).items() if count > 1]
    assert not twice
    for entry in entries:
        assert entry.messages, f"'{entry.title}' names no message"
        assert entry.stage, f"'{entry.title}' stands before the first stage"
        assert len(entry.text.split()) >= 12, f"'{entry.title}' says too little about its messages"


def test_settings_and_options_the_pages_advise_exist(entries):
    known = set(re.findall(r"--[a-z][\w-]+", "".join(tool_help())))
    foreign = {"--notest", "--no-cache-dir", "--local-dir"}  # of convmv, pip, hf
    for path in (PAGE, KOREAN):
        code = " ".join(re.findall(r"`[^`\n]+`", re.sub(r"^- .*$", "", path.read_text("utf-8"), flags=re.MULTILINE)))
        unknown = set(re.findall(r"--[a-z][\w-]+", code)) - known - foreign
        assert not unknown, f"{path.name} advises options koret does not have: {unknown}"


def tool_help() -> list[str]:
    parser = cli.build_parser()
    (commands,) = (a for a in parser._actions if getattr(a, "choices", None))
    return [parser.format_help(), *(command.format_help() for command in commands.choices.values())]


def test_the_korean_page_explains_the_same_messages_together(entries):
    korean = tool.read_page(KOREAN)
    assert [entry.messages for entry in korean] == [entry.messages for entry in entries]
    for entry in korean:
        assert re.search("[가-힣]", entry.title) and re.search("[가-힣]", entry.text), (
            f"'{entry.title}' is not in Korean"
        )


@pytest.mark.parametrize("page", [PAGE, KOREAN], ids=lambda p: p.name)
def test_links_within_the_page_lead_to_a_heading(page):
    text = page.read_text("utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


# ---- what the collector sees


SAMPLE = """
LEAST = 3
def check(value, name):
    hint = "it looks like CP949" if value else "save it as UTF-8"
    listed = f" ({value})" if value else ""
    if value < LEAST:
        raise ValueError(f"{name!r} is {value:,}, less than {LEAST}{listed}: {hint}")
    raise KeyError(name)
def explain(code):
    if code == 404:
        return f"not there ({code})"
    return "the server refused it"
class Reader:
    def read(self, parser, row):
        parser.error("unrecognized arguments: " + " ".join(row))
        print(f"left out: {row}", file=sys.stderr)
        print(f"{row} is ordinary output")
        raise RuntimeError(explain(row)) from None
"""


def collect(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "__init__.py").write_text("")
    (tmp_path / "made" / "module.py").write_text(text, encoding="utf-8")
    return [message.text for message in tool.find_messages(tmp_path)]


def test_messages_are_read_off_the_code_with_holes_where_values_go(tmp_path):
    assert collect(tmp_path, SAMPLE) == [
        "… is …, less than …: it looks like CP949",
        "… is …, less than …: save it as UTF-8",
        "unrecognized arguments: …",
        "left out: …",
        "the server refused it",
        "not there (…)",
    ]


def test_a_new_message_would_be_missed_on_the_page(tmp_path, entries):
    (text,) = collect(tmp_path, "def f(x):\n    raise ValueError(f'the flux of {x} is reversed')\n")
    assert text == "the flux of … is reversed"
    assert text not in {message for entry in entries for message in entry.messages}


def test_the_real_code_has_no_raise_the_collector_passes_over(found):
    """Every `raise Name("literal ...")` of the package, found by a plain text search, is among the messages."""
    texts = "\n".join(found)
    missed = []
    for path in sorted((ROOT / "src" / "koret").rglob("*.py")):
        for literal in re.findall(r'raise \w+\(\s*"([^"{}\\]{12,})"', path.read_text("utf-8")):
            if literal not in texts and " ".join(literal.split()) not in texts:
                missed.append(f"{path.name}: {literal}")
    assert not missed


# ---- from a message on the screen to its entry


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"] + ["--batch-size"], "expected one argument"),
        (["compare", "offline"], "are required"),
        (["evaluate", "offline", "--dataset-root", "sample", "--split", "some"], "invalid choice"),
        (["evaluate", "offline", "--dataset-root", "sample", "--max-queries", "many"], "invalid int value"),
        (["train", "--batchsize", "3"], "unknown option --batchsize"),
        (["train", "--batch-size", "one"], "must be a whole number"),
        (["train", "--dataset-root", "nowhere.json"], "there is no file or folder nowhere.json"),
        (["stats", "nowhere.json"], "no such file or folder: nowhere.json"),
        (["runs", "run_20990101_000000"], "no run called run_20990101_000000"),
        (["tensorboard", "nowhere"], "no directory nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_command_line_says_leads_to_its_entry(arguments, words, entries, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KORET_DEBUG", raising=False)
    try:
        code = cli.main(arguments)
    except SystemExit as error:  # argparse
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and words in said
    entry = tool.find_entry(said, entries)
    assert entry is not None, f"no entry explains: {said}"
    assert any(words.split()[-1].lower() in m.lower() or words.split()[0] in m for m in entry.messages)


def test_an_unknown_text_leads_nowhere(entries, capsys):
    assert tool.find_entry("a sentence koret never says", entries) is None
    assert tool.main(["a sentence koret never says"]) == 1
    assert tool.main(["koret: the question is empty"]) == 0
    assert "Nothing to ask" in capsys.readouterr().out
