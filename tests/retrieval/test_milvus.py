"""Against the real engine: its embedded build, and the same build as a server of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from koret.retrieval.folder import FolderStore
from koret.retrieval.milvus import MilvusStore
from koret.retrieval.milvus_connection import Patience, parse_url
from koret.retrieval.milvus_rows import translate
from koret.retrieval.store import Condition, Entry

pytest.importorskip("milvus_lite")

INFO = {"dtype": "float16", "lexical": [], "encoder": "한국어 '모델'"}
AWKWARD = "문서 '\"\\ {x}\n\x01%"
SIZE = 8


def make_vectors(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, SIZE)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_document(name: str, count: int, version: str = "1") -> list[Entry]:
    return [Entry(f"{name}#{i}", name, f"제목 > {i}", f"본문 {i}", version) for i in range(1, count + 1)]


def make_corpus() -> tuple[list[Entry], np.ndarray]:
    """60 passages of 20 documents, many of equal vectors, with metadata of every kind."""
    entries = []
    for i in range(60):
        document = f"{AWKWARD}{i // 3}"
        metadata: dict = {"종류": ("가", '나"\\', "b\n")[i % 3]} if i % 4 else {}
        if i % 2:
            metadata["year"] = 1990 + i % 30
        if i % 5 == 0:
            metadata["year"] = "text"
        if i % 7 == 0:
            metadata['a"]b.c ['] = i % 2 == 0
        if i % 6 == 0:
            metadata["f"] = -1.5e-7 * i
        if i % 20 == 0:
            metadata["f"] = float("nan")
        if i % 20 == 1:
            metadata["f"] = 2**70
        metadata |= {"document": "not the key"} if i % 10 == 0 else {}
        entries.append(Entry(f"{document}#{i % 3 + 1}", document, f"제목 > {i % 4}", "본문 " * (i + 1), "1", metadata))
    return entries, make_vectors(25)[np.random.default_rng(1).integers(0, 25, 60)]


def show(entry: Entry) -> str:
    """Everything in it, NaN too, whatever the order of its metadata."""
    return f"{entry.id} {entry.document} {entry.heading} {entry.text} {entry.version} {sorted(entry.metadata.items())}"


VALUES = (2000, 1, True, 0.0, -3e-6, 1e30, 2**71, "가", '나"\\', "text", "b\n", "제목 > 1", f"{AWKWARD}1")
KEYS = ("year", "종류", 'a"]b.c [', "f", "absent", "document", "heading")


def test_finds_what_the_folder_index_finds(url: str, tmp_path: Path) -> None:
    entries, vectors = make_corpus()
    stores = [MilvusStore.create(url, INFO, SIZE), FolderStore.create(tmp_path / "index", INFO, SIZE)]
    for store in stores:
        store.add(entries, vectors)
    queries = make_vectors(3, seed=2)
    conditions = [[Condition(key, sign, value)] for key in KEYS for sign in ("=", "!=", "<", ">=") for value in VALUES]
    rng = np.random.default_rng(3)
    chosen = [conditions[i] for i in rng.permutation(len(conditions))[:120]]
    chosen += [[Condition('a"]b.c [', sign, value)] for sign in ("=", "!=", "<", ">=") for value in (True, False, 1, 2)]
    chosen += [[], [Condition("year", ">=", 1995), Condition("종류", "!=", "가")], [Condition("year", "=", 1)]]
    nothing = 0
    for where in chosen:
        theirs, ours = (store.search(queries, 5, where) for store in stores)
        nothing += not ours[0]
        for found, expected in zip(theirs, ours, strict=True):
            assert [show(entry) for entry, _ in found] == [show(entry) for entry, _ in expected], where
            np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=0, atol=1e-6)
    assert 10 < nothing < 100  # both answers were asked for
    assert sorted(stores[0].list_documents()) == sorted({entry.document for entry in entries})
    assert stores[0].read_document(entries[0].document)[1] == entries[1]
    for store in stores:
        store.close()


def test_orders_ties_by_id_however_many(url: str) -> None:
    store = MilvusStore.create(url, INFO, SIZE)
    entries = make_document("d", 150)
    store.add(entries, np.repeat(make_vectors(1), 150, axis=0))
    (found,) = store.search(make_vectors(1), 5)
    assert [entry.id for entry, _ in found] == sorted(entry.id for entry in entries)[:5]
    assert len(store.search(make_vectors(1), 500)[0]) == 150


def test_replaces_deletes_and_counts(url: str) -> None:
    store = MilvusStore.create(url, INFO, SIZE)
    entries = make_document(AWKWARD, 4) + make_document("b", 2)
    store.add(entries, make_vectors(6))
    store.add(make_document(AWKWARD, 3, "2"), make_vectors(3, seed=4))
    assert store.count() == 5
    assert store.find_versions([AWKWARD, "b", "c"]) == ["2", "1", None]
    (found,) = store.search(make_vectors(3, seed=4)[1:2], 1)
    assert found[0][0] == make_document(AWKWARD, 3, "2")[1] and found[0][1] == pytest.approx(1, abs=1e-3)
    assert store.delete([AWKWARD, "c"]) == 3
    assert (store.count(), list(store.list_documents()), store.delete([])) == (2, ["b"], 0)
    store.close()
    reopened = MilvusStore.open(url)
    assert reopened.info | INFO == reopened.info and reopened.info["dimensions"] == SIZE
    assert (reopened.count(), reopened.find_versions(["b"])) == (2, ["1"])
    reopened.close()


def test_half_written_document_has_no_version(url: str) -> None:
    store = MilvusStore.create(url, INFO, SIZE)
    store.add(make_document("d", 3) + make_document("e", 1), make_vectors(4))
    half = next(store._connection.scan('document == "d" and number == 2', ["key"]))["key"]
    store._connection.call("delete", ids=[half])
    assert store.find_versions(["d", "e"]) == [None, "1"]
    store.add(make_document("d", 3), make_vectors(3))
    assert store.find_versions(["d"]) == ["1"]


def test_document_half_deleted_is_still_listed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MilvusStore.create(url, INFO, SIZE)
    store.add(make_document("d", 3), make_vectors(3))
    monkeypatch.setattr("koret.retrieval.milvus.ROWS", 1)
    call, calls = store._connection.call, []

    def break_off(name: str, **options: object) -> object:
        calls.append(name)
        if calls.count("delete") == 3:
            raise KeyboardInterrupt
        return call(name, **options)

    monkeypatch.setattr(store._connection, "call", break_off)
    with pytest.raises(KeyboardInterrupt):
        store.delete(["d"])
    monkeypatch.setattr(store._connection, "call", call)
    assert (store.count(), list(store.list_documents())) == (1, ["d"])
    assert (store.delete(["d"]), store.count()) == (1, 0)


def test_refuses_what_does_not_fit(url: str) -> None:
    store = MilvusStore.create(url, INFO, SIZE)
    long = Entry("d#1", "d", "", "가" * 30_000, "1")
    with pytest.raises(ValueError, match="text of 'd#1' takes 90,000 bytes"):
        store.add([*make_document("e", 1), long], make_vectors(2))
    with pytest.raises(ValueError, match="same id"):
        store.add(make_document("e", 1) * 2, make_vectors(2))
    for vectors in (make_vectors(2), make_vectors(1) * np.nan, make_vectors(1) * 2):
        with pytest.raises(ValueError, match="vectors"):
            store.add(make_document("e", 1), vectors)
    assert store.count() == 0
    with pytest.raises(ValueError, match="k must"):
        store.search(make_vectors(1), 0)
    with pytest.raises(ValueError, match="exists"):
        MilvusStore.create(url, INFO, SIZE)


def test_opens_only_its_own(database: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="koret index"):
        MilvusStore.open(f"milvus:{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(FileNotFoundError, match="'nothing'"):
        MilvusStore.open(f"{database}?collection=nothing")
    store = MilvusStore.create(f"{database}?collection=own", INFO, SIZE)
    store._connection._connect().create_collection("foreign", dimension=SIZE)
    with pytest.raises(ValueError, match="did not make"):
        MilvusStore.open(f"{database}?collection=foreign")


def test_approximate_index_still_scores_exactly(database: str) -> None:
    url = f"{database}?collection=graph&index=hnsw"
    store = MilvusStore.create(url, INFO, SIZE)
    entries, vectors = make_corpus()
    store.add(entries, vectors)
    rounded = vectors.astype(np.float16).astype(np.float64)
    (found,) = store.search(make_vectors(1, seed=2), 5)
    expected = np.sort(rounded @ make_vectors(1, seed=2)[0].astype(np.float64))[::-1][:5]
    np.testing.assert_allclose([score for _, score in found], expected, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "uri", "collection"),
    [
        ("milvus://db:1/papers", "http://db:1", "papers"),
        ("milvus+https://db/papers", "https://db:19530", "papers"),
        ("milvus://[::1]:5", "http://[::1]:5", "koret"),
        ("milvus:///data/x y.db?collection=c", "/data/x y.db", "c"),
        ("milvus:x.db", str(Path("x.db").absolute()), "koret"),
    ],
)
def test_reads_urls(text: str, uri: str, collection: str) -> None:
    assert parse_url(text)[:2] == (uri, collection)


@pytest.mark.parametrize(
    "text",
    ["milvus:", "milvus://", "http://db/x", "milvus://db/a/b", "milvus://u:p@db/x", "milvus:folder", "milvus://db:x/y",
     "milvus://db/a-b", "milvus://db/a?index=NONE", "milvus://db/a?token=secret", "milvus+https:x.db"],
)  # fmt: skip
def test_names_urls_it_cannot_read(text: str) -> None:
    with pytest.raises(ValueError, match="milvus://|collection name|index"):
        parse_url(text)


def test_conditions_are_quoted() -> None:
    text = translate([Condition('k" or true', "=", '" or ""=="\\')])
    assert text.endswith(r'values["tk%22;%20;or%20;true"] == "\" or \"\"==\"\\")')
    assert translate([Condition("a", "!=", True)]) == '(not (exists values["ba"] and values["ba"] == 1))'


def test_says_that_nothing_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pauses: list[float] = []
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"127.0.0.1:{port} does not answer \(3 tries\).*nothing that was kept"):
        MilvusStore.open(f"milvus://127.0.0.1:{port}/x", patience=Patience(0.3, 0.3, (0.5, 2.0), pauses.append))
    assert pauses == [0.5, 2.0]
    assert time.monotonic() - start < 20


def test_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(RuntimeError, match=r"pip install 'koret\[milvus\]'"):
        MilvusStore.create("milvus://127.0.0.1:1/x", INFO, SIZE)


# ---- crashes, in processes of their own


@pytest.mark.slow
def test_kill_loses_nothing_acknowledged(tmp_path: Path) -> None:
    url = f"milvus:{tmp_path}/killed.db"
    MilvusStore.create(url, INFO | {"lexical": ["bigram"]}, SIZE).close()
    kept: set[str] = set()
    for round_ in range(5):
        writer = subprocess.Popen([sys.executable, __file__, url, str(round_)], stdout=subprocess.PIPE, text=True)
        said = [writer.stdout.readline().strip() for _ in range(3 + 4 * round_)]
        os.kill(writer.pid, signal.SIGKILL)
        kept.update(said, writer.stdout.read().split())
        writer.wait()
        store = MilvusStore.open(url)
        names = sorted(kept)
        assert store.find_versions(names) == ["1"] * len(names)
        for name in names:
            assert store.read_document(name) == make_document(name, 50)
        folder = FolderStore.create(tmp_path / f"folder{round_}", store.info, SIZE)
        entries = [entry for name in store.list_documents() for entry in store.read_document(name)]
        folder.add(entries, make_vectors(len(entries)))
        assert store.search_lexical(["본문 7", "제목"], 20) == folder.search_lexical(["본문 7", "제목"], 20)
        store.close()
    assert len(kept) >= 50


@pytest.mark.slow
def test_second_process_is_told(tmp_path: Path) -> None:
    url = f"milvus:{tmp_path}/held.db"
    store = MilvusStore.create(url, INFO, SIZE)
    code = f"from koret.retrieval.milvus import MilvusStore; MilvusStore.open({url!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process uses it" in other.stderr
    store.close()


@pytest.mark.slow
def test_server_goes_away_and_comes_back(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"milvus://127.0.0.1:{port}/served"
    server = start_server(tmp_path, port)
    try:
        store = MilvusStore.create(url, INFO, SIZE)
        store.add(make_document("a", 60), make_vectors(60))
        server.send_signal(signal.SIGKILL)
        server.wait()
        impatient = Patience(0.5, 1.0, (0.1,))
        store._connection.patience = impatient
        with pytest.raises(RuntimeError, match="does not answer"):
            store.add(make_document("b", 2), make_vectors(2))
        with pytest.raises(RuntimeError, match="does not answer"):
            store.search(make_vectors(1), 1)
        store._connection.patience = Patience(sleep=lambda _: None, call=20.0)
        server = start_server(tmp_path, port)
        store.add(make_document("b", 2), make_vectors(2))
        assert (store.count(), store.find_versions(["a", "b"])) == (62, ["1", "1"])
        assert store.search(make_vectors(1), 1)[0][0][0].id in ("a#1", "b#1")
        assert MilvusStore.open(url).count() == 62
    finally:
        server.kill()
        server.wait()


def start_server(folder: Path, port: int) -> subprocess.Popen:
    """The embedded engine behind a port of its own, as `milvus-lite server` starts it."""
    options = ["server", "--data-dir", str(folder / "served"), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-m", "milvus_lite", *options], stdout=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return server
        time.sleep(0.1)
    raise AssertionError("the server did not start")


if __name__ == "__main__":  # the writer that is killed: adds documents for ever, saying each once it is kept
    target = MilvusStore.open(sys.argv[1])
    for number in range(10**6):
        document = f"{sys.argv[2]}-{number}"
        target.add(make_document(document, 50), make_vectors(50))
        print(document, flush=True)
