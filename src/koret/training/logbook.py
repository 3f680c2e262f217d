"""One record of a run's numbers: TensorBoard, metrics.jsonl and the terminal show the same."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from koret.files import explain_full_disk

METRICS = "metrics.jsonl"
PIPED_WIDTH = 110  # columns, where nobody says how wide the paper is: the closing table needs 100


class Logbook:
    """Writes every record to TensorBoard and, as one JSON line, to metrics.jsonl."""

    def __init__(self, run: Path, step: int = 0, positions: Mapping[str, int] | None = None) -> None:
        """Go on after ``step``: whatever was written beyond ``positions`` (what ``flush`` returned) is taken back."""
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        (run / METRICS).touch()
        for path in self._files():
            _cut(path, (positions or {}).get(path.name, 0))
        self._lines = open(run / METRICS, "ab")
        _wait_for_new_name(run)
        # A TensorBoard that is looking on forgets what it has read of the steps taken back.
        self._board = SummaryWriter(str(run), purge_step=step + 1 if positions else 0)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of one step. Raises ValueError when one is not finite: such a number is never written."""
        numbers = {name: float(value) for name, value in values.items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value} at step {step}")
        now = time.time()
        line = json.dumps({"step": step, "time": round(now, 3), **numbers}, ensure_ascii=False, allow_nan=False)
        with explain_full_disk(METRICS):
            self._lines.write(line.encode() + b"\n")
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step, walltime=now)

    def record_text(self, name: str, text: str) -> None:
        self._board.add_text(name, text, 0)

    def record_histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        for name, array in values.items():
            self._board.add_histogram(name, array, step)

    def flush(self) -> dict[str, int]:
        """Bring everything recorded to the device; returns how long every file is now."""
        with explain_full_disk(METRICS):
            self._lines.flush()
            self._board.flush()
        sizes = {}
        for path in self._files():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                sizes[path.name] = os.fstat(file.fileno()).st_size
        return sizes

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def _files(self) -> list[Path]:
        return [self._run / METRICS, *sorted(self._run.glob("events.out.tfevents.*"))]


def _cut(path: Path, size: int) -> None:
    """Shorten a file to what was recorded; an event file nobody vouches for goes altogether."""
    if size == 0 and path.name != METRICS:
        path.unlink()
    elif path.stat().st_size > size:
        os.truncate(path, size)


def _wait_for_new_name(run: Path) -> None:
    """Event files are read in the order of their names, which count seconds: never start two within one."""
    stamps = [path.name.split(".")[3] for path in run.glob("events.out.tfevents.*")]
    newest = max((int(stamp) for stamp in stamps if stamp.isdigit()), default=0)
    while 0 <= newest - int(time.time()) <= 1:
        time.sleep(0.02)


class Terminal:
    """What a person sees of a training: a progress bar on a terminal, plain lines when piped."""

    def __init__(self, console: Console | None = None, progress: bool = True) -> None:
        self.console = console or Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
        self.progress = progress
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """Print a line of plain text above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def start(self, step: int, total: int) -> None:
        """Begin to show training at ``step`` of ``total``."""
        self._total, self._began, self._first = total, time.monotonic(), step
        if self.progress and self.console.is_terminal:
            columns = ("training", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("training", total=total, completed=step, note="")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, loss: float, pairs_per_second: float) -> None:
        """Show the newest numbers."""
        pace = (time.monotonic() - self._began) / max(1, step - self._first)
        note = f"loss {loss:.4f}  {pairs_per_second:,.1f} pairs/s  {format_time(pace * (self._total - step))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif self.progress:
            self.say(f"step {step}/{self._total}  {note}")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def format_time(seconds: float) -> str:
    """2:05 or 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def describe_config(config: Mapping[str, Any]) -> str:
    """Settings as a Markdown table, the form TensorBoard shows text in."""
    rows = [f"| {name} | {value} |" for name, value in config.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])
