"""HTTP connections that cannot be held open for nothing: every wait for a client has an end."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # from the first byte (or the connection) to the end of a request's header
WRITE_SECONDS = 15.0  # that a client may take no byte of what waits for it
CONNECTIONS = 256  # beyond them the one that has kept us waiting longest for a request is closed
HEADER_BYTES = 16 << 10


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with limits on time: header, reading of answers, closing.

    uvicorn itself limits only the pause between two requests. A body's time is ``protection``'s.
    """

    def __init__(self, *args: Any, most_connections: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most_connections = most_connections or CONNECTIONS
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._waits_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_header()
        if len(self.connections) > self._most_connections:
            idle = [one for one in self.connections if isinstance(one, PatientProtocol) and one._header_timer]
            min(idle, key=lambda one: one._waits_since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_header_timer")
        self._stop("_write_timer")
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._stop("_header_timer")
        elif self._header_timer is None and not self.transport.is_closing():
            self._expect_header()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(WRITE_SECONDS, self.transport.abort)  # closing waits for what was not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_write_timer")

    def _expect_header(self) -> None:
        self._waits_since = self.loop.time()
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop(self, timer: str) -> None:
        handle = getattr(self, timer)
        if handle is not None:
            handle.cancel()
            setattr(self, timer, None)
