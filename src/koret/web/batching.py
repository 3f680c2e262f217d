"""Questions of many people answered together: whatever waits when a worker is free goes into its next batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Item, Answer = TypeVar("Item"), TypeVar("Answer")
MOST_WAITING = 256  # items; beyond that a server says it is busy instead of answering ever later


class Busy(RuntimeError):
    """More is waiting than can be answered in a reasonable time."""


class MicroBatcher(Generic[Item, Answer]):
    """One thread that answers what waits, up to ``most`` items at a time: ``answer(items)`` gives one answer each.

    Each item has a future of its own, so answers cannot be swapped. ``run`` takes longer work in small pieces: a piece
    is done only while no item waits.
    """

    def __init__(self, answer: Callable[[list[Item]], Sequence[Answer]], name: str, most: int = 32) -> None:
        self._answer, self._most = answer, most
        self._items: deque[tuple[Item, Future]] = deque()
        self._pieces: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def ask(self, item: Item) -> Future:
        """A future of the item's answer. Raises Busy."""
        return self._put(self._items, item)

    def run(self, piece: Callable[[], Any]) -> Future:
        """A future of what ``piece()`` returns; it runs when nobody's item waits. Raises Busy."""
        return self._put(self._pieces, piece)

    def close(self) -> None:
        """Answer nothing more; what still waits is cancelled."""
        with self._changed:
            self._closed = True
            waiting = [*self._items, *self._pieces]
            self._items.clear()
            self._pieces.clear()
            self._changed.notify()
        for _, future in waiting:
            future.cancel()
        self._thread.join(timeout=10)

    def _put(self, queue: deque, what: Any) -> Future:
        future: Future = Future()
        with self._changed:
            if self._closed or len(queue) >= MOST_WAITING:
                raise Busy("too much is waiting")
            queue.append((what, future))
            self._changed.notify()
        return future

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._pieces or self._closed)
                if self._closed:
                    return
                batch = [self._items.popleft() for _ in range(min(self._most, len(self._items)))]
                piece = None if batch else self._pieces.popleft()
            if piece is not None:
                _run_piece(*piece)
                continue
            batch = [(item, future) for item, future in batch if future.set_running_or_notify_cancel()]
            self._answer_batch(batch)

    def _answer_batch(self, batch: list[tuple[Item, Future]]) -> None:
        try:
            answers = self._answer([item for item, _ in batch]) if batch else []
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:  # one bad item must not spoil its neighbours' answers
                for one in batch:
                    self._answer_batch([one])
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)


def _run_piece(piece: Callable[[], Any], future: Future) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(piece())
        except Exception as error:
            future.set_exception(error)
