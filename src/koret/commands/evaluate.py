"""koret evaluate, compare, sweep: scores with intervals, wins and losses, how much of a tuning to keep."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from koret.commands.data import add_loading_options, loading_options
from koret.commands.screen import open_console, print_json
from koret.files import write_json
from koret.privacy import scrub


def add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="run, model directory, hub name, 'offline' or 'latest'")
    command.add_argument("--dataset-root", required=True, metavar="DATA", help="file, folder or zip, or 'sample'")
    command.add_argument("--baseline", metavar="BASE", help="a second model, scored on the same questions")
    command.add_argument("--bm25", action=argparse.BooleanOptionalAction, default=True, help="score BM25 as well")
    command.add_argument(
        "--split", choices=["auto", "all", "held-out"], default="auto",
        help="questions to ask; auto: those a run held out when it was trained on this data, else all",
    )  # fmt: skip
    command.add_argument("--extra", metavar="DIR", action="append", default=[], help="also score this BEIR-layout set")
    command.add_argument("--probes", action="store_true", help="also score NFD, unspaced, particle and typo variants")
    command.add_argument("--max-queries", type=int, metavar="N", help="ask at most N questions")
    command.add_argument(
        "--max-seq-length", type=int, metavar="N", help="cut texts to N tokens (default: the model's own)"
    )
    command.add_argument("--json", metavar="FILE", help="write the report as JSON ('-': print it)")
    command.add_argument("--out", metavar="DIR", help="write report.html, plots, report.json and per-query results")
    command.add_argument("--trec", metavar="DIR", help="write TREC run and qrels files")
    add_loading_options(command)


def evaluate(options: argparse.Namespace) -> None:
    from koret.evaluation import evaluator, outputs, tables

    report = evaluator.evaluate(
        options.model,
        options.dataset_root,
        baseline=options.baseline,
        bm25=options.bm25,
        split=options.split,
        extra=options.extra,
        probes=options.probes,
        max_queries=options.max_queries,
        max_seq_length=options.max_seq_length,
        progress=sys.stderr.isatty(),
        **loading_options(options),
    )
    if options.out:
        outputs.save_report(report, options.out)
    if options.trec:
        outputs.save_trec(report, options.trec)
    if options.json and options.json != "-":
        write_json(Path(options.json), scrub(report.to_dict()))
    if options.json == "-":
        print_json(report.to_dict())
    else:
        tables.print_report(report, open_console())


def add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("model_a", metavar="MODEL_A")
    command.add_argument("model_b", metavar="MODEL_B")
    command.add_argument("--dataset-root", required=True, metavar="DATA")
    command.add_argument("--split", choices=["auto", "all", "held-out"], default="auto")
    command.add_argument("--max-queries", type=int, metavar="N", help="ask at most N questions")
    command.add_argument(
        "--moves", type=int, default=20, metavar="N", help="largest moves shown either way (default 20)"
    )
    command.add_argument("--json", action="store_true", help="print the comparison as JSON")
    add_loading_options(command)


def compare(options: argparse.Namespace) -> None:
    from koret.evaluation import comparison, tables

    found = comparison.compare_models(
        options.model_a,
        options.model_b,
        options.dataset_root,
        split=options.split,
        max_queries=options.max_queries,
        moves=options.moves,
        progress=sys.stderr.isatty(),
        **loading_options(options),
    )
    if options.json:
        print_json(found.to_dict())
    else:
        open_console().print(tables.format_comparison(found))


def add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="run, model directory or 'latest'")
    command.add_argument("--dataset-root", required=True, metavar="DATA", help="the set it was tuned for")
    command.add_argument("--baseline", metavar="BASE", help="default: what the run was tuned from")
    command.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
        metavar="W",
        help="shares of the tuning",
    )
    command.add_argument(
        "--extra", metavar="DIR", action="append", default=[], help="a BEIR-layout set not to get worse on"
    )
    command.add_argument("--split", choices=["auto", "all", "held-out"], default="auto")
    command.add_argument("--max-queries", type=int, metavar="N", help="ask at most N questions")
    command.add_argument("--save", metavar="DIR", help="write the chosen model here")
    command.add_argument("--plot", metavar="FILE", help="draw the trade-off (PNG or SVG)")
    command.add_argument("--json", action="store_true", help="print as JSON")
    add_loading_options(command)


def sweep(options: argparse.Namespace) -> None:
    from koret.evaluation import sweep as sweeping
    from koret.figures import save_figure

    found = sweeping.sweep(
        options.model,
        options.dataset_root,
        baseline=options.baseline,
        weights=options.weights,
        extra=options.extra,
        split=options.split,
        max_queries=options.max_queries,
        save=options.save,
        progress=sys.stderr.isatty(),
        **loading_options(options),
    )
    if options.plot:
        save_figure(sweeping.draw_sweep(found), Path(options.plot))
    if options.json:
        print_json(found.to_dict())
        return
    table = Table("strength", *(escape(task) for task in found.tasks), title="nDCG@10 between base and tuned")
    for point in found.points:
        cells = [f"{s.mean:.3f} {s.low:.3f}–{s.high:.3f}" for s in point.scores.values()]
        table.add_row(f"{point.weight:g}", *cells, style="bold" if point.weight == found.chosen else None)
    open_console().print(table, found.sentence, Text(found.cleanness))
