"""Files and folders that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAGING, TRASH = ".staging-", ".trash-"  # prefixes of folders being written and being deleted


class DiskFull(RuntimeError):
    """The disk filled up while something was being saved; nothing saved before is harmed."""


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either its old content or all of the new one, also after a power cut.

    Raises DiskFull, or OSError as the system gave it.
    """
    temporary = path.with_name(f"{STAGING}{path.name}")
    try:
        with explain_full_disk(path.name):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """``write_file`` with readable JSON; NaN and infinity are refused with a ValueError."""
    write_file(path, (json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Wait for, then hold, the lock file ``path``; the system releases it however the process ends."""
    import fcntl

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def stage_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` in one rename once everything in it has reached the device.

    An existing ``target`` is replaced. When filling fails nothing of it stays. Raises DiskFull.
    """
    staging, trash = target.with_name(STAGING + target.name), target.with_name(TRASH + target.name)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with explain_full_disk(target.name):
            staging.mkdir(parents=True)
            yield staging
            for folder, _, names in os.walk(staging, topdown=False):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            if target.exists():
                shutil.rmtree(trash, ignore_errors=True)
                target.rename(trash)
            staging.rename(target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(trash, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder so that nobody ever sees half of it."""
    trash = path.with_name(TRASH + path.name)
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written or half-deleted in ``folder``."""
    for path in folder.iterdir():
        if path.name.startswith((STAGING, TRASH)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def explain_full_disk(what: str) -> Iterator[None]:
    """Turn "no space left" into a DiskFull that says what was being saved and what to do."""
    try:
        yield
    except Exception as error:
        # safetensors reports the system's error as text only
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "os error 28" not in str(error):
            raise
        raise DiskFull(f"disk full while saving {what}: free some space; what was saved before is intact") from error


def _sync(path: Path) -> None:
    """Wait until the device has a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
