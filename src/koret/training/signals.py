"""Ctrl-C and SIGTERM: finish the step, save, leave; a second one leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
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

    Only the main thread can receive signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
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
        """Raise Interrupted when a signal came in."""
        if self._received is not None:
            raise Interrupted(self._received)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Around work that changes nothing and may take long: a signal raises Interrupted in the middle of it."""
        self._raise = True
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
