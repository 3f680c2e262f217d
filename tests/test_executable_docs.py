"""What the documents show runs: every shell and Python block, in order, in one working directory a document.

A block runs as it stands unless a comment on the line before it says how it is checked instead:

    <!-- check: run with A -> B; C -> D -->  runs shortened: A is replaced by B (\\n for a new line) and C by D
    <!-- check: slow -->                     runs with the slow tests (`slow with A -> B` too); its commands are parsed
    <!-- check: parse, REASON -->            never runs: options and settings are checked by the real parser
    <!-- check: serve URL -->                started with the slow tests, URL fetched, stopped
    <!-- check: make -->                     every line is a target of the Makefile
    <!-- check: skip because REASON -->      only blocks counted in SKIPPED
"""

from __future__ import annotations

import ast
import glob
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from koret import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")])
SHELL = ("bash", "sh", "console")
# languages that are shown, not run; anything else must be one that is checked
SHOWN = ("text", "json", "yaml", "http", "html")
# documents with blocks nothing can be said about, and how many they may have
SKIPPED: dict[str, int] = {}
# seconds a server has to answer for the first time: `koret web` encodes the sample twice before it listens
ANSWER_WITHIN = 300
BLOCK = re.compile(
    r"(?:^<!-- check: (?P<check>[^\n]*?) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
# One short training serves every document that speaks of `latest`.
TINY = [
    "train", "--config", "recipes/sample.yaml", "--max-steps", "2", "--train-split", "0.95", "--eval-samples", "16",
    "--eval-corpus-size", "1", "--max-seq-length", "32", "--passage-tokens", "512", "--precision", "fp32",
    "--num-workers", "0",
]  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block: its document and line, language, text, and the check asked for ('' = run it)."""

    place: str
    language: str
    text: str
    check: str

    @property
    def kind(self) -> str:
        return re.split(r"[\s,]", self.check, maxsplit=1)[0] or "run"

    @property
    def script(self) -> str:
        """The shell commands: of a console block the lines after `$ `."""
        text = self.text.replace("\\\n", " ")
        if self.language != "console":
            return text
        return "".join(line[2:] + "\n" for line in text.splitlines() if line.startswith("$ "))

    def shorten(self) -> Block:
        """The block with the replacements its comment names."""
        text = self.text
        for change in filter(None, self.check.partition(" with ")[2].split(";")):
            old, arrow, new = change.partition("->")
            assert arrow and old.strip() in text, (
                f"{self.place}: the comment replaces {old.strip()!r}, which is not there"
            )
            text = text.replace(old.strip(), new.strip().replace("\\n", "\n"))
        return Block(self.place, self.language, text, self.check)


def read_blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    blocks = []
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("text"))
        place = f"{document.relative_to(ROOT)}:{line}"
        blocks.append(Block(place, found["language"], found["text"], found["check"] or ""))
    return blocks


def name_document(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, made by `koret train`."""
    folder = prepare_folder(tmp_path_factory.mktemp("tiny"))
    call_koret(TINY, folder)
    (run,) = (folder / "logs" / "tensorboard").glob("run_*")
    return run


def prepare_folder(folder: Path) -> Path:
    """What a reader's checkout has, where documents write beside it."""
    for name in ("recipes", "run_tensorboard.sh", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def enter_folder(folder: Path, run: Path) -> Path:
    """A fresh checkout that holds one finished run."""
    prepare_folder(folder)
    shutil.copytree(run, folder / "logs" / "tensorboard" / run.name, copy_function=os.link)
    return folder


def call_koret(words: list[str], folder: Path) -> None:
    """`koret WORDS` in this process: the imports of torch are paid for once."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert cli.main(words) == 0, f"koret {shlex.join(words)} failed"
    finally:
        os.chdir(before)


def split_koret(script: str, folder: Path) -> list[list[str]] | None:
    """The arguments of each command where the script is nothing but plain `koret` lines, else None."""
    commands = []
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] != "koret" or re.search(r"[|<>&;$`]", re.sub(r'"[^"$`]*"|#.*', "", line)):
            return None
        commands.append([path for word in words[1:] for path in expand(word, folder)])
    return commands


def expand(word: str, folder: Path) -> list[str]:
    """What the shell makes of a word with a star."""
    return sorted(glob.glob(word, root_dir=folder)) or [word] if "*" in word else [word]


def run_block(block: Block, folder: Path, names: dict) -> None:
    """Run a block as a reader would; raise where it fails."""
    if block.language == "python":
        before = Path.cwd()
        os.chdir(folder)
        try:
            exec(compile(block.text, block.place, "exec"), names)
        finally:
            os.chdir(before)
        return
    done_here = re.sub(r"^koret tensorboard.*$", "", block.script, flags=re.MULTILINE)
    assert done_here == block.script, f"{block.place}: koret tensorboard does not end; say `check: serve URL`"
    plain = split_koret(block.script, folder)
    if plain is None:
        done = subprocess.run(
            ["bash", "-euc", block.script], cwd=folder, env=make_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block.place}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return
    # a star must be expanded after the command before it has run
    for line in block.script.splitlines():
        for words in split_koret(line, folder) or []:
            call_koret(words, folder)


def make_environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}


def parse_block(block: Block) -> None:
    """Check a block without running it: shell syntax, commands, options, settings; Python syntax and imports."""
    if block.language == "python":
        check_imports(block)
        return
    done = subprocess.run(["bash", "-nc", block.script], capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    for line in block.script.splitlines():
        parse_command(shlex.split(line.split("|")[0], comments=True), block)


def parse_command(words: list[str], block: Block) -> None:
    from koret.commands.train import read_config

    words = words[words.index("koret") :] if "koret" in words else []
    if not words:
        return
    try:
        options, rest = cli.build_parser().parse_known_args(words[1:])
    except SystemExit as error:
        pytest.fail(f"{block.place}: koret does not take {shlex.join(words)}: {error}")
    assert not rest, f"{block.place}: {shlex.join(words)} has unknown {rest}"
    if words[1] == "train" and "$" not in shlex.join(words):
        if options.config:
            options.config = str(ROOT / options.config) if (ROOT / options.config).is_file() else None
        read_config(options)


def check_imports(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, block.place)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "koret":
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{block.place}: {node.module} has no {missing}"


def serve_block(block: Block, folder: Path) -> None:
    """Start the command, fetch the URL its comment names, stop it. The port is moved to a free one."""
    url = block.check.split()[1]
    (port,) = re.findall(r":(\d+)", url)
    assert f"--port {port}" in block.script, f"{block.place}: the command and {url} must name the same port"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
    said = folder / "served.txt"
    with open(said, "w") as out:
        process = subprocess.Popen(
            ["bash", "-c", block.script.replace(port, free)], cwd=folder, env=make_environment(),
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + ANSWER_WITHIN
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(url.replace(port, free), timeout=5) as answer:
                    assert answer.status == 200 and answer.read()
                return
            except OSError:
                assert process.poll() is None, f"{block.place}: it stopped\n{said.read_text()[-2000:]}"
                time.sleep(0.5)
        pytest.fail(f"{block.place}: {url} did not answer in {ANSWER_WITHIN} s\n{said.read_text()[-2000:]}")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def check_targets(block: Block) -> None:
    """`make -n` knows every target shown."""
    for line in block.script.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "make", f"{block.place}: {line} is no make command"
            done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.place}: {done.stderr}"


def check_shown(block: Block) -> None:
    """JSON and YAML that is shown can be read: as one value, or a value a line."""
    if block.language == "yaml":
        yaml.safe_load(block.text)
    if block.language == "json":
        try:
            json.loads(block.text)
        except json.JSONDecodeError:
            assert all(json.loads(line) for line in block.text.splitlines() if line), block.place


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_document)
def test_every_block_is_of_a_kind_that_is_checked(document):
    fences = [line for line in document.read_text(encoding="utf-8").splitlines() if line.startswith("```")]
    blocks = read_blocks(document)
    assert len(fences) == 2 * len(blocks), "a fence is not closed"
    outside = BLOCK.sub("", document.read_text(encoding="utf-8"))
    assert not re.findall(r"^ {4}(?:\$ )?(?:koret|pip|make|python|import) .*", outside, re.MULTILINE), "fence commands"
    for block in blocks:
        known = (*SHELL, "python", *SHOWN)
        assert block.language in known, f"{block.place}: {block.language!r} is not one of {known}"
        kinds = ("run", "slow", "parse", "serve", "make", "skip")
        assert block.kind in kinds, f"{block.place}: unknown check {block.check!r}"
        assert not block.check or block.language not in SHOWN, f"{block.place}: nothing to check in {block.language}"
    skipped = [block for block in blocks if block.kind == "skip"]
    assert len(skipped) == SKIPPED.get(name_document(document), 0)
    assert all("because " in block.check for block in skipped)


def find_original(document: Path) -> Path | None:
    """The English page of a Korean one that is laid out as it is."""
    if document.name == "README.ko.md":
        return ROOT / "README.md"
    original = ROOT / "docs" / "guides" / document.name
    return original if document.parent.name == "ko" and original.is_file() else None


def list_runs(document: Path) -> list[str]:
    """What the blocks that run say, without comments."""
    runs = [block.shorten() for block in read_blocks(document) if block.kind == "run" and block.language not in SHOWN]
    return [re.sub(r"\s+#.*", "", block.text if block.language == "python" else block.script).strip() for block in runs]


def test_a_page_is_a_translation_only_where_it_runs_the_same():
    korean = [document for document in DOCUMENTS if find_original(document)]
    assert len(korean) >= 7
    same = [document.name for document in korean if list_runs(document) == list_runs(find_original(document))]
    assert "README.ko.md" in same and "search.md" not in same  # a page with more to run than its original runs


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_document)
def test_blocks_run_or_parse(document, request, tmp_path):
    """A translation that runs the same as its original, in the same order, is parsed: the original runs."""
    original = find_original(document)
    runs = original is None or list_runs(document) != list_runs(original)
    folder, names = tmp_path, {"__name__": "__main__"}
    if runs:
        enter_folder(folder, request.getfixturevalue("tiny_run"))
    for block in read_blocks(document):
        if block.language in SHOWN:
            check_shown(block)
        elif block.kind == "run" and runs:
            run_block(block.shorten(), folder, names)
        elif block.kind == "make":
            check_targets(block)
        elif block.kind != "skip":
            parse_block(block.shorten())


LONG = [path for path in DOCUMENTS if any(block.kind in ("slow", "serve") for block in read_blocks(path))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("document", LONG, ids=name_document)
def test_long_blocks_run(document, tiny_run, tmp_path):
    folder, names = enter_folder(tmp_path, tiny_run), {"__name__": "__main__"}
    for block in read_blocks(document):
        if block.language in SHOWN:
            continue
        if block.kind in ("run", "slow"):
            run_block(block.shorten(), folder, names)
        elif block.kind == "serve":
            serve_block(block, folder)
