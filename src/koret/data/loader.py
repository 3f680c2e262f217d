"""Many files in parallel, in bounded memory -> a prepared data set on disk, memory-mapped."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import pyarrow as pa

from koret.data import assemble, workers
from koret.data.account import DEFAULT_MAX_BAD, check_report, describe_source, make_report, report_source
from koret.data.account import format_report as format_report
from koret.data.prepare import SHARDS, Settings, SourceReport
from koret.data.sources import DataError, Source, find_sources
from koret.data.tables import ARTICLES as ARTICLES
from koret.data.tables import PASSAGES as PASSAGES
from koret.data.tables import QUESTIONS as QUESTIONS
from koret.files import hold_lock, stage_folder, write_json

SAMPLE = Path(__file__).parent / "sample" / "korquad2.1_sample.json"
_QUIET_BYTES = 64 << 20  # a single source below this is prepared without progress lines
_HASHED = 1 << 16  # bytes hashed at either end of a large file


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: three tables joined by row number, and the account of how they came to be.

    The tables follow the schemas ARTICLES, PASSAGES and QUESTIONS of this module and may be memory-mapped.
    """

    articles: pa.Table
    passages: pa.Table
    questions: pa.Table
    fingerprint: str  # sha256 over sources and settings
    report: dict = field(default_factory=dict)  # counts per file, kept, rejected by reason
    directory: Path | None = None


def load_dataset(
    path: str | Path = "sample",
    *,
    tokenizer: Path | None = None,
    passage_tokens: int | None = None,
    max_seq_length: int = 256,
    overlap: float = 0.0,
    num_workers: int = 4,
    cache_dir: Path | str | None = None,
    strict: bool = False,
    max_bad: float = DEFAULT_MAX_BAD,
    progress: bool = True,
) -> Dataset:
    """Read ``path`` into a prepared data set; the second time it is only mapped into memory.

    ``path`` is ``'sample'`` (the embedded set), a KorQuAD 1.0/2.0/2.1 or SQuAD JSON file, a JSONL, CSV or Parquet file
    of pairs, an official zip, a BEIR folder, a folder of documents with a questions.jsonl, or a folder of any of these.
    HTML pages are cut into passages of ``passage_tokens`` (default ``max_seq_length``) tokens as the ``tokenizer``
    (a tokenizer.json) counts them, estimated without one; ready-made paragraphs stay whole unless ``passage_tokens``
    is given. ``overlap`` is the share of a passage repeated in the next.

    Rows do not depend on ``num_workers`` (0: this process). ``strict`` validates every byte of the files. More than
    a share of ``max_bad`` rejected records is an error; the default also lets ten of them pass in any set. The result
    is kept in ``cache_dir`` (default ``$KORET_CACHE`` or ``~/.cache/koret``) and rebuilt when a file, a setting or
    the code changes.

    Raises FileNotFoundError for a path that is not there and ValueError for unusable data, naming file and record.
    """
    root = SAMPLE if str(path) == "sample" else Path(path).expanduser()
    _check_settings(num_workers, max_bad)
    sources, ignored = find_sources(root)
    settings = Settings(
        page_tokens=passage_tokens or max_seq_length,
        paragraph_tokens=passage_tokens,
        overlap=overlap,
        tokenizer=str(Path(tokenizer).absolute()) if tokenizer else None,
        strict=strict,
    )
    folder = find_cache_dir(cache_dir) / "datasets" / _make_key(sources, ignored, settings)
    dataset = _open_prepared(folder)
    if dataset is None:
        _make_parent(folder)
        with hold_lock(folder.with_suffix(".lock")):  # a second process waits, then finds the work done
            dataset = _open_prepared(folder)
            if dataset is None:
                _prepare(root, sources, ignored, settings, folder, num_workers, progress)
                dataset = _open_prepared(folder)
        if dataset is None:
            raise DataError(f"the prepared data in {folder} vanished while it was opened: run again")
    check_report(dataset.report, dataset.directory, max_bad)
    return dataset


def find_cache_dir(cache_dir: Path | str | None) -> Path:
    """Where prepared data is kept: as given, or $KORET_CACHE, or ~/.cache/koret."""
    return Path(cache_dir or os.environ.get("KORET_CACHE") or Path.home() / ".cache" / "koret").expanduser()


