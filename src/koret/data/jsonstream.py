"""Walk through a JSON file of any size, one value at a time, in the memory one value takes."""

from __future__ import annotations

import re
from typing import BinaryIO

from koret.data.sources import DataError

BLOCK = 1 << 18
_LONGEST_VALUE = 512 << 20
_STRUCTURE = re.compile(rb'["{}\[\]]')
_SCALAR_END = re.compile(rb"[\s,}\]]")
_INSIDE_STRING = re.compile(rb'(?:[^"\\]*\\.){0,1000}[^"\\]*', re.DOTALL)  # bounded: every round is remembered
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")


class JsonStream:
    """A window on a file. Positions are indexes into ``buffer`` and stay valid until ``forget``.

    Raises DataError naming the file for anything that is not JSON text in UTF-8.
    """

    def __init__(self, stream: BinaryIO, name: str, block: int = BLOCK) -> None:
        self.buffer = bytearray()
        self.name = name
        self.base = 0  # bytes of the file before the buffer
        self._stream, self._block = stream, memoryview(bytearray(block))
        self._check_start()

    def more(self) -> bool:
        """Read another block; False at the end of the file."""
        count = self._stream.readinto(self._block)
        if count:
            self.buffer += self._block[:count]
        return bool(count)

    def forget(self, position: int) -> int:
        """Drop what lies before ``position`` when that frees much; returns the position in the new buffer."""
        if position < len(self._block):
            return position
        del self.buffer[:position]
        self.base += position
        return 0

    def find(self, needle: bytes, start: int, limit: int) -> int:
        """The next place of ``needle`` that is at most ``limit`` bytes after ``start``, or -1; looks no farther."""
        position, end = start, start + limit + len(needle)
        while (found := self.buffer.find(needle, position, end)) < 0:
            position = max(position, len(self.buffer) - len(needle) + 1)
            if len(self.buffer) >= end or not self.more():
                return -1
        return found

    def skip_space(self, position: int) -> int:
        """The position of the next character that is no white space. Raises DataError at the end of the file."""
        while True:
            found = _NOT_SPACE.search(self.buffer, position)
            if found:
                return found.start()
            position = len(self.buffer)
            if not self.more():
                raise EndOfFile(f"{self.name} ends too early", self)

    def at_end(self, position: int) -> bool:
        """Whether only white space follows."""
        try:
            self.skip_space(position)
        except EndOfFile:
            return True
        return False

    def peek(self, position: int) -> bytes:
        while position >= len(self.buffer):
            if not self.more():
                raise EndOfFile(f"{self.name} ends too early", self)
        return bytes(self.buffer[position : position + 1])

    def skip_value(self, start: int) -> int:
        """The position after the JSON value that starts at ``start``, whatever is inside its strings."""
        first = self.peek(start)
        if first == b'"':
            return self._skip_string(start)
        if first not in b"{[":
            return self._skip_scalar(start)
        depth, position = 0, start
        while True:
            found = _STRUCTURE.search(self.buffer, position)
            mark = found and (found.start(), found[0])
            found = None  # a live match would forbid the buffer to grow
            if not mark:
                position = len(self.buffer)
                self._grow(start)
                continue
            position = mark[0] + 1
            if mark[1] == b'"':
                position = self._skip_string(mark[0])
            elif mark[1] in b"{[":
                depth += 1
            else:
                depth -= 1
                if not depth:
                    return position

    def _skip_string(self, start: int) -> int:
        position = start + 1
        while True:
            position = _INSIDE_STRING.match(self.buffer, position).end()
            after = self.buffer[position : position + 2]
            if after.startswith(b'"'):
                return position + 1
            if len(after) < 2:  # the end of what was read, perhaps within an escape
                self._grow(start)

    def _skip_scalar(self, start: int) -> int:
        position = start
        while True:
            found = _SCALAR_END.search(self.buffer, position)
            if found:
                return found.start()
            position = len(self.buffer)
            if not self.more():
                return position

    def _grow(self, start: int) -> None:
        if len(self.buffer) - start > _LONGEST_VALUE:
            raise DataError(
                f"{self.name}: the value at byte {self.base + start:,} is larger than {_LONGEST_VALUE >> 20} MB: "
                "this is no list of articles"
            )
        if not self.more():
            raise EndOfFile(f"{self.name} ends too early", self)

    def _check_start(self) -> None:
        """Recognise what is no JSON by its first bytes, and step over a byte order mark."""
        while self.more() and self.buffer.isspace():
            self.base += len(self.buffer)
            self.buffer.clear()
        head = bytes(self.buffer[:256])
        if head.startswith(b"\xef\xbb\xbf"):
            del self.buffer[:3]
            self.base += 3
            head = head[3:]
        problem = _recognise(head)
        if problem:
            raise DataError(f"{self.name} {problem}")


class EndOfFile(DataError):
    """The file ended inside a value."""

    def __init__(self, message: str, stream: JsonStream) -> None:
        super().__init__(message)
        self.size = stream.base + len(stream.buffer)


def _recognise(head: bytes) -> str | None:
    text = head.lstrip()
    if not text:
        return "is empty"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the data: run `git lfs pull`"
    if text.startswith(b"<"):
        return "is an HTML page, perhaps an error page of the download: download it again"
    if head.startswith(b"\x1f\x8b"):
        return "is gzip-compressed: unpack it first (gunzip)"
    if head.startswith(b"PK\x03\x04"):
        return "is a zip archive: name it .zip"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        return "is UTF-16 or UTF-32 text: save it as UTF-8"
    if not text.startswith((b"{", b"[")):
        return f"is not JSON: it starts with {text[:20]!r}"
    return None
