"""Your own data: pairs as JSONL, CSV or Parquet, BEIR folders, and documents with questions apart."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from koret.data.korquad import REPEATED, Answer, Article, Question, Reject, looks_like_html
from koret.data.markup import clean_html_text
from koret.data.sources import DOCUMENT_SUFFIXES, DataError, Source, natural_key, open_source

# The names a field goes by; the first is the one the documentation uses.
QUERY = ("query", "question", "anchor")
POSITIVE = ("positive", "positives", "pos", "passage", "context")
NEGATIVE = ("negatives", "negative", "neg")
ANSWER = ("answer", "answers")
ARTICLE = ("article", "title")
FIELDS = ("id", "url", *QUERY, *POSITIVE, *NEGATIVE, *ANSWER, *ARTICLE)

_Line = tuple[str, int]  # file of a folder, line number
Numbered = tuple[int, "dict[str, Any] | str"]  # line or row number, and the record or what is wrong with it


def open_reader(source: Source) -> Reader:
    """The reader for a source that is no KorQuAD or SQuAD JSON."""
    readers = {"jsonl": JsonLinesReader, "table": TableReader, "beir": BeirReader, "documents": DocumentReader}
    return readers[source.format](source)


class Reader:
    """A source of articles that says, record by record, what it could not use."""

    format, version = "pairs", ""

    def __init__(self, source: Source) -> None:
        self.source = source

    def reject(self, number: int, reason: str, identity: str = "", file: str = "", **kind: bool) -> Reject:
        """A record that cannot be used; ``file`` is the one of a folder's files it stands in."""
        name = self.name_file(file) if file else self.source.name
        return Reject(name, reason, number, id=identity, **kind)

    def name_file(self, file: str) -> str:
        """A file of a folder, relative to what the user named as every source is."""
        return file if self.source.name == "." else f"{self.source.name}/{file}"


class PairReader(Reader, ABC):
    """Records of (query, positive) as articles.

    Rows that name the same ``article`` (or ``title``) become one article; without a name, rows with the same positive
    do. So one file is held in memory. A row that cannot be used is a Reject with its number as position.
    """

    def __iter__(self) -> Iterator[Article | Reject]:
        groups: dict[object, _Group] = {}
        for number, record in self.read_records():
            place = f"{self.source.name}:{number}"
            try:
                pair = _read_pair(record, place)
            except ValueError as error:
                given = record.get("id") if isinstance(record, dict) else None
                yield self.reject(number, str(error), place if given in (None, "") else str(given))
                continue
            key = ("article", pair.article) if pair.article else ("positive", pair.positives[0])
            groups.setdefault(key, _Group(pair.article, pair.url, number)).add(pair)
        for group in groups.values():
            yield group.make_article(self.source.name)

    @abstractmethod
    def read_records(self) -> Iterable[Numbered]:
        """Every record with its number, or what is wrong with it."""


class _Pair(msgspec.Struct):
    id: str
    query: str
    positives: list[str]
    negatives: list[str]
    answers: list[Answer]
    article: str
    url: str


class _Group:
    """The rows that make up one article."""

    def __init__(self, title: str, url: str, number: int) -> None:
        self.title, self.url, self.number = title, url, number
        self.contexts: dict[str, int] = {}
        self.questions: list[Question] = []

    def add(self, pair: _Pair) -> None:
        where = tuple(self.contexts.setdefault(text, len(self.contexts)) for text in pair.positives)
        located = len(where) == 1 and any(a.start >= 0 or pair.positives[0].count(a.text) == 1 for a in pair.answers)
        self.questions.append(
            Question(
                id=pair.id,
                text=pair.query,
                answers=tuple(pair.answers),
                paragraph=where[0],
                negatives=tuple(text for text in pair.negatives if text not in pair.positives),
                whole=() if located else where,
            )
        )

    def make_article(self, source: str) -> Article:
        html = any(looks_like_html(text) for text in self.contexts)
        return Article(
            self.title, tuple(self.contexts), tuple(self.questions), html, self.url, source, self.number
        )  # fmt: skip


def _read_pair(record: dict[str, Any] | str, place: str) -> _Pair:
    """A row as a pair; ``place`` is its id where it has none. Raises ValueError saying what is wrong with it."""
    if isinstance(record, str):
        raise ValueError(record)
    query = _pick(record, QUERY, _read_text)
    if not query:
        raise ValueError(f"no text under '{QUERY[0]}'")
    positives = _pick(record, POSITIVE, lambda value: _list_texts(value, POSITIVE[0]))
    if not positives:
        raise ValueError(f"no text under '{POSITIVE[0]}'")
    identity, article = record.get("id"), next(iter(_find_given(record, ARTICLE).values()), None)
    return _Pair(
        id=str(place if identity in (None, "") else identity),
        query=query,
        positives=positives,
        negatives=_join(record, NEGATIVE, lambda value: _list_texts(value, NEGATIVE[0])),
        answers=_join(record, ANSWER, _list_answers),
        article="" if article is None else str(article).strip(),
        url=str(record.get("url") or ""),
    )


