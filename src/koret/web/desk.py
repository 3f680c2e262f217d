"""Where questions are answered: one column per model, BM25 and their fusion, all over the same passages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np

from koret.retrieval.encoder import TextEncoder
from koret.retrieval.index import Hit, Index
from koret.retrieval.lexical import LexicalIndex
from koret.retrieval.probe import probe_encoder
from koret.retrieval.store import Entry
from koret.web.batching import MicroBatcher
from koret.web.questions import Questions, Unit, make_unit

DEPTH = 50  # results looked at per column: ranks below what is shown, and what fusion works on
ENCODED_TOGETHER = 8  # questions: while their answers are laid out the next ones are encoded
PIECE_CHARACTERS = 4000  # of pasted passages encoded at a time, so that nobody's question waits long behind them
LEXICAL, FUSED = "bm25", "hybrid"


class Column(msgspec.Struct, frozen=True):
    """What a column of the page is: ``kind`` is base, tuned or model for a model, bm25 or hybrid."""

    id: str
    kind: str
    name: str


@dataclass(frozen=True)
class Model:
    """A model, its passages, and the thread that encodes questions for it, in a precision of its own."""

    column: Column
    index: Index
    encoder: TextEncoder
    worker: MicroBatcher

    @classmethod
    def start(cls, column: Column, index: Index, precision: str) -> Model:
        encoder = index.encoder.with_precision(precision)
        if encoder.precision != "fp32":
            probe_encoder(encoder)
        worker = MicroBatcher(partial(_search_vectors, encoder, index), f"model {column.id}", ENCODED_TOGETHER)
        return cls(column, index, encoder, worker)


def _search_vectors(encoder: TextEncoder, index: Index, queries: list[str]) -> list[list[Hit]]:
    different = list(dict.fromkeys(queries))
    found = index.search_vectors(encoder.encode(different, "query"), DEPTH)
    answers = dict(zip(different, found, strict=True))
    return [answers[query] for query in queries]


class Desk:
    """Answers searches of many people at once. ``indexes`` are one per model, in the order of the columns.

    BM25 is asked over the passages of the last one, where it holds words, and fused with the last model's ranking.
    Questions are encoded in ``precision``; one that is not fp32 is probed first (RuntimeError).
    """

    def __init__(
        self,
        columns: Sequence[Column],
        indexes: Sequence[Index],
        questions: Questions,
        corpus: str,
        precision: str = "fp32",
    ) -> None:
        self.questions, self.corpus = questions, corpus
        self.passages = indexes[-1].count()
        self._models = [Model.start(*pair, precision) for pair in zip(columns, indexes, strict=True)]
        self.precisions = [model.encoder.precision for model in self._models]
        last = indexes[-1]
        self._lexical: MicroBatcher[str, list[Hit]] = MicroBatcher(
            lambda queries: last.search_lexical(queries, DEPTH), "bm25"
        )
        worded = [Column(LEXICAL, LEXICAL, "BM25"), Column(FUSED, FUSED, f"{columns[-1].name} + BM25")]
        self.columns = [*columns, *(worded if last.has_words else ())]

    def close(self) -> None:
        for worker in (self._lexical, *(model.worker for model in self._models)):
            worker.close()
        for model in self._models:
            model.index.close()

    async def search(self, query: str, wanted: Sequence[str], k: int) -> dict[str, Any]:
        """The first ``k`` passages of each column in ``wanted``, ranks down to DEPTH, and the gold if it is known."""
        question = self.questions.find(query)
        gold = question.gold if question else frozenset()
        asked = {model.column.id: _wrap(model.worker.ask(query)) for model in self._needed(wanted)}
        if LEXICAL in wanted or FUSED in wanted:
            asked[LEXICAL] = _wrap(self._lexical.ask(query))
        found = await _time_all(asked)
        record = _lay_out(self._order(self._fuse(found, wanted), wanted), k, gold)
        return {
            "query": query,
            "known": question is not None,
            "answers": question.answers if question else (),
            **record,
        }

    async def rank(self, query: str, passages: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
        """The given passages as each column in ``wanted`` ranks them."""
        entries = [Entry(f"{i}", f"{i}", "", text, "") for i, text in enumerate(passages)]
        asked: dict[str, Awaitable[list[Hit]]] = {}
        for model in self._needed(wanted):
            asked[model.column.id] = self._rank_dense(model, query, entries)
        if LEXICAL in wanted or FUSED in wanted:
            asked[LEXICAL] = _wrap(self._lexical_of(query, entries))
        found = await _time_all(asked)
        return {"query": query, **_lay_out(self._order(self._fuse(found, wanted), wanted), len(entries), frozenset())}

    def _needed(self, wanted: Sequence[str]) -> list[Model]:
        last = self._models[-1]
        return [m for m in self._models if m.column.id in wanted or (m is last and FUSED in wanted)]

    async def _rank_dense(self, model: Model, query: str, entries: list[Entry]) -> list[Hit]:
        encode = model.encoder.encode
        jobs = [model.worker.run(partial(encode, [query], "query"))]
        jobs += [model.worker.run(partial(encode, piece, "passage")) for piece in _cut([e.text for e in entries])]
        vector, *pieces = await asyncio.gather(*map(_wrap, jobs))
        scores = np.concatenate(pieces) @ vector[0]
        return _list_hits(entries, scores, np.argsort(-scores, kind="stable"))

    def _lexical_of(self, query: str, entries: list[Entry]):
        def rank() -> list[Hit]:
            rows, scores = LexicalIndex([entry.text for entry in entries]).search([query], len(entries))
            all_scores = np.zeros(len(entries), np.float32)
            all_scores[rows[0][rows[0] >= 0]] = scores[0][rows[0] >= 0]
            return _list_hits(entries, all_scores, rows[0][rows[0] >= 0])

        return self._lexical.run(rank)

    def _fuse(self, found: dict[str, tuple[list[Hit], float]], wanted: Sequence[str]) -> dict:
        if FUSED not in wanted:
            return found
        model = self._models[-1]
        began = time.perf_counter()
        (dense, slow), (lexical, slow_too) = found[model.column.id], found[LEXICAL]
        fused = model.index.fuse(dense, lexical, max(DEPTH, len(dense)))
        return {**found, FUSED: (fused, max(slow, slow_too) + time.perf_counter() - began)}

    def _order(self, found: dict, wanted: Sequence[str]) -> dict:
        return {column.id: found[column.id] for column in self.columns if column.id in wanted}


def _wrap(future) -> asyncio.Future:
    return asyncio.wrap_future(future)


async def _time_all(asked: dict[str, Awaitable[list[Hit]]]) -> dict[str, tuple[list[Hit], float]]:
    """Every answer with the seconds it took, waiting included."""
    began = time.perf_counter()

    async def take(answer: Awaitable[list[Hit]]) -> tuple[list[Hit], float]:
        return await answer, time.perf_counter() - began

    return dict(zip(asked, await asyncio.gather(*map(take, asked.values())), strict=True))


def _list_hits(entries: list[Entry], scores: np.ndarray, order: np.ndarray) -> list[Hit]:
    return [Hit(rank, float(scores[row]), entries[row], {}) for rank, row in enumerate(order.tolist(), 1)]


def _cut(texts: list[str]) -> list[list[str]]:
    """Texts in pieces of about PIECE_CHARACTERS."""
    pieces: list[list[str]] = [[]]
    room = PIECE_CHARACTERS
    for text in texts:
        if room <= 0:
            pieces.append([])
            room = PIECE_CHARACTERS
        pieces[-1].append(text)
        room -= len(text)
    return pieces


def _lay_out(found: dict[str, tuple[list[Hit], float]], k: int, gold: frozenset[Unit]) -> dict[str, Any]:
    """Columns of the first ``k`` hits, and the passages they show: each once, with its rank in every column."""
    passages: dict[Unit, dict[str, Any]] = {}
    ranks: dict[str, dict[Unit, int]] = {}
    columns = []
    for id_, (hits, seconds) in found.items():
        units = [make_unit(hit.entry.heading, hit.entry.text) for hit in hits]
        # of passages that are one the first counts: it comes last here
        ranks[id_] = own = dict(zip(reversed(units), [hit.rank for hit in reversed(hits)], strict=True))
        shown = []
        for unit, hit in zip(units[:k], hits[:k], strict=True):
            place = passages.get(unit)
            if place is None:
                entry = hit.entry
                place = passages[unit] = {
                    "key": f"p{len(passages)}",
                    "id": entry.id,
                    "heading": entry.heading,
                    "text": entry.text,
                    "gold": unit in gold,
                }
            shown.append({"rank": hit.rank, "passage": place["key"], "score": round(hit.score, 6)})
        columns.append(
            {
                "id": id_,
                "milliseconds": round(1000 * seconds, 2),
                "hits": shown,
                "lowest": round(hits[-1].score, 6) if hits else None,
                "gold_rank": min((own[unit] for unit in gold if unit in own), default=None),
                "depth": len(hits),
            }
        )
    for unit, place in passages.items():
        place["ranks"] = {id_: own[unit] for id_, own in ranks.items() if unit in own}
    return {"columns": columns, "passages": {place["key"]: place for place in passages.values()}}
