"""Generate the parts of the documentation that mirror the code: file tree, settings, command line.

Each stands between `<!-- NAME: generated -->` and `<!-- end -->` in its file. Run it after a change; a test runs it
with --check.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import sys
from pathlib import Path

from koret.cli import build_parser
from koret.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "koret"
# in the order of the pipeline; a folder that is not named here fails the test
FOLDERS = ("data", "retrieval", "training", "evaluation", "export", "serving", "web", "commands")


def draw_tree() -> str:
    """The package as a tree with the caption of every file, the first line of its docstring."""
    rows = [("src/koret/", "")]
    rows += [(f"  {path.name}", read_caption(path)) for path in sorted(PACKAGE.glob("*.py"))]
    for folder in FOLDERS:
        rows.append((f"  {folder}/", read_caption(PACKAGE / folder / "__init__.py")))
        paths = sorted(p for p in (PACKAGE / folder).glob("*.py") if p.name != "__init__.py")
        rows += [(f"    {path.name}", read_caption(path)) for path in paths]
    width = max(len(name) for name, _ in rows) + 2
    return "```text\n" + "\n".join(f"{name:<{width}}{caption}".rstrip() for name, caption in rows) + "\n```"


def read_caption(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def describe_settings() -> str:
    """A table of every TrainingConfig field."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(TrainingConfig):
        default = ", ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        lines.append(f"| `{f.name}` | `{'none' if default in (None, '') else default}` | {f.metadata['help']} |")
    return "\n".join(lines)


def describe_commands() -> str:
    """Every command with its options, as its --help has them."""
    parser = build_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    lines = []
    for name, command in subparsers.choices.items():
        positional = [a for a in command._actions if not a.option_strings]
        usage = " ".join([f"koret {name}", *(str(a.metavar or "|".join(a.choices or [a.dest])) for a in positional)])
        lines += [f"### `{usage}`", "", command.description, ""]
        if name == "train":
            lines += ["Every setting of the table above is an option: `batch_size` is `--batch-size`.", ""]
        options = [a for a in command._actions if a.option_strings and not a.dest.startswith(("setting_", "help"))]
        lines += [f"- `{', '.join(a.option_strings)}`{': ' + a.help if a.help else ''}" for a in options]
        lines.append("")
    return "\n".join(lines).rstrip().replace("%%", "%")


PARTS = {"tree": draw_tree, "settings": describe_settings, "commands": describe_commands}


def update(text: str) -> str:
    """``text`` with its generated parts made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- (\w+): generated -->)\n.*?(<!-- end -->)", replace, text, flags=re.DOTALL)


def list_documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for path in list_documents():
        text = path.read_text(encoding="utf-8")
        if (fresh := update(text)) != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(fresh, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'is out of date, run tools/docs.py' if check else 'updated'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
