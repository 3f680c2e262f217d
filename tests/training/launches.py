"""Start the same training in several real processes, as torchrun and accelerate launch do, and read what they left."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from toys import make_dataset

from koret.config import TrainingConfig
from koret.training.trainer import EmbeddingTrainer


@dataclass(frozen=True)
class Ended:
    """How a process of a launch ended: its exit code (minus the signal that killed it) and what it wrote."""

    returncode: int
    said: str
    complained: str


def launch(job: dict, folder: Path, count: int = 2) -> list[Ended]:
    """Processes 0 to ``count`` - 1 of one launch, ended; ``job`` goes to ``run`` in each of them.

    They are forks of this one, which has imported everything, in an environment as torchrun makes it. What the
    launchers themselves start is tested by ``test_launchers``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(count):
        numbers = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        numbers |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        said, complained = folder / f"said-{rank}.txt", folder / f"complained-{rank}.txt"
        child = os.fork()
        if child == 0:
            _become(job, {name: str(value) for name, value in numbers.items()}, said, complained)
        children.append((child, said, complained))
    codes = _wait_for([child for child, _, _ in children], seconds=240)
    return [
        Ended(code, said.read_text(), bad.read_text()) for code, (_, said, bad) in zip(codes, children, strict=True)
    ]


def _become(job: dict, environment: dict[str, str], said: Path, complained: Path) -> NoReturn:
    """In a forked child: run the job and end; nothing of the parent's is run or written."""
    code = 70
    try:
        os.environ.update(environment)
        for number, file in ((1, said), (2, complained)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.write(1, json.dumps(run(job)).encode())
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _wait_for(children: list[int], seconds: float) -> list[int]:
    """The exit codes; children that take longer are killed."""
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > until:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def run(job: dict) -> dict:
    """In a process of the launch: train as told, and say how it ended, what was shown, and what each step measured."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    console, data = Console(file=io.StringIO(), width=200), make_dataset(**job.get("data_of", {}).get(rank, {}))
    if job.get("resume"):
        trainer = EmbeddingTrainer.resume(job["resume"], dataset=data, console=console)
    else:
        own = job.get("config_of", {}).get(rank, {})
        trainer = EmbeddingTrainer(TrainingConfig(**{**job["config"], **own}), dataset=data, console=console)
    accident = job.get("accident", {}).get(rank)
    if accident == "out of memory":
        _run_out_of_memory_once(trainer)
    elif accident is not None:
        _stop_at(trainer, accident)
    try:
        run = trainer.train()
        return {"state": run.state, "run": str(run.path), "shown": console.file.getvalue()}
    except BaseException as error:
        return {"state": type(error).__name__, "error": str(error), "shown": console.file.getvalue()}


def _run_out_of_memory_once(trainer) -> None:
    """This process's third embedding of a training step fails as on a full device."""
    trainer._prepare()
    plain, calls = trainer.gradients._embed, []

    def embed(texts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return plain(texts)

    trainer.gradients._embed = embed


def _stop_at(trainer, step: int) -> None:
    """This process alone is sent SIGTERM during ``step``."""
    plain = trainer._take_step

    def take(one):
        if one.number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(one)

    trainer._take_step = take
