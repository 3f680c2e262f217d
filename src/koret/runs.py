"""A run directory: create, lock, describe, find, read, compare."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from koret.privacy import scrub

PACKAGES = ("koret", "torch", "transformers", "sentence-transformers", "peft", "tokenizers", "safetensors", "numpy")
STATES = ("running", "finished", "interrupted", "failed", "killed")


class RunBusy(RuntimeError):
    """Another process is working on this run."""


# ---------------------------------------------------------------- create and lock


def create_run(log_dir: str | Path, now: datetime | None = None) -> Path:
    """Make a new directory ``run_YYYYmmdd_HHMMSS`` in ``log_dir``; a taken name gets ``_2``, ``_3``, ...

    Raises ValueError when ``log_dir`` cannot be written.
    """
    log_dir = Path(log_dir).expanduser()
    name = f"run_{now or datetime.now():%Y%m%d_%H%M%S}"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 10_000):
            path = log_dir / (name if attempt == 1 else f"{name}_{attempt}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()  # fails when anybody else made it first: two runs never share a directory
                return path
    except OSError as error:
        raise ValueError(f"cannot create a run in {log_dir}: {error.strerror}; choose another --log-dir") from error
    raise ValueError(f"cannot create a run in {log_dir}: every name from {name} on is taken")


@contextlib.contextmanager
def lock_run(path: Path) -> Iterator[None]:
    """Hold the run for this process; the system releases it however the process ends. Raises RunBusy."""
    descriptor = _take_lock(path, exclusive=True, patience=1.0)
    if descriptor is None:
        raise RunBusy(f"{path} is in use by another process; wait for it, or stop it first")
    try:
        yield
    finally:
        os.close(descriptor)


def _take_lock(path: Path, *, exclusive: bool, patience: float = 0.0) -> int | None:
    """An open descriptor of the directory holding an advisory lock, or None when somebody else holds one."""
    import fcntl

    deadline = time.monotonic() + patience  # a reader looking at the run holds its shared lock for a moment
    descriptor = os.open(path, os.O_RDONLY)
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(0.02)


def _is_held(path: Path) -> bool:
    descriptor = _take_lock(path, exclusive=False)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


# ---------------------------------------------------------------- describe


def describe_environment(**details: Any) -> dict[str, Any]:
    """What a run ran with: command, versions, machine, commit, and ``details``; scrubbed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return scrub(
        {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "system": f"{platform.system()} {platform.machine()}",
            "versions": versions,
            "commit": _read_commit(),
            **details,
        }
    )


