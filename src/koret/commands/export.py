"""koret export: a model for other programs, proven to rank the same."""

from __future__ import annotations

import argparse
import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from koret.commands.data import add_loading_options, loading_options
from koret.commands.screen import open_console, print_json

TARGETS = ("merged", "onnx", "openvino")


def add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="RUN", help="run, model directory, hub name, 'offline' or 'latest'")
    command.add_argument("--to", required=True, choices=TARGETS, help="merged safetensors, ONNX or OpenVINO files")
    command.add_argument("--int8", action="store_true", help="weights of 8 bits (ONNX: products in 8 bits too)")
    command.add_argument("--dims", type=int, metavar="D", help="keep the first D numbers of a vector, of unit length")
    command.add_argument(
        "--binary", action="store_true", help="also measure vectors of bits, with and without rescoring"
    )
    command.add_argument(
        "--trim-vocab", metavar="CORPUS", help="drop tokens this text file (a passage a line) or data set never uses"
    )
    command.add_argument("--trim-anyway", action="store_true", help="trim although the corpus is too small to be safe")
    command.add_argument(
        "--lora-strength", type=float, metavar="S", help="share of the tuning to keep, 0 to 1 (default 1)"
    )
    command.add_argument(
        "--extra", metavar="DIR", action="append", default=[], help="say what the tuning kept forgot on this BEIR set"
    )
    command.add_argument("--out", metavar="DIR", help="folder to write (default: exports/ in the run)")
    command.add_argument("--dataset-root", metavar="DATA", help="questions to prove it on (default: the run's own)")
    command.add_argument("--max-queries", type=int, metavar="N", help="ask at most N questions")
    command.add_argument(
        "--limit-ndcg", type=float, metavar="X",
        help="the interval of the nDCG@10 difference must stay above -X (default 0.01)",
    )  # fmt: skip
    command.add_argument(
        "--limit-cosine", type=float, metavar="X", help="least cosine to the original (default: by kind)"
    )
    command.add_argument("--keep-failed", action="store_true", help="keep an export that failed, as OUT.failed")
    command.add_argument("--json", action="store_true", help="print the parity report as JSON")
    add_loading_options(command)


def export(options: argparse.Namespace) -> None:
    from koret.export import exporting

    try:
        done = exporting.export_model(
            options.model,
            options.to,
            int8=options.int8,
            dims=options.dims,
            binary=options.binary,
            trim_vocab=options.trim_vocab,
            trim_anyway=options.trim_anyway,
            lora_strength=options.lora_strength,
            extra=options.extra,
            out=options.out,
            dataset_root=options.dataset_root,
            max_queries=options.max_queries,
            limit_ndcg=options.limit_ndcg,
            limit_cosine=options.limit_cosine,
            keep_failed=options.keep_failed,
            progress=sys.stderr.isatty(),
            **loading_options(options),
        )
    except exporting.ParityFailed as error:
        _show(error.parity, options.json)
        raise
    if options.json:
        print_json({"folder": str(done.folder), "export": done.record, **done.parity.to_dict()})
        return
    console = open_console()
    if not done.record["tuned"]:
        console.print(f"{done.record['model']} is no run of koret: exported as it is, never tuned", markup=False)
    _show(done.parity, False)
    console.print(
        f"parity [bold green]passed[/]; written to {escape(str(done.folder))}", highlight=False, soft_wrap=True
    )
    console.print(f"load it with:\n  {escape(explain_loading(done.record['kind'], str(done.folder)))}", highlight=False)


def explain_loading(kind: str, folder: str) -> str:
    """The line of Python that loads an export of ``kind`` in plain sentence-transformers."""
    given = {
        "merged": "",
        "onnx": ', backend="onnx"',
        "openvino": ', backend="openvino"',
        "onnx-int8": ', backend="onnx", model_kwargs={"file_name": "onnx/model_qint8.onnx"}',
        "openvino-int8": ', backend="openvino", '
        'model_kwargs={"file_name": "openvino/openvino_model_qint8_quantized.xml"}',
    }[kind]
    return f'SentenceTransformer("{folder}"{given})'


def _show(found, as_json: bool) -> None:
    from koret.export import parity

    if as_json:
        print_json(found.to_dict())
        return
    console: Console = open_console()
    table = Table("", "original", found.kind, title="parity", box=SIMPLE_HEAD)
    for row in parity.summarize(found):
        table.add_row(*map(escape, row))
    console.print(table)
    if found.stored:
        table = Table("vectors", "bytes searched", "bytes kept", "nDCG@10", "difference", box=SIMPLE_HEAD)
        for way in found.stored:
            gap = parity.format_gap(way.difference)
            table.add_row(way.name, str(way.searched), str(way.kept), f"{way.ndcg:.4f}", escape(gap))
        console.print(table)
    for line in parity.describe_strength(found.strength) if found.strength else ():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for check in found.checks:
        mark = "[green]ok[/]" if check.passed else "[bold red]FAILED[/]"
        console.print(f"{mark:>6}  {escape(check.sentence)}", highlight=False)
