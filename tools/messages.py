"""Every message koret can show a person, found in its source, and the page that explains them.

    python tools/messages.py                  every message with its place; those without an entry are marked
    python tools/messages.py --missing        only those, as lines to paste into docs/TROUBLESHOOTING.md
    python tools/messages.py "TEXT"           the entry that explains a message as it was shown

A message is read off the syntax tree: what `raise`, `parser.error`, a reject or a printed warning is given, with `…`
where a value is filled in. A test holds the page and the code together.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PAGE = ROOT / "docs" / "TROUBLESHOOTING.md"
HOLE = "…"  # stands for whatever is filled in
MOST = 12  # ways one message can read before its parts count as filled in

# Calls that show their text to a person, by the last part of their name, and which argument holds it (None: the
# first that is text).
SHOWN = {
    "error": 0, "exit": 1, "warning": 0, "warn": 0, "exception": 0,  # argparse, logging, warnings
    "reject": None, "_reject": None, "Reject": None, "Unlocated": 0,  # records left out
    "announce": 0, "say": 0,  # downloads, checkpoints and training speak through these
    "__init__": 0,  # an exception that words itself
    "JSONResponse": 0, "HTTPException": None,  # answers of the web page
}  # fmt: skip
# Lists whose elements are shown; of a tuple, its last part.
LISTS = {"problems", "hints", "excluded", "twins", "notes"}
# Keyword arguments and dictionary keys that hold a message.
KEYS = {"crash", "problem", "error", "detail"}
# Reasons and notes that are named before they are shown: constants, and functions that return them.
NAMED = {
    "koret.data.assemble": ("IDENTICAL", "CONFLICTING"),
    "koret.data.formats": ("read_json_lines",),
    "koret.data.totals": ("compare_totals",),
    "koret.data.sources": ("_list_file", "_list_zip", "_find_other_json"),
    "koret.evaluation.audit": ("sentence",),
    "koret.retrieval.attention": ("explain_padding",),
    "koret.retrieval.packed": ("explain_unsupported",),
    "koret.web.words": ("_SENTENCES",),  # in every language they are said in
}
# What needs no entry, and why.
UNSEEN = {
    "module 'koret' has no attribute '…'",  # Python's own words for a misspelt name
    "…; go on with --resume",  # stands behind "stopped by …"
}
QUIET = {"koret.retrieval.examples"}  # a demonstration: what it prints explains itself
# Messages argparse words itself; the command line shows them as its own. A test provokes each.
FOREIGN = (
    "the following arguments are required: …",
    "argument …: expected one argument",
    "argument …: invalid choice: … (choose from …)",
    "argument …: invalid int value: …",
)


@dataclass(frozen=True)
class Message:
    """What a person may read, holes marked, and where the code says it."""

    text: str
    module: str
    line: int


def find_messages(source: Path = SOURCE) -> list[Message]:
    """Every different message in the package under ``source``, in the order of modules and lines."""
    found: dict[str, Message] = {}
    for path in sorted(source.rglob("*.py")):
        module = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        for text, line in _Module(module, source).find():
            text = normalize(text)
            if is_speech(text) and text not in UNSEEN and module not in QUIET:
                found.setdefault(text, Message(text, module, line))
    return list(found.values())


def normalize(text: str) -> str:
    """One line, one hole where several stand together."""
    text = re.sub(r"[0-9a-f]{64}|%[sd]", HOLE, " ".join(text.split())).removeprefix("koret: ")
    return re.sub(rf"{HOLE}(\s*{HOLE})+", HOLE, text)


def is_speech(text: str) -> bool:
    """Whether a text says something beside what is filled in: two words, or one that stands alone."""
    words = re.findall(r"[^\W\d_]{2,}", text)
    return (len(words) > 1 and " " in text) or ([text] == words and len(text) > 7)


class _Module:
    """One file's syntax tree, with what a name in it stands for."""

    def __init__(self, name: str, source: Path) -> None:
        self.name, self.source = name, source
        self.tree = _parse(name, source)
        self.functions = {n.name: n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)}
        self.values = {
            target.id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in self.tree.body:  # IDENTICAL, CONFLICTING = "...", "..."
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and hasattr(node.value, "elts"):
                self.values |= dict(zip((t.id for t in node.targets[0].elts), node.value.elts, strict=True))
        self.imports = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("koret")
            for alias in node.names
        }

    def find(self) -> Iterator[tuple[str, int]]:
        for name in NAMED.get(self.name, ()):
            if isinstance(table := self.values.get(name), ast.Dict):
                for node in (text for value in table.values for text in value.elts):
                    yield re.sub(r"\{[^{}]*\}", HOLE, node.value), node.lineno
            elif name in self.values:
                yield from self._read(self.values[name], None)
            else:
                yield from self._read_all(self.functions[name])
        yield from self._walk(self.tree, None)

    def _walk(self, node: ast.AST, function: ast.FunctionDef | None) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.FunctionDef):
            function = node
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from self._read(node.exc, function)
        elif isinstance(node, ast.Call):
            yield from self._read_call(node, function)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in KEYS:
                    yield from self._read(value, function)
        for child in ast.iter_child_nodes(node):
            yield from self._walk(child, function)

    def _read_call(self, call: ast.Call, function: ast.FunctionDef | None) -> Iterator[tuple[str, int]]:
        name = _last_name(call.func)
        if name == "append" and call.args and _last_name(call.func.value) in LISTS:
            last = call.args[0].elts[-1] if isinstance(call.args[0], ast.Tuple) else call.args[0]
            yield from self._read(last, function)
        elif name == "print" and any(_last_name(k.value) == "stderr" for k in call.keywords if k.arg == "file"):
            yield from self._read(call.args[0], function)
        elif (name in SHOWN or name.endswith("Error")) and call.args:
            place = SHOWN.get(name)
            for argument in call.args if place is None else call.args[place : place + 1]:
                read = list(self._read(argument, function))
                yield from read
                if place is None and any(is_speech(text) for text, _ in read):
                    break
        for keyword in call.keywords:
            if keyword.arg in KEYS:
                yield from self._read(keyword.value, function)

    def _read_all(self, function: ast.FunctionDef) -> Iterator[tuple[str, int]]:
        """Every text a function returns, yields or puts into a list; of a tuple, its last part."""
        for node in ast.walk(function):
            value = node.value if isinstance(node, (ast.Return, ast.Yield)) else None
            if isinstance(node, ast.Call) and _last_name(node.func) == "append":
                value = node.args[0]
            value = value.elts[-1] if isinstance(value, ast.Tuple) else value
            if isinstance(value, (ast.Constant, ast.JoinedStr, ast.IfExp)):
                yield from self._read(value, function)

    def _read(self, node: ast.expr, function: ast.FunctionDef | None) -> Iterator[tuple[str, int]]:
        for text in self.spell(node, function):
            yield text, node.lineno

    # ---- what an expression can read as

    def spell(self, node: ast.expr | None, function: ast.FunctionDef | None, depth: int = 0) -> list[str]:
        """The texts an expression can stand for, ``…`` for what only a run decides."""
        if depth > 6 or node is None:
            return [HOLE]
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            return self._join(node.values, function, depth)
        if isinstance(node, ast.FormattedValue):
            texts = self.spell(node.value, function, depth + 1) if _is_plain(node) else [HOLE]
            is_known = len(texts) == 1 and HOLE not in texts[0]  # a constant's name stands for its text
            return texts if is_known or any(map(is_speech, texts)) else [HOLE]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._join([node.left, node.right], function, depth)
        if isinstance(node, ast.IfExp):
            return self._unite([node.body, node.orelse], function, depth)
        if isinstance(node, ast.BoolOp):
            return self._unite(node.values, function, depth)
        if isinstance(node, ast.Name):
            return self._spell_name(node.id, function, depth)
        if isinstance(node, ast.Call):
            return self._spell_call(node, function, depth)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):  # one of a table's sentences
            table = self.values.get(node.value.id)
            return self._unite(table.values, function, depth) if isinstance(table, ast.Dict) else [HOLE]
        return [HOLE]

    def _join(self, parts: list[ast.expr], function: ast.FunctionDef | None, depth: int) -> list[str]:
        ways = [self.spell(part, function, depth) for part in parts]
        count = 1
        for i, way in enumerate(ways):
            count *= len(way)
            if count > MOST:
                ways[i], count = [HOLE], count // len(way)
        return ["".join(texts) for texts in product(*ways)]

    def _unite(self, nodes: list[ast.expr], function: ast.FunctionDef | None, depth: int) -> list[str]:
        """The different readings; a part that may be absent is left out, and a word or two beside a hole."""
        texts = list(dict.fromkeys(text for node in nodes for text in self.spell(node, function, depth)))
        if "" in texts:
            return [""]
        return [text for text in texts if text == HOLE or len(text.split()) > 2] if HOLE in texts else texts

    def _spell_name(self, name: str, function: ast.FunctionDef | None, depth: int) -> list[str]:
        own = [
            node.value
            for node in (ast.walk(function) if function else ())
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
        ]
        if own:
            return self._unite(own, function, depth + 1)
        if name in self.values:
            return self.spell(self.values[name], None, depth + 1)
        if name in self.imports:
            module, original = self.imports[name]
            home = _open(module, self.source)
            if home and original in home.values:
                return home.spell(home.values[original], None, depth + 1)
        return [HOLE]

    def _spell_call(self, call: ast.Call, function: ast.FunctionDef | None, depth: int) -> list[str]:
        name = _last_name(call.func)
        if name[:1].isupper() or name.lstrip("_")[:1].isupper():  # an exception: its text
            ways = [self.spell(argument, function, depth + 1) for argument in call.args]
            return next((way for way in ways if any(map(is_speech, way))), [HOLE])
        home, original = self, name
        if name in self.imports:
            module, original = self.imports[name]
            home = _open(module, self.source)
        if home is None or original not in home.functions:
            return [HOLE]
        own = home.functions[original]
        returned = [n.value for n in ast.walk(own) if isinstance(n, ast.Return) and n.value is not None]
        returned = [v for v in returned if not (isinstance(v, ast.Constant) and v.value is None)]
        return home._unite(returned, own, depth + 1) or [HOLE]