def _read_commit() -> str | None:
    """The commit of the source this package runs from, with ``+`` when files were changed; None outside a checkout."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*question: str) -> str:
        command = [git, "-C", str(Path(__file__).parent), *question]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", Path(__file__).name)  # fails in somebody else's checkout
        return ask("describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------- find, read, compare


@dataclass(frozen=True)
class Run:
    """What a run directory says about itself."""

    path: Path
    status: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)  # metrics of the untrained model on the run's questions
    final: dict[str, float] = field(default_factory=dict)  # metrics of the saved model on the same
    verdict: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def state(self) -> str:
        """One of STATES; a run that says "running" while nobody holds it was killed."""
        state = self.status.get("state", "killed")
        return "killed" if state == "running" and not _is_held(self.path) else state

    @property
    def base_run(self) -> str | None:
        """The name of the run whose model this one began with; None where it was none."""
        return self.environment.get("model", {}).get("run")

    @property
    def is_finished(self) -> bool:
        return self.status.get("state") == "finished"

    @property
    def model(self) -> Path | None:
        """The finished model, or None before there is one."""
        return self.path / "model" if (self.path / "model" / "modules.json").is_file() else None


def is_run(path: Path) -> bool:
    return (path / "status.json").is_file()


def read_run(path: str | Path) -> Run:
    """Read a run directory (or the ``model`` directory in one). Raises FileNotFoundError when it is neither."""
    path = Path(path).expanduser()
    if not is_run(path) and is_run(path.parent):
        path = path.parent
    if not is_run(path):
        raise FileNotFoundError(f"{path} is not a run directory: it has no status.json")
    environment = _read_json(path / "environment.json")
    config = environment.pop("config", {})
    return Run(
        path=path,
        status=_read_json(path / "status.json"),
        config=_read_json(path / "model" / "training_config.json") or config,
        environment=environment,
        data=_read_json(path / "data.json"),
        base=_read_json(path / "evaluation" / "base.json").get("metrics", {}),
        final=_read_json(path / "evaluation" / "final.json").get("metrics", {}),
        verdict=_read_json(path / "evaluation" / "verdict.json"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return value if isinstance(value, dict) else {}


def find_runs(log_dir: str | Path) -> list[Run]:
    """Every run in ``log_dir``, oldest first; an absent directory holds none."""
    folder = Path(log_dir).expanduser()
    if not folder.is_dir():
        return []
    paths = [p for p in folder.iterdir() if p.name.startswith("run_") and is_run(p)]
    return [read_run(p) for p in sorted(paths, key=_by_age)]


def _by_age(path: Path) -> tuple[str, int]:
    """run_20251103_143022_10 after run_20251103_143022_9."""
    date, _, number = path.name[len("run_") :].partition("_")
    clock, _, twin = number.partition("_")
    return f"{date}_{clock}", int(twin) if twin.isdigit() else 1


@dataclass(frozen=True)
class Difference:
    """One setting or score over several runs."""

    name: str
    values: tuple[Any, ...]
    group: str  # "setting", "data" or "score"

    @property
    def differs(self) -> bool:
        return any(v != self.values[0] for v in self.values)


def compare_runs(paths: Sequence[str | Path]) -> list[Difference]:
    """Settings, data and scores of several runs side by side; a value a run does not have is None."""
    runs = [read_run(path) for path in paths]
    rows = []
    for group, tables in (
        ("setting", [r.config for r in runs]),
        ("data", [{k: v for k, v in r.data.items() if not isinstance(v, (dict, list))} for r in runs]),
        ("score", [r.final for r in runs]),
    ):
        names = dict.fromkeys(name for table in tables for name in table)
        rows += [Difference(name, tuple(table.get(name) for table in tables), group) for name in names]
    return rows


def resolve_run(name: str | Path, log_dir: str | Path) -> Path:
    """The run directory meant by a path, a run's name in ``log_dir``, or ``latest``. Raises FileNotFoundError."""
    if str(name) == "latest":
        runs = find_runs(log_dir)
        if not runs:
            raise FileNotFoundError(f"there is no run in {log_dir} yet")
        return runs[-1].path
    for path in (Path(name).expanduser(), Path(log_dir).expanduser() / name):
        if is_run(path):
            return path
        if path.name == "model" and is_run(path.parent):
            return path.parent
    raise FileNotFoundError(f"no run called {name}: it is neither a run directory nor a name in {log_dir}")


def resolve_model(name: str | Path, log_dir: str | Path = "./logs/tensorboard") -> Path:
    """The model directory meant by a model path, a run, a run's name in ``log_dir``, or ``latest`` (its newest model).

    Raises FileNotFoundError saying what is there instead.
    """
    path = Path(name).expanduser()
    if (path / "modules.json").is_file() or (path / "config.json").is_file():
        return path
    if str(name) == "latest":
        models = [run.model for run in find_runs(log_dir) if run.model]
        if not models:
            raise FileNotFoundError(f"no finished run in {log_dir}: train a model first")
        return models[-1]
    run = read_run(resolve_run(name, log_dir))
    if run.model is None:
        raise FileNotFoundError(f"{run.path} holds no model: it is {run.state}; finish it with --resume {run.path}")
    return run.model


def find_origin(model: str | Path) -> Run | None:
    """The run that a model comes from, named as for ``resolve_model``; None where it comes from none."""
    try:
        return read_run(resolve_model(model))
    except FileNotFoundError:
        return None
