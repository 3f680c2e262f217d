"""Two real processes build the index that one builds."""

from __future__ import annotations

import collections
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from koret.retrieval.distributed import build_shares
from koret.retrieval.folder import FolderStore
from koret.retrieval.processes import Process, choose_owner, find_process

SETTINGS = {"dtype": "float32", "lexical": ("bigram",), "passage_tokens": 64}


def write_corpus(path: Path, changed: str = "") -> Path:
    records = [
        {
            "id": f"문서 {i}",
            "title": f"제목 {i}",
            "text": f"{i}번째 문서는 {'가나다라마'[i % 5]} 이야기다. " * (1 + 7 * (i % 4)),
        }
        for i in range(24)
    ]
    records[3]["text"] += changed
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def launch(corpus: Path, out: str | Path, count: int = 2) -> list[dict]:
    """What each process of a launch says, as torchrun and accelerate would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(count):
        numbers = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        environment = {**os.environ, **numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, str(corpus), str(out)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return [json.loads(line.splitlines()[-1]) for line in said]


def read_all(store: FolderStore) -> dict[str, tuple]:
    kept = {}
    for entries, vectors in store.read_segments():
        kept.update({entry.id: (entry, vector) for entry, vector in zip(entries, vectors, strict=True)})
    return kept


def assert_equal(one: FolderStore, two: FolderStore) -> None:
    expected, found = read_all(one), read_all(two)
    assert {key: entry for key, (entry, _) in found.items()} == {key: entry for key, (entry, _) in expected.items()}
    for key, (_, vector) in found.items():
        np.testing.assert_allclose(vector, expected[key][1], rtol=0, atol=2e-7)


@pytest.mark.slow
def test_two_processes_build_what_one_builds(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    alone = build_shares("offline", corpus, tmp_path / "one", **SETTINGS)
    first, second = launch(corpus, tmp_path / "two")
    assert second is None
    assert first["encoded"] == alone.report.encoded and first["added"] == 24
    assert_equal(alone.store, FolderStore.open(tmp_path / "two"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "one", "two"]
    queries = ["가 이야기", "3번째 문서"]
    together = FolderStore.open(tmp_path / "two").search_lexical(queries, 5)
    assert together == alone.store.search_lexical(queries, 5)

    # leftovers of a killed launch are taken in, and only what changed is encoded
    changed = write_corpus(tmp_path / "corpus.jsonl", "새 문장이 하나 더 있다.")
    share = FolderStore.create(tmp_path / "two.share-5", {**alone.store.info, "lexical": []}, 384)
    gone, vectors = next(alone.store.read_segments())
    chosen = [i for i, entry in enumerate(gone) if entry.document == "문서 7"]
    share.add([gone[i] for i in chosen], vectors[chosen])
    share.close()
    first, _ = launch(changed, tmp_path / "two")
    assert (first["changed"], first["added"], first["unchanged"]) == (1, 0, 23)
    alone.close()
    again = build_shares("offline", changed, tmp_path / "one", **SETTINGS)
    assert_equal(again.store, FolderStore.open(tmp_path / "two"))


@pytest.mark.slow
def test_two_processes_fill_a_database(tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite")
    from test_milvus import start_server

    from koret.retrieval.milvus import MilvusStore

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_server(tmp_path, port)
    try:
        corpus = write_corpus(tmp_path / "corpus.jsonl")
        first, _ = launch(corpus, url := f"milvus://127.0.0.1:{port}/shared")
        alone = build_shares("offline", corpus, tmp_path / "one", **SETTINGS)
        store = MilvusStore.open(url)
        queries = alone.encoder.encode(["가 이야기", "3번째 문서"], "query")
        for found, expected in zip(store.search(queries, 50), alone.store.search(queries, 50), strict=True):
            np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=0, atol=1e-5)
            assert sorted(e.id for e, _ in found) == sorted(e.id for e, _ in expected)
        assert first["encoded"] == store.count() == alone.count()
        words = ["가 이야기", "3번째 문서"]
        assert store.search_lexical(words, 50) == alone.store.search_lexical(words, 50)
    finally:
        server.kill()
        server.wait()


def test_every_document_has_one_owner() -> None:
    owners = [choose_owner(f"문서 {i}", 4) for i in range(4000)]
    counts = collections.Counter(owners)
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 900
    assert owners[:5] == [choose_owner(f"문서 {i}", 4) for i in range(5)]
    assert sum(Process(rank, 3).owns("문서 1") for rank in range(3)) == 1


def test_reads_the_launchers_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert find_process() == Process(0, 1, 0, 1)
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(ValueError, match="RANK=5 and WORLD_SIZE=1"):
        find_process()
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_process() == Process(5, 8, 1, 2)
    with pytest.raises(ValueError, match="serves one process"):
        build_shares("offline", "corpus.jsonl", "milvus:x.db")


if __name__ == "__main__":
    import msgspec
    import torch

    torch.set_num_threads(1)
    built = build_shares("offline", *sys.argv[1:], **SETTINGS)
    print(json.dumps(built and msgspec.to_builtins(built.report)))
