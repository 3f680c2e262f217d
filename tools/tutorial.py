"""Run docs/tutorial/walk.py cell by cell and write walk.md: its text, its code, what it printed, how long it took.

python tools/tutorial.py            runs it in a temporary directory and writes docs/tutorial/walk.md
python tools/tutorial.py --check    says whether walk.md was made from the present walk.py; runs nothing
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import re
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

WALK = Path(__file__).resolve().parents[1] / "docs" / "tutorial" / "walk.py"
PAGE = WALK.with_suffix(".md")
PARSE = "<!-- check: parse, walk.py runs as a whole in a slow test -->"
LONGEST_OUTPUT = 40


@dataclass(frozen=True)
class Cell:
    """One `# %%` cell: Markdown text, or code with the line it begins in."""

    is_text: bool
    source: str
    line: int


def read_cells(text: str) -> list[Cell]:
    cells = []
    for found in re.finditer(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text, re.MULTILINE | re.DOTALL):
        source = found[2].strip("\n")
        if found[1]:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        cells.append(Cell(bool(found[1]), source, text.count("\n", 0, found.start(2))))
    return cells


def make_stamp(source: str) -> str:
    return f"<!-- made from walk.py, sha256 {hashlib.sha256(source.encode()).hexdigest()} -->"


def run_cells(cells: list[Cell]) -> list[tuple[str, float]]:
    """What each code cell printed and the seconds it took, in one namespace; a cell that fails stops the walk."""
    names = {"__name__": "__main__"}
    done = []
    for cell in cells:
        if cell.is_text:
            continue
        said, began = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            exec(compile("\n" * cell.line + cell.source, str(WALK), "exec"), names)
        done.append((said.getvalue(), time.perf_counter() - began))
        print(f"{done[-1][1]:6.1f} s  line {cell.line + 1}", flush=True)
    return done


def render(source: str, results: list[tuple[str, float]]) -> str:
    """The page: Markdown cells as they are, code and output fenced, the seconds below, a table of them at the end."""
    parts, steps, left, heading = [make_stamp(source)], [], iter(results), "setting up"
    for cell in read_cells(source):
        if cell.is_text:
            parts.append(cell.source)
            heading = next(iter(re.findall(r"^## (.*)", cell.source, re.MULTILINE)), heading)
            continue
        said, seconds = next(left)
        parts.append(f"{PARSE}\n```python\n{cell.source}\n```")
        lines = [line.rstrip() for line in said.rstrip().splitlines()]
        if len(lines) > LONGEST_OUTPUT:
            lines = [*lines[:LONGEST_OUTPUT], f"... {len(lines) - LONGEST_OUTPUT} more lines"]
        if lines:
            parts.append("```text\n" + "\n".join(lines) + "\n```")
        parts.append(f"*{seconds:.1f} s*")
        steps.append((heading, seconds))
    total = sum(seconds for _, seconds in steps)
    rows = [f"| {heading} | {seconds:.1f} |" for heading, seconds in steps]
    parts.append("\n".join(["| step | seconds |", "|---|---|", *rows, f"| **all** | **{total:.1f}** |"]))
    return "\n\n".join(parts) + "\n"


def check(source: str, page: str) -> str | None:
    """What is wrong with the page: None when it was made from this source and shows every cell."""
    if not page.startswith(make_stamp(source)):
        return "walk.md was made from another walk.py, run tools/tutorial.py"
    place = 0
    for cell in read_cells(source):
        place = page.find(cell.source, place)
        if place < 0:
            return f"walk.md lacks the cell of line {cell.line + 1}, run tools/tutorial.py"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run nothing, compare")
    parser.add_argument("--out", type=Path, default=PAGE, help="default: docs/tutorial/walk.md")
    options = parser.parse_args()
    source, out = WALK.read_text(encoding="utf-8"), options.out.resolve()
    if options.check:
        problem = check(source, out.read_text(encoding="utf-8"))
        print(problem or "walk.md is up to date")
        return 1 if problem else 0
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            results = run_cells(read_cells(source))
        finally:
            os.chdir(before)
    out.write_text(render(source, results), encoding="utf-8")
    print(f"{out.name}: {sum(seconds for _, seconds in results):.1f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
