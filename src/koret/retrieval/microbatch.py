"""Many callers, one encoder: texts that wait together are encoded together, and everybody gets their own rows.

The web page has a queue of its own (``web.batching``): it answers single questions by any function, BM25 among them.
Here callers bring lists, which are cut into turns, counted in texts and tokens, and put together again row by row.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import NamedTuple

import numpy as np

from koret.retrieval.encoder import Kind, TextEncoder

PIECE = 16  # texts of one caller that go into a batch before it is the next caller's turn
BATCH_TOKENS = 4096  # taken at a time: more makes nobody faster on a CPU and everybody wait longer
LONGEST_WAIT = 60  # seconds a refused caller is asked to wait at most


class QueueFull(RuntimeError):
    """More texts are waiting than the queue may hold; ``retry_after`` says in how many seconds to ask again."""

    def __init__(self, waiting: int, limit: int, retry_after: int) -> None:
        super().__init__(f"{waiting} texts are waiting and at most {limit} may: ask again in {retry_after} s")
        self.retry_after = retry_after


class Closed(RuntimeError):
    """The batcher takes no more texts."""


class Encoded(NamedTuple):
    """The answer to one caller: (N, D) float32 unit vectors, and how many tokens the model read of each text (N,)."""

    vectors: np.ndarray
    tokens: np.ndarray


class Batch(NamedTuple):
    """What one turn of the worker did."""

    texts: int
    tokens: int
    seconds: float


class _Job:
    """One caller's texts, cut into pieces of similar length."""

    def __init__(self, texts: Sequence[str], kind: Kind, dimensions: int) -> None:
        self.texts, self.kind, self.future = texts, kind, Future()
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        self.pieces = deque(order[i : i + PIECE] for i in range(0, len(order), PIECE))
        self.encoded = Encoded(np.empty((len(texts), dimensions), np.float32), np.zeros(len(texts), np.int64))
        self.left = len(texts)

    def fill(self, rows: list[int], vectors: np.ndarray, tokens: list[int]) -> None:
        self.encoded.vectors[rows], self.encoded.tokens[rows] = vectors, tokens
        self.left -= len(rows)
        if self.left:
            return
        bad = np.flatnonzero(~np.isfinite(self.encoded.vectors).all(axis=1))
        if bad.size:
            self.fail(FloatingPointError(f"the model gives a vector that is not finite for text {bad[0]}"))
        else:
            with contextlib.suppress(InvalidStateError):  # the caller has gone
                self.future.set_result(self.encoded)

    def fail(self, error: Exception) -> None:
        self.pieces.clear()
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


class TextBatcher:
    """One thread that encodes what waits, callers taking turns, so that one question never waits for a whole corpus.

    ``submit`` may be called from any thread. ``max_waiting`` bounds the texts not yet begun. ``watch`` is called
    after every batch, in the worker's thread.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        max_waiting: int = 4096,
        batch_tokens: int = BATCH_TOKENS,
        watch: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        if max_waiting < 1 or batch_tokens < 1:
            raise ValueError(f"max_waiting ({max_waiting}) and batch_tokens ({batch_tokens}) must be at least 1")
        self.encoder, self.max_waiting, self.batch_tokens, self.watch = encoder, max_waiting, batch_tokens, watch
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._waiting = 0
        self._rate = 0.0  # texts a second, of late
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="encoder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts accepted and not yet begun."""
        return self._waiting

    @property
    def is_alive(self) -> bool:
        """Whether texts are still taken."""
        return self._thread.is_alive() and not self._closed

    def submit(self, texts: Sequence[str], kind: Kind) -> Future[Encoded]:
        """A future of ``Encoded`` for these texts, rows in their order; cancelling it drops what has not begun.

        Raises QueueFull where the texts do not fit beside those waiting (alone they always do), Closed after
        ``close``. The future fails with FloatingPointError where a vector is not finite.
        """
        job = _Job(list(texts), kind, self.encoder.dimensions)
        if not job.texts:
            job.future.set_result(job.encoded)
            return job.future
        with self._changed:
            if self._closed:
                raise Closed("the server is stopping")
            if self._waiting and self._waiting + len(texts) > self.max_waiting:
                raise QueueFull(self._waiting, self.max_waiting, self._estimate_wait())
            self._jobs.append(job)
            self._waiting += len(texts)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Take no more, finish what was taken, and return when that is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _estimate_wait(self) -> int:
        return min(LONGEST_WAIT, math.ceil(self._waiting / self._rate)) if self._rate else 1

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
            began = time.perf_counter()
            pieces = self._take_pieces()
            tokens = sum(len(x) for _, _, ids in pieces for x in ids)
            self._encode(pieces)
            texts, seconds = sum(len(rows) for _, rows, _ in pieces), time.perf_counter() - began
            if texts:
                self._rate += 0.2 * (texts / seconds - self._rate) if self._rate else texts / seconds
                self.watch(Batch(texts, tokens, seconds))

    def _take_pieces(self) -> list[tuple[_Job, list[int], list[np.ndarray]]]:
        """Pieces of the jobs in turn with their token ids, until the batch is full or nothing waits."""
        taken, tokens = [], 0
        while tokens < self.batch_tokens:
            with self._changed:
                if not self._jobs:
                    break
                job = self._jobs.popleft()
                if job.future.cancelled() or not job.pieces:
                    self._waiting -= sum(map(len, job.pieces))
                    continue
                rows = job.pieces.popleft()
                self._waiting -= len(rows)
                if job.pieces:
                    self._jobs.append(job)
            try:
                ids = self.encoder.tokenize([job.texts[i] for i in rows], job.kind)
            except Exception as error:
                self._give_up(job, error)
                continue
            taken.append((job, rows, ids))
            tokens += sum(map(len, ids))
        return taken

    def _encode(self, pieces: list[tuple[_Job, list[int], list[np.ndarray]]]) -> None:
        try:
            vectors = self.encoder.encode_ids([x for _, _, ids in pieces for x in ids]) if pieces else ()
        except Exception as error:
            if len(pieces) == 1:
                self._give_up(pieces[0][0], error)
            else:  # what one caller's text breaks must not break its neighbours'
                for piece in pieces:
                    self._encode([piece])
            return
        at = 0
        for job, rows, ids in pieces:
            job.fill(rows, vectors[at : at + len(rows)], [len(x) for x in ids])
            at += len(rows)

    def _give_up(self, job: _Job, error: Exception) -> None:
        with self._changed:
            self._waiting -= sum(map(len, job.pieces))
            job.fail(error)
