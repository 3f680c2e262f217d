"""One source -> clean articles, passages and questions in Arrow shards: what a loader's worker does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from unicodedata import is_normalized

import msgspec
import pyarrow as pa

from koret.data.answers import Unlocated, classify_answer, clean_and_map, find_answer, find_quoted
from koret.data.keys import fold_text, normalize_answer, text_key
from koret.data.korquad import Answer, Article, ArticleReader, Question, Reject, looks_like_html
from koret.data.markup import Span, clean_html_text, normalize_text
from koret.data.native import scan
from koret.data.passages import Passage, TokenCounter, estimate_tokens, find_gold, make_token_counter, split_article
from koret.data.sources import Source
from koret.data.tables import ARTICLES, PASSAGES, QUESTIONS, TableWriter

SHARDS = {"articles": ARTICLES, "passages": PASSAGES, "questions": QUESTIONS}
SHARD_QUESTIONS = QUESTIONS.append(pa.field("answered", pa.bool_()))  # whether the source gives the answer
LEAST_KNOWN = 2  # characters of a normalised answer that make other passages with it known positives


class Settings(msgspec.Struct, frozen=True):
    """What decides how a source becomes rows."""

    page_tokens: int  # budget of passages cut from HTML pages
    paragraph_tokens: int | None = None  # budget for ready-made paragraphs; None: they stay whole
    overlap: float = 0.0
    tokenizer: str | None = None  # path of a tokenizer.json; None: token counts are estimated
    strict: bool = False


class SourceReport(msgspec.Struct):
    """What became of a source: seen = kept + rejected, for articles and for questions."""

    name: str
    format: str = ""
    version: str = ""
    bytes: int = 0
    articles_seen: int = 0
    articles_kept: int = 0
    articles_rejected: int = 0
    questions_seen: int = 0
    questions_kept: int = 0
    questions_rejected: int = 0
    reasons: dict[str, int] = {}
    passages: int = 0
    moved_answers: int = 0  # found at their only occurrence, because answer_start was wrong or missing
    wide_answers: int = 0  # no passage holds the whole answer
    seconds: float = 0.0


def shard_path(folder: Path, number: int, table: str) -> Path:
    suffix = "jsonl" if table == "rejects" else "arrow"
    return folder / f"{number:05d}.{table}.{suffix}"


def prepare_source(source: Source, settings: Settings, folder: Path, number: int) -> SourceReport:
    """Read ``source`` and write its shards (row numbers count from this shard's start). Raises DataError."""
    return _Preparation(source, settings, folder, number).run()


def open_records(source: Source, strict: bool) -> Iterable[Article | Reject]:
    """The records of a source of any format, as an object with ``format`` and ``version`` attributes."""
    if source.format == "json":
        return ArticleReader(source, strict=strict)
    from koret.data import formats

    return formats.open_reader(source)


class _Preparation:
    def __init__(self, source: Source, settings: Settings, folder: Path, number: int) -> None:
        self.source, self.settings, self.folder, self.number = source, settings, folder, number
        self.report = SourceReport(source.name, bytes=source.size)
        self.reasons: Counter[str] = Counter()
        self.count_tokens: TokenCounter = estimate_tokens
        if settings.tokenizer:
            self.count_tokens = make_token_counter(settings.tokenizer)

    def run(self) -> SourceReport:
        started = time.perf_counter()
        self.tables = {
            name: TableWriter(shard_path(self.folder, self.number, name), schema)
            for name, schema in (SHARDS | {"questions": SHARD_QUESTIONS}).items()
        }
        reader = open_records(self.source, self.settings.strict)
        with open(shard_path(self.folder, self.number, "rejects"), "wb") as self.rejects:
            for record in reader:
                self.count_lost(record) if isinstance(record, Reject) else self.keep(record)
        for table in self.tables.values():
            table.close()
        report = self.report
        report.format, report.version = reader.format, reader.version
        report.passages, report.reasons = self.tables["passages"].rows, dict(self.reasons.most_common())
        report.seconds = round(time.perf_counter() - started, 3)
        return report

    def count_lost(self, record: Reject) -> None:
        """Account for a record that the reader could not use."""
        self.report.articles_seen += record.is_article
        self.report.articles_rejected += record.is_article
        self.report.questions_seen += _count_questions(record)
        self.reject(record)

    def reject(self, record: Reject) -> None:
        lost = _count_questions(record)
        self.report.questions_rejected += lost
        self.reasons[record.reason.partition(":")[0]] += max(lost, 1)
        path, _, member = record.source.partition("!")
        line = {
            "file": path, "member": member, "article": record.article, "position": record.position,
            "id": record.id, "questions": lost, "reason": record.reason,
        }  # fmt: skip
        self.rejects.write(msgspec.json.encode(line) + b"\n")

    def keep(self, article: Article) -> None:
        report = self.report
        report.articles_seen += 1
        report.articles_kept += 1
        report.questions_seen += len(article.questions)
        rows = _ArticleRows(article, self.settings, self.count_tokens)
        first = self.tables["passages"].rows
        number = self.tables["articles"].append(
            (article.title, article.url, article.source, first, len(rows.passages), rows.characters, article.html)
        )
        add_passage, tokens_known = self.tables["passages"].append, self.settings.tokenizer is not None
        for p, key in zip(rows.passages, rows.keys, strict=True):
            tokens = p.tokens if tokens_known else -1
            add_passage((number, p.heading, p.text, p.start, p.end, tokens, key), len(p.text))
        for identity in rows.blank_negatives:
            reason = "a negative is empty once cleaned"
            self.reject(Reject(article.source, reason, article.position, article.title, identity, is_part=True))
        for question, placed in rows.place_questions():
            if isinstance(placed, str):
                self.reject(Reject(article.source, placed, article.position, article.title, question.id))
                continue
            report.questions_kept += 1
            report.moved_answers += placed.moved
            report.wide_answers += placed.wide
            self.tables["questions"].append(
                (
                    question.id,
                    question.text,
                    number,
                    placed.answers,
                    placed.kind,
                    [first + i for i in placed.gold],
                    first + placed.best,
                    [first + i for i in placed.known],
                    [first + i for i in placed.negatives],
                    text_key(question.text),
                    text_key(normalize_answer(placed.answers[0])),
                    *placed.span,
                    bool(question.answers),
                ),
                sum(map(len, placed.answers)),
            )


def _count_questions(record: Reject) -> int:
    return record.questions if record.is_article else int(not record.is_part)


class _Placed(msgspec.Struct):
    """A question's answers in clean text and its passages, numbered within the article."""

    answers: list[str]
    kind: str
    gold: list[int]
    best: int
    known: list[int]
    negatives: list[int]
    span: Span
    moved: int
    wide: bool


class _ArticleRows:
    """Clean text and passages of one article, and the places of its questions in them."""

    def __init__(self, article: Article, settings: Settings, count_tokens: TokenCounter) -> None:
        self.article = article
        self.passages: list[Passage] = []
        self.groups: list[list[int]] = []  # passage numbers of each context
        self.characters = 0
        self.moved: Counter[int] = Counter()  # question number -> answers found elsewhere than said
        self._folded: list[str] | None = None
        self._places: dict[tuple[int, int], Span | Unlocated] = {}  # (question, answer) -> where in clean text
        self._clean: list[str] = []
        budget = settings.page_tokens if article.html else settings.paragraph_tokens
        for index, context in enumerate(article.contexts):
            text = self._clean_context(index, context)
            self._clean.append(text)
            self.characters += len(text)
            made = split_article(
                article.title,
                text,
                html=article.html,
                budget=budget,
                count_tokens=count_tokens,
                overlap=settings.overlap,
            )
            self.groups.append(list(range(len(self.passages), len(self.passages) + len(made))))
            self.passages += made
        self.own = len(self.passages)  # the rest are hard negatives
        self._negative_numbers: dict[str, list[int]] = {}  # a negative as given -> its passages
        self._add_negatives(settings, count_tokens)
        self.keys = [text_key(passage.text) for passage in self.passages]

    @property
    def blank_negatives(self) -> list[str]:
        """The id of a question for every negative of it of which cleaning leaves nothing."""
        return [q.id for q in self.article.questions for text in q.negatives if not self._negative_numbers[text]]

    def _add_negatives(self, settings: Settings, count_tokens: TokenCounter) -> None:
        """Clean and cut hard negatives as positives are, so that a text is the same in either place."""
        is_markup = self.article.html and not self.article.is_clean
        numbers: dict[tuple[str, bool], list[int]] = {}
        for given in dict.fromkeys(text for question in self.article.questions for text in question.negatives):
            is_page = is_markup or looks_like_html(given)
            text = clean_html_text(given) if is_page else normalize_text(given)
            html = is_page or self.article.html
            if (text, html) not in numbers:
                budget = settings.page_tokens if html else settings.paragraph_tokens
                made = split_article(
                    "", text, html=html, budget=budget, count_tokens=count_tokens, overlap=settings.overlap
                )
                numbers[text, html] = list(range(len(self.passages), len(self.passages) + len(made)))
                self.passages += made
            self._negative_numbers[given] = numbers[text, html]

    def place_questions(self) -> Iterable[tuple[Question, _Placed | str]]:
        """Every question with its place, or with the reason why it has none."""
        for number, question in enumerate(self.article.questions):
            try:
                yield question, self._place(number, question)
            except Unlocated as reason:
                yield question, str(reason)

    def _clean_context(self, index: int, context: str) -> str:
        """The clean text of a context; notes where the answers of its questions are in it."""
        is_markup = self.article.html and not self.article.is_clean
        text = context if is_markup else normalize_text(context)
        wanted: list[tuple[tuple[int, int], Span]] = []
        quoted: list[tuple[int, int]] = []  # answers to a page without an offset
        for number, question in enumerate(self.article.questions):
            for i, answer in enumerate(question.answers if question.paragraph == index and not question.whole else ()):
                if is_markup and answer.start < 0:
                    quoted.append((number, i))
                    continue
                try:
                    span = _find_anywhere(text, context, answer)
                    self.moved[number] += span[0] != answer.start
                    wanted.append(((number, i), span))
                except Unlocated as reason:
                    self._places[number, i] = reason
        if not is_markup:
            self._places |= {key: _strip(text, *span) for key, span in wanted}
            return text
        clean, spans = clean_and_map(text, [span for _, span in wanted])
        self._places |= {key: span for (key, _), span in zip(wanted, spans, strict=True)}
        for number, i in quoted:
            try:
                self._places[number, i] = find_quoted(clean, self.article.questions[number].answers[i].text)
                self.moved[number] += 1
            except Unlocated as reason:
                self._places[number, i] = reason
        return clean

    def _place(self, number: int, question: Question) -> _Placed:
        if question.whole:
            return self._place_whole(question)
        found = [(i, self._places[number, i]) for i in range(len(question.answers))]
        spans = [(i, place) for i, place in found if not isinstance(place, Unlocated)]
        if not spans:
            raise found[0][1]
        text, group = self._clean[question.paragraph], self.groups[question.paragraph]
        if not group:
            raise Unlocated("the article has no text")
        answers = list(dict.fromkeys(text[start:stop] for _, (start, stop) in spans))
        gold, best = find_gold([self.passages[i] for i in group], [span for _, span in spans])
        gold, best = [group[i] for i in gold], group[best]
        kind = classify_answer(question.answers[spans[0][0]].text if self.article.html else "", answers[0])
        known = self._find_known(answers, gold)
        negatives = self._list_negatives(question, known)
        start, stop = spans[0][1]
        wide = not any(self.passages[i].start <= start and stop <= self.passages[i].end for i in gold)
        return _Placed(answers, kind, gold, best, known, negatives, (start, stop), self.moved[number], wide)

    def _place_whole(self, question: Question) -> _Placed:
        """A question whose source names passages as answering it, without saying where in them."""
        gold = sorted({i for context in question.whole for i in self.groups[context]})
        if not gold:
            raise Unlocated("the positive is empty")
        best = self.groups[question.whole[0]]
        given = [clean_html_text(answer.text) if self.article.html else answer.text for answer in question.answers]
        answers = [answer for answer in given if answer] or [self._clean[context] for context in question.whole]
        known = self._find_known(given, gold)
        negatives = self._list_negatives(question, known)
        kind = classify_answer("", answers[0])
        return _Placed(answers, kind, gold, best[0] if best else gold[0], known, negatives, (-1, -1), 0, False)

    def _find_known(self, answers: list[str], gold: list[int]) -> list[int]:
        """Gold passages and those of the same article that contain an answer's text."""
        wanted = [normal for normal in map(normalize_answer, answers) if len(normal) >= LEAST_KNOWN]
        if not wanted or self.own == len(gold):
            return gold
        if self._folded is None:
            texts = [passage.text for passage in self.passages[: self.own]]
            self._folded = _fold_all(texts, self.article.html and not self.article.is_clean)
        known = set(gold)
        for answer in wanted:
            known.update([i for i, text in enumerate(self._folded) if answer in text])
        return sorted(known)

    def _list_negatives(self, question: Question, known: list[int]) -> list[int]:
        if not question.negatives:
            return []
        positive = {self.keys[i] for i in known}
        found = dict.fromkeys(i for text in question.negatives for i in self._negative_numbers[text])
        return [i for i in found if self.keys[i] not in positive]


def _fold_all(texts: list[str], is_clean: bool) -> list[str]:
    """Texts as ``normalize_answer`` sees them, so that answers can be looked for in them.

    ``is_clean``: ``markup`` has left no white space but spaces and line ends.
    """
    if not scan and is_clean:
        joined = "\0".join(texts)
        if is_normalized("NFKC", joined):  # all at once for speed
            return joined.lower().replace(" ", "").replace("\n", "").split("\0")
    return [fold_text(text.replace("\0", " ")) for text in texts]


def _find_anywhere(text: str, context: str, answer: Answer) -> Span:
    """``find_answer`` in a context that may have been composed (NFC) since the offsets were counted."""
    if text is context or text == context:
        return find_answer(context, answer)
    start, stop = find_answer(context, answer)
    return len(normalize_text(context[:start])), len(normalize_text(context[:stop]))


def _strip(text: str, start: int, stop: int) -> Span:
    """The span without white space at its ends."""
    while start < stop and text[start].isspace():
        start += 1
    while start < stop and text[stop - 1].isspace():
        stop -= 1
    return start, stop
