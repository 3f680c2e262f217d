"""koret runs, koret tensorboard: what was trained, side by side, and its curves."""

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
from koret.commands.screen import open_console, print_json


def add_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", metavar="RUN", nargs="*", help="run directories or names; none lists all runs")
    command.add_argument("--log-dir", default="./logs/tensorboard", metavar="DIR")
    command.add_argument("--json", action="store_true", help="print as JSON")


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


RUN_PARTS = ("config", "data", "base", "final", "verdict")


def show_run(run: runs.Run, as_json: bool, console: Console) -> None:
    if as_json:
        reason = {"reason": run.status["reason"]} if run.status.get("reason") else {}
        parts = {name: getattr(run, name) for name in RUN_PARTS}
        print_json({"path": str(run.path), "state": run.state, **reason, **parts})
        return
    console.print(
        f"[bold]{escape(str(run.path))}[/]  {run.state}{say_progress(run.status)}", highlight=False, soft_wrap=True
    )
    if run.status.get("reason"):
        console.print(f"  {escape(run.status['reason'])}", highlight=False, soft_wrap=True)
    for part in RUN_PARTS:
        values = getattr(run, part)
        if not values:
            continue
        console.print(f"\n[bold]{part}[/]")
        for key, value in values.items():
            shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
            shown = f"{value:.4f}" if isinstance(value, float) and part in ("base", "final") else shown
            console.print(f"  {key:<28} {escape(str(shown))}", highlight=False, soft_wrap=True)


def say_progress(status: dict[str, Any]) -> str:
    """Where a run that did not finish stands."""
    if status.get("state") == "finished" or not status.get("total_steps"):
        return ""
    return f" after step {status.get('step', 0):,} of {status['total_steps']:,}"


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


def add_tensorboard(command: argparse.ArgumentParser) -> None:
    command.add_argument("log_dir", nargs="?", default="./logs/tensorboard", metavar="LOG_DIR")
    command.add_argument("--host", default="0.0.0.0", help="address to listen on (default 0.0.0.0: every network)")
    command.add_argument("--port", type=int, default=6006)


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
    # not -m: that would look for modules in the working directory first
    start = "import sys; sys.path[:] = filter(None, sys.path); from tensorboard.main import run_main; run_main()"
    command = [sys.executable, "-c", start, "--logdir", str(folder)]
    os.execv(sys.executable, [*command, "--host", options.host, "--port", str(options.port)])


def find_address() -> str:
    """This machine's address on its network; its name where it has no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent, the route names our own
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
