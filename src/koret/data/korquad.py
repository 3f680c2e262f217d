"""Read KorQuAD 1.0, 2.0, 2.1 and SQuAD JSON, and JSONL pairs, as article records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import orjson

from koret.data.jsonstream import BLOCK, EndOfFile, JsonStream
from koret.data.shape import Shape, learn_shape
from koret.data.sources import DataError, Source, find_sources, open_source
from koret.data.validation import find_fault, peek_id, peek_title


class Answer(msgspec.Struct, frozen=True, gc=False):
    """One gold answer: its text and where it starts in the article's context (code points, -1 unknown)."""

    text: str
    start: int = -1


class Question(msgspec.Struct, frozen=True, gc=False):
    """One question with every gold answer the source gives it.

    ``paragraph`` is the index of the context it was asked about (0 for KorQuAD 2.x, whose articles have one).
    ``negatives`` are texts a JSONL source names as hard negatives; ``whole`` are contexts it names as positives without
    saying where in them the answer is.
    """

    id: str
    text: str
    answers: tuple[Answer, ...]
    paragraph: int = 0
    negatives: tuple[str, ...] = ()
    whole: tuple[int, ...] = ()


class Article(msgspec.Struct, frozen=True, gc=False):
    """One article: HTML pages have one context, SQuAD-style articles one per paragraph.

    ``html`` says whether the contexts are markup (KorQuAD 2.x) or plain text.
    ``is_clean`` marks a page that is cut like one but needs no cleaning (Markdown, plain documents).
    ``source`` names the file (and zip member) and ``position`` the record inside it, for messages and rejects.
    """

    title: str
    contexts: tuple[str, ...]
    questions: tuple[Question, ...]
    html: bool
    url: str = ""
    source: str = ""
    position: int = 0
    is_clean: bool = False


class Reject(msgspec.Struct, frozen=True, gc=False):
    """A record that was not used, and why. An article's reject counts its questions; a question's has its id."""

    source: str
    reason: str
    position: int  # of the article in its source
    article: str = ""
    id: str = ""
    questions: int = 0  # questions lost with an article; 0: the reject is one question
    is_article: bool = False
    is_part: bool = False  # only part of a question, which counts by itself: a judgement, a negative


class _Answer(msgspec.Struct, gc=False):
    text: str
    answer_start: int = -1


class _Question(msgspec.Struct, gc=False):
    question: str
    id: str | int = ""
    answer: _Answer | str | list[_Answer] | None = None
    answers: _Answer | str | list[_Answer] | None = None
    is_impossible: bool = False


class _Paragraph(msgspec.Struct, gc=False):
    context: str
    qas: list[msgspec.Raw] = []


class _Article(msgspec.Struct, gc=False):
    title: str | None = ""
    url: str | None = ""
    context: str | None = None
    paragraphs: list[_Paragraph] | None = None
    qas: list[msgspec.Raw] = []


