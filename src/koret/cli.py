"""The `koret` command: parse -> one call -> print."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from koret import __version__
from koret.commands import data, evaluate, export, index, mine, runs, search, serve, train, web
from koret.privacy import make_printable

# name, help, the function that adds its options, the function that runs it
COMMANDS = (
    ("download", "fetch the official KorQuAD files, resumable and verified", data.add_download, data.download),
    (
        "stats",
        "show what a data set contains: counts, lengths, duplicates, losses, leakage",
        data.add_stats,
        data.show_stats,
    ),
    ("mine", "find hard negatives: what ranks high for a question without answering it", mine.add_mine, mine.mine),
    ("train", "fine-tune a model and prove what it gained", train.add_train, train.train),
    (
        "evaluate",
        "score a model on a data set, with intervals and baselines",
        evaluate.add_evaluate,
        evaluate.evaluate,
    ),
    (
        "compare",
        "wins and losses of one model against another, query by query",
        evaluate.add_compare,
        evaluate.compare,
    ),
    (
        "sweep",
        "how much of a tuning to keep: scores between base and tuned, at home and elsewhere",
        evaluate.add_sweep,
        evaluate.sweep,
    ),
    ("index", "make a corpus searchable, keep it up to date, delete from it", index.add_index, index.index),
    ("search", "find the passages that answer a question", search.add_search, search.search),
    ("web", "compare models side by side in the browser: search, report, own passages", web.add_web, web.show_page),
    ("serve", "serve a model behind OpenAI's embeddings interface", serve.add_serve, serve.serve_model),
    ("export", "a model for other programs, proven to rank the same", export.add_export, export.export),
    ("runs", "list runs, show one, or compare several", runs.add_runs, runs.show_runs),
    ("tensorboard", "show the runs in TensorBoard", runs.add_tensorboard, runs.start_tensorboard),
    (
        "examples",
        "three worked examples: one query, a batch, similarities",
        search.add_examples,
        search.show_examples,
    ),
)
DONE, FAILED, USAGE = 0, 1, 2
SPINS = "20000"  # turns a thread waits for another before it sleeps; 300,000 where nobody says
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
    _share_processors()
    try:
        return options.run(options) or DONE
    except KeyboardInterrupt as error:  # a training says where it stopped and how to go on
        print(f"koret: {error}; go on with --resume" if str(error) else "koret: interrupted", file=sys.stderr)
        return getattr(error, "exit_code", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, `koret runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if os.environ.get("KORET_DEBUG") == "1":
            raise
        print(f"koret: {make_printable(str(error).strip()) or type(error).__name__}", file=sys.stderr)
        return getattr(error, "exit_code", USAGE if isinstance(error, (ValueError, FileNotFoundError)) else FAILED)


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


def _share_processors() -> None:
    """Let the threads of a product give way to other programs: read once, when torch is loaded.

    GNU's OpenMP has them spin while they wait for each other. Where other programs take all processors, one thread
    waits for its turn while another burns its own; docs/RESULTS.md has what a training step gains and where it loses.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the option reference in the documentation is generated from it."""
    parser = Parser(prog="koret", description="Fine-tune Korean retrieval embeddings, and prove that they got better.")
    parser.add_argument("--version", action="version", version=f"koret {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name, help, add_options, run in COMMANDS:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(run=run, parser=command)
        add_options(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
