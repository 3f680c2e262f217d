"""koret search, koret examples: ask a model or an index."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.text import Text

from koret import runs
from koret.commands.screen import open_console, print_json

LONGEST_QUERY = 10_000  # characters
INDEXED = ("mode", "tokenizer", "where", "weight")  # options that ask for an index


def add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model",
        metavar="MODEL_OR_INDEX",
        help="an index (a folder made by koret index, or milvus:...), or run, model directory, hub name, 'offline' or "
        "'latest'",
    )
    command.add_argument("query", metavar="QUESTION")
    command.add_argument(
        "--passages",
        metavar="FILE",
        help="with a model: text file (a passage a line) or any data set; default: the run's own data",
    )
    command.add_argument("--top-k", type=int, default=5, help="passages shown (default 5)")
    command.add_argument(
        "--mode",
        choices=("dense", "lexical", "hybrid"),
        help="with an index: by vectors, by words (BM25) or by both (default: both where it holds words)",
    )
    command.add_argument(
        "--tokenizer",
        choices=("bigram", "kiwi"),
        help="with an index of both: words to search by, pairs of characters (default) or Kiwi's morphemes",
    )
    command.add_argument(
        "--where",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="with an index: only passages whose metadata meet this; = != < <= > >=, repeatable",
    )
    command.add_argument(
        "--weight",
        type=float,
        metavar="W",
        help="hybrid: share of the dense score, 0 to 1 (default: learned on held-out questions, else reciprocal rank)",
    )
    command.add_argument("--model", dest="encoder", metavar="MODEL", help="with an index: where its model lies now")
    command.add_argument("--json", action="store_true", help="print the hits as JSON")


def search(options: argparse.Namespace) -> None:
    query = options.query.strip()
    if not query:
        raise ValueError("the question is empty")
    if len(query) > LONGEST_QUERY:
        raise ValueError(f"the question has {len(query):,} characters; at most {LONGEST_QUERY:,} are read: shorten it")
    if options.top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {options.top_k}")
    if is_index(options.model):
        if options.passages is not None:
            raise ValueError(
                f"--passages goes with a model, and {options.model} is an index, which has its own: leave it out, or "
                "name a model in place of the index"
            )
        hits = search_index(options, query)
    else:
        given = [f"--{n}" for n in (*INDEXED, "encoder") if getattr(options, n) not in (None, [])]
        if given:
            raise ValueError(
                f"{given[0].replace('encoder', 'model')} needs an index, and {options.model} is none: make one with "
                f"koret index {options.model} CORPUS --out DIR"
            )
        hits = search_passages(options, query)
    if options.json:
        print_json(hits)
    else:
        show_hits(hits, query)


def is_index(name: str) -> bool:
    from koret.retrieval.places import is_database

    return is_database(name) or Path(name, "index.json").is_file()


def search_index(options: argparse.Namespace, query: str) -> list[dict[str, Any]]:
    """The hits in a saved index, as they are printed."""
    from koret.retrieval.index import open_index
    from koret.retrieval.store import parse_condition

    where = [parse_condition(text) for text in options.where]
    index = open_index(options.model, options.encoder)
    try:
        mode = options.mode or ("hybrid" if index.has_words or options.tokenizer else "dense")
        if options.tokenizer and mode == "dense":
            raise ValueError("--tokenizer is for searching by words, and --mode dense compares vectors: leave one out")
        if options.weight is not None and mode != "hybrid":
            raise ValueError(f"--weight is for --mode hybrid, and this search is {mode}: leave it out")
        (hits,) = index.search(
            [query], options.top_k, mode=mode, where=where, weight=options.weight, tokenizer=options.tokenizer
        )
    finally:
        index.close()
    return [
        {
            "rank": hit.rank,
            "score": hit.score,
            **{"scores": hit.parts},
            "id": hit.entry.id,
            "document": hit.entry.document,
            "heading": hit.entry.heading or str(hit.entry.metadata.get("title", "")),
            "passage": hit.entry.text,
            "metadata": hit.entry.metadata,
        }
        for hit in hits
    ]


def search_passages(options: argparse.Namespace, query: str) -> list[dict[str, Any]]:
    """The hits among passages that are encoded now."""
    from koret.retrieval.inference import E5KorQuADInference

    model = E5KorQuADInference(options.model)
    return model.search(query, read_passages(options, model.encoder), top_k=options.top_k)


def show_hits(hits: list[dict[str, Any]], query: str) -> None:
    """Rank, score, title and section, and the passage, or the part of it around the words of the query, in bold."""
    from koret.retrieval.excerpt import cut_excerpt, mark_words

    console = open_console()
    if not hits:
        console.print("no passage found: other words, fewer conditions (--where) or --mode dense may find some")
    for hit in hits:
        head = Text.assemble((f"{hit['rank']:>2}", "bold cyan"), f"  {hit['score']:.4f}  ")
        if hit.get("heading"):
            head.append(hit["heading"], "bold green")
            parts = hit["scores"] if len(hit["scores"]) > 1 else {}
            head.append("".join(f"  {name} {value:.3f}" for name, value in parts.items()), "dim")
            console.print(head)
            head = Text("    ")
        body, spans = hit["passage"], mark_words(query, hit["passage"])
        start, end = cut_excerpt(body, spans)
        text = Text(body[start:end])
        for a, b in spans:
            if start <= a and b <= end:
                text.stylize("bold yellow", a - start, b - start)
        head.append("… " if start else "").append_text(text).append(" …" if end < len(body) else "").append("\n")
        console.print(head)


def read_passages(options: argparse.Namespace, encoder: Any) -> list[str]:
    """The passages to search: a text file's lines, a data set's passages, or those the run was trained on."""
    from koret.evaluation.selection import find_runs, open_data

    trained = find_runs(options.model)[:1]
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