# ---- prepared or not


def _make_key(sources: Sequence[Source], ignored: list[tuple[str, str]], settings: Settings) -> str:
    """The name of the prepared data: changes with every file, setting and line of code that matters."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr((source.name, source.format, source.member, source.size)).encode())
    for path in sorted({source.path for source in sources}):
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            status = file.stat()
            name = file.relative_to(path).as_posix() if file != path else file.name
            digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
            digest.update(_hash_ends(file, status.st_size))
    digest.update(repr(ignored).encode() + msgspec.json.encode(msgspec.structs.replace(settings, tokenizer=None)))
    if settings.tokenizer:
        digest.update(_read_tokenizer(settings.tokenizer))
    for file in sorted([*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("csrc/*.[ch]")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _hash_ends(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        start = file.read(_HASHED * 2 if size <= _HASHED * 2 else _HASHED)
        file.seek(max(size - _HASHED, 0))
        return hashlib.sha256(start + file.read(_HASHED)).digest()


def _read_tokenizer(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"cannot read the tokenizer {path}: {error.strerror}") from None


def _open_prepared(folder: Path) -> Dataset | None:
    """The data set in ``folder``, or None where there is none or it is damaged."""
    try:
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
        if any((folder / name).stat().st_size != size for name, size in manifest["files"].items()):
            return None
        tables = {name: pa.ipc.open_file(pa.memory_map(str(folder / f"{name}.arrow"))).read_all() for name in SHARDS}
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    return Dataset(**tables, fingerprint=manifest["fingerprint"], report=manifest["report"], directory=folder)


def _prepare(
    root: Path,
    sources: Sequence[Source],
    ignored: list[tuple[str, str]],
    settings: Settings,
    folder: Path,
    num_workers: int,
    progress: bool,
) -> None:
    """Build the data set in ``folder``: workers write shards, which are joined, checked and renamed into place."""
    started = time.perf_counter()
    with stage_folder(folder) as staging:
        shards = staging / "shards"
        shards.mkdir()
        with _show_progress(sources, progress) as on_done:
            reports = workers.prepare_all(sources, settings, shards, num_workers, on_done)
        digest = assemble.assemble(shards, staging, reports)
        for shard in shards.iterdir():
            shard.unlink()
        shards.rmdir()
        report = make_report("sample" if root == SAMPLE else str(root), reports, ignored, started)
        write_json(
            staging / "manifest.json",
            {
                "fingerprint": hashlib.sha256(f"{digest} {_describe(settings)}".encode()).hexdigest(),
                "settings": msgspec.to_builtins(settings),
                "sources": [asdict(source) | {"path": str(source.path)} for source in sources],
                "files": {f.name: f.stat().st_size for f in sorted(staging.glob("*.arrow"))},
                "report": report,
            },
        )


def _make_parent(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"prepared data cannot be written to {folder.parent}: {error.strerror}. Name another folder with cache_dir "
            "or the variable KORET_CACHE"
        ) from error


def _describe(settings: Settings) -> str:
    tokenizer = hashlib.sha256(_read_tokenizer(settings.tokenizer)).hexdigest() if settings.tokenizer else ""
    return msgspec.json.encode(msgspec.structs.replace(settings, tokenizer=tokenizer, strict=False)).decode()


@contextmanager
def _show_progress(sources: Sequence[Source], progress: bool):
    """A callback for finished sources: a bar on a terminal, else a line each; small sets are prepared in silence."""
    if not progress or (len(sources) == 1 and sources[0].size < _QUIET_BYTES):
        yield lambda report: None
        return
    if not sys.stderr.isatty():
        done: list[SourceReport] = []

        def print_line(report: SourceReport) -> None:
            done.append(report)
            print(f"[{len(done)}/{len(sources)}] {describe_source(report_source(report))}", file=sys.stderr, flush=True)

        yield print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("preparing data"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(source.size for source in sources), name="")
        yield lambda report: bar.update(task, advance=report.bytes, name=report.name)


def _check_settings(num_workers: int, max_bad: float) -> None:
    if num_workers < 0:
        raise ValueError(f"num_workers must be 0 or more, not {num_workers}")
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is a share between 0 and 1, not {max_bad}")
