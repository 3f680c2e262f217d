"""Start the same training in several real processes, as torchrun and accelerate launch do, and read what they left."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def launch(job: dict, folder: Path, count: int = 2) -> list[subprocess.Popen]:
    """Processes 0 to ``count`` - 1 of one launch, ended; ``job`` goes to ``run`` in each of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(count):
        numbers = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        numbers |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, str(folder / "job.pickle")],
                env={**os.environ, **{name: str(value) for name, value in numbers.items()}},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for process in processes:
        process.said, process.complained = process.communicate(timeout=240)
    return processes


def run(job: dict) -> dict:
    """In a process of the launch: train as told, and say how it ended, what was shown, and what each step measured."""
    import torch
    from rich.console import Console

    sys.path.insert(0, str(HERE))
    from toys import make_dataset

    from koret.config import TrainingConfig
    from koret.training.trainer import EmbeddingTrainer

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
    import torch

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
    import signal

    plain = trainer._take_step

    def take(one):
        if one.number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(one)

    trainer._take_step = take


if __name__ == "__main__":
    print(json.dumps(run(pickle.loads(Path(sys.argv[1]).read_bytes()))))
