"""Which documents a corpus holds: what pruning needs to know before it removes anything."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from koret.data.korquad import Reject
from koret.retrieval.corpus import Document
from koret.retrieval.postings import hash_text
from koret.retrieval.store import Store

_NUMBER = re.compile(r" \(\d+\)$")  # behind a title that came before


class Census:
    """The documents that went by, by 8 bytes of their ids; what could not be read was there all the same.

    A record that cannot be used keeps what the index holds of it: a file with one bad byte is no file removed. Where
    it has no id of its own, it stands for its title and every numbered one; where it has neither it may be any
    document, and then nothing is known to be gone: ``nameless`` is the first such record.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._unread: set[int] = set()
        self.nameless: Reject | None = None

    def watch(self, items: Iterable[Document | Reject]) -> Iterator[Document | Reject]:
        """The same items, noted as they pass."""
        for item in items:
            if isinstance(item, Document):
                self._seen.add(hash_text(item.id))
            elif item.is_article and (name := item.id or item.article):
                self._unread.add(hash_text(name))
            else:
                self.nameless = self.nameless or item
            yield item

    def find_gone(self, store: Store) -> tuple[list[str], int]:
        """The documents of an index that went by neither read nor unread, and the number of those unread."""
        gone, unread = [], 0
        for name in store.list_documents():
            if hash_text(name) in self._seen:
                continue
            if {hash_text(name), hash_text(_NUMBER.sub("", name))} & self._unread:
                unread += 1
            else:
                gone.append(name)
        return gone, unread
