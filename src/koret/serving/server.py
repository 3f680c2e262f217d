"""Serving a model until told to stop."""

from __future__ import annotations

import socket
from typing import Any

from koret.web.server import Server


class PatientServer(Server):
    """The page's server, but its end waits for every answer under way, however long the queue."""

    def __init__(self, app: Any, most_connections: int | None = None) -> None:
        super().__init__(app, most_connections)
        self.config.timeout_graceful_shutdown = None


def serve(app: Any, own: socket.socket, most_connections: int | None = None) -> None:
    """Answer on a bound socket until Ctrl-C or SIGTERM, then finish what was accepted; a second Ctrl-C ends at once."""
    PatientServer(app, most_connections).serve_until_stopped(own)
