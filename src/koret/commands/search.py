"""koret search, koret examples: ask a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.markup import escape

from koret import runs
from koret.commands.screen import open_console, print_json


def add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="run, model directory, hub name, 'offline' or 'latest'")
    command.add_argument("query", metavar="QUESTION")
    command.add_argument(
        "--passages", metavar="FILE", help="text file (a passage a line) or any data set; default: the run's own data"
    )
    command.add_argument("--top-k", type=int, default=5, help="passages shown (default 5)")
    command.add_argument("--json", action="store_true", help="print the hits as JSON")


def search(options: argparse.Namespace) -> None:
    from koret.retrieval.inference import E5KorQuADInference

    if not options.query.strip():
        raise ValueError("the question is empty")
    model = E5KorQuADInference(options.model)
    hits = model.search(options.query, read_passages(options, model.encoder), top_k=options.top_k)
    if options.json:
        print_json(hits)
        return
    console = open_console()
    for hit in hits:
        console.print(f"[bold]{hit['rank']:>2}[/]  {hit['score']:.4f}  {escape(hit['passage'])}\n", highlight=False)


def read_passages(options: argparse.Namespace, encoder: Any) -> list[str]:
    """The passages to search: a text file's lines, a data set's passages, or those the run was trained on."""
    from koret.evaluation.selection import find_runs, open_data

    trained = find_runs(options.model)
    source = options.passages or (trained[0].config["dataset_root"] if trained else "sample")
    if source.endswith(".txt"):
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 text (byte {error.start}): convert it first") from error
        passages = [line.strip() for line in lines if line.strip()]
    else:
        from koret.data.passages import join_heading

        table = open_data(source, encoder, trained)[0].passages
        columns = table.column("heading").to_pylist(), table.column("text").to_pylist()
        passages = list(dict.fromkeys(join_heading(heading, text) for heading, text in zip(*columns, strict=True)))
    if not passages:
        raise ValueError(f"{source} holds no passage to search")
    return passages


def add_examples(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", nargs="?", help="default: the newest run, else the offline base")


def show_examples(options: argparse.Namespace) -> None:
    from koret.retrieval import examples

    name = options.model
    if name is None:
        try:
            name = str(runs.resolve_model("latest"))
        except FileNotFoundError:
            name = "offline"
    examples.run_examples(name, print)
