"""Ctrl-C and SIGTERM: finish the step, save, leave; a second one leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """A training was asked to stop, and its state was saved. ``exit_code`` is the shell's: 130 or 143.

    Like any KeyboardInterrupt it passes through ``except Exception``.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is remembered (or raised, inside ``at_once``), a second one kills.

    Only the main thread can receive signals; elsewhere this does nothing. Processes that share a training stop
    together: ``agree`` tells each the largest number any of them received, and nobody leaves in the middle of a piece
    of work that the others wait in.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self._agree = agree
        self._received: int | None = None
        self._raise = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Interrupted when a signal came in, here or in a process that shares the training."""
        number = (self._agree or int)(self._received or 0)
        if number:
            raise Interrupted(number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Around work that changes nothing and may take long: a signal raises Interrupted in the middle of it."""
        self._raise = self._agree is None
        try:
            self.check()
            yield
        finally:
            self._raise = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the progress bar hides the cursor
            os._exit(128 + number)
        self._received = number
        if self._raise:
            raise Interrupted(number)
