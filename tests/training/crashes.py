"""Run a training in a forked child that dies, or whose disk fills up, at a chosen file operation."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from rich.console import Console

from koret.runs import find_runs
from koret.training.trainer import EmbeddingTrainer

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


UNHANDLED = 71  # exit code of a child that Ctrl-C reached outside the training


def start_or_go_on(config, **options) -> EmbeddingTrainer:
    """What a person does after a crash: the same command, with --resume latest where there is a run."""
    runs = find_runs(config.log_dir)
    return EmbeddingTrainer.resume(runs[-1].path, **options) if runs else EmbeddingTrainer(config, **options)


def run_child(config, dataset, encoder, output: Path, arm=lambda root: None) -> int:
    """Start or go on with a run in a child process; returns its exit code, or minus the signal that killed it.

    What it said is appended to ``output``. ``arm(root)`` prepares the accident.
    """
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            with open(output, "a", encoding="utf-8") as file:
                arm(config.log_dir)
                console = Console(file=file, width=200)
                try:
                    start_or_go_on(config, dataset=dataset, encoder=encoder, console=console).train()
                    code = 0
                except KeyboardInterrupt as error:
                    code = getattr(error, "exit_code", UNHANDLED)
                except Exception as error:
                    code = 1
                    file.write(f"{type(error).__name__}: {error}\n")
                    traceback.print_exc(file=file)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def count_operations(log: Path):
    """Arms nothing; writes one line per file operation below the runs directory."""

    def arm(root):
        def note(event, args):
            if _matters(event, args, root):
                os.write(descriptor, f"{event} {Path(str(args[0])).name}\n".encode())

        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        sys.addaudithook(note)

    return arm


def kill_at(number: int):
    """SIGKILL just before file operation ``number`` (from 0) below the runs directory."""

    def arm(root):
        seen = [0]

        def strike(event, args):
            if _matters(event, args, root):
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen[0] += 1

        sys.addaudithook(strike)

    return arm


def _matters(event, args, root) -> bool:
    if event not in OPERATIONS or not args or not str(args[0]).startswith(root):
        return False
    return event != "open" or args[1] is None or any(c in str(args[1]) for c in "wax+")


def tear_write(number: int):
    """SIGKILL half-way through write ``number`` (from 0) of a file opened by Python below the runs directory."""

    def fault(file, data):
        file.write(data[: len(data) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return _break_writes(lambda n: n == number, fault)


def fill_disk_from(number: int):
    """From write ``number`` (from 0) on, every write fails as on a full disk, half of its data written."""

    def fault(file, data):
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    return _break_writes(lambda n: n >= number, fault)


def _break_writes(strikes, fault):
    def arm(root):
        seen, plain = [0], io.open

        class Breaking:
            def __init__(self, file):
                self._file = file

            def __getattr__(self, name):
                return getattr(self._file, name)

            def __enter__(self):
                self._file.__enter__()
                return self

            def __exit__(self, *error):
                return self._file.__exit__(*error)

            def write(self, data):
                number, seen[0] = seen[0], seen[0] + 1
                return fault(self._file, data) if strikes(number) else self._file.write(data)

        def breaking_open(path, mode="r", *args, **options):
            file = plain(path, mode, *args, **options)
            return Breaking(file) if str(path).startswith(root) and any(c in mode for c in "wax+") else file

        io.open = breaking_open
        import builtins

        builtins.open = breaking_open

    return arm


def read_outcome(log_dir: str) -> dict:
    """What must not depend on how often a run was interrupted: weights, scores, and both curves."""
    run = find_runs(log_dir)[-1]
    weights = ["model/model.safetensors", "model/lora_weights/adapter_model.safetensors"]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_bytes().splitlines()]
    for line in lines:
        line.pop("time")
        line.pop("train/pairs_per_second", None)
    return {
        "state": run.state,
        "weights": [(run.path / name).read_bytes() for name in weights],
        "final": run.final,
        "verdict": run.verdict,
        "metrics.jsonl": lines,
        "tensorboard": read_curves(run.path),
    }


def read_curves(run: Path) -> dict[str, list]:
    """Every scalar in TensorBoard as TensorBoard would show it, less the speed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run), size_guidance={"scalars": 0})
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag != "train/pairs_per_second"]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}
