"""Pairs to batches: tokens made once, every distinct text encoded once.

Letters: B pairs of a batch, M distinct targets in it (their positives and curated negatives), U distinct texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as dump_arrays

from koret.data.columns import Csr
from koret.data.pairs import PairTable, known_mask
from koret.files import DiskFull, write_file
from koret.retrieval.encoder import Kind, TextEncoder
from koret.training.guide import GuideTable

TOKENIZE_AT_ONCE = 4096  # texts


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokenTable:
    """Token ids of N texts, end to end: text i is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # (sum of lengths,) int32
    offsets: np.ndarray  # (N + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenize_texts(encoder: TextEncoder, texts: Sequence[str], kind: Kind, cache: Path | None = None) -> TokenTable:
    """Tokenise every text once; in the folder ``cache`` the result is kept for the next run.

    A cached table is found by a hash of texts, tokenizer, prefix and length limit, so it is never stale.
    """
    path = cache / f"tokens-{_hash_inputs(encoder, texts, kind)}.safetensors" if cache else None
    if path is not None and (table := _read_table(path, len(texts))) is not None:
        return table
    pieces = []
    for start in range(0, len(texts), TOKENIZE_AT_ONCE):
        pieces += encoder.tokenize(texts[start : start + TOKENIZE_AT_ONCE], kind)
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    table = TokenTable(np.concatenate(pieces) if pieces else np.zeros(0, np.int32), offsets)
    if path is not None:
        try:
            write_file(path, dump_arrays({"ids": table.ids, "offsets": table.offsets}))
        except (OSError, DiskFull):
            pass  # the cache only saves time: the run goes on without it
    return table


def _hash_inputs(encoder: TextEncoder, texts: Sequence[str], kind: Kind) -> str:
    # A tokenizer also remembers the truncation and padding of its last call, which do not matter here.
    tokenizer = {**json.loads(encoder.tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    digest = hashlib.sha256(json.dumps(tokenizer).encode())
    digest.update(repr((encoder.prefixes[kind], encoder.max_seq_length)).encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def _read_table(path: Path, count: int) -> TokenTable | None:
    try:
        table = TokenTable(**load_file(path))
    except (OSError, SafetensorError, TypeError):
        return None
    fits = len(table) == count and table.offsets[0] == 0 and table.offsets[-1] == len(table.ids)
    return table if fits and (table.lengths >= 0).all() else None


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """B pairs as distinct texts and who is what to whom."""

    rows: np.ndarray  # (B,) pairs
    texts: list[np.ndarray]  # U token lists, each distinct text once: questions first, then targets
    queries: np.ndarray  # (B,) each pair's question among the texts
    targets: np.ndarray  # (M,) the targets among the texts
    positives: np.ndarray  # (B,) column of each pair's positive among the targets
    known: np.ndarray | None  # (B, M) bool, never negatives; none: only the own positive is spared
    curated: np.ndarray | None = None  # (B, M) bool, the pair's own hard negatives; given beside a guide
    guide: np.ndarray | None = None  # (U, G) float32, the guide's unit vectors of the texts
    teacher: np.ndarray | None = None  # (B, M) float32, NaN where unknown
    right: np.ndarray | None = None  # (B, M) bool, known to be right; given where several are positives

    @property
    def has_negatives(self) -> bool:
        """Whether any pair has a target that may serve as a negative."""
        own = np.zeros((len(self.rows), len(self.targets)), dtype=bool)
        own[np.arange(len(self.rows)), self.positives] = True
        return bool((~own if self.known is None else ~(own | self.known)).any())


class BatchMaker:
    """Turns rows of the pair table into batches of token lists."""

    def __init__(
        self,
        table: PairTable,
        queries: TokenTable,
        targets: TokenTable,
        mask: bool,
        guide: GuideTable | None = None,
        teacher: bool = False,
        several: bool = False,
    ) -> None:
        """``queries``: tokens of ``table.queries``, ``targets`` of ``table.texts``; ``mask`` spares known positives.

        ``guide``: a guide's vectors of the same texts; ``teacher``: whether batches carry the table's scores;
        ``several``: whether they say which targets are right, beside each pair's own.
        """
        self.table, self.queries, self.targets, self.mask = table, queries, targets, mask
        self.guide, self.teacher, self.several = guide, teacher, several
        self.query_id = np.unique(np.array(table.queries, dtype=object), return_inverse=True)[1]  # one a distinct text

    def make(self, rows: np.ndarray) -> Batch:
        _, first, question = np.unique(self.query_id[rows], return_index=True, return_inverse=True)
        own = self.table.targets[rows]
        ids = np.unique(np.concatenate([own, self.table.negatives.take(rows)[1]]))
        texts = [self.queries[int(row)] for row in rows[first]] + [self.targets[int(i)] for i in ids]
        return Batch(
            rows=rows,
            texts=texts,
            queries=question.reshape(-1),
            targets=len(first) + np.arange(len(ids)),
            positives=np.searchsorted(ids, own),
            known=known_mask(self.table, rows, ids) if self.mask else None,
            right=known_mask(self.table, rows, ids, same_answer=False) if self.several else None,
            curated=self._mark_curated(rows, ids) if self.guide else None,
            guide=self.guide.take(rows[first], ids) if self.guide else None,
            teacher=self._take_scores(rows, ids) if self.teacher else None,
        )

    def _mark_curated(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """(B, M) bool: the hard negatives named for each pair."""
        marked = np.zeros((len(rows), len(ids)), dtype=bool)
        owner, values = self.table.negatives.take(rows)
        marked[owner, np.searchsorted(ids, values)] = True
        return marked

    def _take_scores(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """(B, M) float32 teacher scores of each pair's own target and hard negatives; NaN elsewhere."""
        table = self.table
        scores = np.full((len(rows), len(ids)), np.nan, np.float32)
        owner, values = table.negatives.take(rows)
        scores[owner, np.searchsorted(ids, values)] = Csr(table.negatives.offsets, table.negative_scores).take(rows)[1]
        scores[np.arange(len(rows)), np.searchsorted(ids, table.targets[rows])] = table.positive_scores[rows]
        return scores


def cut_micro_batches(texts: Sequence[np.ndarray], budget: int | None) -> list[np.ndarray]:
    """Positions of ``texts``, longest first in every piece, cut so that no piece holds more than ``budget`` tokens.

    A text longer than the budget stands alone. Without a budget there is one piece. The piece of the most tokens is the
    last: it is the one that GradCache embeds once.
    """
    lengths = np.array([len(text) for text in texts])
    order = np.argsort(-lengths, kind="stable")
    if budget is None:
        return [order]
    pieces, start, held = [], 0, 0
    for at, length in enumerate(lengths[order].tolist()):
        if held and held + length > budget:
            pieces.append(order[start:at])
            start, held = at, 0
        held += length
    pieces.append(order[start:])
    most = max(range(len(pieces)), key=lambda i: lengths[pieces[i]].sum())
    return [*pieces[:most], *pieces[most + 1 :], pieces[most]]
