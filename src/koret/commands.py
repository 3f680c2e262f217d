"""What each `koret` command does: one public call, then words for the terminal or JSON for a program."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from koret import runs
from koret.config import TrainingConfig, read_settings
from koret.files import write_json


def run(options: argparse.Namespace) -> int | None:
    """Run the parsed command; returns its exit code, None for 0."""
    return COMMANDS[options.command](options)


def open_console() -> Console:
    """A terminal of at least 100 columns: tables stay whole when piped."""
    console = Console()
    return console if console.is_terminal else Console(width=max(100, console.width))


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


# ---------------------------------------------------------------- data


def download(options: argparse.Namespace) -> None:
    from koret.data.download import download as fetch

    fetch(options.dataset, Path(options.dest), base_url=options.base_url, jobs=options.jobs)


def show_stats(options: argparse.Namespace) -> None:
    from koret.data import statistics, statistics_report

    tokenizer = None
    if options.model:
        from koret.retrieval.encoder import load_encoder

        tokenizer = load_encoder(options.model).export_tokenizer(find_cache() / "tokenizers")
    settings = {"tokenizer": tokenizer, "max_seq_length": options.max_seq_length}
    dataset = load_data(options.data, options, **settings)
    others = {Path(name).name: load_data(name, options, **settings) for name in options.against}
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


def load_data(path: str, options: argparse.Namespace, **settings: Any):
    """The data set at ``path``; what was read and skipped goes to stderr."""
    from koret.data import loader

    dataset = loader.load_dataset(path, **loading_options(options), **settings)
    print(loader.format_report(dataset.report), file=sys.stderr)
    return dataset


def find_cache() -> Path:
    from koret.data import loader

    return loader.find_cache_dir(None)


# ---------------------------------------------------------------- search


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


def show_examples(options: argparse.Namespace) -> None:
    from koret.retrieval import examples

    name = options.model
    if name is None:
        try:
            name = str(runs.resolve_model("latest"))
        except FileNotFoundError:
            name = "offline"
    examples.run_examples(name, print)


# ---------------------------------------------------------------- runs


def show_runs(options: argparse.Namespace) -> None:
    console = open_console()
    if not options.runs:
        found = runs.find_runs(options.log_dir)
        if options.json:
            print_json([summarize_run(run) for run in found])
        elif found:
            console.print(tabulate_runs(found))
        else:
            console.print(f"no run in {options.log_dir} yet; make one with: koret train")
        return
    paths = [runs.resolve_run(name, options.log_dir) for name in options.runs]
    if len(paths) == 1:
        show_run(runs.read_run(paths[0]), options.json, console)
    elif options.json:
        rows = runs.compare_runs(paths)
        print_json([{**dataclasses.asdict(row), "differs": row.differs} for row in rows])
    else:
        console.print(tabulate_differences([path.name for path in paths], runs.compare_runs(paths)))


def summarize_run(run: runs.Run) -> dict[str, Any]:
    """One run as a flat record."""
    return {
        "run": run.name,
        "state": run.state,
        "model_name": run.config.get("model_name"),
        "dataset_root": run.config.get("dataset_root"),
        "positives": run.config.get("positives"),
        "base": run.base.get("ndcg@10"),
        "final": run.final.get("ndcg@10"),
        "verdict": run.verdict.get("verdict"),
    }


def tabulate_runs(found: list[runs.Run]) -> Table:
    table = Table("run", "state", title="runs, oldest first", box=SIMPLE_HEAD)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for name in ("model", "data", "positives", "base nDCG@10", "tuned", "verdict"):
        table.add_column(name, overflow="fold")
    for run in found:
        record = summarize_run(run)
        scores = ["" if record[k] is None else f"{record[k]:.4f}" for k in ("base", "final")]
        words = [record["model_name"], Path(record["dataset_root"] or "").name, record["positives"]]
        cells = [run.name, run.state, *words, *scores, record["verdict"]]
        table.add_row(*(escape(str(cell or "")) for cell in cells))
    return table


def show_run(run: runs.Run, as_json: bool, console: Console) -> None:
    if as_json:
        print_json({"path": str(run.path), "state": run.state, **{k: getattr(run, k) for k in RUN_PARTS}})
        return
    console.print(f"[bold]{escape(str(run.path))}[/]  {run.state}", highlight=False)
    for part in RUN_PARTS:
        values = getattr(run, part)
        if not values:
            continue
        console.print(f"\n[bold]{part}[/]")
        for key, value in values.items():
            shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
            shown = f"{value:.4f}" if isinstance(value, float) and part in ("base", "final") else shown
            console.print(f"  {key:<28} {escape(str(shown))}", highlight=False, soft_wrap=True)


RUN_PARTS = ("config", "data", "base", "final", "verdict")


def tabulate_differences(names: list[str], rows: list[runs.Difference]) -> Table:
    table = Table(title="≠ marks what differs", box=SIMPLE_HEAD)
    for name in ("", "", *names):
        table.add_column(name, overflow="fold")
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_section()
        values = [f"{v:.4f}" if isinstance(v, float) and group == "score" else str(v) for v in row.values]
        style = "bold yellow" if row.differs else None
        table.add_row("≠" if row.differs else "", row.name, *(escape(v) for v in values), style=style)
    return table


def start_tensorboard(options: argparse.Namespace) -> None:
    """Check the directory and the port, say who can read what, then become TensorBoard."""
    folder = Path(options.log_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no directory {folder}: train a model first (make train), or name another log directory"
        )
    if not any(folder.rglob("events.out.tfevents.*")):
        raise FileNotFoundError(
            f"{folder} holds no TensorBoard events: train a model first, or name another log directory"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except (OSError, OverflowError) as error:
            raise RuntimeError(
                f"cannot listen on {options.host}:{options.port} ({error}); choose another with --port"
            ) from error
    print(f"TensorBoard over {folder}")
    print(f"  on this machine  http://localhost:{options.port}")
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"  on the network   http://{find_address()}:{options.port}")
        print(
            f"There is no password: anyone who can reach {options.host}:{options.port} can read the names, curves,\n"
            "texts and settings of these runs. Only for this machine: add --host 127.0.0.1\n"
            f"(and from elsewhere: ssh -L {options.port}:localhost:{options.port} THIS_MACHINE). Stop with Ctrl-C."
        )
    sys.stdout.flush()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    os.execv(sys.executable, [*command, "--host", options.host, "--port", str(options.port)])


def find_address() -> str:
    """This machine's address on its network; its name where it has no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent, the route names our own
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


