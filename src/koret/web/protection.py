"""What every request must pass before it reaches the page, and what every answer carries.

Against DNS rebinding the Host header must be a name this server goes by; against other sites' pages, Origin and
Sec-Fetch-Site must not be foreign and a body must be JSON, which no foreign form can send unasked; against waste, a
body is capped and has to arrive in time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import orjson

from koret.web.words import explain

BODY_BYTES = 256 << 10
DRAINED_BYTES = 4 << 20  # of a body too large: read and thrown away, so that its sender reads why
BODY_SECONDS = 10.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is not answered: ``reason`` is a key of ``words``, ``values`` what its sentence mentions."""

    def __init__(self, status: int, reason: str, **values: Any) -> None:
        super().__init__(reason)
        self.status, self.reason, self.values = status, reason, values


class Protection:
    """ASGI middleware around the page. ``hosts`` are names the server goes by; with ``open_to_network`` it also
    answers to any plain address, which no foreign name can be rebound to.
    """

    def __init__(self, app: Any, hosts: Iterable[str] = (), open_to_network: bool = False) -> None:
        self.app = app
        self.hosts = {name.lower().rstrip(".") for name in (*LOOPBACK, *hosts)}
        self.open_to_network = open_to_network

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        started = False

        async def send_protected(message: dict[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                kept = b"no-store" if scope["path"].startswith("/api/") else b"no-cache"
                extra = [*HEADERS, (b"cache-control", kept)]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            self._check(scope)
            body = await _read_body(receive)
            await self.app(scope, _replay(body, receive), send_protected)
        except Refused as refusal:
            await _send_refusal(refusal, send_protected)
        except Exception:
            log.exception("a request failed")
            if not started:
                await _send_refusal(Refused(500, "failed"), send_protected)

    def _check(self, scope: dict[str, Any]) -> None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        named = [value.decode("latin-1") for value in headers.get(b"host", ())]
        if len(named) != 1 or not self._is_ours(named[0]):
            raise Refused(421, "host")
        site = headers.get(b"sec-fetch-site", [b"none"])[-1]
        if site not in (b"none", b"same-origin") and scope["path"].startswith("/api/"):
            raise Refused(403, "origin")
        for origin in headers.get(b"origin", ()):
            if _take_authority(origin.decode("latin-1")) != named[0].lower():
                raise Refused(403, "origin")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Refused(405, "method")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", [b""])[-1].split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refused(415, "content_type")

    def _is_ours(self, host: str) -> bool:
        name = _take_name(host)
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.open_to_network


def _take_name(host: str) -> str:
    """The name in a Host header without port, brackets and closing dot; '' where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        if parts.netloc != host or "@" in host or parts.path or parts.query or (parts.port or 0) < 0:
            return ""
        return (parts.hostname or "").rstrip(".")
    except ValueError:
        return ""


def _take_authority(origin: str) -> str:
    """host:port of an Origin header; '' for 'null' and nonsense."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return ""
    return parts.netloc if parts.scheme in ("http", "https") else ""


async def _read_body(receive: Any) -> bytes:
    """The whole body. Raises Refused when it is too large, too slow or broken off."""
    try:
        pieces, size = await asyncio.wait_for(_gather_body(receive), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, "slow") from None
    if size > BODY_BYTES:
        raise Refused(413, "too_large", most=BODY_BYTES >> 10)
    return b"".join(pieces)


async def _gather_body(receive: Any) -> tuple[list[bytes], int]:
    """What came of the body, up to the limit, and how long it is, as far as that was followed."""
    pieces, size, more = [], 0, True
    while more and size <= DRAINED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "broken_off")
        size += len(message.get("body", b""))
        if size <= BODY_BYTES:
            pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return pieces, size


def _replay(body: bytes, receive: Any) -> Any:
    """A ``receive`` that gives the body read before, then whatever comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict[str, Any]:
        return waiting.pop() if waiting else await receive()

    return again


async def _send_refusal(refusal: Refused, send: Any) -> None:
    content = orjson.dumps({"error": {"code": refusal.reason, **explain(refusal.reason, **refusal.values)}})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if refusal.status in (408, 413, 400):
        headers.append((b"connection", b"close"))
    if refusal.status == 405:
        headers.append((b"allow", b"GET, HEAD, POST"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
