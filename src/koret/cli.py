"""The `koret` command: parse -> one call -> print."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from koret import __version__
from koret.config import TrainingConfig

DONE, FAILED, USAGE = 0, 1, 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse, with wrong options named together with their nearest neighbour and the command's own help."""

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        hints = []
        for word in unknown:
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, n=1)
            hints.append(f"unknown option {word}" + (f" (did you mean {near[0]}?)" if near else ""))
        self.exit(USAGE, f"koret: {'; '.join(hints) or message}\nsee: {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the job failed, 2 wrong usage or settings."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if getattr(options, "parser", None) is None:
        parser.print_help()
        return DONE
    if rest:
        options.parser.error("unrecognized arguments: " + " ".join(rest))
    _quieten_libraries()
    try:
        return _import_commands().run(options) or DONE
    except KeyboardInterrupt as error:  # a training says where it stopped and how to go on
        print(f"koret: {error}; go on with --resume" if str(error) else "koret: interrupted", file=sys.stderr)
        return getattr(error, "exit_code", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, `koret runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if os.environ.get("KORET_DEBUG") == "1":
            raise
        print(f"koret: {str(error).strip() or type(error).__name__}", file=sys.stderr)
        return getattr(error, "exit_code", USAGE if isinstance(error, (ValueError, FileNotFoundError)) else FAILED)


def _import_commands():
    from koret import commands

    return commands


def _quieten_libraries() -> None:
    """Model loading prints bars and advice of its own; koret says what it does itself."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    said = logging.StreamHandler()
    said.setLevel(logging.WARNING)  # on the handler: some libraries set their own loggers to DEBUG
    logging.basicConfig(format="%(message)s", handlers=[said])


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the option reference in the documentation is generated from it."""
    parser = Parser(prog="koret", description="Fine-tune Korean retrieval embeddings, and prove that they got better.")
    parser.add_argument("--version", action="version", version=f"koret {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(command=name, parser=command)
        return command

    _add_download(add("download", "fetch the official KorQuAD files, resumable and verified"))
    _add_stats(add("stats", "show what a data set contains: counts, lengths, duplicates, losses, leakage"))
    _add_train(add("train", "fine-tune a model and prove what it gained"))
    _add_evaluate(add("evaluate", "score a model on a data set, with intervals and baselines"))
    _add_compare(add("compare", "wins and losses of one model against another, query by query"))
    _add_sweep(add("sweep", "how much of a tuning to keep: scores between base and tuned, at home and elsewhere"))
    _add_search(add("search", "find the passages that answer a question"))
    _add_runs(add("runs", "list runs, show one, or compare several"))
    _add_tensorboard(add("tensorboard", "show the runs in TensorBoard"))
    _add_examples(add("examples", "three worked examples: one query, a batch, similarities"))
    return parser


def _add_download(command: argparse.ArgumentParser) -> None:
    command.add_argument("dataset", choices=["korquad-1.0", "korquad-2.0", "korquad-2.1"])
    command.add_argument("--dest", required=True, metavar="DIR", help="where the files go")
    command.add_argument("--base-url", metavar="URL", help="a mirror with the official layout")
    command.add_argument("--jobs", type=int, default=2, help="files fetched at a time (default 2)")


def _add_data_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--num-workers", type=int, default=4, help="processes that read and clean (default 4)")
    command.add_argument("--strict", action="store_true", help="validate every byte, raw_html included")
    command.add_argument(
        "--max-bad", type=float, default=0.001, metavar="SHARE", help="stop above this share of bad records"
    )


def _add_stats(command: argparse.ArgumentParser) -> None:
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
    _add_data_options(command)


def _add_train(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="YAML file of settings; options given here win over it")
    command.add_argument("--resume", metavar="RUN", help="continue a run: its directory, its name, or 'latest'")
    command.add_argument("--dry-run", action="store_true", help="print the plan, train nothing")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in dataclasses.fields(TrainingConfig):
        name = f.metadata["group"]
        group = groups.setdefault(name, command.add_argument_group(name))
        default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            dest=f"setting_{f.name}",
            metavar="VALUE",
            nargs="*" if isinstance(f.default, tuple) else None,
            help=f"{f.metadata['help']} (default {'none' if default is None else default})".replace("%", "%%"),
        )


def _add_evaluate(command: argparse.ArgumentParser) -> None:
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
    _add_data_options(command)


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("model_a", metavar="MODEL_A")
    command.add_argument("model_b", metavar="MODEL_B")
    command.add_argument("--dataset-root", required=True, metavar="DATA")
    command.add_argument("--split", choices=["auto", "all", "held-out"], default="auto")
    command.add_argument("--max-queries", type=int, metavar="N", help="ask at most N questions")
    command.add_argument(
        "--moves", type=int, default=20, metavar="N", help="largest moves shown either way (default 20)"
    )
    command.add_argument("--json", action="store_true", help="print the comparison as JSON")
    _add_data_options(command)


def _add_sweep(command: argparse.ArgumentParser) -> None:
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
    _add_data_options(command)


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="run, model directory, hub name, 'offline' or 'latest'")
    command.add_argument("query", metavar="QUESTION")
    command.add_argument(
        "--passages", metavar="FILE", help="text file (a passage a line) or any data set; default: the run's own data"
    )
    command.add_argument("--top-k", type=int, default=5, help="passages shown (default 5)")
    command.add_argument("--json", action="store_true", help="print the hits as JSON")


def _add_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", metavar="RUN", nargs="*", help="run directories or names; none lists all runs")
    command.add_argument("--log-dir", default="./logs/tensorboard", metavar="DIR")
    command.add_argument("--json", action="store_true", help="print as JSON")


def _add_tensorboard(command: argparse.ArgumentParser) -> None:
    command.add_argument("log_dir", nargs="?", default="./logs/tensorboard", metavar="LOG_DIR")
    command.add_argument("--host", default="0.0.0.0", help="address to listen on (default 0.0.0.0: every network)")
    command.add_argument("--port", type=int, default=6006)


def _add_examples(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", nargs="?", help="default: the newest run, else the offline base")


if __name__ == "__main__":
    sys.exit(main())
