"""What every request must pass before it is read: right host, no foreign page, the key, a body of bounded size."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Iterable
from typing import Any

from koret.serving.requests import ApiError
from koret.web.protection import Protection, Refused

BODY_BYTES = 32 << 20
DRAINED_BYTES = 64 << 20  # of a body too large: read and thrown away, so that its sender reads why
BODY_SECONDS = 30.0
OPEN_PATHS = ("/health",)  # asked by machines that hold no key
SENTENCES = {
    "host": "this server does not answer to that host name; start it with koret serve --allow-host NAME",
    "origin": "requests from pages of other sites are refused",
    "method": "this request method is not used here",
    "content_type": "a request must be JSON (Content-Type: application/json)",
}
log = logging.getLogger(__name__)


class Guard(Protection):
    """The page's checks of host, origin and content type, answering in OpenAI's shape; and the key, where one is set.

    ``hosts`` and ``open_to_network`` as for ``Protection``; ``key`` is what must follow "Bearer " in Authorization.
    ``watch`` is told the path and the status of every request refused here.
    """

    def __init__(
        self,
        app: Any,
        hosts: Iterable[str] = (),
        open_to_network: bool = False,
        key: str | None = None,
        watch: Callable[[str, int], None] = lambda path, status: None,
    ) -> None:
        super().__init__(app, hosts, open_to_network)
        self.watch = watch
        self.expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        try:
            try:
                self._check(scope)
            except Refused as refusal:
                raise ApiError(refusal.status, SENTENCES[refusal.reason], code=refusal.reason) from None
            self._check_key(scope)
            scope["koret.body"] = await _read_body(receive)
        except ApiError as error:
            self.watch(scope["path"], error.status)
            await send_error(error, send)
            return
        await self.app(scope, receive, send)

    def _check_key(self, scope: dict[str, Any]) -> None:
        if self.expected is None or scope["path"] in OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self.expected):
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip


async def _read_body(receive: Any) -> bytes:
    """The whole body. Raises ApiError when it is too large, too slow or broken off."""
    try:
        pieces, size = await asyncio.wait_for(_gather(receive), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the request did not arrive within {BODY_SECONDS:g} s", code="slow", headers={"connection": "close"}
        ) from None
    if size > BODY_BYTES:
        raise ApiError(
            413, f"the request is too large: at most {BODY_BYTES >> 20} MB are taken", code="too_large",
            headers={"connection": "close"},
        )  # fmt: skip
    return b"".join(pieces)


async def _gather(receive: Any) -> tuple[list[bytes], int]:
    """What came of the body, up to the limit, and how long it is, as far as that was followed."""
    pieces, size, more = [], 0, True
    while more and size <= DRAINED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the request broke off", code="broken_off", headers={"connection": "close"})
        size += len(message.get("body", b""))
        if size <= BODY_BYTES:
            pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return pieces, size


async def send_error(error: ApiError, send: Any) -> None:
    """Send what was refused, over a bare ASGI connection."""
    headers = {"content-type": "application/json", "content-length": str(len(error.content)), **error.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": error.content})
