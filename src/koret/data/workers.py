"""Preparing sources in several processes that import nothing but the data layer."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from koret.data.prepare import Settings, SourceReport, prepare_source
from koret.data.sources import DataError, Source


class _Job(msgspec.Struct):
    source: Source
    settings: Settings
    folder: Path
    number: int


class _Result(msgspec.Struct):
    report: SourceReport | None = None
    problem: str = ""  # the data's fault, for the user
    crash: str = ""  # a traceback: ours


_encode = msgspec.json.Encoder(enc_hook=str).encode  # paths as text
_decode_job = msgspec.json.Decoder(_Job, dec_hook=lambda kind, value: kind(value)).decode
_decode_result = msgspec.json.Decoder(_Result).decode

# A fresh interpreter that never sees the user's main module: no torch, and no `if __name__ == "__main__"` needed.
# Nor does it look into the working directory, unless this process does.
_START = "import sys; sys.path[:] = sys.argv[1:]; from koret.data.workers import serve; serve()"


def prepare_all(
    sources: Sequence[Source],
    settings: Settings,
    folder: Path,
    num_workers: int,
    on_done: Callable[[SourceReport], None] = lambda report: None,
) -> list[SourceReport]:
    """Prepare every source into ``folder``; reports in the order of ``sources``, whoever did the work.

    ``num_workers`` 0 works in this process. The first broken source stops the rest and raises its DataError.
    """
    num_workers = min(
        num_workers, len(sources), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 64
    )
    jobs = [_Job(source, settings, folder, number) for number, source in enumerate(sources)]
    if num_workers < 2 and (num_workers == 0 or len(sources) == 1):
        reports = []
        for job in jobs:
            reports.append(prepare_source(job.source, settings, folder, job.number))
            on_done(reports[-1])
        return reports
    return _Pool(num_workers).run(jobs, on_done)


class _Pool:
    """Worker processes, each fed by a thread that waits for it: largest source first, so that all end together."""

    def __init__(self, size: int) -> None:
        paths = [str(Path(path).absolute()) if path else os.getcwd() for path in sys.path]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", _START, *paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            for _ in range(size)
        ]
        self._todo: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, _Result]] = queue.SimpleQueue()

    def run(self, jobs: list[_Job], on_done: Callable[[SourceReport], None]) -> list[SourceReport]:
        for job in sorted(jobs, key=lambda job: -job.source.size):
            self._todo.put(job)
        reports: dict[int, SourceReport] = {}
        try:
            for process in self._processes:
                threading.Thread(target=self._feed, args=(process,), daemon=True).start()
            while len(reports) < len(jobs):
                number, result = self._done.get()
                if result.report is None:
                    raise DataError(result.problem) if result.problem else RuntimeError(result.crash)
                reports[number] = result.report
                on_done(result.report)
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
        return [reports[number] for number in range(len(jobs))]

    def _feed(self, process: subprocess.Popen) -> None:
        """Give one process job after job; whatever happens, every job taken gets a result."""
        while True:
            try:
                job = self._todo.get_nowait()
            except queue.Empty:
                return
            try:
                process.stdin.write(_encode(job) + b"\n")
                process.stdin.flush()
                result = _decode_result(process.stdout.readline())
            except Exception:
                process.kill()
                code = process.wait()
                why = "killed, perhaps for lack of memory" if code < 0 else f"exit code {code}"
                crash = f"the process preparing {job.source.name} ended ({why}): try fewer num_workers"
                self._done.put((job.number, _Result(crash=crash)))
                return
            self._done.put((job.number, result))


def serve() -> None:
    """Answer jobs from standard input, one JSON line each, until it closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    for line in sys.stdin.buffer:
        job = _decode_job(line)
        try:
            result = _Result(prepare_source(job.source, job.settings, job.folder, job.number))
        except (DataError, OSError) as error:
            result = _Result(problem=str(error))
        except Exception:
            result = _Result(crash=f"preparing {job.source.name} failed:\n{traceback.format_exc()}")
        answers.write(_encode(result) + b"\n")
        answers.flush()
