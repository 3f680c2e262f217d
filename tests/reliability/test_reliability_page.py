"""Every test the reliability page names is in the tree, and every file it names too."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "RELIABILITY.md"


def find_tests() -> set[str]:
    """Names of all test functions under tests/."""
    return {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_named_test_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    assert len(named) >= 40
    assert not named - find_tests()


def test_every_named_file_exists():
    named = set(re.findall(r"\btests(?:/\w+)*(?:\.py)?\b", PAGE.read_text(encoding="utf-8")))
    assert len(named) >= 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_promise_names_a_test_and_a_command():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows if not row.startswith("| promise")]
    assert len(rows) >= 20
    for row in rows:
        assert len(row) == 4 and re.search(r"test_\w+", row[1]) and "pytest" in row[2] + row[1] or row[2] == "same", row


@pytest.mark.parametrize("name", ["test_that_was_never_written", "test_killed_at_file_operations"])
def test_a_missing_one_is_seen(name):
    assert (name in find_tests()) == (name == "test_killed_at_file_operations")