class _Head(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    title: str
    url: str = ""


_decode_article = msgspec.json.Decoder(_Article).decode
_decode_head = msgspec.json.Decoder(_Head).decode
_decode_questions = msgspec.json.Decoder(list[_Question]).decode
_decode_question = msgspec.json.Decoder(_Question, strict=False).decode

UNANSWERABLE = "unanswerable"
REPEATED = "duplicate id, identical"
_MARKUP = re.compile(r"<(?:!doctype|html|body|div|p|table|tr|td|ul|ol|li|h[1-6]|a|b|span|br)\b[^<>]*>", re.I)
_LONGEST_HEAD, _FARTHEST_ARTICLE = 1 << 16, 64 << 20  # bytes to look ahead for the context of an article, of the next
_OBJECT = re.compile(rb'\{[ \t\r\n]*"')


def _opens_object(buffer: bytearray, start: int, stop: int) -> bool:
    """Whether an object with members opens in buffer[start:stop], which starts inside a string."""
    while (start := buffer.find(b"{", start, stop)) >= 0:
        if _OBJECT.match(buffer, start, stop):
            return True
        start += 1
    return False


def looks_like_html(text: str) -> bool:
    """Whether a text has the tags of a page."""
    return _MARKUP.search(text) is not None


def read_articles(
    source: Source | Path | str, *, contexts: bool = True, strict: bool = False, block: int = BLOCK
) -> ArticleReader:
    """Iterate over the ``Article`` and ``Reject`` records of one JSON file or zip member, one in memory at a time.

    ``contexts=False`` leaves the contexts out (questions and answers only), at the speed of a text search.
    ``strict=True`` validates every byte, ``raw_html`` and duplicate keys included. A question that cannot be used is
    a Reject before its article; an article that cannot be read is one Reject. Raises DataError naming the file when
    the file itself is broken (truncated, not UTF-8, no articles in it).
    """
    if not isinstance(source, Source):
        found, _ = find_sources(Path(source))
        if len(found) > 1:
            raise DataError(f"{source} holds {len(found)} files: read them one by one, or all with load_dataset")
        source = found[0]
    return ArticleReader(source, contexts, strict, block)


class ArticleReader:
    """The articles of one source. ``version`` and ``format`` are known once it has been read."""

    def __init__(self, source: Source, contexts: bool = True, strict: bool = False, block: int = BLOCK) -> None:
        self.source, self.version, self.format = source, "", ""
        self._contexts, self._strict, self._block = contexts, strict, block
        self._shape: Shape | Literal[False] | None = None  # None: not learnt yet; False: none to be found
        self._count = 0

    def __iter__(self) -> Iterator[Article | Reject]:
        with open_source(self.source) as file:
            stream = JsonStream(file, self.source.name, self._block)
            try:
                yield from self._walk(stream)
            except EndOfFile as error:
                raise DataError(
                    f"{self.source.name} is cut off after {self._count:,} whole articles, at byte {error.size:,}: "
                    "copy or download it again"
                ) from None
        if not self.format:
            self._name_format(is_squad=False)

    def _walk(self, stream: JsonStream) -> Iterator[Article | Reject]:
        position = stream.skip_space(0)
        if stream.peek(position) == b"[":
            position = yield from self._walk_articles(stream, position)
        else:
            position = yield from self._walk_members(stream, position)
        if not stream.at_end(position):
            raise DataError(
                f"{self.source.name} goes on after its JSON ended (byte {stream.base + position:,}): "
                "one record a line is JSONL, name it .jsonl"
            )

    def _walk_members(self, stream: JsonStream, position: int) -> Iterator[Article | Reject]:
        """The members of the outermost object: ``data`` is the list of articles, ``version`` names the format."""
        keys, found = [], False
        position = stream.skip_space(position + 1)
        while stream.peek(position) != b"}":
            end = stream.skip_value(position)
            key = self._decode_text(stream, position, end)
            keys.append(key)
            position = stream.skip_space(end)
            self._expect(stream, position, b":")
            position = stream.skip_space(position + 1)
            if key == "data" and stream.peek(position) == b"[":
                found = True
                position = yield from self._walk_articles(stream, position)
            else:
                end = stream.skip_value(position)
                value = self._decode_text(stream, position, end) if key == "version" or self._strict else None
                if key == "version":
                    self.version = str(value)
                position = end
            position = stream.skip_space(position)
            if stream.peek(position) == b",":
                position = stream.skip_space(position + 1)
            else:
                self._expect(stream, position, b"}")
        if not found:
            raise DataError(
                f"{self.source.name} is no KorQuAD or SQuAD file: expected a list of articles under 'data', "
                f"found the keys {', '.join(map(str, keys[:8])) or '(none)'}"
            )
        return position + 1

    def _walk_articles(self, stream: JsonStream, position: int) -> Iterator[Article | Reject]:
        """The elements of the list that starts at ``position``; returns the position after it."""
        previous, gap_start = b"", 0
        self._shape = None
        position = stream.skip_space(position + 1)
        while stream.peek(position) != b"]":
            if previous and self._shape is None and not self._strict:
                self._shape = learn_shape(previous, bytes(stream.buffer[gap_start:position])) or False
            previous = b""
            hopped = self._hop(stream, position, self._shape) if self._shape else None
            if hopped:
                records, end = hopped
            else:
                end = stream.skip_value(position)
                raw = bytes(stream.buffer[position:end])
                self._check_encoding(raw, stream.base + position)
                records = self._read_whole(raw)
                previous = raw if self._shape is None else b""
            self._count += 1
            yield from records
            gap_start = end
            position = stream.skip_space(end)
            if stream.peek(position) == b",":
                position = stream.skip_space(position + 1)
            else:
                self._expect(stream, position, b"]")
            if not previous:
                position = stream.forget(position)
        return position + 1

    # ---- the usual shape: jump over raw_html without parsing it

    def _hop(self, stream: JsonStream, start: int, shape: Shape) -> tuple[list[Article | Reject], int] | None:
        """The article at ``start`` and where it ends, or None where it does not have the learnt shape.

        Inside a JSON string a quote is always escaped, so the byte strings looked for can only be structure; each
        piece between them must decode by itself, and no object may open in what is jumped over: no article is lost
        between two that look alike.
        """
        context = stream.find(shape.context, start, _LONGEST_HEAD)
        if context < 0:
            return None
        try:
            head = _decode_head(stream.buffer[start:context].rstrip(b", \t\r\n") + b"}")
            following = stream.find(shape.context, context + 1, _FARTHEST_ARTICLE)
            buffer = stream.buffer
            if following >= 0:
                end = buffer.rfind(shape.separator, context, following)
                questions = buffer.rfind(shape.questions, context, end) if end >= 0 else -1
            else:  # the last article that looks like this one
                self._shape = False
                questions = buffer.rfind(shape.questions, context)
                end = stream.skip_value(questions + len(shape.questions) - 1) if questions >= 0 else -1
                if not shape.separator.startswith(bytes(buffer[end : end + shape.closing])):
                    return None
            text = buffer.find(shape.raw_html, context, questions + 1) if self._contexts else context
            if not context <= text <= questions or _opens_object(buffer, text, questions):
                return None
            asked = _decode_questions(buffer[questions + len(shape.questions) - 1 : end])
            page = None
            if self._contexts:
                page = orjson.loads(memoryview(buffer)[context + len(shape.context) - 1 : text + 1])
        except (ValueError, RecursionError):
            return None
        return self._make_records(head.title, head.url, page, asked), end + shape.closing

    # ---- anything else: one whole article

    def _read_whole(self, raw: bytes) -> list[Article | Reject]:
        problem = find_fault(raw) if self._strict else None
        try:
            article = _decode_article(raw)
        except RecursionError:
            problem = "nested too deeply"
        except ValueError as error:
            problem = f"not a valid article: {error}"
        if not problem and article.context is None and article.paragraphs is None:
            problem = "neither 'context' nor 'paragraphs'"
        if problem:
            return [self._reject(problem, questions=raw.count(b'"question"'), article=peek_title(raw))]
        if article.paragraphs is not None:
            return self._make_squad_records(article)
        return self._make_records(article.title or "", article.url or "", article.context, article.qas)

    def _make_records(
        self, title: str, url: str, page: str | None, asked: Sequence[_Question | msgspec.Raw]
    ) -> list[Article | Reject]:
        """The records of a KorQuAD 2.x article: rejected questions first, then the article."""
        read = [self._make_question(question, 0, number, title) for number, question in enumerate(asked)]
        self.format or self._name_format(is_squad=False)
        article = Article(
            title=title,
            contexts=(page,) if page is not None else (),
            questions=tuple(q for q in read if isinstance(q, Question)),
            html=page is not None and looks_like_html(page),
            url=url,
            source=self.source.name,
            position=self._count,
        )
        return [*(q for q in read if isinstance(q, Reject)), article]

    def _make_squad_records(self, article: _Article) -> list[Article | Reject]:
        title = (article.title or "").replace("_", " ")
        read: list[Question | Reject] = []
        for index, paragraph in enumerate(article.paragraphs or ()):
            read += [self._make_question(raw, index, len(read) + n, title) for n, raw in enumerate(paragraph.qas)]
        self.format or self._name_format(is_squad=True)
        contexts = tuple(paragraph.context for paragraph in article.paragraphs or ()) if self._contexts else ()
        questions = tuple(q for q in read if isinstance(q, Question))
        made = Article(title, contexts, questions, False, article.url or "", self.source.name, self._count)
        return [*(q for q in read if isinstance(q, Reject)), made]

    def _make_question(
        self, question: _Question | msgspec.Raw, paragraph: int, number: int, title: str
    ) -> Question | Reject:
        if isinstance(question, msgspec.Raw):
            try:
                question = _decode_question(question)
            except (ValueError, RecursionError) as error:
                return self._reject(f"not a valid question: {error}", article=title, id=peek_id(question))
        given = question.answers if question.answer is None else question.answer
        answers = given if isinstance(given, list) else [given] if given is not None else []
        answers = [Answer(a, -1) if isinstance(a, str) else Answer(a.text, a.answer_start) for a in answers]
        answers = [answer for answer in dict.fromkeys(answers) if answer.text.strip()]
        identity = str(question.id) if question.id != "" else f"{self.source.name}:{self._count}-{number}"
        if question.is_impossible:
            return self._reject(UNANSWERABLE, article=title, id=identity)
        if not question.question.strip():
            return self._reject("empty question", article=title, id=identity)
        if not answers:
            return self._reject("no answer", article=title, id=identity)
        return Question(identity, question.question.strip(), tuple(answers), paragraph)

    def _reject(self, reason: str, questions: int | None = None, **where: str) -> Reject:
        return Reject(
            self.source.name, reason, self._count, questions=questions or 0, is_article=questions is not None, **where
        )

    # ---- faults of the file

    def _name_format(self, is_squad: bool) -> None:
        named = re.search(r"korquad_?v?(\d\.\d)", f"{self.version} {self.source.name}", re.I)
        if named and (named[1] == "1.0") == is_squad:
            self.format = f"KorQuAD {named[1]}"
        else:
            self.format = "SQuAD" if is_squad else "KorQuAD 2.x"

    def _decode_text(self, stream: JsonStream, start: int, end: int) -> object:
        raw = bytes(stream.buffer[start:end])
        try:
            return msgspec.json.decode(raw)
        except (ValueError, RecursionError) as error:
            self._check_encoding(raw, stream.base + start)
            where = f"{self.source.name} is not valid JSON near byte {stream.base + start:,}"
            raise DataError(f"{where}: {error}") from None

    def _expect(self, stream: JsonStream, position: int, mark: bytes) -> None:
        found = stream.peek(position)
        if found != mark:
            raise DataError(
                f"{self.source.name} is not valid JSON: expected {mark.decode()!r} at byte "
                f"{stream.base + position:,} (after {self._count:,} articles), found {found!r}"
            )

    def _check_encoding(self, raw: bytes, start: int) -> None:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            try:
                raw.decode("cp949")
                hint = "it looks like CP949 (Korean Windows): convert it with `iconv -f CP949 -t UTF-8`"
            except UnicodeDecodeError:
                hint = "save it as UTF-8"
            raise DataError(f"{self.source.name} is not UTF-8 (byte {start + error.start:,}): {hint}") from None
