"""koret download, koret stats: get the data, look at it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from koret.commands.screen import open_console, print_json


def add_download(command: argparse.ArgumentParser) -> None:
    command.add_argument("dataset", choices=["korquad-1.0", "korquad-2.0", "korquad-2.1"])
    command.add_argument("--dest", required=True, metavar="DIR", help="where the files go")
    command.add_argument("--base-url", metavar="URL", help="a mirror with the official layout")
    command.add_argument("--jobs", type=int, default=2, help="files fetched at a time (default 2)")


def download(options: argparse.Namespace) -> None:
    from koret.data.download import download as fetch

    fetch(options.dataset, Path(options.dest), base_url=options.base_url, jobs=options.jobs)


def add_stats(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", metavar="DATA", help="file, folder or zip, or 'sample'")
    command.add_argument("--out", metavar="DIR", help="write statistics.json, plots and report.html here")
    command.add_argument("--model", metavar="MODEL", help="count tokens as this model does")
    command.add_argument(
        "--max-seq-length", type=int, default=256, help="length that counts as truncated (default 256)"
    )
    command.add_argument(
        "--against", metavar="DATA", action="append", default=[], help="look for overlap with this set too"
    )
    command.add_argument("--json", action="store_true", help="print the statistics as JSON")
    add_loading_options(command)


def show_stats(options: argparse.Namespace) -> None:
    from koret.data import statistics, statistics_report

    tokenizer = None
    if options.model:
        from koret.retrieval.encoder import load_encoder

        tokenizer = load_encoder(options.model).export_tokenizer(find_cache() / "tokenizers")
    settings = {"tokenizer": tokenizer, "max_seq_length": options.max_seq_length}
    dataset = load_data(options.data, options, **settings)
    others = {name: load_data(name, options, **settings) for name in options.against}
    found = statistics.compute_statistics(
        dataset, tokenizer=tokenizer, max_seq_length=options.max_seq_length, others=others
    )
    if options.out:
        files = statistics_report.save_report(found, Path(options.out))
    if options.json:
        print_json(found)
        return
    console = open_console()
    for table in statistics_report.format_tables(found):
        console.print(table)
    if options.out:
        console.print(f"written to {options.out}: {', '.join(sorted(file.name for file in files))}", highlight=False)


def add_loading_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--num-workers", type=int, default=4, help="processes that read and clean (default 4)")
    command.add_argument("--strict", action="store_true", help="validate every byte, raw_html included")
    command.add_argument(
        "--max-bad", type=float, default=0.001, metavar="SHARE", help="stop above this share of bad records"
    )


def loading_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"num_workers": options.num_workers, "strict": options.strict, "max_bad": options.max_bad}


def load_data(path: str, options: argparse.Namespace, **settings: Any):
    """The data set at ``path``; what was read and skipped goes to stderr."""
    from koret.data import loader

    dataset = loader.load_dataset(path, **loading_options(options), **settings)
    print(loader.format_report(dataset.report), file=sys.stderr)
    return dataset


def find_cache() -> Path:
    from koret.data import loader

    return loader.find_cache_dir(None)