# ---------------------------------------------------------------- train


def read_config(options: argparse.Namespace) -> TrainingConfig:
    """Settings from the file and the options, checked together; options win."""
    return TrainingConfig(**{**(read_settings(options.config) if options.config else {}), **given_settings(options)})


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line."""
    prefix = "setting_"
    return {k[len(prefix) :]: v for k, v in vars(options).items() if k.startswith(prefix) and v is not None}


def train(options: argparse.Namespace) -> None:
    from koret.training.trainer import EmbeddingTrainer

    console = Console(stderr=True) if options.json else open_console()
    if options.resume:
        changes = {k: v for k, v in given_settings(options).items() if k != "log_dir"}
        log_dir = options.setting_log_dir or TrainingConfig().log_dir
        path = runs.resolve_run(options.resume, log_dir)
        trainer = EmbeddingTrainer.resume(path, changes=changes, console=console)
    else:
        trainer = EmbeddingTrainer(read_config(options), console=console)
    if options.dry_run:
        trainer.explain_plan()
        return
    run = trainer.train()
    if options.json:
        print_json({"run": str(run.path), "model": str(run.model), "base": run.base, "final": run.final, **run.verdict})
        return
    console.print("\nwhat to try next", style="bold")
    for command, purpose in (
        (f'koret search {run.path} "조선 시대에 한글을 만든 임금은 누구인가?"', "ask the tuned model"),
        (
            f"koret compare {run.config['model_name']} {run.path} --dataset-root {run.config['dataset_root']}",
            "see wins and losses",
        ),
        (f"koret tensorboard {run.path.parent}", "look at the curves"),
    ):
        console.print(f"  {command}    # {purpose}", highlight=False, markup=False, soft_wrap=True)


# ---------------------------------------------------------------- evaluate


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
        write_json(Path(options.json), report.to_dict())
    if options.json == "-":
        print_json(report.to_dict())
    else:
        tables.print_report(report, open_console())


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
    open_console().print(table, found.sentence)


def loading_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"num_workers": options.num_workers, "strict": options.strict, "max_bad": options.max_bad}


COMMANDS = {
    "evaluate": evaluate,
    "compare": compare,
    "sweep": sweep,
    "train": train,
    "download": download,
    "stats": show_stats,
    "search": search,
    "runs": show_runs,
    "tensorboard": start_tensorboard,
    "examples": show_examples,
}
