"""A connection to Milvus by URL that tries again while the engine is away, and then says so in words."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

TOKEN = "KORET_MILVUS_TOKEN"
DEEPEST = 16_384  # results of one search: the engine's limit
INDEXES: dict[str, dict[str, Any]] = {
    "FLAT": {},
    "HNSW": {"M": 32, "efConstruction": 200},
    "DISKANN": {},
    "AUTOINDEX": {},
}


class Patience(NamedTuple):
    """How long an unreachable server is waited for: every try's seconds, and the pauses between tries."""

    connect: float = 5.0
    call: float = 30.0
    pauses: tuple[float, ...] = (1.0, 3.0)
    sleep: Callable[[float], None] = time.sleep


class Address(NamedTuple):
    uri: str
    collection: str
    index: str
    place: str  # in words, without secrets
    file: str | None  # of the embedded build


def parse_url(url: str) -> Address:
    """Raises ValueError showing the forms."""
    plain, _, query = str(url).partition("?")
    options = dict(parse_qsl(query))
    scheme, _, rest = plain.partition(":")
    index = options.pop("index", "FLAT").upper()
    if scheme not in ("milvus", "milvus+https") or not rest.strip("/") or set(options) - {"collection"}:
        raise _explain_url(url)
    if index not in INDEXES:
        raise ValueError(f"unknown index {index!r} in {url}; choose one of {', '.join(INDEXES)}")
    if rest.startswith("//") and not rest.startswith("///"):
        parts = urlsplit(f"http:{rest}")
        try:
            host, port = parts.hostname, parts.port or 19530
        except ValueError:
            raise _explain_url(url) from None
        if not host or parts.username or "/" in parts.path.strip("/"):
            raise _explain_url(url)
        collection = options.get("collection") or parts.path.strip("/") or "koret"
        host = f"[{host}]" if ":" in host else host
        uri = f"{'https' if scheme == 'milvus+https' else 'http'}://{host}:{port}"
        address = Address(uri, collection, index, f"{host}:{port}", None)
    else:
        file = os.path.abspath(rest.removeprefix("//"))
        if scheme != "milvus" or not file.endswith(".db"):
            raise _explain_url(url)
        address = Address(file, options.get("collection", "koret"), index, file, file)
    if not re.fullmatch(r"[A-Za-z_]\w{0,254}", address.collection, re.ASCII):
        raise ValueError(f"{address.collection!r} in {url} is no collection name: letters, digits and _ only")
    return address


def _explain_url(url: str) -> ValueError:
    return ValueError(
        f"cannot read {url}; write milvus://host:19530/collection, milvus+https://host:19530/collection, "
        "milvus:file.db or milvus:///absolute/file.db"
    )


class Turns:
    """A lock given in the order in which it was asked for: threads that ask again at once would starve the others."""

    def __init__(self) -> None:
        self._waiting: collections.deque[object] = collections.deque()  # the first has it
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        own = object()
        with self._changed:
            self._waiting.append(own)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is own)
            except BaseException:
                self._waiting.remove(own)
                self._changed.notify_all()
                raise

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()


