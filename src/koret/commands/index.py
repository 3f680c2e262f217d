"""koret index: make an index of a corpus, keep it up to date, delete from it, check it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from koret.commands.screen import print_json
from koret.privacy import make_printable

LEXICAL = {"bigram": ("bigram",), "kiwi": ("kiwi",), "both": ("bigram", "kiwi"), "none": ()}
SHOWN = 10  # skipped records named in the summary
LARGE = 1_000_000  # passages from which on an approximate search is worth its loss
_QUIET = 5.0  # seconds between two lines of progress


def add_index(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODEL", nargs="?", help="run, model directory, hub name, 'offline', 'latest'"
    )
    command.add_argument(
        "corpus",
        metavar="CORPUS",
        nargs="?",
        help="'sample', KorQuAD or SQuAD JSON, JSONL, CSV or Parquet (id, title, text, and what else is to be filtered "
        "by), BEIR, zip, text, Markdown or HTML, or a folder of these",
    )
    command.add_argument("--out", metavar="DIR_OR_URL", required=True, help="the index: a folder, or milvus:...")
    command.add_argument(
        "--dtype", choices=("float32", "float16", "int8", "binary"),
        help="of the vectors (default float16); binary searches bits and scores the nearest, and says its recall",
    )  # fmt: skip
    command.add_argument(
        "--lexical",
        choices=tuple(LEXICAL),
        help="words to search by: pairs of characters (bigram, the default), Kiwi's morphemes (slow), both or none",
    )
    command.add_argument("--approximate", action="store_true", help="also build an approximate index, with its recall")
    command.add_argument("--passage-tokens", type=int, metavar="N", help="length of passages (default: as in training)")
    command.add_argument("--prune", action="store_true", help="remove documents that are not in the corpus any more")
    command.add_argument("--delete", metavar="ID", nargs="+", action="extend", help="remove these documents")
    command.add_argument("--verify", action="store_true", help="read every file of the index and check it")
    command.add_argument("--json", action="store_true", help="print what was done as JSON")


def index(options: argparse.Namespace) -> None:
    """The same command after a kill goes on where it was; under torchrun its processes share the work."""
    if options.delete or options.verify:
        if options.corpus:
            raise ValueError("--delete and --verify go without a corpus: koret index --out DIR --delete ID")
        check_maintenance(options)
        maintain(options)
    elif not options.corpus:
        raise ValueError("name a model and a corpus: koret index MODEL CORPUS --out DIR")
    else:
        build(options)


def check_maintenance(options: argparse.Namespace) -> None:
    """Refuse what --delete and --verify would pass over in silence."""
    from koret.retrieval.places import is_database

    for name in ("dtype", "lexical", "approximate", "passage_tokens", "prune"):
        if getattr(options, name) is not None and getattr(options, name) is not False:
            raise ValueError(
                f"--{name.replace('_', '-')} is for building: leave it out with --delete and --verify, or give it in "
                "a command of its own, with a model and a corpus"
            )
    if options.verify and is_database(options.out):
        raise ValueError(f"{options.out} is a database, and --verify checks the files of a folder: leave it out")


def build(options: argparse.Namespace) -> None:
    from koret.retrieval.distributed import build_shares
    from koret.retrieval.places import exists

    settings: dict[str, Any] = {"passage_tokens": options.passage_tokens}
    if not exists(options.out):
        settings = {**read_run_settings(options.model), **{k: v for k, v in settings.items() if v is not None}}
    index = build_shares(
        options.model,
        options.corpus,
        options.out,
        dtype=options.dtype,
        lexical=None if options.lexical is None else LEXICAL[options.lexical],
        approximate=options.approximate,
        prune=options.prune,
        progress=None if options.json else make_progress(),
        **settings,
    )
    if index is None:  # one of several processes; the first reports for all
        return
    try:
        if options.json:
            report = msgspec.to_builtins(index.report)
            print_json(
                {
                    "index": options.out,
                    "passages": index.count(),
                    **report,
                    "info": index.store.info,
                    "approximate": getattr(index.store, "approximate", None),
                }
            )
        else:
            show_report(index, options)
    finally:
        index.close()


def read_run_settings(model: str) -> dict[str, Any]:
    """How the run that a model comes from cut its passages, and the weight its evaluation learned for hybrid search."""
    from koret.evaluation.selection import find_runs

    settings: dict[str, Any] = {}
    for run in find_runs(model)[:1]:  # behind it come those its base comes from
        tokens, window = run.config.get("passage_tokens"), run.config.get("max_seq_length")
        settings["passage_tokens"] = min(tokens, window) if tokens and window else tokens
        report = run.path / "evaluation" / "report.json"
        if report.is_file():
            settings["hybrid_weight"] = json.loads(report.read_bytes()).get("data", {}).get("fusion_weight")
    return settings


def make_progress() -> Callable[[int], None]:
    """A line every few seconds, however the output is read; the encoder adds a bar on a terminal."""
    started = last = time.perf_counter()

    def show(passages: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > _QUIET:
            last = now
            print(f"{passages:,} passages encoded after {now - started:,.0f} s", file=sys.stderr, flush=True)

    return show


def maintain(options: argparse.Namespace) -> None:
    from koret.retrieval.places import open_store

    store = open_store(options.out)
    done: dict[str, Any] = {"index": options.out}
    try:
        if options.delete:
            known = [name for name, version in zip(options.delete, store.find_versions(options.delete), strict=True)
                     if version is not None]  # fmt: skip
            done |= {"deleted": known, "unknown": [name for name in options.delete if name not in known]}
            done["passages_deleted"] = store.delete(known)
        if options.verify:
            done |= {"unchecked": store.verify(), "verified": True}
        done |= {"passages": store.count(), "tuned": getattr(store, "is_tuned", True)}
    finally:
        store.close()
    if options.json:
        print_json(done)
        return
    if "deleted" in done:
        print(f"{len(done['deleted'])} documents deleted ({done['passages_deleted']:,} passages)")
        for name in done["unknown"]:
            print(make_printable(f"  not in the index: {name}"))
    if "verified" in done:
        old = f", but nothing is known of {' and '.join(done['unchecked'])}: an older koret noted no checksum of it"
        print("every file is as it was written" + (old if done["unchecked"] else ""))
    print(f"{options.out} holds {done['passages']:,} passages")
    if not done["tuned"]:
        print("the recall of its bits was measured before this: koret index MODEL CORPUS measures again")


def show_report(index: Any, options: argparse.Namespace) -> None:
    report, info = index.report, index.info
    words = " and ".join(info.lexical) or "no"
    print(f"{options.out}: {index.count():,} passages ({info.dtype} vectors of {info.encoder}; {words} words)")
    removed = f", {report.removed:,} removed" if options.prune else ""
    print(
        f"documents: {report.added:,} added, {report.changed:,} changed, {report.unchanged:,} unchanged{removed}; "
        f"{report.encoded:,} passages encoded in {report.seconds:,.1f} s"
    )
    if report.gone:
        print(
            f"{report.gone:,} documents of the index are not in this corpus and stay; "
            "the same command with --prune removes them"
        )
    if report.unpruned:
        print(make_printable(report.unpruned))
    if report.spared:
        print(f"{report.spared:,} documents kept as they were: the corpus holds them, but they cannot be read (below)")
    if report.cut_texts:
        print(f"{report.cut_texts:,} texts were longer than {info.passage_tokens} tokens and were cut into passages")
    if report.rejected:
        print(f"{report.rejected:,} records skipped:")
        for reject in report.rejects[:SHOWN]:
            where = f"{reject.source}:{reject.position}" if reject.position else reject.source
            print(make_printable(f"  {where}: {reject.reason}" + (f" ({reject.id})" if reject.id else "")))
        if report.rejected > SHOWN:
            print(f"  and {report.rejected - SHOWN:,} more (--json lists up to 1,000)")
    approximate = getattr(index.store, "approximate", None)
    if approximate:
        print(
            f"approximate: {approximate['nprobe']:,} of {approximate['cells']:,} cells looked at, "
            f"recall@10 {approximate['recall@10']:.3f} of exact search on {approximate['queries']:,} sample queries"
        )
    if bits := getattr(index.store, "bits", None):
        rest = "bits, with conditions" if approximate else "bits"
        missed = f" (aimed at: {bits['aim']})" if bits["recall@10"] < bits["aim"] else ""
        print(
            f"{rest}: the nearest {bits['oversample']:,} passages for each result are scored, "
            f"recall@10 {bits['recall@10']:.3f} of exact search on {bits['queries']:,} sample queries{missed}"
        )
    if not approximate and not bits and index.count() > LARGE:
        print(f"more than {LARGE:,} passages: --approximate makes searching faster, and says at what recall")
    print(f'search it: koret search {options.out} "질문"')
