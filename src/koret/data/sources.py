"""Where records come from: files, folders of any nesting, and zip archives that stay packed."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from koret.privacy import make_printable

FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "table",
}
DOCUMENT_SUFFIXES = (".html", ".htm", ".md", ".markdown", ".txt")
# A zip member that claims to unpack to more than this many times its size, and is large, is not data.
_MOST_EXPANSION, _HARMLESS_SIZE = 200, 256 << 20
_CHUNK = 1 << 18


class DataError(ValueError):
    """A file cannot be read as data; the message names the file, what is wrong and what to do, fit for a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__(make_printable(message))


@dataclass(frozen=True)
class Source:
    """One thing to read records from. ``name`` is relative to what the user named: file, or zip!member."""

    path: Path
    name: str
    format: str  # json | jsonl | table | beir | documents
    member: str | None = None
    size: int = 0  # bytes of records, unpacked


def find_sources(root: Path) -> tuple[list[Source], list[tuple[str, str]]]:
    """Every source at or under ``root`` in natural order, and what was ignored as (name, why).

    Raises FileNotFoundError for a path that is not there and DataError where nothing can be read.
    """
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: {root}")
    if root.is_file():
        found = list(_list_file(root, root.name, named=True))
    else:
        found = list(_list_folder(root))
    sources = [item for item in found if isinstance(item, Source)]
    ignored = [item for item in found if not isinstance(item, Source)]
    sources, twins = _drop_packed_twins(sources)
    if not sources:
        listing = "".join(f"\n  {name}: {why}" for name, why in ignored[:10])
        raise DataError(f"{root} holds no data file (JSON, JSONL, zip, CSV, Parquet or a BEIR folder){listing}")
    return sources, ignored + twins


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key with numbers as numbers: part 2 comes before part 10."""
    return [(int(digits), "") if digits else (0, text) for digits, text in re.findall(r"(\d{1,18})|(\D+)", name)]


def _list_folder(root: Path) -> Iterator[Source | tuple[str, str]]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted((n for n in subfolders if not n.startswith((".", "__MACOSX"))), key=natural_key)
        here = Path(folder)
        whole = _recognise_folder(here, names)
        if whole:
            size = sum(p.stat().st_size for p in here.rglob("*") if p.is_file())
            yield Source(here, _name(here, root), whole, size=size)
            subfolders.clear()
            continue
        for name in subfolders:
            if (here / name).is_symlink():
                yield _name(here / name, root), "a link to a folder, not followed"
        for name in sorted(names, key=natural_key):
            if not name.startswith("."):
                yield from _list_file(here / name, _name(here / name, root))


def _name(path: Path, root: Path) -> str:
    """The path as people and reports name it: relative to what the user named."""
    name = path.relative_to(root).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name!a} is no file name in UTF-8: rename it") from None
    return name


def _recognise_folder(folder: Path, names: list[str]) -> str | None:
    if {"corpus.jsonl", "queries.jsonl"} <= set(names) and (folder / "qrels").is_dir():
        return "beir"
    if "questions.jsonl" in names and any(p.suffix.lower() in DOCUMENT_SUFFIXES for p in folder.rglob("*")):
        return "documents"
    return None


def _list_file(path: Path, name: str, named: bool = False) -> Iterator[Source | tuple[str, str]]:
    """The sources in one file; ``named`` by the user: then anything that is no data is an error of its own."""
    suffix = path.suffix.lower()
    if not path.is_file():
        yield name, "no regular file"  # a pipe, or a link to nowhere
    elif suffix == ".zip":
        yield from _list_zip(path, name)
    elif suffix in FORMATS:
        reason = None if named or suffix != ".json" else _find_other_json(path)
        yield (name, reason) if reason else Source(path, name, FORMATS[suffix], size=path.stat().st_size)
    elif named:
        yield Source(path, name, "json", size=path.stat().st_size)
    else:
        yield name, f"not a data file ({suffix or 'no suffix'})"


def _find_other_json(path: Path) -> str | None:
    """Why a JSON file of a folder is something else than articles (settings, results, ...), or None."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    whole = len(head) < 1 << 16 and head.strip().endswith((b"}", b"]"))
    marks = (b'"data"', b'"paragraphs"', b'"context"', b'"qas"')
    return "JSON without articles" if whole and head.strip() and not any(mark in head for mark in marks) else None


