"""What an index is built of: files of any kind -> documents -> passages, cut as in training, one document at a time."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from koret.data.formats import (
    ARTICLE,
    POSITIVE,
    QUERY,
    JsonLinesReader,
    Numbered,
    TableReader,
    open_reader,
    read_json_lines,
)
from koret.data.korquad import Article, ArticleReader, Reject, looks_like_html
from koret.data.loader import SAMPLE
from koret.data.markup import clean_html_text, normalize_text
from koret.data.passages import TokenCounter, split_article
from koret.data.sources import DOCUMENT_SUFFIXES, DataError, Source, find_sources, natural_key
from koret.retrieval.store import Entry, Value, parse_value

TEXT = ("text", "contents", "content", "body", *POSITIVE)  # the names the text of a record goes by
IDENTITY = ("id", "_id", "doc_id", "docid")
_BESIDE_DATA = re.compile(r"(readme|license|licence|changelog)\b", re.I)


class Document(msgspec.Struct, frozen=True, gc=False):
    """A document to index: ``texts`` are cut one by one; ``kind`` says how they are read.

    html: a page with markup; page: headings as Markdown writes them; plain: paragraphs ready made.
    """

    id: str
    title: str
    texts: tuple[str, ...]
    kind: str
    metadata: dict[str, Value] = {}

    @property
    def version(self) -> str:
        """Hash of everything: equal documents have equal versions."""
        whole = (self.title, self.texts, self.kind, sorted(self.metadata.items()))
        return hashlib.sha256(repr(whole).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_corpus(path: str | Path) -> Iterator[Document | Reject]:
    """Every document of a corpus, each id once; what cannot be used is a Reject naming file and record.

    ``path``: 'sample', a KorQuAD or SQuAD JSON file, JSONL, CSV, TSV or Parquet of documents (id, title, text; other
    columns become metadata) or of training pairs (their passages), an official zip, a BEIR folder, a text, Markdown or
    HTML file, or a folder of any of these. Documents without an id go by their title, numbered when it comes again,
    else by file and record. Raises FileNotFoundError, and DataError for a file that cannot be read.
    """
    root = SAMPLE if str(path) == "sample" else Path(path).expanduser()
    seen: set[bytes] = set()
    for source in find_files(root):
        for found in read_source(source):
            if isinstance(found, Reject):
                if found.is_article or source.format != "json":  # a question lost is no document lost
                    yield found
                continue
            document, position, named = found
            yield _accept(document, source, position, named, seen)


def find_files(root: Path) -> list[Source]:
    """The data and document files at or under ``root``, in natural order."""
    if root.is_file() and root.suffix.lower() in DOCUMENT_SUFFIXES:
        return [Source(root, root.name, "page", size=root.stat().st_size)]
    try:
        sources = [source for source in find_sources(root)[0] if source.format != "documents"]
    except DataError:
        if not root.is_dir():
            raise
        sources = []
    whole = [source.path for source in sources if source.format == "beir"]
    for path in root.rglob("*") if root.is_dir() else ():
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)
        if path.suffix.lower() in DOCUMENT_SUFFIXES and path.is_file() and not hidden:
            if not (sources and _BESIDE_DATA.match(path.name)) and not any(w in path.parents for w in whole):
                sources.append(Source(path, name, "page", size=path.stat().st_size))
    if not sources:
        raise DataError(f"{root} holds nothing to index (text, Markdown, HTML, JSON, JSONL, CSV, Parquet or zip)")
    return sorted(sources, key=lambda source: natural_key(source.name))


def read_source(source: Source) -> Iterator[tuple[Document, int, bool] | Reject]:
    """(document, number of its record, whether it brought an id of its own) or what could not be used."""
    if source.format == "page":
        yield _read_page(source)
    elif source.format == "json":
        for article in ArticleReader(source):
            yield article if isinstance(article, Reject) else _take_article(article)
    elif source.format == "beir":
        with open(source.path / "corpus.jsonl", "rb") as file:
            for number, record in read_json_lines(file, f"{source.name}/corpus.jsonl"):
                yield _take_record(source, number, record)
    else:
        yield from _read_records(source)


def _read_records(source: Source) -> Iterator[tuple[Document, int, bool] | Reject]:
    """Records of documents, or the passages of training pairs, as the first record shows."""
    reader = _DocumentRows(source) if source.format == "table" else JsonLinesReader(source)
    records = iter(reader.read_records())
    first = next(((number, record) for number, record in records if isinstance(record, dict)), None)
    if first and any(name in first[1] for name in QUERY) and any(name in first[1] for name in POSITIVE):
        for article in open_reader(source):
            yield article if isinstance(article, Reject) else _take_article(article)
        return
    for number, record in reader.read_records():
        yield _take_record(source, number, record, typed=source.path.suffix.lower() not in (".csv", ".tsv"))


class _DocumentRows(TableReader):
    """The rows of a table with every column it has."""

    def _read_parquet(self) -> Iterable[Numbered]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.source.path) as table:
                self._check_columns(table.schema_arrow.names)
                rows = (row for batch in table.iter_batches(1000) for row in batch.to_pylist())
                yield from enumerate(rows, 1)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.source.name} is no readable Parquet file: {error}") from None

    def _check_columns(self, names: Iterable[str]) -> None:
        names = list(names)
        if not set(TEXT).intersection(names):
            raise DataError(f"{self.source.name} needs a column named {TEXT[0]}; it has {', '.join(names) or 'none'}")


def _take_record(
    source: Source, number: int, record: dict[str, Any] | str, typed: bool = True
) -> tuple[Document, int, bool] | Reject:
    if isinstance(record, str):
        return _reject(source, record, number)
    identified = next((name for name in IDENTITY if record.get(name) not in (None, "")), None)
    written = next((name for name in TEXT if isinstance(record.get(name), str) and record[name].strip()), None)
    titled = next((name for name in ("title", *ARTICLE) if record.get(name)), None)
    identity, title = str(record.get(identified, "")), str(record.get(titled, "")).strip()
    if written is None:
        return _reject(source, f"no text under '{TEXT[0]}'", number, title, identity)
    text = record[written]
    metadata = {"title": title, **_take_metadata(record, {identified, written, titled}, typed)}
    kind = "html" if looks_like_html(text) else "page"
    return Document(identity, title, (text,), kind, _drop_empty(metadata)), number, bool(identity)


def _take_metadata(record: dict[str, Any], skipped: Container[str | None], typed: bool) -> dict[str, Value]:
    """Every other field that is text, a finite number or a truth value; in CSV, text that reads as one is one."""
    found = {}
    for name, value in record.items():
        missing = isinstance(value, float) and not math.isfinite(value)
        if name and name not in skipped and isinstance(value, (str, int, float, bool)) and not missing:
            found[name] = parse_value(value) if isinstance(value, str) and not typed else value
    return found


def _take_article(article: Article) -> tuple[Document, int, bool]:
    kind = ("page" if article.is_clean else "html") if article.html else "plain"
    metadata = {"title": article.title, "url": article.url}
    return Document("", article.title, article.contexts, kind, _drop_empty(metadata)), article.position, False


def _read_page(source: Source) -> tuple[Document, int, bool] | Reject:
    try:
        text = source.path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return _reject(source, f"not UTF-8 (byte {error.start}): convert it", 0, identity=source.name)
    except OSError as error:
        return _reject(source, f"cannot be read: {error.strerror}", 0, identity=source.name)
    is_html = source.path.suffix.lower() in (".html", ".htm")
    titled = re.search(r"<title[^>]*>([^<]*)</title>" if is_html else r"^# +(.+)$", text, re.MULTILINE | re.IGNORECASE)
    title = " ".join((clean_html_text(titled[1]) if is_html else titled[1]).split()) if titled else source.path.stem
    if not is_html:
        text = text[: titled.start()] + text[titled.end() :] if titled else text
        text = re.sub(r"^# +", "## ", text, flags=re.MULTILINE)
    return Document(source.name, title, (text,), "html" if is_html else "page", {"title": title}), 0, True


def _drop_empty(metadata: dict[str, Any]) -> dict[str, Value]:
    return {name: value for name, value in metadata.items() if value not in (None, "")}


def _accept(document: Document, source: Source, position: int, named: bool, seen: set[bytes]) -> Document | Reject:
    """The document with an id nobody had before, or a Reject for one that came before."""
    if named:
        if _is_known(document.id, seen):
            return _reject(source, "the id came before", position, document.title, document.id)
        return document
    identity = document.title or f"{source.name}:{position}"
    if _is_known(f"{identity}\0{document.version}", seen):
        return _reject(source, "the same document came before", position, document.title, identity)
    number, candidate = 1, identity
    while _is_known(candidate, seen):
        number += 1
        candidate = f"{identity} ({number})"
    return msgspec.structs.replace(document, id=candidate)


def _reject(source: Source, reason: str, position: int, title: str = "", identity: str = "") -> Reject:
    """A document lost, by its id or title where it has one."""
    return Reject(source.name, reason, position, title, identity, is_article=True)


def _is_known(text: str, seen: set[bytes]) -> bool:
    """Whether a text was asked about before; 8 bytes of it are remembered."""
    key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    known = key in seen
    seen.add(key)
    return known


def cut_document(document: Document, budget: int, count_tokens: TokenCounter) -> tuple[list[Entry], int]:
    """The passages of a document, and how many of its texts were longer than ``budget`` tokens and had to be cut."""
    entries: list[Entry] = []
    version, cut = document.version, 0
    for text in document.texts:
        clean = clean_html_text(text) if document.kind == "html" else normalize_text(text)
        made = split_article(
            document.title, clean, html=document.kind != "plain", budget=budget, count_tokens=count_tokens
        )
        cut += len(made) > 1
        for passage in made:
            identity = f"{document.id}#{len(entries) + 1}"
            entries.append(Entry(identity, document.id, passage.heading, passage.text, version, document.metadata))
    return entries, cut