@cache
def _parse(module: str, source: Path) -> ast.Module:
    path = source.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _open(module: str, source: Path) -> _Module | None:
    path = source.joinpath(*module.split("."))
    return _Module(module, source) if path.with_suffix(".py").is_file() else None


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_plain(node: ast.FormattedValue) -> bool:
    """Whether a filled-in value can be read off the code: a name or a call, shown as it is."""
    is_bare = node.conversion == -1 and node.format_spec is None
    return is_bare and isinstance(node.value, (ast.Name, ast.Call, ast.IfExp))


# ---------------------------------------------------------------- the page


@dataclass(frozen=True)
class Entry:
    """A heading of the page, the messages listed under it, and what is said about them."""

    stage: str
    title: str
    messages: tuple[str, ...]
    text: str


def read_page(path: Path = PAGE) -> list[Entry]:
    """The entries of a troubleshooting page: `### title`, then one message a line as "- `message`", then words."""
    entries, stage = [], ""
    for part in re.split(r"^(?=##+ )", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading, _, body = part.partition("\n")
        if heading.startswith("## "):
            stage = heading[3:].strip()
        elif heading.startswith("### "):
            listed = re.findall(r"^- (`+) ?(.+?) ?\1$", body, re.MULTILINE)
            text = re.sub(r"^- (`+) ?(.+?) ?\1$", "", body, flags=re.MULTILINE).strip()
            entries.append(Entry(stage, heading[4:].strip(), tuple(normalize(m) for _, m in listed), text))
    return entries


def find_entry(shown: str, entries: list[Entry]) -> Entry | None:
    """The entry for a message as a person saw it: the one whose fixed words cover most of it."""
    shown = normalize(shown.strip().removeprefix("koret:"))
    best: tuple[int, Entry] | None = None
    for entry in entries:
        for message in entry.messages:
            pattern = ".*".join(map(re.escape, message.split(HOLE)))
            fixed = len(message.replace(HOLE, ""))
            if re.search(pattern, shown) and (best is None or fixed > best[0]):
                best = fixed, entry
    return best[1] if best else None


def main(arguments: list[str]) -> int:
    entries = read_page() if PAGE.exists() else []
    if arguments and not arguments[0].startswith("--"):
        entry = find_entry(" ".join(arguments), entries)
        print(f"{entry.stage}: {entry.title}\n\n{entry.text}" if entry else "no entry of the page has this message")
        return 0 if entry else 1
    explained = {message for entry in entries for message in entry.messages}
    for message in find_messages():
        if "--missing" not in arguments:
            print(f"{' ' if message.text in explained else '!'} {message.module}:{message.line}: {message.text}")
        elif message.text not in explained:
            print(f"- {quote(message.text)}")
    return 0


def quote(text: str) -> str:
    """A message as inline code."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