class Connection:
    """A client that tries again while the engine is away, and then says so in words.

    Calls to an embedded engine take turns: a write, or a search, while it seals what was written misses passages.
    """

    _users: collections.Counter[str] = collections.Counter()  # of each embedded engine in this process
    _turns: collections.defaultdict[str, Turns] = collections.defaultdict(Turns)  # of those too
    _lock = threading.Lock()

    def __init__(self, address: Address, patience: Patience) -> None:
        self.address, self.patience = address, patience
        self.pymilvus = _import_client(address)
        self._client: Any = None
        self._counted = 0  # 1: this connection is one of the users
        self._opening = threading.Lock()
        with self._lock:
            self._turn = self._turns[address.file] if address.file else contextlib.nullcontext()

    def call(self, name: str, **arguments: Any) -> Any:
        """The client's method ``name`` on the collection."""
        return self.try_again(lambda: self._call(name, **arguments))

    @functools.cached_property
    def is_lite(self) -> bool:
        """Whether the engine is the embedded build, in a file or behind a port."""
        return "lite" in self.try_again(lambda: self._connect().get_server_version(timeout=self.patience.call))

    def scan(self, condition: str, fields: Sequence[str], rows: int = 1000) -> Iterator[dict[str, Any]]:
        """Every row that meets ``condition``, a page at a time; begin again where it breaks off."""
        pages = self._call("query_iterator", filter=condition, output_fields=list(fields), batch_size=rows, limit=-1)
        while page := self._take_turn(pages.next):
            yield from page
        pages.close()

    def try_again(self, once: Callable[[], Any]) -> Any:
        """Every operation here may be repeated: writes replace by key, deletions name keys."""
        import grpc

        is_unloaded = False
        for pause in (*self.patience.pauses, None):
            try:
                if is_unloaded:
                    self._call("load_collection")
                return once()
            except (self.pymilvus.MilvusException, grpc.RpcError) as error:
                is_unloaded = bool(re.search("not loaded|'released'", str(error)))  # the engine was started again
                if is_unloaded and pause is not None:
                    continue
                if not self._is_away(error):
                    raise RuntimeError(self._explain_refusal(error)) from error
                self._drop()  # a client that failed once does not find a server that came back
                if pause is None:
                    raise RuntimeError(self._explain_absence()) from error
                self.patience.sleep(pause)

    def close(self) -> None:
        self._drop()
        file = self.address.file
        with self._lock:
            if file is None or not self._users[file]:
                return
            self._users[file] -= self._counted
            self._counted = 0
            if not self._users[file]:
                from milvus_lite.server_manager import server_manager_instance

                server_manager_instance.release_server(file)

    def _call(self, name: str, **arguments: Any) -> Any:
        method = getattr(self._connect(), name)
        return self._take_turn(method, collection_name=self.address.collection, timeout=self.patience.call, **arguments)

    def _take_turn(self, method: Callable[..., Any], **arguments: Any) -> Any:
        with self._turn:
            return method(**arguments)

    def _connect(self) -> Any:
        with self._opening:
            if self._client is None:
                with self._lock:
                    self._client = self.pymilvus.MilvusClient(
                        self.address.uri,
                        token=os.environ.get(TOKEN, ""),
                        timeout=self.patience.connect,
                        dedicated=True,
                    )
                    if self.address.file and not self._counted:
                        self._users[self.address.file] += 1
                        self._counted = 1
            return self._client

    def _drop(self) -> None:
        with self._opening:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    @staticmethod
    def _is_away(error: Exception) -> bool:
        code = error.code() if callable(error.code) else error.code
        said = f"{getattr(code, 'name', code)} {error}"
        return any(word in said for word in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "Fail connecting", "Retry timeout"))

    def _explain_absence(self) -> str:
        tries = len(self.patience.pauses) + 1
        return (
            f"Milvus at {self.address.place} does not answer ({tries} tries); start it or correct the URL, then run "
            "the same command again: nothing that was kept is lost"
        )

    def _explain_refusal(self, error: Exception) -> str:
        said = str(getattr(error, "message", None) or error).strip().splitlines()[0]
        if self.address.file and "Open local milvus failed" in said:
            return f"{self.address.file} cannot be opened: another process uses it, or it is no Milvus file"
        if any(word in said.lower() for word in ("auth", "token", "permission")):
            return f"Milvus at {self.address.place} refuses access ({said}); set {TOKEN}"
        return f"Milvus at {self.address.place} refused: {said}"


def _import_client(address: Address) -> Any:
    try:
        import pymilvus

        if address.file:
            import milvus_lite.server_manager  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{address.place} needs the extra for Milvus ({error}): pip install 'koret[milvus]'"
        ) from error
    for name in ("pymilvus", "milvus_lite", "grpc._server"):  # they write an error with its stack, then raise it
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return pymilvus
