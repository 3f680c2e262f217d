"""koret mine: hard negatives for training, without those that answer the question."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from koret import runs
from koret.commands.screen import open_console, print_json
from koret.config import TrainingConfig

# Settings that decide how data is cut and split: those of the run that MODEL is, else the defaults of koret train.
SHARED = ("train_split", "seed", "max_seq_length", "passage_tokens", "passage_overlap", "max_bad", "num_workers")


def add_mine(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="run, model directory, hub name, 'offline' or 'latest'")
    command.add_argument("--dataset-root", required=True, metavar="DATA", help="file, folder or zip, or 'sample'")
    command.add_argument("--out", required=True, metavar="FILE", help="the file for --hard-negatives (JSON lines)")
    command.add_argument(
        "--source", choices=("model", "bm25", "both"), default="model", help="who names candidates (default model)"
    )
    command.add_argument("--depth", type=int, default=50, metavar="K", help="candidates a question (default 50)")
    command.add_argument(
        "--per-question", type=int, default=4, metavar="N", help="negatives kept for a question (default 4)"
    )
    command.add_argument("--skip-top", type=int, default=0, metavar="N", help="pass over the first N candidates")
    command.add_argument(
        "--margin-absolute", type=read_margin, metavar="X", help="keep what scores below the positive's score - X"
    )
    command.add_argument(
        "--margin-relative",
        type=read_margin,
        default=0.95,
        metavar="SHARE",
        help="keep what scores below this share of the positive's score (default 0.95; 'none' for no limit)",
    )
    command.add_argument("--train-split", metavar="SHARE", help="as in the training that will use the file")
    command.add_argument("--seed", metavar="N", help="as in that training")
    command.add_argument("--max-seq-length", metavar="N", help="as in that training")
    command.add_argument("--passage-tokens", metavar="N", help="as in that training")
    command.add_argument("--passage-overlap", metavar="SHARE", help="as in that training")
    command.add_argument("--max-bad", metavar="SHARE", help="as in that training")
    command.add_argument("--num-workers", metavar="N", help="processes that read and clean data")
    command.add_argument("--json", action="store_true", help="print the first line of the file")


def read_margin(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def mine(options: argparse.Namespace) -> None:
    from koret.data.pairs import split_articles
    from koret.retrieval.encoder import load_encoder
    from koret.training.mining import MiningSettings, mine_negatives
    from koret.training.negatives import write_negatives
    from koret.training.preparation import load_data, require_source

    names = ("source", "depth", "per_question", "skip_top", "margin_absolute", "margin_relative")
    settings = MiningSettings(**{name: getattr(options, name) for name in names})
    config = read_config(options)
    require_source(config)
    encoder = load_encoder(options.model, max_seq_length=config.max_seq_length)
    dataset = load_data(config, encoder, sys.stderr.isatty())
    train, _ = split_articles(dataset, config.train_split, config.seed)
    mined = mine_negatives(dataset, train, encoder, settings, progress=sys.stderr.isatty())
    origin = {"model": options.model, "train_split": config.train_split, "seed": config.seed}
    header = write_negatives(Path(options.out), mined, dataset, settings, origin)
    if options.json:
        print_json(header)
    else:
        show_report(header["report"], options)


def read_config(options: argparse.Namespace) -> TrainingConfig:
    """The settings of the training the file is for, as far as they matter here."""
    config = {}
    try:
        config = runs.read_run(runs.resolve_model(options.model)).config
    except FileNotFoundError:
        pass  # no run: a model by itself
    values: dict[str, Any] = {name: config[name] for name in SHARED if name in config}
    given = {name: getattr(options, name, None) for name in SHARED}
    given = {name: value for name, value in given.items() if value is not None}
    return TrainingConfig(**{**values, **given, "dataset_root": options.dataset_root})


def show_report(report: dict[str, Any], options: argparse.Namespace) -> None:
    """What became of the candidates, and how to train on what is left."""
    console = open_console()
    table = Table(
        "candidates", "number", title=f"hard negatives for {report['questions']:,} questions", title_justify="left"
    )
    table.columns[1].justify = "right"
    for reason, count in report["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    table.add_row("kept", f"{report['kept']:,}", style="bold")
    table.add_row("all", f"{report['candidates']:,}")
    console.print(table)
    if empty := report["questions_without_negatives"]:
        console.print(
            f"{empty:,} questions have none. A model that ranks their passages low finds little below them: try "
            "--source bm25 or both, a greater --depth, or --margin-relative none"
        )
    console.print(
        f"koret train --dataset-root {options.dataset_root} --hard-negatives {options.out} ...    # train on them",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
