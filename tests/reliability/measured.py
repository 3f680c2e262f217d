"""Reads data sets in child processes of a small interpreter and says what each came to, and what it cost.

Run as a program it answers lines of JSON {"path", "cache", "options", "texts"} with lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HARD_SECONDS, HARD_BYTES = 20, 4 << 30  # where the system ends what should have taken 2 s and 1 GB


class Reader:
    """The program below, in another process: it has imported the data layer and nothing else."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def read(self, path: Path, cache: Path, texts: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
        """What reading ``path`` came to: ``report`` or ``refused`` or ``crash``; ``seconds`` of CPU, ``megabytes``."""
        asked = {"path": os.fspath(path), "cache": os.fspath(cache), "texts": texts, "options": options}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


def read_measured(asked: dict[str, Any]) -> dict[str, Any]:
    """The same, in a child of this process."""
    answer, write = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(answer)
            resource.setrlimit(resource.RLIMIT_CPU, (HARD_SECONDS, HARD_SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (HARD_BYTES, HARD_BYTES))
            with os.fdopen(write, "w", encoding="utf-8") as file:
                json.dump(read_data_set(**asked), file)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(answer, encoding="utf-8") as file:
        outcome = json.loads(file.read() or "{}")
    _, status, usage = os.wait4(pid, 0)
    return outcome | {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "seconds": usage.ru_utime + usage.ru_stime,
        "elapsed": time.monotonic() - began,
        "megabytes": usage.ru_maxrss / 1024,
    }


def read_data_set(path: str, cache: str, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
    from koret.data.loader import load_dataset

    try:
        dataset = load_dataset(path, cache_dir=cache, num_workers=0, progress=False, **{"max_bad": 1.0} | options)
    except (ValueError, FileNotFoundError) as error:
        return {"refused": str(error), "kind": type(error).__name__}
    except BaseException:
        return {"crash": traceback.format_exc()}
    passages = dataset.passages.column("text").to_pylist()
    missing = [text for text in texts if not any(text in passage for passage in passages)]
    return {"report": dataset.report, "missing": missing}


if __name__ == "__main__":
    import pyarrow.parquet  # noqa: F401  what a case imports is not its cost

    import koret.data.formats
    import koret.data.loader  # noqa: F401

    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            print(json.dumps(read_measured(json.loads(line))), flush=True)