def _find_given(record: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: record[name] for name in names if record.get(name) not in (None, "", [])}


def _pick(record: dict[str, Any], names: tuple[str, ...], read: Callable[[Any], Any]) -> Any:
    """What a field holds, as read, under one of its names; None for nothing. Raises ValueError where two differ."""
    given = {name: found for name, value in _find_given(record, names).items() if (found := read(value))}
    first = next(iter(given), "")
    for name, found in given.items():
        if found != given[first]:
            raise ValueError(f"'{first}' and '{name}' are one field and hold different things: keep one of them")
    return given.get(first)


def _read_text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _join(record: dict[str, Any], names: tuple[str, ...], read: Callable[[Any], list]) -> list:
    """The different items of a field that lists them, under all of its names."""
    items = [item for value in _find_given(record, names).values() for item in read(value)]
    return list(dict.fromkeys(items))


def _list_texts(value: Any, name: str) -> list[str]:
    if isinstance(value, str) and value.startswith('["') and value.endswith('"]'):  # a list in a CSV cell
        value = _parse_or_keep(value)
    items = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"'{name}' must be text or a list of texts")
    return list(dict.fromkeys(item for item in items if item.strip()))


def _list_answers(value: Any) -> list[Answer]:
    """Answers as text, as {"text", "answer_start"}, as a list of either, or as a dict of two lists."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        value = _parse_or_keep(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        starts = value.get("answer_start")
        starts = starts if isinstance(starts, list) and starts else [-1] * len(value["text"])
        value = [{"text": text, "answer_start": start} for text, start in zip(value["text"], starts, strict=False)]
    answers = []
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        text, start = (item.get("text"), item.get("answer_start", -1)) if isinstance(item, dict) else (item, -1)
        if not isinstance(text, str):
            raise ValueError(f"'{ANSWER[0]}' must be text or {{'text', 'answer_start'}}")
        if text.strip():
            answers.append(Answer(text, start if isinstance(start, int) else -1))
    return answers


def _parse_or_keep(value: str) -> Any:
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return value


class JsonLinesReader(PairReader):
    """One JSON object a line."""

    format = "JSONL pairs"

    def read_records(self) -> Iterable[Numbered]:
        with open_source(self.source) as file:
            yield from read_json_lines(file, self.source.name)


def read_json_lines(file: Any, name: str) -> Iterator[Numbered]:
    """(line number, object or what is wrong) for every line that is not blank. Raises DataError on other encodings."""
    lines = file if isinstance(file, io.BufferedIOBase) else io.BufferedReader(file)
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{name} is UTF-16 text: save it as UTF-8")
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line)
        except RecursionError:
            yield number, "nested too deeply"
        except ValueError as error:
            try:
                line.decode()
            except UnicodeDecodeError:
                raise DataError(f"{name} is not UTF-8 (line {number:,}): convert it, for example from CP949") from None
            yield number, f"not valid JSON: {error}"
        else:
            yield number, record if isinstance(record, dict) else "not a JSON object"


class TableReader(PairReader):
    """CSV, TSV or Parquet with named columns."""

    @property
    def format(self) -> str:
        return {".csv": "CSV pairs", ".tsv": "TSV pairs", ".parquet": "Parquet pairs"}[self.source.path.suffix.lower()]

    def read_records(self) -> Iterable[Numbered]:
        yield from self._read_parquet() if self.source.path.suffix.lower() == ".parquet" else self._read_csv()

    def _read_csv(self) -> Iterable[Numbered]:
        delimiter = "\t" if self.source.path.suffix.lower() == ".tsv" else ","
        csv.field_size_limit(1 << 30)
        line = 1
        try:
            with open(self.source.path, encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(self._refuse_nulls(file), delimiter=delimiter, strict=True)
                self._check_columns(rows.fieldnames or [])
                line = rows.line_num + 1
                for row in rows:
                    try:
                        _check_cells(row, delimiter)
                    except ValueError as error:
                        yield rows.line_num, str(error)
                    else:
                        yield rows.line_num, row
                    line = rows.line_num + 1
        except UnicodeDecodeError as error:
            raise DataError(f"{self.source.name} is not UTF-8 ({error.reason}): save it as CSV UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{self.source.name} is not a readable table: {error} (row at line {line:,})") from None

    def _refuse_nulls(self, lines: Iterable[str]) -> Iterator[str]:
        for number, line in enumerate(lines, 1):
            if "\0" in line:
                raise DataError(f"{self.source.name} holds null bytes (line {number:,}): damaged, or UTF-16")
            yield line

    def _read_parquet(self) -> Iterable[Numbered]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.source.path) as table:
                self._check_columns(table.schema_arrow.names)
                columns = [name for name in table.schema_arrow.names if name in FIELDS]
                number = 0
                for batch in table.iter_batches(1000, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.source.name} is no readable Parquet file: {error}") from None

    def _check_columns(self, names: Iterable[str]) -> None:
        names = list(names)
        for wanted in (QUERY, POSITIVE):
            if not set(wanted).intersection(names):
                raise DataError(
                    f"{self.source.name} needs a column named {' or '.join(wanted)}; "
                    f"it has {', '.join(names) or 'none'}"
                )
        twice = [name for name in FIELDS if names.count(name) > 1]
        if twice:
            raise DataError(f"{self.source.name} has two columns named {twice[0]}: rename or remove one of them")


def _check_cells(row: dict[str | None, Any], delimiter: str) -> None:
    """Raise ValueError where a row has more or fewer cells than there are columns."""
    if None in row:
        held = "tab" if delimiter == "\t" else "comma"
        raise ValueError(f"more cells than columns: put a cell that holds a {held} into quotes")
    if None in row.values():
        raise ValueError("fewer cells than columns: leave a cell empty where there is nothing to say")


class BeirReader(Reader):
    """A BEIR folder: corpus.jsonl, queries.jsonl, qrels/*.tsv.

    Documents that answer the same query form one article, so that a split by article keeps them together.
    """

    format = "BEIR"

    def __iter__(self) -> Iterator[Article | Reject]:
        documents: dict[str, tuple[str, str]] = {}
        for number, record in self._read("corpus.jsonl"):
            if isinstance(record, str) or not isinstance(record.get("text"), str) or "_id" not in record:
                yield self.reject(number, "a document without '_id' and 'text'", file="corpus.jsonl", is_article=True)
                continue
            identity, title = str(record["_id"]), str(record.get("title") or "").strip()
            document = title, f"{title}\n{record['text']}" if title else record["text"]
            if documents.setdefault(identity, document) is not document:
                same = documents[identity] == document
                reason = REPEATED if same else "another document has this '_id': the first is kept"
                yield self.reject(number, reason, identity, "corpus.jsonl", is_article=True)
        relevant: dict[str, dict[str, _Line]] = {}
        yield from self._read_relevant(relevant, documents)
        owner = {document: document for document in documents}
        asked: dict[str, list[tuple[str, str, list[str]]]] = {}
        queries: dict[str, str | None] = {}  # None: no text
        for number, record in self._read("queries.jsonl"):
            identity = "" if isinstance(record, str) else str(record.get("_id", ""))
            text = "" if isinstance(record, str) else record.get("text")
            found = [document for document in relevant.get(identity, ()) if document in documents]
            if not identity or not isinstance(text, str) or not text.strip():
                queries.setdefault(identity, None)
                yield self.reject(number, "a query without '_id' and 'text'", identity, "queries.jsonl")
                continue
            text = text.strip()
            queries[identity] = queries.get(identity) or text
            if queries[identity] != text:
                reason = "another query has this '_id': the first is kept"
                yield self.reject(number, reason, identity, "queries.jsonl")
                continue
            if not found:
                yield self.reject(number, "no relevant document in the corpus", identity, "queries.jsonl")
                continue
            root = _find_root(owner, found[0])
            for document in found[1:]:
                owner[_find_root(owner, document)] = root
            asked.setdefault(found[0], []).append((identity, text, found))
        yield from self._list_unasked(relevant, documents, queries)
        groups: dict[str, list[str]] = {}
        for document in documents:
            groups.setdefault(_find_root(owner, document), []).append(document)
        for position, members in enumerate(groups.values()):
            yield self._make_article(position, members, documents, asked)

    def _make_article(self, position: int, members: list[str], documents: dict, asked: dict) -> Article:
        place = {document: i for i, document in enumerate(members)}
        questions = [
            Question(identity, text, (), whole=tuple(place[document] for document in found))
            for document in members
            for identity, text, found in asked.get(document, ())
        ]
        contexts = tuple(documents[document][1] for document in members)
        title, source = documents[members[0]][0], self.name_file("corpus.jsonl")
        return Article(title, contexts, tuple(questions), False, source=source, position=position)

    def _read(self, name: str) -> Iterator[Numbered]:
        with open(self.source.path / name, "rb") as file:
            yield from read_json_lines(file, self.name_file(name))

    def _read_relevant(self, relevant: dict[str, dict[str, _Line]], documents: Container[str]) -> Iterator[Reject]:
        """Fill ``relevant``: query -> document -> where that is said. Yields what cannot be used."""
        for path in sorted((self.source.path / "qrels").glob("*.tsv")):
            file = f"qrels/{path.name}"
            for number, parts in self._read_judgements(path, file):
                if len(parts) < 3 or not re.fullmatch(r"-?\d+(\.\d+)?", parts[-1].strip()):
                    reason = "a judgement that is not query-id, corpus-id, score with tabs between"
                    yield self.reject(number, reason, f"{file}:{number}", file)
                elif float(parts[-1]) > 0:
                    relevant.setdefault(parts[0], {}).setdefault(parts[-2], (file, number))
                    if parts[-2] not in documents:
                        reason = f"a judgement of a document that is not in corpus.jsonl: {parts[-2]}"
                        yield self.reject(number, reason, parts[0], file, is_part=True)
        if not relevant:
            raise DataError(f"{self.name_file('qrels')} holds no .tsv with lines of query-id, corpus-id, score")

    def _read_judgements(self, path: Path, file: str) -> Iterator[tuple[int, list[str]]]:
        """(line number, cells) of every line that is neither blank nor the header."""
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name_file(file)} is not UTF-8 (byte {error.start}): convert it") from None
        for number, line in enumerate(lines, 1):
            parts = line.split("\t")
            if line.strip() and not (number == 1 and parts[-1].strip() == "score"):
                yield number, parts

    def _list_unasked(
        self, relevant: dict[str, dict[str, _Line]], documents: Container[str], queries: Container[str]
    ) -> Iterator[Reject]:
        """The judgements of queries that do not exist."""
        for query in relevant:
            for document, (file, number) in relevant[query].items() if query not in queries else ():
                if document in documents:
                    reason = f"a judgement of a query that is not in queries.jsonl: {query}"
                    yield self.reject(number, reason, query, file, is_part=True)


def _find_root(owner: dict[str, str], document: str) -> str:
    while owner[document] != document:
        owner[document] = owner[owner[document]]
        document = owner[document]
    return document


class DocumentReader(Reader):
    """A folder of HTML, Markdown or text files, and questions.jsonl with "question", "file" and maybe "answer"."""

    format = "documents"

    def __iter__(self) -> Iterator[Article | Reject]:
        root = self.source.path
        files = sorted((p for p in root.rglob("*") if p.suffix.lower() in DOCUMENT_SUFFIXES), key=lambda p: str(p))
        names: dict[str, Path] = {}  # composed: some systems decompose Hangul in names of files
        for path in sorted(files, key=lambda p: natural_key(str(p))):
            name = path.relative_to(root).as_posix()
            composed = unicodedata.normalize("NFC", name)
            names[name if composed in names else composed] = path
        asked: dict[str, list[Question]] = {}
        listed = self.name_file("questions.jsonl")
        with open(root / "questions.jsonl", "rb") as file:
            for number, record in read_json_lines(file, listed):
                try:
                    name, question = _read_question(record, f"{listed}:{number}", names)
                except ValueError as error:
                    yield self.reject(number, str(error), f"{listed}:{number}", "questions.jsonl")
                    continue
                asked.setdefault(name, []).append(question)
        for position, (name, path) in enumerate(names.items()):
            yield self._make_article(position, name, path, tuple(asked.get(name, ())))

    def _make_article(self, position: int, name: str, path: Path, questions: tuple[Question, ...]) -> Article:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is not UTF-8 (byte {error.start}): convert it") from None
        is_html = path.suffix.lower() in (".html", ".htm")
        titled = re.search(r"<title[^<>]*>([^<]*)</title>" if is_html else r"^# +(.+)$", text, re.MULTILINE | re.I)
        if not is_html:
            text = re.sub(r"^# +", "## ", text, flags=re.MULTILINE)
        title = (clean_html_text(titled[1]) if is_html else titled[1].strip()) if titled else ""
        place = self.name_file(name)
        return Article(title or path.stem, (text,), questions, True, name, place, position, is_clean=not is_html)


def _read_question(record: dict[str, Any] | str, place: str, names: dict[str, Path]) -> tuple[str, Question]:
    if isinstance(record, str):
        raise ValueError(record)
    query, name = _pick(record, QUERY, _read_text), record.get("file")
    if not query:
        raise ValueError(f"no text under '{QUERY[1]}'")
    if isinstance(name, str) and name not in names:
        name = unicodedata.normalize("NFC", name)
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"no document named {name!r}: 'file' is a path inside the folder")
    answers = tuple(_join(record, ANSWER, _list_answers))
    identity = place if record.get("id") is None else str(record["id"])
    return name, Question(identity, query, answers, whole=() if answers else (0,))
