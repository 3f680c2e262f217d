"""One try to bring one file over HTTP, continuing from the bytes an earlier try left in NAME.part."""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from koret.data.published import looks_like
from koret.files import explain_full_disk

CHUNK = 1 << 18
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}


class DownloadError(RuntimeError):
    """A file cannot be fetched; the message names its URL and what to do."""


class Interrupted(Exception):
    """This try failed, the next may not; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class Stopped(Exception):
    """The user or another file's failure ended the download."""


@dataclass
class RemoteFile:
    """A file, its place on disk, and the bytes received for it so far."""

    url: str
    path: str
    target: Path
    received: int = 0

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def origin(self) -> Path:
        """Beside the part, as JSON: [ETag or date, size] of the file it is a part of."""
        return self.target.with_name(self.target.name + ".part.origin")

    def find_part(self) -> tuple[int, list | None]:
        """Bytes kept and the origin they belong to; (0, None) when there is nothing to build on."""
        try:
            have, origin = self.part.stat().st_size, json.loads(self.origin.read_bytes())
        except (OSError, ValueError):
            return 0, None
        return (0, None) if have == 0 or (origin[1] is not None and have > origin[1]) else (have, origin)

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.origin.unlink(missing_ok=True)


class Transfer:
    """Moves bytes: ``opener`` asks, ``draw(name, have, size)`` hears of every chunk, ``stop`` ends it between two."""

    def __init__(self, opener: urllib.request.OpenerDirector, draw: Callable, stop: threading.Event, timeout: float):
        self.opener, self.draw, self.stop, self.timeout = opener, draw, stop, timeout

    def run(self, file: RemoteFile) -> None:
        """Bring the part to its full length. Raises Interrupted, Stopped, DownloadError, DiskFull, OSError."""
        have, origin = file.find_part()
        if origin and have == origin[1]:
            return
        with self._open(file, have, origin) as response:
            first, found = _identify(response)
            if response.status == 206 and not (first == have and origin and _agree(origin, found)):
                file.discard()
                raise Interrupted("the file on the server is not the one the kept part belongs to")
            # 200: nothing was kept, the server knows no ranges, or the file behind the ETag is another
            self._receive(response, file, first, found)

    def _open(self, file: RemoteFile, have: int, origin: list | None) -> http.client.HTTPResponse:
        headers = {"User-Agent": "koret"}
        if origin:
            headers["Range"] = f"bytes={have}-"
            if origin[0] and not origin[0].startswith("W/"):  # weak validators are not allowed here
                headers["If-Range"] = origin[0]
        try:
            return self.opener.open(urllib.request.Request(file.url, headers=headers), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and have:
                file.discard()
                raise Interrupted("the file on the server is shorter than the kept part") from error
            if error.code in TEMPORARY:
                asked = error.headers.get("Retry-After", "")
                raise Interrupted(f"the server answered {error.code}", int(asked) if asked.isdigit() else 0) from error
            raise DownloadError(_explain_status(file, error.code)) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise DownloadError(f"{file.url}: {reason.verify_message}; is a proxy or the clock wrong?") from error
            raise Interrupted(f"no answer ({reason})") from error

    def _receive(self, response: http.client.HTTPResponse, file: RemoteFile, have: int, origin: list) -> None:
        name, size = file.target.name, origin[1]
        chunk = self._read(response, have, size)
        if not have:
            _refuse_page(chunk, file)  # before an older part is given up for it
        with explain_full_disk(file.part.name), open(file.part, "ab" if have else "wb") as part:
            if not have:
                file.origin.write_text(json.dumps(origin))
            while chunk:
                part.write(chunk)
                part.flush()  # a try that ends anywhere leaves all it received
                have += len(chunk)
                file.received += len(chunk)
                self.draw(name, have, size)
                chunk = self._read(response, have, size)
            os.fsync(part.fileno())
        if size is not None and have < size:
            raise Interrupted(f"connection cut after {have:,} of {size:,} bytes")

    def _read(self, response: http.client.HTTPResponse, have: int, size: int | None) -> bytes:
        try:
            chunk = response.read1(CHUNK if size is None else min(CHUNK, size - have)) if have != size else b""
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(f"connection lost ({error})") from error
        if self.stop.is_set():
            raise Stopped
        return chunk


def _refuse_page(head: bytes, file: RemoteFile) -> None:
    """Stop at once when a web page or another text comes in place of the file."""
    if not looks_like(head, file.path):
        text = head[:2000].decode(errors="replace")
        title = re.search(r"<title>(.*?)</title>", text, re.I | re.S)
        what = f"a web page ({title[1].strip()})" if title else f"something else ({text[:60]!r})"
        raise DownloadError(
            f"{file.url} gave {what} instead of {file.target.name}: the file has moved, or a login page or proxy "
            "answered; open the address in a browser, or name a mirror with --base-url"
        )


def _identify(response: http.client.HTTPResponse) -> tuple[int, list]:
    """First byte this answer holds, and the file it is from: [ETag or date, size in bytes], None where unsaid."""
    headers = response.headers
    validator = headers.get("ETag") or headers.get("Last-Modified")
    if response.status == 206:
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        first, size = match.groups() if match else (-1, "*")
    else:
        first, size = 0, headers.get("Content-Length", "*")
    return int(first), [validator, None if size == "*" else int(size)]


def _agree(kept: list, found: list) -> bool:
    return kept[0] == found[0] and kept[1] in (None, found[1])


def _explain_status(file: RemoteFile, code: int) -> str:
    if code not in (404, 410):
        return f"{file.url}: the server refused it ({code}); check --base-url and the proxy"
    other = "; 2.1 is the corrected edition of 2.0: koret download korquad-2.1" if "_2.0_" in file.path else ""
    return f"{file.url}: not there ({code}); check --base-url, or see https://korquad.github.io for where it is{other}"
