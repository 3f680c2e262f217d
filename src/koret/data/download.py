"""Fetch the official KorQuAD files: parallel, resumable, verified; never unpacked, never altered."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from koret.data.published import ROOTS, Damaged, list_files, verify_file
from koret.data.transfer import DownloadError, Interrupted, RemoteFile, Stopped, Transfer
from koret.runs import lock_run

LICENCE = """KorQuAD is licensed CC BY-ND 2.0 KR (https://creativecommons.org/licenses/by-nd/2.0/kr/): name the authors
(LG CNS, https://korquad.github.io); pass it on unchanged or not at all."""
LONGEST_WAIT = 60.0  # seconds between two tries


@dataclass(frozen=True)
class FileReport:
    """One file as it lies on disk; ``received`` counts the bytes this call transferred (0: it was there already)."""

    path: Path
    size: int
    received: int
    as_published: bool | None  # equal to the published SHA-256; None where none is known


@dataclass(frozen=True)
class DownloadReport:
    """What ``download`` did: files in official order, and the seconds it took."""

    dataset: str
    dest: Path
    files: tuple[FileReport, ...]
    seconds: float

    @property
    def received(self) -> int:
        """Bytes transferred by this call."""
        return sum(file.received for file in self.files)


def download(
    dataset: str,
    dest: Path,
    *,
    base_url: str | None = None,
    jobs: int = 2,
    progress: bool = True,
    announce: Callable[[str], None] = print,
    retries: int = 5,
    backoff: float = 1.0,
    timeout: float = 30.0,
) -> DownloadReport:
    """Fetch ``dataset`` into ``dest``, laid out as under the official root, so that ``dest`` can serve as a mirror.

    ``base_url`` replaces that root. Every file grows as NAME.part, is verified (published SHA-256, else zip CRCs or a
    whole JSON parse) and only then renamed; files already there are verified and kept. A lost connection, a timeout or
    a 5xx answer is tried again from the byte reached, ``retries`` times in a row without progress, after ``backoff``
    seconds doubled each time. HTTP_PROXY, HTTPS_PROXY and NO_PROXY count. ``announce`` is called from several threads,
    one at a time. Raises ValueError for wrong arguments, RunBusy when another process writes into ``dest``, DiskFull,
    and DownloadError naming every file that failed; whatever ended the call, Ctrl-C included, calling again continues.
    """
    if dataset not in ROOTS:
        raise ValueError(f"unknown dataset {dataset!r}: choose {', '.join(ROOTS)}")
    if jobs < 1 or retries < 0:
        raise ValueError(f"jobs must be at least 1 and retries at least 0, not {jobs} and {retries}")
    root = (base_url or ROOTS[dataset]).rstrip("/") + "/"
    if not root.startswith(("http://", "https://")) or not urllib.parse.urlsplit(root).netloc:
        raise ValueError(f"--base-url {base_url!r} must be an address like https://mirror.example/dataset/")
    started, dest = time.monotonic(), Path(dest).expanduser()
    files = [RemoteFile(root + path, path, dest / path) for path in list_files(dataset)]
    try:
        for file in files:
            file.target.parent.mkdir(parents=True, exist_ok=True)
        _show_licence(dest, announce)
    except OSError as error:
        raise DownloadError(f"cannot write to {dest}: {error.strerror}; choose another --dest") from error
    with lock_run(dest), _draw_bars(progress and sys.stdout.isatty()) as draw:
        reports = _Fetcher(announce, draw, retries, backoff, timeout).fetch_all(files, jobs)
    return DownloadReport(dataset, dest, reports, time.monotonic() - started)


class _Fetcher:
    def __init__(self, announce: Callable, draw: Callable, retries: int, backoff: float, timeout: float):
        self.announce, self.retries, self.backoff = _take_turns(announce), retries, backoff
        self.stop = threading.Event()
        opener = urllib.request.build_opener()  # reads the proxy variables now
        self.transfer = Transfer(opener, draw, self.stop, timeout)

    def fetch_all(self, files: list[RemoteFile], jobs: int) -> tuple[FileReport, ...]:
        waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        for file in files:
            waiting.put(file)
        reports: dict[str, FileReport] = {}
        errors: list[Exception] = []

        def work() -> None:
            while not self.stop.is_set() and not waiting.empty():
                try:
                    file = waiting.get_nowait()
                    reports[file.path] = self.fetch(file)
                except (queue.Empty, Stopped):
                    return
                except Exception as error:
                    errors.append(error)
                    if not isinstance(error, DownloadError):  # the disk, say: the other files would fail alike
                        self.stop.set()

        # daemons, for Ctrl-C need not wait for a silent server: a part is sound wherever its writing ends
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(files)))]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.02)
        except KeyboardInterrupt:
            self.announce("stopped: what has arrived is kept; the same command continues from there")
            raise
        finally:
            self.stop.set()
        if errors:
            raise _sum_up(errors)
        return tuple(reports[file.path] for file in files)

    def fetch(self, file: RemoteFile) -> FileReport:
        """Bring one file to its place, or find that it is there."""
        name = file.target.name
        if file.target.exists():
            try:
                return self._report(file, verify_file(file.target))
            except Damaged as fault:
                self.announce(f"{name}: the file already here is damaged ({fault}); fetching it again")
        failures = damaged = furthest = 0
        while True:
            wait = 0.0
            try:
                self.transfer.run(file)
                as_published = verify_file(file.part)
                os.replace(file.part, file.target)
                file.origin.unlink(missing_ok=True)
                return self._report(file, as_published)
            except Damaged as fault:
                file.discard()
                damaged += 1
                if damaged == 2:
                    raise DownloadError(
                        f"{file.url} arrived damaged twice ({fault}): the copy on the server is broken, or something "
                        "on the way alters it; try later, or name a mirror with --base-url"
                    ) from fault
                self.announce(f"{name}: arrived damaged ({fault}); fetching it once more from the start")
            except Interrupted as fault:
                have = file.find_part()[0]
                failures = 1 if have > furthest else failures + 1
                furthest = max(furthest, have)
                if failures > self.retries:
                    raise DownloadError(
                        f"{file.url}: {fault}; gave up after {failures} tries without progress "
                        f"({_megabytes(have)} kept): run the same command again to continue"
                    ) from fault
                wait = min(LONGEST_WAIT, max(fault.wait, self.backoff * 2 ** (failures - 1)))
                self.announce(f"{name}: {fault}; trying again in {wait:.0f} s from {_megabytes(have)}")
            if self.stop.wait(wait):
                raise Stopped

    def _report(self, file: RemoteFile, as_published: bool | None) -> FileReport:
        size, name = file.target.stat().st_size, file.target.name
        said = "fetched and verified" if file.received else "already here, verified"
        if as_published is False:
            said += ", but it is not the edition on record: its size or SHA-256 differs"
        self.announce(f"{name}: {said} ({_megabytes(size)})")
        return FileReport(file.target, size, file.received, as_published)


