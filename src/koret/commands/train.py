"""koret train: train a model, prove it, say what to try next."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rich.console import Console

from koret import runs
from koret.commands.screen import open_console, print_json
from koret.config import TrainingConfig, read_settings


def add_train(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="YAML file of settings; options given here win over it")
    command.add_argument("--resume", metavar="RUN", help="continue a run: its directory, its name, or 'latest'")
    command.add_argument("--dry-run", action="store_true", help="print the plan, train nothing")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in dataclasses.fields(TrainingConfig):
        name = f.metadata["group"]
        group = groups.setdefault(name, command.add_argument_group(name))
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            dest=f"setting_{f.name}",
            metavar="VALUE",
            nargs="*" if isinstance(f.default, tuple) else None,
            help=f"{f.metadata['help']} (default {'none' if default in (None, '') else default})".replace("%", "%%"),
        )


def train(options: argparse.Namespace) -> None:
    from koret.retrieval.processes import join_group
    from koret.training.trainer import EmbeddingTrainer

    console = Console(stderr=True) if options.json else open_console()
    if options.resume:
        changes = {k: v for k, v in read_given(options).items() if k != "log_dir"}
        log_dir = options.setting_log_dir or TrainingConfig().log_dir
        path = join_group().lead(runs.resolve_run, options.resume, log_dir)
        trainer = EmbeddingTrainer.resume(path, changes=changes, console=console)
    else:
        trainer = EmbeddingTrainer(read_config(options), console=console)
    if options.dry_run:
        trainer.explain_plan()
        return
    run = trainer.train()
    if not trainer.group.leads:  # one of several processes; the first speaks for all
        return
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


def read_config(options: argparse.Namespace) -> TrainingConfig:
    """Settings from the file and the options, checked together."""
    return TrainingConfig(**read_given(options))


def read_given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of the file and of the command line, which wins."""
    return {**(read_settings(options.config) if options.config else {}), **given_settings(options)}


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line."""
    prefix = "setting_"
    return {k[len(prefix) :]: v for k, v in vars(options).items() if k.startswith(prefix) and v is not None}
