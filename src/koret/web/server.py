"""Listening: one socket, one process, and an end that waits for answers under way."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn

from koret.web.connection import HEADER_BYTES, PatientProtocol

GRACE_SECONDS = 5
KEEP_ALIVE_SECONDS = 15
SWITCH_SECONDS = 0.0005  # after which a thread that waits for Python's lock is given it


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to ``host:port``, not yet listening. Raises RuntimeError in words."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, kind, protocol)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RuntimeError(f"cannot listen on {host}:{port} ({reason}); choose another with --port") from error
    return own


def make_ready(own: socket.socket) -> None:
    """All is loaded: let clients connect, who wait until ``Server`` answers them.

    What was loaded stays to the end, so the garbage collector is told to pass over it: going through the objects of
    ten thousand passages would hold up everybody for a fifth of a second now and then.
    """
    gc.collect()
    gc.freeze()
    own.listen()


@contextlib.contextmanager
def share_often() -> Iterator[None]:
    """Let threads hand Python's lock on ten times as often as usual, for as long as the block runs.

    Encoding and searching give the lock up for every product and want it back for a moment: each time they would wait
    up to 5 ms for a thread that lays out answers. A fifth of SWITCH_SECONDS gained nothing more.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Server(uvicorn.Server):
    """uvicorn with the limits of ``connection``; ``started`` turns true once it listens.

    ``most_connections`` are held open at a time; None: the usual number.
    """

    def __init__(self, app: Any, most_connections: int | None = None) -> None:
        config = uvicorn.Config(
            app,
            http=partial(PatientProtocol, most_connections=most_connections),
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        super().__init__(config)
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # strangers' nonsense is no news

    def serve_until_stopped(self, own: socket.socket) -> None:
        """Answer until Ctrl-C or SIGTERM; answers under way are finished, within GRACE_SECONDS."""
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it again at the end
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self.run(sockets=[own])
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def serve_in_background(self, own: socket.socket):
        """Serve from a thread for as long as the block runs; yields the base address."""
        thread = threading.Thread(target=asyncio.run, args=(self.serve(sockets=[own]),), daemon=True)
        thread.start()
        while not self.started and thread.is_alive():
            thread.join(0.01)
        try:
            yield "http://{}:{}".format(*own.getsockname()[:2])
        finally:
            self.should_exit = True
            thread.join(GRACE_SECONDS + 5)