def _take_turns(announce: Callable[[str], None]) -> Callable[[str], None]:
    """The function for several threads: one line after the other."""
    turn = threading.Lock()

    def announce_alone(line: str) -> None:
        with turn:
            announce(line)

    return announce_alone


def _sum_up(errors: list[Exception]) -> Exception:
    """One error for all: what stopped everything goes first, else every failed file with its reason."""
    for error in errors:
        if isinstance(error, OSError) and error.filename:
            return DownloadError(f"{error.filename}: {error.strerror}; check the disk, or choose another --dest")
        if not isinstance(error, DownloadError):
            return error
    if len(errors) == 1:
        return errors[0]
    return DownloadError(f"{len(errors)} files could not be fetched:\n" + "\n".join(f"  {error}" for error in errors))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _show_licence(dest: Path, announce: Callable[[str], None]) -> None:
    """Say the licence the first time, and leave it with the files."""
    notice = dest / "KorQuAD-LICENSE"
    if not notice.exists():
        announce(LICENCE)
        notice.write_text(LICENCE + "\n")


@contextlib.contextmanager
def _draw_bars(wanted: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """A function drawing how far a file is: a bar each on a terminal, nothing elsewhere."""
    if not wanted:
        yield lambda name, have, size: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    bars: dict[str, progress.TaskID] = {}
    with progress.Progress(*columns) as display:

        def draw(name: str, have: int, size: int | None) -> None:
            if name not in bars:
                bars[name] = display.add_task(name)
            display.update(bars[name], completed=have, total=size, visible=have != size)

        yield draw