def _list_zip(path: Path, name: str) -> Iterator[Source | tuple[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: natural_key(info.filename))
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{name} is no readable zip ({error}): download it again") from error
    for info in infos:
        base = info.filename.rpartition("/")[2]
        if info.is_dir() or info.filename.startswith("__MACOSX/") or base.startswith("."):
            continue
        kind = FORMATS.get(Path(base).suffix.lower())
        full = f"{name}!{info.filename}"
        if kind not in ("json", "jsonl"):
            yield full, "not a JSON file"
        elif info.flag_bits & 1:
            raise DataError(f"{full} is encrypted: unpack it with its password and read the folder")
        elif info.file_size > _HARMLESS_SIZE and info.file_size > _MOST_EXPANSION * max(info.compress_size, 1):
            raise DataError(
                f"{full} would grow {info.file_size / max(info.compress_size, 1):,.0f}-fold to "
                f"{info.file_size / 1e9:,.1f} GB when unpacked: this is no data file"
            )
        else:
            yield Source(path, full, kind, info.filename, info.file_size)


def _drop_packed_twins(sources: list[Source]) -> tuple[list[Source], list[tuple[str, str]]]:
    """Where a file lies both unpacked and in a zip, read the unpacked one."""
    loose = {(source.path.name, source.size): source.name for source in sources if source.member is None}
    kept, twins = [], []
    for source in sources:
        twin = source.member and loose.get((source.member.rpartition("/")[2], source.size))
        if twin:
            twins.append((source.name, f"also unpacked as {twin}, which is read"))
        else:
            kept.append(source)
    return kept, twins


@contextmanager
def open_source(source: Source) -> Iterator[BinaryIO]:
    """The bytes of a source, from a file or out of its zip. Raises DataError naming it, also while reading."""
    try:
        with open(source.path, "rb", buffering=0) as file:
            yield file if source.member is None else io.BufferedReader(_open_member(file, source), _CHUNK)
    except zipfile.BadZipFile as error:
        raise DataError(f"{source.name}: {error}: the zip is damaged, download it again") from error
    except PermissionError as error:
        raise DataError(f"{source.name} cannot be read: permission denied") from error


def _open_member(file: BinaryIO, source: Source) -> io.RawIOBase:
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(source.member)
        if info.compress_type != zipfile.ZIP_DEFLATED:
            return archive.open(info)
    return _DeflatedMember(file, info)


class _DeflatedMember(io.RawIOBase):
    """One deflated zip member, unpacked by ISA-L (twice as fast as zlib), its checksum verified at the end."""

    def __init__(self, file: BinaryIO, info: zipfile.ZipInfo) -> None:
        from isal import isal_zlib

        self._zlib, self._file, self._info = isal_zlib, file, info
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"no member where the zip lists {info.filename}")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        file.seek(name_length + extra_length, os.SEEK_CUR)
        self._packed_left, self._checksum, self._length = info.compress_size, 0, 0
        self._inflate = isal_zlib.decompressobj(-15)

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        piece = b""
        while not piece:
            pending = self._inflate.unconsumed_tail
            if not pending:
                pending = self._file.read(min(_CHUNK, self._packed_left))
                self._packed_left -= len(pending)
            if not pending or self._inflate.eof:
                self._check_end()
                return 0
            try:
                piece = self._inflate.decompress(pending, len(target))
            except self._zlib.error as error:
                raise zipfile.BadZipFile(f"cannot unpack it ({error})") from error
        self._checksum = self._zlib.crc32(piece, self._checksum)
        self._length += len(piece)
        if self._length > self._info.file_size:
            raise zipfile.BadZipFile("it unpacks to more than it says")
        target[: len(piece)] = piece
        return len(piece)

    def _check_end(self) -> None:
        if self._length != self._info.file_size or self._checksum != self._info.CRC:
            raise zipfile.BadZipFile("wrong checksum (CRC)")
